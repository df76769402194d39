//! All I/O goes through [`Disk`], whose real implementation [`Directory`] names the path in every
//! error. Files are opened beneath the store's own directories, without following links.

use std::fmt::Debug;
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, FallocateFlags, FileType, Mode, OFlags, RenameFlags};
use rustix::io::Errno;

use crate::error::{Error, Result};

pub use crate::lock::Lock;

#[cfg(not(target_os = "linux"))]
compile_error!("lamina runs on Linux; for another system, port disk.rs, lock.rs and map.rs");

/// The store's directories.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Folder {
    /// The store itself: `FORMAT`, `LOCK`, `OWNER`.
    Root,
    /// `manifests/`.
    Manifests,
    /// `shards/`.
    Shards,
    /// `spool/`: what a capture keeps until it is complete.
    Spool,
}

impl Folder {
    /// Returns its name beneath the store.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Root => "",
            Self::Manifests => "manifests",
            Self::Shards => "shards",
            Self::Spool => "spool",
        }
    }
}

/// What tells one file from another under the same name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileId {
    /// The device.
    pub device: u64,
    /// The inode.
    pub inode: u64,
    /// The size in bytes.
    pub bytes: u64,
}

/// An open file.
pub trait DiskFile: Debug + Send + Sync {
    /// Returns which file this is, and its present size.
    ///
    /// # Errors
    ///
    /// [`Error::Io`].
    fn id(&self) -> Result<FileId>;

    /// Fills `out` from `offset`.
    ///
    /// # Errors
    ///
    /// [`Error::Io`], also when the file ends before.
    fn read_at(&self, offset: u64, out: &mut [u8]) -> Result<()>;

    /// Writes all of `bytes` at `offset`.
    ///
    /// # Errors
    ///
    /// [`Error::Full`], [`Error::Io`].
    fn write_at(&self, offset: u64, bytes: &[u8]) -> Result<()>;

    /// Reserves room for `bytes` without changing the size.
    ///
    /// # Errors
    ///
    /// [`Error::Full`] if there is not enough.
    fn reserve(&self, bytes: u64) -> Result<()>;

    /// Starts writing back what was written, without waiting. A hint.
    fn start_writeback(&self, offset: u64, bytes: u64);

    /// Makes the contents durable. After an error nothing is known of them: never call it again.
    ///
    /// # Errors
    ///
    /// [`Error::Io`].
    fn sync(&self) -> Result<()>;

    /// Returns the descriptor to map, where there is one.
    fn descriptor(&self) -> Option<BorrowedFd<'_>>;
}

/// A store's directory.
pub trait Disk: Debug + Send + Sync {
    /// Returns the store's path.
    fn root(&self) -> &Path;

    /// Makes `manifests/` and `shards/` if they are missing, and makes them durable.
    ///
    /// # Errors
    ///
    /// [`Error::Io`].
    fn make_folders(&self) -> Result<()>;

    /// Returns the names in a folder, in no order; none if it does not exist.
    ///
    /// # Errors
    ///
    /// [`Error::Io`].
    fn list(&self, folder: Folder) -> Result<Vec<String>>;

    /// Opens a regular file for reading.
    ///
    /// # Errors
    ///
    /// [`Error::Io`], also for links and whatever else is no regular file.
    fn open(&self, folder: Folder, name: &str) -> Result<Box<dyn DiskFile>>;

    /// Makes a new file for reading and writing; a leftover under that name is removed first.
    ///
    /// # Errors
    ///
    /// [`Error::Io`].
    fn create(&self, folder: Folder, name: &str) -> Result<Box<dyn DiskFile>>;

    /// Gives a file of `folder` another name. An existing one is replaced only if `replace` is
    /// set, and is an error otherwise.
    ///
    /// # Errors
    ///
    /// [`Error::Io`].
    fn rename(&self, folder: Folder, from: &str, to: &str, replace: bool) -> Result<()>;

    /// Gives a file of `folder` a second name; returns `false` if that name exists.
    ///
    /// # Errors
    ///
    /// [`Error::Io`].
    fn link(&self, folder: Folder, from: &str, to: &str) -> Result<bool>;

    /// Removes a file; one that is not there is no error.
    ///
    /// # Errors
    ///
    /// [`Error::Io`].
    fn remove(&self, folder: Folder, name: &str) -> Result<()>;

    /// Removes the spool, if there is one.
    ///
    /// # Errors
    ///
    /// [`Error::Io`].
    fn remove_spool(&self) -> Result<()>;

    /// Makes a folder's entries durable.
    ///
    /// # Errors
    ///
    /// [`Error::Io`].
    fn sync_folder(&self, folder: Folder) -> Result<()>;

    /// Takes the writer's lock.
    ///
    /// # Errors
    ///
    /// [`Error::InUse`], [`Error::Io`].
    fn lock(&self) -> Result<Box<dyn Lock>>;
}

/// A directory of a real file system.
#[derive(Debug)]
pub struct Directory {
    path: PathBuf,
    root: OwnedFd,
}

