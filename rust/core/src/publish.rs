//! Making a shard or a version visible: the protocol of `docs/design.md`, step by step.

use std::collections::BTreeSet;
use std::sync::Arc;

use crate::build::Sealed;
use crate::disk::{Disk, Folder, Lock};
use crate::error::{Error, Result};
use crate::layout::{Plan, Region};
use crate::lock::{LOCK, OWNER};
use crate::manifest::{self, Entry, Manifest};
use crate::shard::{Shard, Start};

/// The file that says which format this is.
pub(crate) const FORMAT_FILE: &str = "FORMAT";
/// A manifest on its way.
const NEXT: &str = "next.part";

/// Returns whether a name is that of a temporary file.
pub(crate) fn is_part(name: &str) -> bool {
    name.strip_suffix(".part").is_some()
}

/// Returns the committed versions, highest first.
pub(crate) fn versions(disk: &dyn Disk) -> Result<Vec<u64>> {
    let mut versions: Vec<u64> = disk
        .list(Folder::Manifests)?
        .iter()
        .filter_map(|name| manifest::version_of(name))
        .collect();
    versions.sort_unstable_by(|first, second| second.cmp(first));
    Ok(versions)
}

/// Reads one version.
pub(crate) fn read_version(disk: &dyn Disk, version: u64) -> Result<Manifest> {
    let name = manifest::file_name(version);
    let file = disk.open(Folder::Manifests, &name)?;
    let path = disk.root().join(Folder::Manifests.name()).join(&name);
    let bytes = file.id()?.bytes;
    let decoded = if bytes > manifest::MAX_BYTES {
        Err(format!("it has {bytes} bytes, more than {}", manifest::MAX_BYTES))
    } else {
        let mut text = vec![0; crate::shard::length(bytes)];
        file.read_at(0, &mut text)?;
        Manifest::decode(&text, version)
    };
    decoded.map_err(|found| {
        let older = versions(disk).unwrap_or_default().into_iter().find(|&other| other < version);
        Error::Manifest { path, found, older }
    })
}

/// Refuses a store whose major format is another one, and returns its minor. `None` if no format
/// is there yet: a crash before version 1 may leave `FORMAT` out, or half there.
pub(crate) fn format_minor(disk: &dyn Disk) -> Result<Option<u32>> {
    let unready = || Ok::<_, Error>(versions(disk)?.is_empty());
    let file = match disk.open(Folder::Root, FORMAT_FILE) {
        Err(error) if error.is_not_found() && unready()? => return Ok(None),
        other => other?,
    };
    let mut bytes = vec![0; crate::shard::length(file.id()?.bytes.min(64))];
    file.read_at(0, &mut bytes)?;
    let text = String::from_utf8_lossy(&bytes).into_owned();
    let found = text.lines().next().unwrap_or_default().to_owned();
    let numbers = found.strip_prefix("lamina ").and_then(|rest| {
        let (major, minor) = rest.split_once('.')?;
        Some((major.parse::<u32>().ok()?, minor.parse::<u32>().ok()?))
    });
    match numbers {
        Some((1, minor)) => Ok(Some(minor)),
        None if unready()? => {
            // What a crash may leave of ours is its beginning, then zeros. Any other file is not ours.
            let written = bytes.iter().rposition(|&byte| byte != 0).map_or(0, |last| last + 1);
            bytes.truncate(written);
            if format!("{}\n", crate::FORMAT).as_bytes().starts_with(&bytes) {
                return Ok(None);
            }
            let found = vec![String::from(FORMAT_FILE)];
            Err(Error::Foreign { path: disk.root().to_owned(), found })
        }
        _ => Err(Error::Newer { path: disk.root().to_owned(), found }),
    }
}

/// Returns the names in the store's directory if all of them are ours, or an error that lists
/// those that are not. Looks into the folders only where `FORMAT` does not vouch for them.
pub(crate) fn refuse_foreign(disk: &dyn Disk) -> Result<Vec<String>> {
    let mut names = disk.list(Folder::Root)?;
    names.sort_unstable();
    if names.iter().any(|name| name == FORMAT_FILE)
        && format_minor(disk)?.is_some()
        && !versions(disk)?.is_empty()
    {
        return Ok(names);
    }
    let ours = [FORMAT_FILE, LOCK, OWNER, "manifests", "shards", "spool"];
    let mut foreign: Vec<String> =
        names.iter().filter(|name| !ours.contains(&name.as_str())).cloned().collect();
    for name in disk.list(Folder::Manifests)? {
        if manifest::version_of(&name).is_none() && name != NEXT {
            foreign.push(format!("manifests/{name}"));
        }
    }
    let bare = versions(disk)?.is_empty();
    for name in disk.list(Folder::Shards)? {
        // Version 1 comes before any shard: shards without a version have lost their manifests,
        // and beginning anew would remove them.
        if !is_part(&name) && (bare || !manifest::is_shard_file_name(&name)) {
            foreign.push(format!("shards/{name}"));
        }
    }
    if foreign.is_empty() {
        return Ok(names);
    }
    let more = foreign.len().saturating_sub(5);
    foreign.truncate(5);
    if more > 0 {
        foreign.push(format!("and {more} more"));
    }
    Err(Error::Foreign { path: disk.root().to_owned(), found: foreign })
}

