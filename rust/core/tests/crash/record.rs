//! A disk over a real directory that writes down what it does, and stops when told to.

use std::collections::BTreeMap;
use std::os::fd::BorrowedFd;
use std::path::Path;
use std::sync::{Arc, Mutex};

use lamina_core::disk::{Directory, Disk, DiskFile, FileId, Folder};
use lamina_core::{Error, Lock, Result};

/// One change of the disk, or a note of the writer's progress between them.
#[derive(Clone, Debug)]
pub(crate) enum Change {
    MakeFolders,
    Create(Folder, String, usize),
    Write(usize, u64, Vec<u8>),
    SyncFile(usize),
    Rename(Folder, String, String),
    Link(Folder, String, String),
    Remove(Folder, String),
    SyncFolder(Folder),
    /// These windows are being committed.
    Committing(u64),
    /// This version, with these windows, was acknowledged.
    Acknowledged(u64, u64),
}

/// When, and how, the disk fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Failure {
    Never,
    /// After this many operations every further one fails: the process is gone.
    Stop(usize),
    /// This operation alone fails, and the writer goes on with its clean-up.
    Once(usize),
}

#[derive(Debug)]
struct State {
    changes: Vec<Change>,
    operations: usize,
    syncs_after_failure: usize,
    files: usize,
    /// Which file has which name now.
    names: BTreeMap<(Folder, String), usize>,
    failure: Failure,
}

/// What was written down, shared by all disks over one directory.
#[derive(Clone, Debug)]
pub(crate) struct Log(Arc<Mutex<State>>);

impl Log {
    /// Begins a log over a directory in which these files are numbered already.
    pub(crate) fn over(names: BTreeMap<(Folder, String), usize>) -> Self {
        Self(Arc::new(Mutex::new(State {
            changes: Vec::new(),
            operations: 0,
            syncs_after_failure: 0,
            files: names.len(),
            names,
            failure: Failure::Never,
        })))
    }

    pub(crate) fn note(&self, change: Change) {
        let mut state = self.0.lock().unwrap();
        let names = &mut state.names;
        match &change {
            Change::Create(folder, name, file) => {
                names.insert((*folder, name.clone()), *file);
            }
            Change::Rename(folder, from, to) => {
                if let Some(file) = names.remove(&(*folder, from.clone())) {
                    names.insert((*folder, to.clone()), file);
                }
            }
            Change::Link(folder, from, to) => {
                if let Some(&file) = names.get(&(*folder, from.clone())) {
                    names.insert((*folder, to.clone()), file);
                }
            }
            Change::Remove(folder, name) => {
                names.remove(&(*folder, name.clone()));
            }
            Change::MakeFolders
            | Change::Write(..)
            | Change::SyncFile(_)
            | Change::SyncFolder(_)
            | Change::Committing(_)
            | Change::Acknowledged(..) => {}
        }
        state.changes.push(change);
    }

    pub(crate) fn changes(&self) -> Vec<Change> {
        self.0.lock().unwrap().changes.clone()
    }

    /// Returns how many fsyncs were asked for after one had failed.
    pub(crate) fn syncs_after_failure(&self) -> usize {
        self.0.lock().unwrap().syncs_after_failure
    }

    /// Counts operations anew from here on.
    pub(crate) fn fail(&self, failure: Failure) {
        let mut state = self.0.lock().unwrap();
        state.operations = 0;
        state.syncs_after_failure = 0;
        state.failure = failure;
    }

    /// Counts an operation; returns an error if the disk fails at it.
    fn step(&self, is_sync: bool) -> Result<()> {
        let mut state = self.0.lock().unwrap();
        let at = state.operations;
        state.operations += 1;
        let failed = match state.failure {
            Failure::Never => false,
            Failure::Stop(after) => at >= after,
            Failure::Once(index) => {
                state.syncs_after_failure += usize::from(is_sync && at > index);
                at == index
            }
        };
        if failed {
            return Err(Error::io("reach", "the disk", std::io::Error::other("it is gone")));
        }
        Ok(())
    }

    /// Returns whether the disk has failed before the last operation already.
    fn is_gone(&self) -> bool {
        let state = self.0.lock().unwrap();
        matches!(state.failure, Failure::Stop(after) if state.operations > after + 1)
    }

    fn new_file(&self) -> usize {
        let mut state = self.0.lock().unwrap();
        state.files += 1;
        state.files - 1
    }

