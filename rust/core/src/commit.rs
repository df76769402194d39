//! The writer: windows come in, full shards and committed versions come out.
//!
//! A window is committed whole or not at all. The shard being filled grows in a `.part` that no
//! manifest names; what a commit finds there beyond the last full shard becomes a *piece*, a
//! short shard of its own, and the full shard replaces its pieces.

use std::fmt::Debug;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde_json::value::RawValue;

use crate::build::{Mark, Sealed};
use crate::disk::{Disk, Folder, Lock};
use crate::error::{Error, Result};
use crate::filling::{self, Filling, counts_list};
use crate::layout::{Plan, SiteSpec, rows_per_shard};
use crate::manifest::{Entry, Manifest};
use crate::publish;
use crate::source::Source;
use crate::window::Window;

/// A full shard is committed when this has passed since the last commit.
const FULL_SHARD_DELAY: Duration = Duration::from_secs(10);

/// What a new store is made of.
#[derive(Debug)]
pub struct NewStore {
    /// The sites, in the order of the file.
    pub sites: Vec<SiteSpec>,
    /// JSON that decides whether the numbers can be reused.
    pub identity: String,
    /// JSON about their making.
    pub about: String,
    /// Bytes of a full shard's rows, which decide R.
    pub shard_bytes: u64,
    /// Whether prompts carry their text.
    pub texts: bool,
}

/// How a writer works, beside what it stores.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    /// All rows that the store will have, where that is known.
    pub rows_total: Option<u64>,
    /// The time between commits.
    pub commit_every: Duration,
}

/// A writer that has its lock and its store.
#[derive(Debug)]
pub struct Writer {
    disk: Arc<dyn Disk>,
    lock: Box<dyn Lock>,
    pace: Pace,
    manifest: Manifest,
    previous: Option<Manifest>,
    /// Full shards, committed or not, in order.
    full: Vec<Entry>,
    filling: Option<Filling>,
    windows: u64,
    rows: u64,
    prompts: u64,
    last_commit: Instant,
    sealed_since_commit: bool,
    ended: Option<String>,
    scratch: Vec<u8>,
}

fn json(what: &'static str, text: String) -> Result<Box<RawValue>> {
    RawValue::from_string(text).map_err(|source| Error::Json { what, source })
}

