//! Random captures.

use crate::support::Job;

/// A small generator of numbers (splitmix64), so that a seed says everything.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// Returns a number below `limit`, which is not zero.
    pub(crate) fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    pub(crate) fn index(&mut self, limit: usize) -> usize {
        usize::try_from(self.below(limit as u64)).unwrap()
    }

    pub(crate) fn chance(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }

    pub(crate) fn pick<T: Copy>(&mut self, values: &[T]) -> T {
        values[self.index(values.len())]
    }
}

/// Returns a capture of random windows: prompts longer than a shard, without rows, none.
pub(crate) fn job(random: &mut Random, windows: usize) -> Job {
    let rows = random.pick(&[2, 4, 16]);
    let windows: Vec<Vec<(u64, u64)>> = (0..windows)
        .map(|_| {
            (0..random.below(4))
                .map(|_| {
                    let length = random.pick(&[1, 1, 2, rows / 2, rows, 2 * rows + 1]);
                    let some = random.below(length + 1);
                    (random.pick(&[0, length, length, some]), length)
                })
                .collect()
        })
        .collect();
    let mut job = Job::new(&windows, rows);
    job.total = random.chance(50);
    job.texts = random.chance(50);
    job
}