    fn file_of(&self, folder: Folder, name: &str) -> usize {
        self.0.lock().unwrap().names.get(&(folder, name.to_owned())).copied().unwrap()
    }
}

/// The disk.
#[derive(Debug)]
pub(crate) struct Recorder {
    inner: Directory,
    log: Log,
}

impl Recorder {
    pub(crate) fn over(path: &Path, log: &Log) -> Arc<dyn Disk> {
        Arc::new(Self { inner: Directory::create(path).unwrap(), log: log.clone() })
    }
}

#[derive(Debug)]
struct RecordedFile {
    inner: Box<dyn DiskFile>,
    file: usize,
    log: Log,
}

impl DiskFile for RecordedFile {
    fn id(&self) -> Result<FileId> {
        self.inner.id()
    }

    fn read_at(&self, offset: u64, out: &mut [u8]) -> Result<()> {
        self.log.step(false)?;
        self.inner.read_at(offset, out)
    }

    fn write_at(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        let write = |bytes: &[u8]| {
            self.log.note(Change::Write(self.file, offset, bytes.to_vec()));
            self.inner.write_at(offset, bytes)
        };
        if let Err(gone) = self.log.step(false) {
            if !self.log.is_gone() {
                // The write during which the process stops gets half way.
                write(bytes.split_at(bytes.len() / 2).0)?;
            }
            return Err(gone);
        }
        write(bytes)
    }

    fn reserve(&self, bytes: u64) -> Result<()> {
        self.log.step(false)?;
        self.inner.reserve(bytes)
    }

    fn start_writeback(&self, offset: u64, bytes: u64) {
        self.inner.start_writeback(offset, bytes);
    }

    fn sync(&self) -> Result<()> {
        self.log.step(true)?;
        self.log.note(Change::SyncFile(self.file));
        self.inner.sync()
    }

    fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        self.inner.descriptor()
    }
}

impl Disk for Recorder {
    fn root(&self) -> &Path {
        self.inner.root()
    }

    fn make_folders(&self) -> Result<()> {
        self.log.step(false)?;
        self.log.note(Change::MakeFolders);
        self.log.note(Change::SyncFolder(Folder::Root));
        self.inner.make_folders()
    }

    fn list(&self, folder: Folder) -> Result<Vec<String>> {
        self.log.step(false)?;
        self.inner.list(folder)
    }

    fn open(&self, folder: Folder, name: &str) -> Result<Box<dyn DiskFile>> {
        self.log.step(false)?;
        let inner = self.inner.open(folder, name)?;
        let file = self.log.file_of(folder, name);
        Ok(Box::new(RecordedFile { inner, file, log: self.log.clone() }))
    }

    fn create(&self, folder: Folder, name: &str) -> Result<Box<dyn DiskFile>> {
        self.log.step(false)?;
        let inner = self.inner.create(folder, name)?;
        let file = self.log.new_file();
        self.log.note(Change::Remove(folder, name.to_owned()));
        self.log.note(Change::Create(folder, name.to_owned(), file));
        Ok(Box::new(RecordedFile { inner, file, log: self.log.clone() }))
    }

    fn rename(&self, folder: Folder, from: &str, to: &str, replace: bool) -> Result<()> {
        self.log.step(false)?;
        self.inner.rename(folder, from, to, replace)?;
        self.log.note(Change::Rename(folder, from.to_owned(), to.to_owned()));
        Ok(())
    }

    fn link(&self, folder: Folder, from: &str, to: &str) -> Result<bool> {
        self.log.step(false)?;
        let linked = self.inner.link(folder, from, to)?;
        if linked {
            self.log.note(Change::Link(folder, from.to_owned(), to.to_owned()));
        }
        Ok(linked)
    }

    fn remove(&self, folder: Folder, name: &str) -> Result<()> {
        self.log.step(false)?;
        self.inner.remove(folder, name)?;
        self.log.note(Change::Remove(folder, name.to_owned()));
        Ok(())
    }

    fn remove_spool(&self) -> Result<()> {
        self.log.step(false)?;
        self.inner.remove_spool()
    }

    fn sync_folder(&self, folder: Folder) -> Result<()> {
        self.log.step(true)?;
        self.log.note(Change::SyncFolder(folder));
        self.inner.sync_folder(folder)
    }

    fn lock(&self) -> Result<Box<dyn Lock>> {
        self.inner.lock()
    }
}
