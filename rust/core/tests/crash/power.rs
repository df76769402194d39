//! Kills and power cuts at every moment of captures, and of what goes on after them.

use std::collections::BTreeMap;

use lamina_core::disk::Folder;

use crate::cut::{Image, Model};
use crate::random::{self, Random};
use crate::record::{Change, Failure, Log, Recorder};
use crate::run::{Course, Progress};
use crate::support::{Job, folder};

/// A capture, what happened to it so far, and how it should end.
struct Case {
    job: Job,
    names: Vec<String>,
    changes: Vec<Change>,
}

impl Case {
    /// Runs a capture that is closed, killed and resumed a few times, writing down every change.
    fn new(random: &mut Random, windows: usize) -> Self {
        let job = random::job(random, windows);
        let names = job.names();
        let directory = folder();
        let log = Log::over(BTreeMap::new());
        let run = |course: &Course| course.run(&Recorder::over(directory.path(), &log), &log, &job);
        for _ in 0..random.below(3) {
            let course = Course::random(random, &job);
            if random.chance(50) {
                log.fail(Failure::Stop(random.index(150)));
                let _ = run(&course);
                log.fail(Failure::Never);
            } else {
                run(&course.closed_after(random.index(windows))).unwrap();
            }
        }
        assert_eq!(run(&Course::random(random, &job)).unwrap(), names);
        Self { job, names, changes: log.changes() }
    }

    /// Draws `cuts` images at each moment; returns how many there were.
    fn try_all(&self, random: &mut Random, cuts: usize, depth: u32) -> Result<usize, String> {
        let (mut model, mut progress) = (Model::default(), Progress::default());
        let mut images = 0;
        for change in &self.changes {
            model.apply(change);
            progress.apply(change);
            if matches!(change, Change::Committing(_) | Change::Acknowledged(..)) {
                continue;
            }
            for _ in 0..cuts {
                let image = after(&model, random);
                images += self.go_on(random, &image, &progress, depth)?;
            }
        }
        Ok(images)
    }

    /// Examines an image and runs the capture on it to its end; at `depth`, once more with a cut
    /// on the way.
    fn go_on(
        &self,
        random: &mut Random,
        image: &Image,
        progress: &Progress,
        depth: u32,
    ) -> Result<usize, String> {
        let directory = folder();
        image.write_to(directory.path());
        let mut progress = progress.examine(directory.path(), &self.job)?;
        let (log, mut model) = image.continued();
        let disk = Recorder::over(directory.path(), &log);
        let found = Course::random(random, &self.job).run(&disk, &log, &self.job);
        let found = found.map_err(|error| format!("cannot be resumed: {error}"))?;
        if found != self.names {
            return Err(format!("ended with {found:?}, not {:?}", self.names));
        }
        let changes = log.changes();
        let mut images = 1;
        if depth > 0 && random.chance(20) {
            let moment = random.index(changes.len());
            for change in changes.iter().take(moment + 1) {
                model.apply(change);
                progress.apply(change);
            }
            let image = after(&model, random);
            images += self.go_on(random, &image, &progress, depth - 1)?;
        }
        Ok(images)
    }

    /// Runs all moments with those changes left out that `is_lost` names.
    fn without(&self, is_lost: impl Fn(&Change) -> bool, random: &mut Random) -> bool {
        let changes = self.changes.iter().filter(|change| !is_lost(change)).cloned().collect();
        let case = Self { job: self.job.clone(), names: self.names.clone(), changes };
        case.try_all(random, 3, 0).is_err()
    }
}

/// Returns what a kill or, more often, a power cut leaves.
fn after(model: &Model, random: &mut Random) -> Image {
    if random.chance(20) { model.as_seen() } else { model.cut(random) }
}

fn survive(seeds: std::ops::Range<u64>, cuts: usize) -> usize {
    let mut images = 0;
    for seed in seeds {
        let mut random = Random(seed);
        let windows = 1 + random.index(6);
        let case = Case::new(&mut random, windows);
        images += case
            .try_all(&mut random, cuts, 2)
            .unwrap_or_else(|error| panic!("seed {seed}: {error}"));
    }
    images
}

#[test]
fn a_power_cut_at_any_moment_leaves_a_whole_version_that_goes_on() {
    let seeds = std::env::var("LAMINA_CRASH_SEEDS").ok().and_then(|text| text.parse().ok());
    let images = survive(0..seeds.unwrap_or(12), 2);
    assert!(images > 1000, "{images} images");
}

#[test]
fn without_any_one_kind_of_its_fsyncs_a_power_cut_loses_a_version() {
    let is_manifest = |change: &Change, of: &[Change]| {
        let Change::SyncFile(synced) = change else { return None };
        of.iter().find_map(|change| {
            let Change::Create(folder, _, file) = change else { return None };
            (file == synced).then_some(*folder == Folder::Manifests)
        })
    };
    let mut found = [false; 4];
    for seed in 200..230 {
        let mut random = Random(seed);
        let case = Case::new(&mut random, 5);
        let lost: [&dyn Fn(&Change) -> bool; 4] = [
            &|change| is_manifest(change, &case.changes) == Some(false),
            &|change| is_manifest(change, &case.changes) == Some(true),
            &|change| matches!(change, Change::SyncFolder(Folder::Shards)),
            &|change| matches!(change, Change::SyncFolder(Folder::Manifests)),
        ];
        for (found, is_lost) in found.iter_mut().zip(lost) {
            *found = *found || case.without(is_lost, &mut random);
        }
        if found == [true; 4] {
            return;
        }
    }
    panic!("shards, manifests, shards/, manifests/: {found:?}");
}
