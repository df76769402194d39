//! The disk stops, or fails once, at every operation in turn.

use std::collections::BTreeMap;
use std::path::Path;

use crate::random::{self, Random};
use crate::record::{Failure, Log, Recorder};
use crate::run::{Course, Progress};
use crate::support::{Job, folder};

/// Captures with a disk that fails as `failure` says, after a first run that was closed after
/// `first` windows; then the store is examined and the capture is run to its end. Returns whether
/// the failure was met at all.
fn survives(
    job: &Job,
    names: &[String],
    first: usize,
    course: &Course,
    failure: Failure,
) -> Result<bool, String> {
    let directory = folder();
    let path = directory.path();
    let log = Log::over(BTreeMap::new());
    let run = |course: &Course| course.run(&Recorder::over(path, &log), &log, job);
    if first > 0 {
        run(&course.clone().closed_after(first)).map_err(|error| error.to_string())?;
    }
    log.fail(failure);
    let was_met = run(course).is_err();
    let syncs = log.syncs_after_failure();
    if syncs > 0 {
        return Err(format!("{syncs} fsyncs were tried after the failure"));
    }
    log.fail(Failure::Never);
    Progress::of(&log.changes()).examine(path, job)?;
    let found = run(course).map_err(|error| format!("cannot be resumed: {error}"))?;
    if found != names {
        return Err(format!("it ended with {found:?}, not {names:?}"));
    }
    Progress::of(&log.changes()).examine(path, job)?;
    match left_over(path, names.len()) {
        0 => Ok(was_met),
        left => Err(format!("{left} files too many are left in shards/")),
    }
}

/// Files in `shards/` beyond those that two versions can name.
fn left_over(path: &Path, shards: usize) -> usize {
    let names = std::fs::read_dir(path.join("shards")).unwrap();
    let names: Vec<String> =
        names.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    let parts = names.iter().filter_map(|name| name.strip_suffix(".part")).count();
    parts + names.len().saturating_sub(2 * shards + 8)
}

fn at_every_operation(seed: u64, windows: usize, failure: impl Fn(usize) -> Failure) {
    let mut random = Random(seed);
    let job = random::job(&mut random, windows);
    let names = job.names();
    let course = Course::random(&mut random, &job);
    let first = random.index(windows);
    let (mut operation, mut unmet) = (0, 0);
    while unmet < 3 {
        let was_met = survives(&job, &names, first, &course, failure(operation))
            .unwrap_or_else(|error| panic!("seed {seed}, operation {operation}: {error}"));
        unmet = if was_met { 0 } else { unmet + 1 };
        operation += 1;
    }
    assert!(operation > 20);
}

#[test]
fn a_process_that_stops_after_any_operation_leaves_a_whole_version() {
    for seed in 0..3 {
        at_every_operation(seed, 5, Failure::Stop);
    }
}

#[test]
fn an_operation_that_fails_once_ends_the_writer_and_nothing_else() {
    for seed in 100..102 {
        at_every_operation(seed, 5, Failure::Once);
    }
}
