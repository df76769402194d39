//! Reading every byte: headers, names, blocks, whole tensors, and what tables must add up to.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use crate::checksum::{crc32c, halves};
use crate::disk::Disk;
use crate::error::{Error, Place, Result};
use crate::layout::{Plan, Region, Tensor};
use crate::manifest::Entry;
use crate::shard::{Shard, length};
use crate::side::Side;
use crate::store::{Store, View};

/// Bytes read at a time.
const READ_BYTES: u64 = 1 << 20;
/// The time between reports of progress.
const PROGRESS_EVERY: Duration = Duration::from_millis(50);
/// Stores up to this size are verified in a few milliseconds.
const SMALL_BYTES: u64 = 64 << 20;

/// More threads than this only get in each other's way.
const MAX_THREADS: usize = 256;

/// One damaged place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Damage {
    /// Where.
    pub place: Place,
    /// What is wrong.
    pub found: String,
}

/// One piece of work: a shard's header and tables, or one of its tensors.
struct Task {
    shard: usize,
    region: Option<usize>,
}

struct Work<'a> {
    disk: &'a dyn Disk,
    view: &'a View,
    next: AtomicUsize,
    tasks: Vec<Task>,
    done_bytes: AtomicU64,
    stop: AtomicBool,
    damages: Mutex<Vec<Damage>>,
    failure: Mutex<Option<Error>>,
    missing_is_damage: bool,
}

impl Store {
    /// Reads every byte of every shard and returns what is damaged, in the order of the store.
    ///
    /// `progress` is called from this thread with the bytes done and the bytes in all; it stops
    /// the work by returning `false`.
    ///
    /// # Errors
    ///
    /// [`Error::Io`] where a disk cannot be read; [`Error::Closed`] where `progress` stopped it.
    pub fn verify(
        &self,
        threads: usize,
        progress: &mut dyn FnMut(u64, u64) -> bool,
    ) -> Result<Vec<Damage>> {
        let progress = std::cell::RefCell::new(progress);
        let attempt = |missing_is_damage: bool| {
            self.with_view(|view| {
                let mut progress = progress.borrow_mut();
                let rows = self.rows();
                verify(self.disk(), view, rows, threads, missing_is_damage, &mut **progress)
            })
        };
        // A missing file may only mean a newer version; missing from the newest, it is damage.
        match attempt(false) {
            Err(Error::Missing { .. }) => attempt(true),
            other => other,
        }
    }
}

fn verify(
    disk: &dyn Disk,
    view: &View,
    rows: u64,
    threads: usize,
    missing_is_damage: bool,
    progress: &mut dyn FnMut(u64, u64) -> bool,
) -> Result<Vec<Damage>> {
    let plan = &view.manifest.plan;
    let mut tasks = Vec::new();
    let mut total = 0u64;
    // A writer may replace the short shards, and the last full one, at any moment: they come first,
    // so that one that is gone costs a moment and not the whole work again.
    let stable = view.manifest.full_shards().saturating_sub(1);
    let shards = || view.manifest.shards.iter().enumerate();
    for (shard, entry) in shards().skip(stable).chain(shards().take(stable)) {
        if view.starts.get(shard).is_some_and(|start| start.row >= rows && entry.rows > 0) {
            continue;
        }
        tasks.push(Task { shard, region: None });
        let Ok(layout) = plan.layout(&entry.size()) else {
            continue; // the task above reports it
        };
        for (region, found) in layout.checked().enumerate() {
            total = total.saturating_add(found.bytes);
            tasks.push(Task { shard, region: Some(region) });
        }
    }
    let work = Work {
        disk,
        view,
        next: AtomicUsize::new(0),
        tasks,
        done_bytes: AtomicU64::new(0),
        stop: AtomicBool::new(false),
        damages: Mutex::default(),
        failure: Mutex::default(),
        missing_is_damage,
    };
    let available = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let threads = if threads == 0 { available } else { threads.min(MAX_THREADS) };
    let stopped = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(|| work.run())).collect();
        let mut go_on = true;
        // Short for small stores, so that the last sleep does not dominate.
        let pause = if total > SMALL_BYTES { PROGRESS_EVERY } else { PROGRESS_EVERY / 500 };
        while workers.iter().any(|worker| !worker.is_finished()) {
            std::thread::sleep(pause);
            if go_on && !progress(work.done_bytes.load(Ordering::Relaxed), total) {
                go_on = false;
                work.stop.store(true, Ordering::Relaxed);
            }
        }
        !go_on
    });
    if stopped {
        return Err(Error::Closed { reason: String::from("verifying was stopped") });
    }
    if let Some(failure) = work.failure.into_inner().unwrap_or_else(PoisonError::into_inner) {
        return Err(failure);
    }
    progress(total, total);
    let mut damages = work.damages.into_inner().unwrap_or_else(PoisonError::into_inner);
    damages.sort_by(|first, second| {
        (first.place.rows, &first.place.site).cmp(&(second.place.rows, &second.place.site))
    });
    damages.dedup();
    Ok(damages)
}

