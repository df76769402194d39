//! What several tests need: files of a store, and a disk that watches or spoils.

use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use lamina_core::disk::{Directory, Disk, DiskFile, FileId, Folder};
use lamina_core::manifest::{Entry, Manifest};
use lamina_core::{Error, Lock, Result, Store, Writer};

use crate::support::{Job, verify};

/// Returns the names of the files in `folder` of the store, sorted.
pub(crate) fn files(store: &Path, folder: &str) -> Vec<String> {
    let mut names: Vec<String> = std::fs::read_dir(store.join(folder))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort_unstable();
    names
}

pub(crate) fn shard_path(store: &Path, entry: &Entry) -> PathBuf {
    store.join("shards").join(entry.file_name())
}

pub(crate) fn manifest_path(store: &Path, version: u64) -> PathBuf {
    store.join("manifests").join(lamina_core::manifest::file_name(version))
}

pub(crate) fn manifest(store: &Path, version: u64) -> Manifest {
    Manifest::decode(&std::fs::read(manifest_path(store, version)).unwrap(), version).unwrap()
}

pub(crate) fn newest(store: &Path) -> Manifest {
    let names = files(store, "manifests");
    let versions = names.iter().filter_map(|name| lamina_core::manifest::version_of(name));
    manifest(store, versions.max().unwrap())
}

/// Returns how many temporary files lie in `shards/`.
pub(crate) fn parts(store: &Path) -> usize {
    files(store, "shards").iter().filter_map(|name| name.strip_suffix(".part")).count()
}

/// Flips one bit of a file.
pub(crate) fn flip(path: &Path, at: u64) {
    let mut bytes = std::fs::read(path).unwrap();
    bytes[usize::try_from(at).unwrap()] ^= 16;
    std::fs::write(path, bytes).unwrap();
}

/// Where the rows of site `site` begin in a shard.
pub(crate) fn region(manifest: &Manifest, shard: usize, site: usize) -> u64 {
    manifest.plan.layout(&manifest.shards[shard].size()).unwrap().site(site).unwrap().offset
}

/// What happened on a disk, and what shall go wrong.
#[derive(Default)]
pub(crate) struct Events {
    /// `write shards/filling.part 12`, in order.
    pub(crate) log: Vec<String>,
    /// The event that begins like this fails, the first time it comes.
    pub(crate) fail: Option<(String, std::io::ErrorKind)>,
    /// What comes just before the event that begins like this, the first time.
    pub(crate) before: Option<(String, Box<dyn FnOnce() + Send>)>,
}

impl std::fmt::Debug for Events {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Events").field("log", &self.log).finish_non_exhaustive()
    }
}

/// A disk over a real directory that watches every operation.
#[derive(Debug)]
pub(crate) struct Watched {
    inner: Directory,
    events: Arc<Mutex<Events>>,
}

impl Watched {
    pub(crate) fn over(path: &Path) -> (Arc<dyn Disk>, Arc<Mutex<Events>>) {
        let events = Arc::default();
        let inner = Directory::create(path).unwrap();
        (Arc::new(Self { inner, events: Arc::clone(&events) }), events)
    }

    fn file(&self, folder: Folder, name: &str, inner: Box<dyn DiskFile>) -> Box<dyn DiskFile> {
        let name = format!("{}/{name}", folder.name());
        Box::new(WatchedFile { inner, name, events: Arc::clone(&self.events) })
    }
}

fn happens(events: &Mutex<Events>, event: String) -> Result<()> {
    let mut events = events.lock().unwrap();
    if let Some((_, hook)) = events.before.take_if(|(prefix, _)| event.starts_with(prefix.as_str()))
    {
        hook();
    }
    let failure = events.fail.take_if(|(prefix, _)| event.starts_with(prefix.as_str()));
    events.log.push(event);
    failure.map_or(Ok(()), |(what, kind)| {
        Err(Error::io("do", what, std::io::Error::new(kind, "made to fail")))
    })
}

