//! Reading a store: one committed version, without a lock.
//!
//! Opening reads `FORMAT` and the newest manifest. A shard is checked when it is first used. If a
//! shard is gone because a writer has replaced it, the newest manifest of the same store says
//! where its rows are now; their numbers never change, and this reader keeps its own row count.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use crate::disk::{Directory, Disk};
use crate::error::{Error, Result};
use crate::layout::Plan;
use crate::manifest::Manifest;
use crate::publish;
use crate::shard::{Shard, Start};
use crate::side::Side;

/// How often a missing shard may lead to a newer version before it is an error.
const MAX_RELOADS: u32 = 16;

/// A store at one version.
#[derive(Debug)]
pub struct Store {
    disk: Arc<dyn Disk>,
    manifest: Arc<Manifest>,
    rows: u64,
    prompts: u64,
    view: Mutex<Arc<View>>,
}

/// A manifest whose shards are opened as they are used.
#[derive(Debug)]
pub(crate) struct View {
    pub(crate) manifest: Arc<Manifest>,
    pub(crate) starts: Vec<Start>,
    full: usize,
    shards: Mutex<BTreeMap<usize, Arc<Opened>>>,
}

/// A checked, mapped shard with its prompt table once it is needed.
#[derive(Debug)]
pub(crate) struct Opened {
    pub(crate) shard: Shard,
    prompts: OnceLock<PromptIndex>,
    texts: OnceLock<Vec<u64>>,
    checked: [OnceLock<()>; 3],
}

/// The prompts whose table entry lies in one shard.
#[derive(Debug)]
pub(crate) struct PromptIndex {
    /// Rows of each prompt, over all shards.
    pub(crate) rows: Vec<u64>,
    /// Tokens of each prompt.
    pub(crate) lengths: Vec<u64>,
    /// Where each prompt's rows start, counted in this shard.
    pub(crate) starts: Vec<u64>,
    /// Where each prompt's ids start, counted in this shard.
    pub(crate) ids: Vec<u64>,
}

/// The rows of one shard's prompts stay below this, those in later shards counted.
pub(crate) const MAX_SUM: u64 = 1 << 60;

/// Returns the sum before each value, and that of all; it stops at the largest number.
fn sums(first: u64, values: &[u64]) -> (Vec<u64>, u64) {
    let mut sum = first;
    let mut starts = Vec::with_capacity(values.len());
    for &value in values {
        starts.push(sum);
        sum = sum.saturating_add(value);
    }
    (starts, sum)
}

impl Opened {
    /// Returns the shard's prompts, read and checked at the first call.
    pub(crate) fn prompts(&self) -> Result<&PromptIndex> {
        if let Some(index) = self.prompts.get() {
            return Ok(index);
        }
        let rows = self.shard.side_u64(Side::PromptRows)?;
        let lengths = self.shard.side_u64(Side::PromptLength)?;
        let entry = self.shard.entry();
        let (starts, end) = sums(entry.head, &rows);
        let (ids, ids_end) = sums(0, &lengths);
        for (side, is_wrong) in
            [(Side::PromptRows, end >= MAX_SUM), (Side::PromptLength, ids_end != entry.ids)]
        {
            if is_wrong {
                return Err(self.shard.does_not_add_up(side));
            }
        }
        Ok(self.prompts.get_or_init(|| PromptIndex { rows, lengths, starts, ids }))
    }

    /// Returns where each prompt's text starts, counted in this shard, and where the last one
    /// ends; read and checked at the first call.
    pub(crate) fn text_starts(&self) -> Result<&[u64]> {
        if let Some(starts) = self.texts.get() {
            return Ok(starts);
        }
        let lengths = self.shard.side_u64(Side::PromptTextLength)?;
        let (mut starts, end) = sums(0, &lengths);
        if end != self.shard.entry().text_bytes {
            return Err(self.shard.does_not_add_up(Side::PromptTextLength));
        }
        starts.push(end);
        Ok(self.texts.get_or_init(|| starts))
    }

