//! One writer: an `fcntl` record lock on one descriptor, and a registry inside the process.
//!
//! A record lock dies with its process, forked children or not (a `flock` would stay with them),
//! but any other open and close of the file in the process drops it. So only the writer's one
//! descriptor ever opens `LOCK`; who holds it stands in `OWNER`; and the lock is taken again
//! before every publication and every removal.

use std::collections::BTreeSet;
use std::fmt::Debug;
use std::io::Write as _;
use std::os::fd::{BorrowedFd, IntoRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use rustix::fs::{AtFlags, FlockOperation, Mode, OFlags};
use rustix::io::Errno;
use rustix::process::Pid;

use crate::error::{Error, Result};

/// The file that is locked, never renamed, never removed.
pub(crate) const LOCK: &str = "LOCK";
/// Who holds the lock.
pub(crate) const OWNER: &str = "OWNER";

/// A writer's lock, released when it is dropped.
pub trait Lock: Debug + Send + Sync {
    /// Takes the lock again.
    ///
    /// # Errors
    ///
    /// [`Error::InUse`] if somebody else got it, [`Error::Closed`] in a forked child.
    fn retake(&self) -> Result<()>;
}

/// Process, device and inode of the `LOCK` files that are held. A forked child inherits the set,
/// but not the locks: its own process number keeps it from being bound by them.
static HELD: Mutex<BTreeSet<(u32, u64, u64)>> = Mutex::new(BTreeSet::new());

#[derive(Debug)]
pub(crate) struct FileLock {
    path: PathBuf,
    root: OwnedFd,
    /// `None` only while it is dropped.
    file: Option<OwnedFd>,
    key: (u64, u64),
    process: u32,
}

impl FileLock {
    pub(crate) fn take(path: &Path, root: BorrowedFd<'_>) -> Result<Self> {
        let mut held = HELD.lock().unwrap_or_else(PoisonError::into_inner);
        let process = std::process::id();
        let name = path.join(LOCK);
        let failed = |source: Errno| Error::io("lock", &name, source);
        match rustix::fs::statat(root, LOCK, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) if held.contains(&(process, stat.st_dev, stat.st_ino)) => {
                return Err(in_use(path, root));
            }
            Ok(_) | Err(Errno::NOENT) => {}
            Err(source) => return Err(failed(source)),
        }
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let file =
            rustix::fs::openat(root, LOCK, flags, Mode::from_raw_mode(0o644)).map_err(failed)?;
        match rustix::fs::fcntl_lock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(Errno::AGAIN | Errno::ACCESS) => return Err(in_use(path, root)),
            Err(source) => return Err(failed(source)),
        }
        let stat = rustix::fs::fstat(&file).map_err(failed)?;
        let key = (stat.st_dev, stat.st_ino);
        let root = root.try_clone_to_owned().map_err(|source| Error::io("lock", &name, source))?;
        let lock = Self { path: path.to_owned(), root, file: Some(file), key, process };
        held.insert((process, key.0, key.1));
        // Dropping a lock takes the set, so it must be free should this fail.
        drop(held);
        lock.write_owner()?;
        Ok(lock)
    }

    fn write_owner(&self) -> Result<()> {
        let flags = OFlags::WRONLY
            | OFlags::CREATE
            | OFlags::TRUNC
            | OFlags::CLOEXEC
            | OFlags::NOFOLLOW
            | OFlags::NONBLOCK;
        let failed = |source: std::io::Error| Error::io("write", self.path.join(OWNER), source);
        let file = rustix::fs::openat(&self.root, OWNER, flags, Mode::from_raw_mode(0o644))
            .map_err(|source| failed(source.into()))?;
        let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
        let since = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs());
        writeln!(
            std::fs::File::from(file),
            "process {} on host {host} since {}",
            self.process,
            utc(since)
        )
        .map_err(failed)
    }
}

