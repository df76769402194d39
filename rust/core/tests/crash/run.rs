//! Running a capture until something stops it, and what must be there afterwards.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use lamina_core::disk::{Disk, Folder};
use lamina_core::manifest::version_of;
use lamina_core::{Error, Result, Store, Writer};

use crate::random::Random;
use crate::record::{Change, Log};
use crate::support::{Job, shard_names, verify};

/// When a run commits, and where it ends.
#[derive(Clone, Debug)]
pub(crate) struct Course {
    /// For each window, whether a commit follows it.
    pub(crate) commits: Vec<bool>,
    /// Whether every append commits by itself.
    pub(crate) timed: bool,
    /// Windows after which the writer is closed, without a commit; all of them: it is finished.
    pub(crate) windows: usize,
}

impl Course {
    pub(crate) fn random(random: &mut Random, job: &Job) -> Self {
        let percent = random.pick(&[0, 40, 70, 100]);
        Self {
            commits: job.windows.iter().map(|_| random.chance(percent)).collect(),
            timed: random.chance(20),
            windows: job.windows.len(),
        }
    }

    pub(crate) fn closed_after(self, windows: usize) -> Self {
        Self { windows, ..self }
    }

    /// Runs a capture from where the store is; returns the names of its shards.
    pub(crate) fn run(&self, disk: &Arc<dyn Disk>, log: &Log, job: &Job) -> Result<Vec<String>> {
        let every = if self.timed { Duration::ZERO } else { Duration::from_secs(1 << 30) };
        let pace = job.paced(every);
        let is_new = !disk.list(Folder::Manifests)?.iter().any(|name| version_of(name).is_some());
        let mut writer = if is_new {
            log.note(Change::Committing(0));
            Writer::begin(Arc::clone(disk), disk.lock()?, job.new_store(), pace)?
        } else {
            Writer::resume(Arc::clone(disk), disk.lock()?, pace)?
        };
        acknowledge(log, &writer);
        let done = usize::try_from(writer.manifest().windows).unwrap();
        for window in done..self.windows {
            let next = window as u64 + 1;
            if self.timed {
                log.note(Change::Committing(next));
            }
            if job.append(&mut writer, window)? {
                acknowledge(log, &writer);
            }
            if self.commits[window] {
                log.note(Change::Committing(next));
                writer.commit()?;
                acknowledge(log, &writer);
            }
        }
        if self.windows == job.windows.len() {
            log.note(Change::Committing(self.windows as u64));
            writer.finish()?;
            acknowledge(log, &writer);
        } else {
            writer.close();
        }
        Ok(shard_names(writer.manifest()))
    }
}

fn acknowledge(log: &Log, writer: &Writer) {
    let manifest = writer.manifest();
    log.note(Change::Acknowledged(manifest.version, manifest.windows));
}

/// What is known of a store's versions.
#[derive(Clone, Debug, Default)]
pub(crate) struct Progress {
    /// Windows of each version that was acknowledged.
    versions: BTreeMap<u64, u64>,
    /// Windows of the version that may come next.
    next: Option<u64>,
}

impl Progress {
    pub(crate) fn apply(&mut self, change: &Change) {
        if let Change::Committing(windows) = change {
            self.next = Some(*windows);
        }
        if let Change::Acknowledged(version, windows) = change {
            self.versions.insert(*version, *windows);
            self.next = None;
        }
    }

    pub(crate) fn of(changes: &[Change]) -> Self {
        let mut progress = Self::default();
        for change in changes {
            progress.apply(change);
        }
        progress
    }

    fn newest(&self) -> Option<u64> {
        self.versions.last_key_value().map(|(&version, _)| version)
    }

    /// Says what is wrong with the store at `path`: it must be at the version that was
    /// acknowledged or at the next one (the next two at the end), whole, and the version before
    /// must be there too.
    /// Returns what is known now.
    pub(crate) fn examine(&self, path: &Path, job: &Job) -> std::result::Result<Self, String> {
        let store = match Store::open(path, None) {
            Ok(store) => store,
            Err(Error::NotReady { .. } | Error::NotFound { .. }) if self.newest().is_none() => {
                return Ok(self.clone());
            }
            Err(error) => return Err(format!("after {self:?} it does not open: {error}")),
        };
        let (version, windows) = (store.manifest().version, store.manifest().windows);
        let newest = self.newest().unwrap_or(0);
        let all = job.windows.len() as u64;
        let known = match self.versions.get(&version) {
            Some(&windows) if version == newest => Some(windows),
            None if version == newest + 1 => self.next,
            // The end replaces pieces in one version and drops them in a second one.
            None if version == newest + 2 => self.next.filter(|&next| next == all),
            _ => None,
        };
        if known != Some(windows) {
            return Err(format!("after {self:?} it is at version {version}, {windows} windows"));
        }
        check(&store, job)?;
        let mut now = self.clone();
        now.versions.insert(version, windows);
        now.next = None;
        let before =
            if version == newest + 2 { Some(&all) } else { self.versions.get(&(version - 1)) };
        if let Some(&windows) = before {
            let before = Store::open(path, Some(version - 1))
                .map_err(|error| format!("the version before {version}: {error}"))?;
            if before.manifest().windows != windows {
                return Err(format!("version {} has other windows", version - 1));
            }
            check(&before, job).map_err(|error| format!("the version before: {error}"))?;
        }
        Ok(now)
    }
}

fn check(store: &Store, job: &Job) -> std::result::Result<(), String> {
    let windows = usize::try_from(store.manifest().windows).unwrap();
    let all_done = windows == job.windows.len();
    if store.manifest().complete && !all_done {
        return Err(format!("complete with {windows} windows"));
    }
    job.compare(store, windows)?;
    verify(store)
}