    /// Returns the bytes of a row table, checked at the first call.
    pub(crate) fn row_table(&self, side: Side) -> Result<&[u8]> {
        let index = side.row_table().unwrap_or_default();
        let Some(region) = self.shard.layout().side(side) else {
            return Ok(&[]);
        };
        if let Some(checked) = self.checked.get(index)
            && checked.get().is_none()
        {
            self.shard.read_checked(region, (0, region.bytes), &mut |_| Ok(()))?;
            checked.get_or_init(|| ());
        }
        Ok(self.shard.region_bytes(region).unwrap_or_default())
    }
}

impl View {
    fn new(manifest: Manifest) -> Self {
        let mut start = Start::default();
        let starts = manifest
            .shards
            .iter()
            .map(|shard| {
                let here = start;
                start.row += shard.rows;
                start.prompt += shard.prompts;
                here
            })
            .collect();
        let full = manifest.full_shards();
        Self { manifest: Arc::new(manifest), starts, full, shards: Mutex::default() }
    }

    /// Returns the shard that holds `row`, which the caller knows to exist.
    pub(crate) fn shard_of_row(&self, row: u64) -> usize {
        let by_size = usize::try_from(row / self.manifest.plan.rows_per_shard()).unwrap_or(0);
        if by_size < self.full {
            return by_size;
        }
        self.starts.partition_point(|start| start.row <= row).saturating_sub(1)
    }

    /// Returns the shard whose table has `prompt`, which the caller knows to exist.
    pub(crate) fn shard_of_prompt(&self, prompt: u64) -> usize {
        self.starts.partition_point(|start| start.prompt <= prompt).saturating_sub(1)
    }

    /// Returns shard `index`, checked at its first use.
    pub(crate) fn open(&self, disk: &dyn Disk, index: usize) -> Result<Arc<Opened>> {
        let mut shards = self.shards.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(opened) = shards.get(&index) {
            return Ok(Arc::clone(opened));
        }
        let (Some(entry), Some(&start)) = (self.manifest.shards.get(index), self.starts.get(index))
        else {
            let path = disk.root().to_owned();
            return Err(Error::NotFound { path });
        };
        let shard = Shard::open(disk, &self.manifest.plan, entry, start)?.mapped()?;
        let opened = Arc::new(Opened {
            shard,
            prompts: OnceLock::new(),
            texts: OnceLock::new(),
            checked: Default::default(),
        });
        shards.insert(index, Arc::clone(&opened));
        Ok(opened)
    }
}

impl Store {
    /// Opens the store in a directory, at its newest version or at `version`.
    ///
    /// # Errors
    ///
    /// [`Error::NotFound`], [`Error::NotReady`], [`Error::Foreign`], [`Error::Newer`],
    /// [`Error::NoVersion`], [`Error::Manifest`].
    pub fn open(path: &Path, version: Option<u64>) -> Result<Self> {
        let directory = Directory::open(path)?;
        let owner = directory.owner();
        Self::open_on(Arc::new(directory), version, owner)
    }

    fn open_on(disk: Arc<dyn Disk>, version: Option<u64>, owner: Option<String>) -> Result<Self> {
        let path = || disk.root().to_owned();
        if publish::format_minor(&*disk)?.is_none() {
            let names = publish::refuse_foreign(&*disk)?;
            return Err(if names.is_empty() {
                Error::NotFound { path: path() }
            } else {
                Error::NotReady { path: path(), owner }
            });
        }
        let manifest = match version {
            None => {
                if let Some(manifest) = newest(&*disk)? {
                    manifest
                } else {
                    publish::refuse_foreign(&*disk)?;
                    return Err(Error::NotReady { path: path(), owner });
                }
            }
            Some(version) => match publish::read_version(&*disk, version) {
                Err(error) if error.is_not_found() => {
                    let present = publish::versions(&*disk)?;
                    return Err(Error::NoVersion { path: path(), version, present });
                }
                other => other?,
            },
        };
        Ok(Self::over(disk, manifest))
    }