const READ: OFlags =
    OFlags::RDONLY.union(OFlags::CLOEXEC).union(OFlags::NOFOLLOW).union(OFlags::NONBLOCK);
const FOLDER: OFlags =
    OFlags::RDONLY.union(OFlags::CLOEXEC).union(OFlags::DIRECTORY).union(OFlags::NOFOLLOW);

impl Directory {
    /// Opens a store's directory.
    ///
    /// # Errors
    ///
    /// [`Error::NotFound`] if there is none, [`Error::Io`].
    pub fn open(path: impl Into<PathBuf>) -> Result<Self> {
        let path = path.into();
        // The store's own path may lead over links; what lies beneath may not.
        let flags = FOLDER.difference(OFlags::NOFOLLOW);
        match rustix::fs::open(&path, flags, Mode::empty()) {
            Ok(root) => Ok(Self { path, root }),
            Err(Errno::NOENT) => Err(Error::NotFound { path }),
            Err(source) => Err(Error::io("open", path, source)),
        }
    }

    /// Makes a store's directory, parents too, and opens it.
    ///
    /// # Errors
    ///
    /// [`Error::Io`].
    pub fn create(path: impl Into<PathBuf>) -> Result<Self> {
        let path = path.into();
        let new = path.ancestors().take_while(|path| !path.exists()).count();
        std::fs::create_dir_all(&path).map_err(|source| Error::io("make", &path, source))?;
        let opened = Self::open(path)?;
        if let Ok(whole) = opened.path.canonicalize() {
            // The entries of the new directories, and of one that a crash may have left behind;
            // parents that cannot be opened are not ours to sync.
            for parent in whole.ancestors().skip(1).take(new.max(1)) {
                if let Ok(parent) = rustix::fs::open(parent, FOLDER, Mode::empty()) {
                    let _ = rustix::fs::fsync(parent);
                }
            }
        }
        Ok(opened)
    }

    /// Returns the bytes that an unprivileged writer may still use on this file system.
    ///
    /// # Errors
    ///
    /// [`Error::Io`].
    pub fn free_bytes(&self) -> Result<u64> {
        let stat = rustix::fs::fstatvfs(&self.root)
            .map_err(|source| Error::io("ask for the free space of", &self.path, source))?;
        Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
    }

    fn path_of(&self, folder: Folder, name: &str) -> PathBuf {
        let mut path = self.path.clone();
        for part in [folder.name(), name] {
            if !part.is_empty() {
                path.push(part);
            }
        }
        path
    }

    fn folder(&self, folder: Folder) -> Result<OwnedFd> {
        let name = if folder == Folder::Root { "." } else { folder.name() };
        rustix::fs::openat(&self.root, name, FOLDER, Mode::empty())
            .map_err(|source| Error::io("open", self.path_of(folder, ""), source))
    }

    fn file(
        &self,
        folder: Folder,
        name: &str,
        flags: OFlags,
        verb: &'static str,
    ) -> Result<OpenFile> {
        let path = self.path_of(folder, name);
        let directory = self.folder(folder)?;
        let mode = Mode::from_raw_mode(0o644);
        let file =
            rustix::fs::openat(directory, name, flags, mode).map_err(|source| match source {
                Errno::LOOP => {
                    Error::io(verb, &path, std::io::Error::other("it is a symbolic link"))
                }
                other => Error::io(verb, &path, other),
            })?;
        let stat = rustix::fs::fstat(&file).map_err(|source| Error::io(verb, &path, source))?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            return Err(Error::io(verb, path, std::io::Error::other("it is no regular file")));
        }
        Ok(OpenFile { path, file: File::from(file) })
    }
}

impl Disk for Directory {
    fn root(&self) -> &Path {
        &self.path
    }

    fn make_folders(&self) -> Result<()> {
        for folder in [Folder::Manifests, Folder::Shards] {
            match rustix::fs::mkdirat(&self.root, folder.name(), Mode::from_raw_mode(0o755)) {
                Ok(()) | Err(Errno::EXIST) => {}
                Err(source) => return Err(Error::io("make", self.path_of(folder, ""), source)),
            }
        }
        self.sync_folder(Folder::Root)
    }

    fn list(&self, folder: Folder) -> Result<Vec<String>> {
        let directory = match self.folder(folder) {
            Err(error) if error.is_not_found() => return Ok(Vec::new()),
            other => other?,
        };
        let path = self.path_of(folder, "");
        let entries =
            rustix::fs::Dir::new(directory).map_err(|source| Error::io("list", &path, source))?;
        let mut names = Vec::new();
        for entry in entries {
            let entry = entry.map_err(|source| Error::io("list", &path, source))?;
            let name = entry.file_name().to_string_lossy().into_owned();
            if name != "." && name != ".." {
                names.push(name);
            }
        }
        Ok(names)
    }

    fn open(&self, folder: Folder, name: &str) -> Result<Box<dyn DiskFile>> {
        Ok(Box::new(self.file(folder, name, READ, "open")?))
    }