/// Refuses to write to a store that a later minor version has written: what this one does not
/// know of would be lost.
pub(crate) fn refuse_later(disk: &dyn Disk, manifests: &[&Manifest]) -> Result<()> {
    let ours = crate::FORMAT.rsplit('.').next().and_then(|minor| minor.parse().ok());
    let theirs = format_minor(disk)?;
    let further = manifests.iter().any(|manifest| manifest.further_groups > 0);
    if theirs <= ours && !further {
        return Ok(());
    }
    let mut found = format!("lamina 1.{}", theirs.unwrap_or(0));
    if further {
        found.push_str(", with groups of sites that a later version added");
    }
    Err(Error::Newer { path: disk.root().to_owned(), found })
}

/// Takes the lock again and checks that nobody else has published.
pub(crate) fn check_turn(disk: &dyn Disk, lock: &dyn Lock, expected: u64) -> Result<()> {
    lock.retake()?;
    let found = versions(disk)?.first().copied().unwrap_or(0);
    if found == expected {
        Ok(())
    } else {
        Err(Error::Overtaken { path: disk.root().to_owned(), expected, found })
    }
}

/// Gives a sealed shard its name, which stands for its bytes. If the name exists, that shard is
/// used where it is intact, and renamed over where it is damaged.
pub(crate) fn publish_shard(
    disk: &dyn Disk,
    lock: &dyn Lock,
    version: u64,
    plan: &Arc<Plan>,
    sealed: &Sealed,
    counts: Vec<[u64; 4]>,
) -> Result<Entry> {
    let entry = sealed.entry(counts);
    check_turn(disk, lock, version)?;
    let name = entry.file_name();
    let exists = match disk.open(Folder::Shards, &name) {
        Ok(_) => true,
        Err(error) if error.is_not_found() => false,
        Err(error) => return Err(error),
    };
    if exists && is_intact(disk, plan, &entry)? {
        disk.open(Folder::Shards, &name)?.sync()?;
        disk.remove(Folder::Shards, sealed.part)?;
    } else {
        disk.rename(Folder::Shards, sealed.part, &name, exists)?;
    }
    Ok(entry)
}

fn is_intact(disk: &dyn Disk, plan: &Arc<Plan>, entry: &Entry) -> Result<bool> {
    let shard = match Shard::open(disk, plan, entry, Start::default()) {
        Ok(shard) => shard,
        Err(Error::Damaged { .. } | Error::Missing { .. }) => return Ok(false),
        Err(error) => return Err(error),
    };
    let regions: Vec<Region> = shard.layout().checked().copied().collect();
    for region in regions {
        match shard.read_checked(&region, (0, region.bytes), &mut |_| Ok(())) {
            Ok(()) => {}
            Err(Error::Damaged { .. }) => return Ok(false),
            Err(error) => return Err(error),
        }
    }
    Ok(true)
}

/// Makes version `manifest.version` visible and durable. Every shard that it names is durable
/// already; their entries become so here.
pub(crate) fn publish_version(disk: &dyn Disk, lock: &dyn Lock, manifest: &Manifest) -> Result<()> {
    let version = manifest.version;
    check_turn(disk, lock, version - 1)?;
    disk.sync_folder(Folder::Shards)?;
    let bytes = manifest.encode().map_err(|source| Error::Json { what: "the manifest", source })?;
    let file = disk.create(Folder::Manifests, NEXT)?;
    file.write_at(0, &bytes)?;
    file.sync()?;
    let linked = disk.link(Folder::Manifests, NEXT, &manifest::file_name(version))?;
    disk.remove(Folder::Manifests, NEXT)?;
    let found = versions(disk)?.first().copied().unwrap_or(0);
    if !linked || found != version {
        let path = disk.root().to_owned();
        return Err(Error::Overtaken { path, expected: version - 1, found });
    }
    disk.sync_folder(Folder::Manifests)
}

/// Removes what no reader can need any more: manifests below the two newest, then shards that
/// neither of these names. Foreign names stay.
pub(crate) fn clean_up(disk: &dyn Disk, lock: &dyn Lock, keep: &[&Manifest]) -> Result<()> {
    let newest = keep.first().map_or(0, |manifest| manifest.version);
    let remove = |folder: Folder, name: &str| -> Result<()> {
        check_turn(disk, lock, newest)?;
        disk.remove(folder, name)
    };
    for version in versions(disk)? {
        if !keep.iter().any(|manifest| manifest.version == version) {
            remove(Folder::Manifests, &manifest::file_name(version))?;
        }
    }
    let named: BTreeSet<String> =
        keep.iter().flat_map(|manifest| &manifest.shards).map(Entry::file_name).collect();
    for name in disk.list(Folder::Shards)? {
        if manifest::is_shard_file_name(&name) && !named.contains(&name) {
            remove(Folder::Shards, &name)?;
        }
    }
    Ok(())
}

/// Removes every temporary file of this writer, or of one that is gone.
pub(crate) fn remove_parts(disk: &dyn Disk, lock: &dyn Lock, version: u64) -> Result<()> {
    for folder in [Folder::Shards, Folder::Manifests] {
        for name in disk.list(folder)? {
            if is_part(&name) {
                check_turn(disk, lock, version)?;
                disk.remove(folder, &name)?;
            }
        }
    }
    Ok(())
}

/// Returns 128 random bits in hex.
pub(crate) fn random_id() -> Result<String> {
    let mut bytes = [0u8; 16];
    let mut filled = 0;
    while let Some(rest) = bytes.get_mut(filled..)
        && !rest.is_empty()
    {
        filled += rustix::rand::getrandom(rest, rustix::rand::GetRandomFlags::empty())
            .map_err(|source| Error::io("read", "/dev/urandom", source))?;
    }
    Ok(format!("{:032x}", u128::from_le_bytes(bytes)))
}