    fn over(disk: Arc<dyn Disk>, manifest: Manifest) -> Self {
        let (rows, prompts) = manifest.totals();
        let view = Arc::new(View::new(manifest));
        let manifest = Arc::clone(&view.manifest);
        Self { disk, manifest, rows, prompts, view: Mutex::new(view) }
    }

    /// Returns the manifest of this version.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Returns sites, R and texts.
    pub fn plan(&self) -> &Plan {
        &self.manifest.plan
    }

    /// Returns the number of rows.
    pub fn rows(&self) -> u64 {
        self.rows
    }

    /// Returns the number of prompts.
    pub fn prompts(&self) -> u64 {
        self.prompts
    }

    /// Returns the store's disk.
    pub(crate) fn disk(&self) -> &dyn Disk {
        &*self.disk
    }

    /// Returns a newer version of the same store, if there is one.
    ///
    /// # Errors
    ///
    /// [`Error::Manifest`], [`Error::Io`].
    pub fn newer(&self) -> Result<Option<Self>> {
        let found = newest(&*self.disk)?.filter(|found| {
            found.store == self.manifest.store && found.version > self.manifest.version
        });
        Ok(found.map(|manifest| Self::over(Arc::clone(&self.disk), manifest)))
    }

    /// Runs `read` over the present view; if a shard is missing, over that of a newer version of
    /// the same store, whose rows have the same numbers.
    pub(crate) fn with_view<T>(&self, read: impl Fn(&View) -> Result<T>) -> Result<T> {
        let mut reloads = 0;
        loop {
            let view = Arc::clone(&self.view.lock().unwrap_or_else(PoisonError::into_inner));
            let (place, source) = match read(&view) {
                Err(Error::Missing { place, .. }) => (place, view.manifest.version),
                other => return other,
            };
            reloads += 1;
            let found = newest(&*self.disk)?.filter(|found| {
                reloads <= MAX_RELOADS
                    && found.store == self.manifest.store
                    && found.version > source
                    // Rows are only ever added; what has fewer cannot answer for ours.
                    && matches!(found.totals(), (rows, prompts)
                        if rows >= self.rows && prompts >= self.prompts)
            });
            let Some(found) = found else {
                return Err(Error::Missing { place, version: source });
            };
            let mut current = self.view.lock().unwrap_or_else(PoisonError::into_inner);
            if current.manifest.version < found.version {
                *current = Arc::new(View::new(found));
            }
        }
    }
}

/// Reads the newest manifest; one that is removed meanwhile was not the newest.
fn newest(disk: &dyn Disk) -> Result<Option<Manifest>> {
    for _ in 0..MAX_RELOADS {
        let Some(&version) = publish::versions(disk)?.first() else {
            return Ok(None);
        };
        match publish::read_version(disk, version) {
            Err(error) if error.is_not_found() => {}
            other => return other.map(Some),
        }
    }
    Ok(None)
}

/// What a directory holds, as far as a look tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Probe {
    /// Nothing is there.
    Missing,
    /// An empty directory.
    Empty,
    /// A store that was begun and has no version yet.
    Unready,
    /// A store.
    Store,
}

/// Returns what a directory holds. Writes nothing.
///
/// # Errors
///
/// [`Error::Foreign`] for anything that is not ours, [`Error::Newer`], [`Error::Io`].
pub fn probe(path: &Path) -> Result<Probe> {
    let disk = match Directory::open(path) {
        Err(Error::NotFound { .. }) => return Ok(Probe::Missing),
        other => other?,
    };
    let names = publish::refuse_foreign(&disk)?;
    if names.is_empty() {
        return Ok(Probe::Empty);
    }
    if publish::versions(&disk)?.is_empty() {
        return Ok(Probe::Unready);
    }
    publish::format_minor(&disk)?;
    Ok(Probe::Store)
}