impl Work<'_> {
    fn run(&self) {
        // The shard of the last task stays open: tasks of one shard follow each other.
        let mut open: Option<(usize, Arc<Shard>)> = None;
        let mut broken: BTreeSet<usize> = BTreeSet::new();
        while !self.stop.load(Ordering::Relaxed) {
            let Some(task) = self.tasks.get(self.next.fetch_add(1, Ordering::Relaxed)) else {
                return;
            };
            if broken.contains(&task.shard) {
                continue;
            }
            let shard = match &open {
                Some((index, shard)) if *index == task.shard => Ok(Arc::clone(shard)),
                _ => self.open(task.shard).map(Arc::new),
            };
            let result = shard.and_then(|shard| {
                open = Some((task.shard, Arc::clone(&shard)));
                match task.region {
                    None => self.check_tables(&shard),
                    Some(index) => self.check_region(&shard, index),
                }
            });
            match result {
                Ok(()) => {}
                Err(Error::Damaged { place, found }) => {
                    broken.insert(task.shard);
                    self.report(*place, found);
                }
                Err(Error::Missing { place, .. }) if self.missing_is_damage => {
                    broken.insert(task.shard);
                    self.report(*place, String::from("the file is not there"));
                }
                Err(error) if is_unreadable(&error) => {
                    broken.insert(task.shard);
                    if let Some(entry) = self.view.manifest.shards.get(task.shard) {
                        let start = self.view.starts.get(task.shard).copied().unwrap_or_default();
                        let rows = (0, entry.rows);
                        let place = crate::shard::place(entry, start, "whole file", rows);
                        self.report(place, error.to_string());
                    }
                }
                Err(error) => {
                    self.stop.store(true, Ordering::Relaxed);
                    let mut failure = self.failure.lock().unwrap_or_else(PoisonError::into_inner);
                    failure.get_or_insert(error);
                }
            }
        }
    }

    fn open(&self, index: usize) -> Result<Shard> {
        let plan: &Arc<Plan> = &self.view.manifest.plan;
        let entry = self.view.manifest.shards.get(index);
        let start = self.view.starts.get(index).copied().unwrap_or_default();
        entry.map_or_else(
            || Err(Error::Closed { reason: String::from("a shard that is not there") }),
            |entry| Shard::open(self.disk, plan, entry, start),
        )
    }

    fn report(&self, place: Place, found: String) {
        let mut damages = self.damages.lock().unwrap_or_else(PoisonError::into_inner);
        damages.push(Damage { place, found });
    }

    /// Checks that the header is the canonical one and that the tables add up.
    fn check_tables(&self, shard: &Shard) -> Result<()> {
        let whole = |site: &str, found: String| {
            let rows = (0, shard.entry().rows);
            self.report(crate::shard::place(shard.entry(), shard.start(), site, rows), found);
        };
        if !shard.header_is_canonical()? {
            whole("header", String::from("it is not the header that the manifest's numbers give"));
        }
        let prompts = shard.side_u64(Side::PromptRows);
        let lengths = shard.side_u64(Side::PromptLength);
        // Damaged blocks are reported by the tensors' own tasks.
        let (Ok(rows), Ok(lengths)) = (prompts, lengths) else {
            return Ok(());
        };
        let Entry { head, rows: own, ids, text_bytes, .. } = *shard.entry();
        let sum =
            |values: &[u64]| values.iter().try_fold(0u64, |sum, &value| sum.checked_add(value));
        if sum(&lengths) != Some(ids) {
            whole("#prompt.length", format!("its sum is not the {ids} ids of the shard"));
        }
        if shard.layout().side(Side::PromptTextLength).is_some()
            && let Ok(texts) = shard.side_u64(Side::PromptTextLength)
            && sum(&texts) != Some(text_bytes)
        {
            let found = format!("its sum is not the {text_bytes} bytes of text of the shard");
            whole("#prompt.text_length", found);
        }
        let starts_within = sum(&rows).and_then(|sum| sum.checked_add(head));
        if starts_within.is_none_or(|covered| covered < own) {
            whole("#prompt.rows", format!("its prompts do not cover the {own} rows of the shard"));
        }
        Ok(())
    }

    fn check_region(&self, shard: &Shard, index: usize) -> Result<()> {
        // What is checked comes first among the regions.
        let Some(region) = shard.layout().regions.get(index).copied() else {
            return Ok(());
        };
        let mut hash = xxhash_rust::xxh3::Xxh3::new();
        let mut buffer = Vec::new();
        let blocks_at_once = (READ_BYTES / region.block_bytes).max(1);
        let (mut block, blocks) = (0, region.blocks());
        let mut intact = true;
        while block < blocks && !self.stop.load(Ordering::Relaxed) {
            let upto = blocks.min(block + blocks_at_once);
            let begin = block * region.block_bytes;
            let end = region.bytes.min(upto * region.block_bytes);
            buffer.resize(length(end - begin), 0);
            match shard.read_raw(&region, begin, &mut buffer) {
                Err(error) if is_unreadable(&error) => {
                    self.find_unreadable(shard, &region, (block, upto))?;
                    intact = false;
                    block = upto;
                    continue;
                }
                other => other?,
            }
            hash.update(&buffer);
            for (bytes, index) in buffer.chunks(length(region.block_bytes)).zip(block..) {
                let found = crc32c(0, bytes);
                if Some(found) != shard.crc(&region, index) {
                    intact = false;
                    let recorded = shard.crc(&region, index).unwrap_or(0);
                    self.report(
                        shard.block_place(&region, index),
                        format!(
                            "block {index} has the checksum {found:08x}, recorded is {recorded:08x}"
                        ),
                    );
                }
            }
            self.done_bytes.fetch_add(end - begin, Ordering::Relaxed);
            block = upto;
        }
        if intact && block == blocks {
            self.check_whole(shard, &region, index, halves(hash.digest128()));
        }
        Ok(())
    }

    /// Reports which of some blocks, not all of which can be read, are damaged or unreadable.
    fn find_unreadable(&self, shard: &Shard, region: &Region, blocks: (u64, u64)) -> Result<()> {
        for block in blocks.0..blocks.1 {
            let begin = block * region.block_bytes;
            let end = region.bytes.min(begin + region.block_bytes);
            let mut buffer = vec![0; length(end - begin)];
            match shard.read_block(region, block, &mut buffer) {
                Ok(()) => {}
                Err(Error::Damaged { place, found }) => self.report(*place, found),
                Err(error) if is_unreadable(&error) => {
                    self.report(shard.block_place(region, block), error.to_string());
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn check_whole(&self, shard: &Shard, region: &Region, index: usize, found: [u64; 2]) {
        if shard.xxh3(index) == Some(found) {
            return;
        }
        let rows = match region.tensor {
            Tensor::Pad(_) => (0, 0),
            Tensor::Site(_) | Tensor::Side(_) => (0, shard.entry().rows),
        };
        let place =
            crate::shard::place(shard.entry(), shard.start(), &shard.region_name(region), rows);
        self.report(
            place,
            String::from("its XXH3-128 differs although every block's CRC32C agrees"),
        );
    }
}

/// Returns whether the disk cannot give these bytes any more: damage, as far as a store goes.
fn is_unreadable(error: &Error) -> bool {
    error.errno() == Some(rustix::io::Errno::IO.raw_os_error())
}
