//! The disk stops, or fails once, at every operation in turn.

use std::collections::BTreeMap;

use crate::record::{Change, Failure, Log, Recorder};
use crate::run::{Course, Progress};
use crate::support::{Job, Random, folder};

/// Captures with a disk that fails as `failure` says, in the second of two runs if the first is
/// closed after `first` windows; then the store is examined and the capture is run to its end.
fn survive(job: &Job, names: &[String], first: usize, course: &Course, failure: Failure) -> bool {
    let directory = folder();
    let log = Log::over(BTreeMap::new());
    if first > 0 {
        let closed = course.clone().closed_after(first);
        closed.run(&Recorder::over(directory.path(), &log), &log, job).unwrap();
    }
    log.fail(failure);
    let result = course.run(&Recorder::over(directory.path(), &log), &log, job);
    let operations = log.operations();
    log.fail(Failure::Never);
    let changes = log.changes();
    let progress = Progress::of(&changes);
    let progress = progress.examine(directory.path(), job).unwrap_or_else(|error| {
        panic!("{failure:?} after {first} windows: {error}");
    });
    let found = course.run(&Recorder::over(directory.path(), &log), &log, job).unwrap();
    assert_eq!(found, names, "{failure:?} after {first} windows");
    progress.examine(directory.path(), job).err();
    Progress::of(&log.changes()).examine(directory.path(), job).unwrap();
    let left = std::fs::read_dir(directory.path().join("shards")).unwrap().count();
    assert!(left <= 3 * names.len() + 8, "{failure:?}: {left} files are left in shards/");
    assert!(result.is_err() || failure_is_past(failure, operations));
    result.is_err()
}

fn failure_is_past(failure: Failure, operations: usize) -> bool {
    match failure {
        Failure::Never => true,
        Failure::Stop(at) | Failure::Once(at) => at >= operations,
    }
}
