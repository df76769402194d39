//! Random captures against what they are made of: the commits leave no trace in the shards.

use proptest::prelude::*;

use crate::support::{Job, disk, folder, shard_names};

/// Prompts as (rows, tokens).
fn windows() -> impl Strategy<Value = Vec<Vec<(u64, u64)>>> {
    let prompt = prop_oneof![1u64..4, 4u64..40, 100u64..150].prop_flat_map(|length| {
        prop_oneof![Just((length, length)), (0..=length).prop_map(move |rows| (rows, length))]
    });
    prop::collection::vec(prop::collection::vec(prompt, 0..5), 1..7)
}

/// What follows a window.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Then {
    GoOn,
    Commit,
    /// The writer ends here, and what was not committed is done again.
    Die,
}

fn courses() -> impl Strategy<Value = Vec<Then>> {
    let then = prop_oneof![Just(Then::GoOn), Just(Then::Commit), Just(Then::Die)];
    prop::collection::vec(then, 7)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 150, ..ProptestConfig::default() })]

    #[test]
    fn any_course_of_commits_and_resumes_ends_with_the_same_shards(
        windows in windows(),
        course in courses(),
        power in 0u32..8,
        total: bool,
        texts: bool,
    ) {
        let mut job = Job::new(&windows, 1 << power);
        (job.total, job.texts) = (total, texts);
        let directory = folder();
        let disk = disk(directory.path());
        let mut writer = job.begin(&disk).unwrap();
        let mut course = course.into_iter();
        let mut window = 0;
        while window < windows.len() {
            job.append_all(&mut writer, window, window + 1);
            window += 1;
            match course.next() {
                Some(Then::Commit) => {
                    writer.commit().unwrap();
                    job.check(directory.path(), window);
                }
                Some(Then::Die) => {
                    drop(writer);
                    writer = job.resume(&disk).unwrap();
                    window = usize::try_from(writer.manifest().windows).unwrap();
                    job.check(directory.path(), window);
                }
                Some(Then::GoOn) | None => {}
            }
        }
        writer.finish().unwrap();
        job.check(directory.path(), windows.len());
        prop_assert_eq!(shard_names(writer.manifest()), job.names());
        let shards = &writer.manifest().shards;
        let full = 1u64 << power;
        prop_assert!(shards.iter().rev().skip(1).all(|shard| shard.rows == full));
    }

    #[test]
    fn a_complete_store_goes_on_as_if_it_had_never_ended(
        windows in windows(),
        cut in 0usize..7,
        power in 0u32..6,
    ) {
        let job = Job::new(&windows, 1 << power);
        let cut = cut.min(windows.len());
        let directory = folder();
        let disk = disk(directory.path());
        let mut writer = job.begin(&disk).unwrap();
        job.append_all(&mut writer, 0, cut);
        writer.finish().unwrap();
        job.check(directory.path(), cut);
        drop(writer);
        let mut writer = job.resume(&disk).unwrap();
        job.append_all(&mut writer, cut, windows.len());
        writer.finish().unwrap();
        job.check(directory.path(), windows.len());
        prop_assert_eq!(shard_names(writer.manifest()), job.names());
    }
}