    fn create(&self, folder: Folder, name: &str) -> Result<Box<dyn DiskFile>> {
        self.remove(folder, name)?;
        let flags =
            OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        Ok(Box::new(self.file(folder, name, flags, "make")?))
    }

    fn rename(&self, folder: Folder, from: &str, to: &str, replace: bool) -> Result<()> {
        let directory = self.folder(folder)?;
        let failed = |source| Error::io("rename to", self.path_of(folder, to), source);
        if !replace {
            let flags = RenameFlags::NOREPLACE;
            match rustix::fs::renameat_with(&directory, from, &directory, to, flags) {
                // File systems without NOREPLACE: the caller holds the lock and has looked.
                Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => {}
                other => return other.map_err(failed),
            }
        }
        rustix::fs::renameat(&directory, from, &directory, to).map_err(failed)
    }

    fn link(&self, folder: Folder, from: &str, to: &str) -> Result<bool> {
        let directory = self.folder(folder)?;
        match rustix::fs::linkat(&directory, from, &directory, to, AtFlags::empty()) {
            Ok(()) => Ok(true),
            Err(Errno::EXIST) => Ok(false),
            Err(source) => Err(Error::io("link", self.path_of(folder, to), source)),
        }
    }

    fn remove(&self, folder: Folder, name: &str) -> Result<()> {
        let directory = self.folder(folder)?;
        match rustix::fs::unlinkat(directory, name, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => Ok(()),
            Err(source) => Err(Error::io("remove", self.path_of(folder, name), source)),
        }
    }

    fn remove_spool(&self) -> Result<()> {
        for name in self.list(Folder::Spool)? {
            self.remove(Folder::Spool, &name)?;
        }
        match rustix::fs::unlinkat(&self.root, Folder::Spool.name(), AtFlags::REMOVEDIR) {
            Ok(()) | Err(Errno::NOENT) => Ok(()),
            Err(source) => Err(Error::io("remove", self.path_of(Folder::Spool, ""), source)),
        }
    }

    fn sync_folder(&self, folder: Folder) -> Result<()> {
        let directory = self.folder(folder)?;
        rustix::fs::fsync(directory)
            .map_err(|source| Error::io("make durable", self.path_of(folder, ""), source))
    }

    fn lock(&self) -> Result<Box<dyn Lock>> {
        Ok(Box::new(crate::lock::FileLock::take(&self.path, self.root.as_fd())?))
    }
}

#[derive(Debug)]
struct OpenFile {
    path: PathBuf,
    file: File,
}

impl OpenFile {
    fn write_error(&self, needed: u64, source: std::io::Error) -> Error {
        let full = [Errno::NOSPC, Errno::DQUOT].map(|errno| Some(errno.raw_os_error()));
        if full.contains(&source.raw_os_error()) {
            let free = rustix::fs::fstatvfs(&self.file)
                .map_or(0, |stat| stat.f_bavail.saturating_mul(stat.f_frsize));
            return Error::Full { path: self.path.clone(), needed, free };
        }
        Error::io("write", &self.path, source)
    }
}

impl DiskFile for OpenFile {
    fn id(&self) -> Result<FileId> {
        let stat = rustix::fs::fstat(&self.file)
            .map_err(|source| Error::io("look at", &self.path, source))?;
        Ok(FileId {
            device: stat.st_dev,
            inode: stat.st_ino,
            bytes: u64::try_from(stat.st_size).unwrap_or(0),
        })
    }

    fn read_at(&self, offset: u64, out: &mut [u8]) -> Result<()> {
        self.file.read_exact_at(out, offset).map_err(|source| Error::io("read", &self.path, source))
    }

    fn write_at(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        self.file
            .write_all_at(bytes, offset)
            .map_err(|source| self.write_error(bytes.len() as u64, source))
    }

    fn reserve(&self, bytes: u64) -> Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        // A signal (Ctrl-C) may cut a long reservation short; that is no reason to end a capture.
        let reserve = || rustix::fs::fallocate(&self.file, FallocateFlags::KEEP_SIZE, 0, bytes);
        match rustix::io::retry_on_intr(reserve) {
            // A file system that cannot reserve says when it is full.
            Ok(()) | Err(Errno::OPNOTSUPP | Errno::NOSYS) => Ok(()),
            Err(source) => Err(self.write_error(bytes, source.into())),
        }
    }

    fn start_writeback(&self, offset: u64, bytes: u64) {
        // DONTNEED starts asynchronous write-back of dirty pages and drops only clean ones.
        let length = std::num::NonZeroU64::new(bytes);
        let _ = rustix::fs::fadvise(&self.file, offset, length, rustix::fs::Advice::DontNeed);
    }

    fn sync(&self) -> Result<()> {
        rustix::fs::fsync(&self.file)
            .map_err(|source| Error::io("make durable", &self.path, source))
    }

    fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        Some(self.file.as_fd())
    }
}

impl Directory {
    /// Returns who is writing, as far as `OWNER` says and its process still runs.
    pub fn owner(&self) -> Option<String> {
        crate::lock::living_owner(self.root.as_fd())
    }
}