impl Writer {
    /// Begins a new store: `FORMAT`, then version 1 without shards.
    ///
    /// # Errors
    ///
    /// [`Error::Exists`] if there is a version, [`Error::Site`] for sites that cannot be stored,
    /// and everything a disk can say.
    pub fn begin(
        disk: Arc<dyn Disk>,
        lock: Box<dyn Lock>,
        new: NewStore,
        pace: Pace,
    ) -> Result<Self> {
        publish::refuse_foreign(&*disk)?;
        if !publish::versions(&*disk)?.is_empty() {
            return Err(Error::Exists { path: disk.root().to_owned() });
        }
        let rows = rows_per_shard(&new.sites, new.shard_bytes)?;
        let plan = Plan::new(new.sites, rows, new.texts)?;
        let identity = json("the identity", new.identity)?;
        let about = json("what is known of the making", new.about)?;
        publish::check_turn(&*disk, &*lock, 0)?;
        disk.make_folders()?;
        publish::remove_parts(&*disk, &*lock, 0)?;
        publish::clean_up(&*disk, &*lock, &[])?;
        let format = disk.create(Folder::Root, publish::FORMAT_FILE)?;
        format.write_at(0, format!("{}\n", crate::FORMAT).as_bytes())?;
        format.sync()?;
        disk.sync_folder(Folder::Root)?;
        let created = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs());
        let manifest = Manifest {
            store: publish::random_id()?,
            version: 1,
            created,
            complete: false,
            windows: 0,
            identity,
            about,
            plan: Arc::new(plan),
            shards: Vec::new(),
            further_groups: 0,
        };
        publish::publish_version(&*disk, &*lock, &manifest)?;
        Ok(Self::over(disk, lock, manifest, None, pace))
    }

    /// Continues a store at its newest version, which is made durable first; the shard being
    /// filled is rebuilt from its pieces, checked.
    ///
    /// # Errors
    ///
    /// [`Error::NotReady`] if there is no version, [`Error::Manifest`] and [`Error::Damaged`] if
    /// bytes are not those that were written, [`Error::Mismatch`] if `rows_total` is less than
    /// what is there.
    pub fn resume(disk: Arc<dyn Disk>, lock: Box<dyn Lock>, pace: Pace) -> Result<Self> {
        publish::refuse_foreign(&*disk)?;
        let versions = publish::versions(&*disk)?;
        let Some(&newest) = versions.first() else {
            return Err(Error::NotReady { path: disk.root().to_owned(), owner: None });
        };
        let manifest = publish::read_version(&*disk, newest)?;
        let previous = match versions.get(1).map(|&version| publish::read_version(&*disk, version))
        {
            // The version before may be damaged; then only the newest is kept.
            None | Some(Err(Error::Manifest { .. })) => None,
            Some(read) => Some(read?),
        };
        let keep: Vec<&Manifest> = std::iter::once(&manifest).chain(previous.as_ref()).collect();
        publish::refuse_later(&*disk, &keep)?;
        let rows = manifest.totals().0;
        if pace.rows_total.is_some_and(|total| total < rows) {
            return Err(Error::Mismatch {
                what: String::from("rows in all"),
                expected: format!("at least the {rows} that are stored"),
                found: pace.rows_total.unwrap_or(0).to_string(),
            });
        }
        publish::check_turn(&*disk, &*lock, newest)?;
        // What was seen may not be durable yet.
        disk.sync_folder(Folder::Shards)?;
        disk.sync_folder(Folder::Manifests)?;
        publish::remove_parts(&*disk, &*lock, newest)?;
        publish::clean_up(&*disk, &*lock, &keep)?;
        let mut writer = Self::over(disk, lock, manifest, previous, pace);
        writer.rebuild()?;
        Ok(writer)
    }

    fn over(
        disk: Arc<dyn Disk>,
        lock: Box<dyn Lock>,
        manifest: Manifest,
        previous: Option<Manifest>,
        pace: Pace,
    ) -> Self {
        let (rows, prompts) = manifest.totals();
        Self {
            disk,
            lock,
            pace,
            windows: manifest.windows,
            manifest,
            previous,
            full: Vec::new(),
            filling: None,
            rows,
            prompts,
            last_commit: Instant::now(),
            sealed_since_commit: false,
            ended: None,
            scratch: Vec::new(),
        }
    }

    /// Rebuilds the shard being filled from the short shards of the manifest.
    fn rebuild(&mut self) -> Result<()> {
        let shards = self.manifest.shards.clone();
        let mut full = self.manifest.full_shards();
        if full == shards.len() || shards.iter().skip(full).all(|shard| shard.rows == 0) {
            // Prompts without rows may still join the last shard, or leave it.
            full = full.saturating_sub(1);
        }
        self.full = shards.iter().take(full).cloned().collect();
        let pieces = shards.get(full..).unwrap_or_default();
        if pieces.is_empty() {
            return Ok(());
        }
        let (total, plan) = (self.pace.rows_total, &self.manifest.plan);
        let start = filling::start_after(&self.full);
        let version = self.manifest.version;
        let filling = Filling::rebuild(&*self.disk, plan, total, pieces, start);
        self.filling = Some(filling.map_err(|error| error.at_version(version))?);
        Ok(())
    }

    fn open_filling(&self, head: u64) -> Result<Filling> {
        let start = filling::start_after(&self.full);
        Filling::open(&*self.disk, &self.manifest.plan, self.pace.rows_total, (start, head))
    }

    /// Returns the newest committed version.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Returns windows, rows and prompts appended, committed or not.
    pub fn appended(&self) -> (u64, u64, u64) {
        (self.windows, self.rows, self.prompts)
    }

    /// Sets what is known of the making, from the next commit on.
    ///
    /// # Errors
    ///
    /// [`Error::Json`].
    pub fn set_about(&mut self, about: String) -> Result<()> {
        self.manifest.about = json("what is known of the making", about)?;
        Ok(())
    }

    fn guard(&self) -> Result<()> {
        self.ended.as_ref().map_or(Ok(()), |reason| Err(Error::Closed { reason: reason.clone() }))
    }

    /// Runs a step after which, if it fails, nothing is known of the files: the writer ends.
    fn or_end<T>(&mut self, step: impl FnOnce(&mut Self) -> Result<T>) -> Result<T> {
        // A step that panics ends the writer, too.
        self.ended = Some(String::from("an earlier step was cut short"));
        let result = step(self);
        if result.is_ok() {
            self.ended = None;
        }
        if let Err(error) = &result {
            self.ended = Some(format!("an earlier step failed: {error}"));
            self.filling = None;
            // The room is given back; what cannot be removed now is removed at the next start.
            let _ = self.remove_parts();
        }
        result.map_err(|error| filling::located(error, &self.full, (self.rows, self.prompts)))
    }

    fn remove_parts(&self) -> Result<()> {
        publish::remove_parts(&*self.disk, &*self.lock, self.manifest.version)
    }

    fn check_turn(&self) -> Result<()> {
        publish::check_turn(&*self.disk, &*self.lock, self.manifest.version)
    }

    /// Appends one window, and commits if it is time. Returns whether it did.
    ///
    /// # Errors
    ///
    /// [`Error::Mismatch`] if the window does not fit, and then nothing has changed; after any
    /// other error the writer has ended, and what was committed is kept.
    pub fn append(&mut self, window: &Window<'_>) -> Result<bool> {
        self.guard()?;
        window.check(&self.manifest.plan)?;
        let rows = window.rows();
        if let Some(total) = self.pace.rows_total
            && self.rows + rows > total
        {
            return Err(Error::Mismatch {
                what: String::from("rows in all"),
                expected: format!("at most {total}, as announced"),
                found: (self.rows + rows).to_string(),
            });
        }
        self.or_end(|writer| writer.add(window))?;
        self.windows += 1;
        let elapsed = self.last_commit.elapsed();
        let due = elapsed >= self.pace.commit_every
            || (self.sealed_since_commit && elapsed >= FULL_SHARD_DELAY);
        if due {
            self.commit()?;
        }
        Ok(due)
    }

    fn add(&mut self, window: &Window<'_>) -> Result<()> {
        self.check_turn()?;
        let limit = self.manifest.plan.rows_per_shard();
        let rows = window.rows();
        let mut row = 0;
        let mut prompts = window.prompts();
        let positions: Vec<u8> =
            window.positions.iter().flat_map(|position| position.to_le_bytes()).collect();
        let mut sources: Vec<&dyn Source> = window.columns.to_vec();
        sources.extend([window.tokens, &positions, window.flags]);
        loop {
            if self.filling.as_ref().is_some_and(|filling| filling.build.rows() == limit)
                && row < rows
            {
                self.seal_filling()?;
            }
            if row == rows && prompts.is_done() {
                break;
            }
            let head = prompts.start() - row;
            let mut filling = match self.filling.take() {
                Some(filling) => filling,
                None => self.open_filling(head)?,
            };
            let take = (limit - filling.build.rows()).min(rows - row);
            let end = row + limit - filling.build.rows();
            while let Some(records) = prompts.before(end) {
                filling.prompts.append(&records)?;
                self.prompts += records.len() as u64;
            }
            if row + take == rows {
                while let Some(records) = prompts.before(u64::MAX) {
                    let plan = &self.manifest.plan;
                    filling.table(&*self.disk, plan, true)?.append(&records)?;
                    self.prompts += records.len() as u64;
                }
            }
            let plan = &self.manifest.plan;
            filling.add_rows(plan, &sources, (row, take), &mut self.scratch)?;
            for &(site, at, count) in window.overflow {
                if (row..row + take).contains(&at) {
                    filling.count(site, [0, 0, count]);
                }
            }
            self.filling = Some(filling);
            row += take;
            self.rows += take;
        }
        Ok(())
    }

    /// Publishes the full shard; its boundary prompts open the next one.
    fn seal_filling(&mut self) -> Result<()> {
        let Some(filling) = self.filling.take() else {
            return Ok(());
        };
        let Filling { build, prompts, boundary, head, counts, .. } = filling;
        let sealed = build.seal(&prompts, head)?;
        let entry = self.publish(&sealed, counts_list(&counts))?;
        self.full.push(entry);
        self.sealed_since_commit = true;
        if let Some(boundary) = boundary {
            let mut next = self.open_filling(0)?;
            next.prompts.append_table(&boundary, Mark::default())?;
            self.filling = Some(next);
        }
        Ok(())
    }

    fn publish(&self, sealed: &Sealed, counts: Vec<[u64; 4]>) -> Result<Entry> {
        let (plan, version) = (&self.manifest.plan, self.manifest.version);
        publish::publish_shard(&*self.disk, &*self.lock, version, plan, sealed, counts)
    }

    /// Commits every window appended so far.
    ///
    /// # Errors
    ///
    /// Everything a disk can say; after an error the writer has ended, and what was committed
    /// before is kept.
    pub fn commit(&mut self) -> Result<()> {
        self.guard()?;
        if self.windows == self.manifest.windows {
            return Ok(());
        }
        self.or_end(|writer| {
            writer.check_turn()?;
            writer.commit_piece()?;
            writer.commit_version(false)
        })
    }

    /// Writes what the shard being filled has beyond its pieces as a further piece.
    fn commit_piece(&mut self) -> Result<()> {
        let Some(mut filling) = self.filling.take() else {
            return Ok(());
        };
        if filling.has_uncommitted() {
            let head = if filling.committed_rows == 0 { filling.head } else { 0 };
            let tables = filling.tables();
            let head = head.min(filling.build.rows() - filling.committed_rows);
            let (sealed, _) =
                filling.build.piece(&*self.disk, filling.committed_rows, &tables, head)?;
            let entry = self.publish(&sealed, filling.uncommitted_counts())?;
            filling.pieces.push(entry);
            filling.mark_committed();
        }
        self.filling = Some(filling);
        Ok(())
    }

    fn commit_version(&mut self, complete: bool) -> Result<()> {
        let mut next = self.manifest.clone();
        next.version += 1;
        next.complete = complete;
        next.windows = self.windows;
        next.shards.clone_from(&self.full);
        next.shards.extend(self.filling.iter().flat_map(|filling| filling.pieces.iter().cloned()));
        publish::publish_version(&*self.disk, &*self.lock, &next)?;
        self.previous = Some(std::mem::replace(&mut self.manifest, next));
        self.last_commit = Instant::now();
        self.sealed_since_commit = false;
        let keep: Vec<&Manifest> =
            std::iter::once(&self.manifest).chain(self.previous.as_ref()).collect();
        publish::clean_up(&*self.disk, &*self.lock, &keep)
    }

    /// Ends the store: the last short shard replaces its pieces, and the store is complete.
    ///
    /// # Errors
    ///
    /// As [`Writer::commit`]; [`Error::Mismatch`] if rows that were announced are missing.
    pub fn finish(&mut self) -> Result<()> {
        self.guard()?;
        if let Some(total) = self.pace.rows_total
            && total != self.rows
        {
            return Err(Error::Mismatch {
                what: String::from("rows in all"),
                expected: format!("{total}, as announced"),
                found: self.rows.to_string(),
            });
        }
        self.or_end(Self::finish_shards)?;
        self.ended = Some(String::from("it was finished"));
        Ok(())
    }

    fn finish_shards(&mut self) -> Result<()> {
        self.check_turn()?;
        if let Some(mut filling) = self.filling.take() {
            let entry = if filling.is_one_piece() {
                filling.pieces.pop()
            } else if filling.build.rows() == filling.build.capacity() {
                if let Some(boundary) = &filling.boundary {
                    filling.prompts.append_table(boundary, Mark::default())?;
                }
                let counts = counts_list(&filling.counts);
                let sealed = filling.build.seal(&filling.prompts, filling.head)?;
                Some(self.publish(&sealed, counts)?)
            } else {
                let head = filling.head.min(filling.build.rows());
                let (sealed, _) =
                    filling.build.piece(&*self.disk, 0, &filling.all_tables(), head)?;
                Some(self.publish(&sealed, counts_list(&filling.counts))?)
            };
            self.full.extend(entry);
        }
        self.remove_parts()?;
        if !self.manifest.complete || self.windows != self.manifest.windows {
            // Pieces of the last version go only when a second version names their replacement.
            if self.has_pieces_to_replace() {
                self.commit_version(false)?;
            }
            self.commit_version(true)?;
        }
        self.check_turn()?;
        self.disk.remove_spool()
    }

    fn has_pieces_to_replace(&self) -> bool {
        let short = self.manifest.shards.iter().skip(self.manifest.full_shards());
        short.into_iter().any(|piece| self.full.last() != Some(piece))
    }

    /// Ends the writer without committing; temporary files are removed.
    pub fn close(&mut self) {
        if self.ended.is_none() {
            self.filling = None;
            let _ = self.remove_parts();
            self.ended = Some(String::from("it was closed"));
        }
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.close();
    }
}