impl Lock for FileLock {
    fn retake(&self) -> Result<()> {
        if std::process::id() != self.process {
            return Err(Error::Closed {
                reason: format!("it belongs to process {}, which forked this one", self.process),
            });
        }
        let name = self.path.join(LOCK);
        let failed = |source: Errno| Error::io("lock", &name, source);
        let file = self.file.as_ref().ok_or_else(|| failed(Errno::BADF))?;
        match rustix::fs::fcntl_lock(file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(Errno::AGAIN | Errno::ACCESS) => {
                return Err(in_use(&self.path, std::os::fd::AsFd::as_fd(&self.root)));
            }
            Err(source) => return Err(failed(source)),
        }
        // A lock on a file that is no longer the one under this name protects nothing.
        let stat =
            rustix::fs::statat(&self.root, LOCK, AtFlags::SYMLINK_NOFOLLOW).map_err(failed)?;
        if (stat.st_dev, stat.st_ino) == self.key {
            Ok(())
        } else {
            Err(Error::io("lock", name, std::io::Error::other("it was replaced by another file")))
        }
    }
}

impl Drop for FileLock {
    fn drop(&mut self) {
        if std::process::id() != self.process {
            // Left open: closing it would drop a lock that this forked child took itself since.
            let _ = self.file.take().map(IntoRawFd::into_raw_fd);
            return;
        }
        let mut held = HELD.lock().unwrap_or_else(PoisonError::into_inner);
        // If the lock was lost, `OWNER` is somebody else's.
        if self.retake().is_ok() {
            let _ = rustix::fs::unlinkat(&self.root, OWNER, AtFlags::empty());
        }
        // Closed before another thread can take the lock: closing later would drop theirs.
        drop(self.file.take());
        held.remove(&(self.process, self.key.0, self.key.1));
    }
}

fn in_use(path: &Path, root: BorrowedFd<'_>) -> Error {
    let owner = owner(root).unwrap_or_else(|| String::from("another writer"));
    Error::InUse { path: path.to_owned(), owner }
}

/// Returns what `OWNER` says, if it is there.
fn owner(root: BorrowedFd<'_>) -> Option<String> {
    use std::io::Read as _;
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NONBLOCK;
    let file = rustix::fs::openat(root, OWNER, flags, Mode::empty()).ok()?;
    let mut text = String::new();
    std::fs::File::from(file).take(512).read_to_string(&mut text).ok()?;
    let line = text.lines().next()?.trim();
    (!line.is_empty()).then(|| line.to_owned())
}

/// Returns what `OWNER` says unless that process ran on this host and is gone: a killed writer
/// leaves the file behind.
pub(crate) fn living_owner(root: BorrowedFd<'_>) -> Option<String> {
    let owner = owner(root)?;
    let parts: Vec<&str> = owner.split(' ').collect();
    if let ["process", process, "on", "host", host, ..] = parts.as_slice()
        && *host == rustix::system::uname().nodename().to_string_lossy()
        && let Some(process) = process.parse().ok().and_then(Pid::from_raw)
        && rustix::process::test_kill_process(process) == Err(Errno::SRCH)
    {
        return None;
    }
    Some(owner)
}

/// Returns seconds since 1970 as `2026-01-31 23:59:59 UTC` (the civil-from-days algorithm of
/// H. Hinnant, "chrono-compatible low-level date algorithms").
fn utc(seconds: u64) -> String {
    let (days, second) = (seconds / 86_400, seconds % 86_400);
    let shifted = days + 719_468;
    let era = shifted / 146_097;
    let day_of_era = shifted % 146_097;
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    format!(
        "{year:04}-{month:02}-{day:02} {:02}:{:02}:{:02} UTC",
        second / 3600,
        second / 60 % 60,
        second % 60
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seconds_print_as_the_calendar_says() {
        assert_eq!(utc(0), "1970-01-01 00:00:00 UTC");
        assert_eq!(utc(951_827_696), "2000-02-29 12:34:56 UTC");
        assert_eq!(utc(1_798_761_599), "2026-12-31 23:59:59 UTC");
    }
}