#[derive(Debug)]
struct WatchedFile {
    inner: Box<dyn DiskFile>,
    name: String,
    events: Arc<Mutex<Events>>,
}

impl DiskFile for WatchedFile {
    fn id(&self) -> Result<FileId> {
        self.inner.id()
    }

    fn read_at(&self, offset: u64, out: &mut [u8]) -> Result<()> {
        happens(&self.events, format!("read {} {}", self.name, out.len()))?;
        self.inner.read_at(offset, out)
    }

    fn write_at(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        happens(&self.events, format!("write {} {}", self.name, bytes.len()))?;
        self.inner.write_at(offset, bytes)
    }

    fn reserve(&self, bytes: u64) -> Result<()> {
        happens(&self.events, format!("reserve {} {bytes}", self.name))?;
        self.inner.reserve(bytes)
    }

    fn start_writeback(&self, offset: u64, bytes: u64) {
        self.inner.start_writeback(offset, bytes);
    }

    fn sync(&self) -> Result<()> {
        happens(&self.events, format!("sync {}", self.name))?;
        self.inner.sync()
    }

    fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        self.inner.descriptor()
    }
}

impl Disk for Watched {
    fn root(&self) -> &Path {
        self.inner.root()
    }

    fn make_folders(&self) -> Result<()> {
        self.inner.make_folders()
    }

    fn list(&self, folder: Folder) -> Result<Vec<String>> {
        happens(&self.events, format!("list {}/", folder.name()))?;
        self.inner.list(folder)
    }

    fn open(&self, folder: Folder, name: &str) -> Result<Box<dyn DiskFile>> {
        Ok(self.file(folder, name, self.inner.open(folder, name)?))
    }

    fn create(&self, folder: Folder, name: &str) -> Result<Box<dyn DiskFile>> {
        happens(&self.events, format!("create {}/{name}", folder.name()))?;
        Ok(self.file(folder, name, self.inner.create(folder, name)?))
    }

    fn rename(&self, folder: Folder, from: &str, to: &str, replace: bool) -> Result<()> {
        happens(&self.events, format!("rename {}/{from} {to} {replace}", folder.name()))?;
        self.inner.rename(folder, from, to, replace)
    }

    fn link(&self, folder: Folder, from: &str, to: &str) -> Result<bool> {
        happens(&self.events, format!("link {}/{from} {to}", folder.name()))?;
        self.inner.link(folder, from, to)
    }

    fn remove(&self, folder: Folder, name: &str) -> Result<()> {
        happens(&self.events, format!("remove {}/{name}", folder.name()))?;
        self.inner.remove(folder, name)
    }

    fn remove_spool(&self) -> Result<()> {
        happens(&self.events, String::from("remove spool/"))?;
        self.inner.remove_spool()
    }

    fn sync_folder(&self, folder: Folder) -> Result<()> {
        happens(&self.events, format!("sync {}/", folder.name()))?;
        self.inner.sync_folder(folder)
    }

    fn lock(&self) -> Result<Box<dyn Lock>> {
        let inner = self.inner.lock()?;
        Ok(Box::new(WatchedLock { inner, events: Arc::clone(&self.events) }))
    }
}

#[derive(Debug)]
struct WatchedLock {
    inner: Box<dyn Lock>,
    events: Arc<Mutex<Events>>,
}

impl Lock for WatchedLock {
    fn retake(&self) -> Result<()> {
        happens(&self.events, String::from("lock"))?;
        self.inner.retake()
    }
}

impl Job {
    pub(crate) fn with_total(self) -> Self {
        Self { total: true, ..self }
    }

    pub(crate) fn resume(&self, disk: &Arc<dyn Disk>) -> Result<Writer> {
        Writer::resume(Arc::clone(disk), disk.lock()?, self.pace())
    }

    pub(crate) fn check(&self, path: &Path, windows: usize) {
        let store = Store::open(path, None).unwrap();
        self.compare(&store, windows).unwrap();
        assert_eq!(verify(&store), Ok(()));
    }
}
