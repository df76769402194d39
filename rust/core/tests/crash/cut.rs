//! What a disk may hold after the power was cut: bytes and directory entries that were not
//! fsynced are there, half there or not there, each on its own.

use std::collections::BTreeMap;
use std::path::Path;

use lamina_core::disk::Folder;

use crate::random::Random;
use crate::record::{Change, Log};

const FOLDERS: [Folder; 3] = [Folder::Root, Folder::Manifests, Folder::Shards];
/// What a disk writes whole or not at all.
const SECTOR: usize = 512;

#[derive(Clone, Debug, Default)]
struct Bytes {
    durable: Vec<u8>,
    current: Vec<u8>,
    pending: Vec<(usize, Vec<u8>)>,
}

#[derive(Clone, Debug)]
enum EntryChange {
    Set(String, usize),
    Unset(String),
    Move(String, String, usize),
}

#[derive(Clone, Debug, Default)]
struct Entries {
    durable: BTreeMap<String, usize>,
    current: BTreeMap<String, usize>,
    pending: Vec<EntryChange>,
}

impl Entries {
    fn change(&mut self, change: EntryChange) {
        apply(&mut self.current, &change);
        self.pending.push(change);
    }
}

fn apply(entries: &mut BTreeMap<String, usize>, change: &EntryChange) {
    match change {
        EntryChange::Set(name, file) => {
            entries.insert(name.clone(), *file);
        }
        EntryChange::Unset(name) => {
            entries.remove(name);
        }
        EntryChange::Move(from, to, file) => {
            entries.remove(from);
            entries.insert(to.clone(), *file);
        }
    }
}

/// The state of a disk: what is seen, and what of it is durable.
#[derive(Clone, Debug, Default)]
pub(crate) struct Model {
    files: Vec<Bytes>,
    folders: BTreeMap<Folder, Entries>,
    made: bool,
    made_durable: bool,
}

/// What a disk holds.
#[derive(Clone, Debug, Default)]
pub(crate) struct Image {
    files: BTreeMap<(Folder, String), Vec<u8>>,
    folders: Vec<Folder>,
}

impl Image {
    /// Writes it out as a directory.
    pub(crate) fn write_to(&self, path: &Path) {
        for folder in &self.folders {
            std::fs::create_dir_all(path.join(folder.name())).unwrap();
        }
        for ((folder, name), bytes) in &self.files {
            std::fs::write(path.join(folder.name()).join(name), bytes).unwrap();
        }
    }

    /// Returns a log, and the model that goes with it, that begin here: all is durable.
    pub(crate) fn continued(&self) -> (Log, Model) {
        let mut model = Model { made: self.folders.len() > 1, ..Model::default() };
        model.made_durable = model.made;
        let mut names = BTreeMap::new();
        for ((folder, name), bytes) in &self.files {
            let file = model.files.len();
            names.insert((*folder, name.clone()), file);
            model.files.push(Bytes {
                durable: bytes.clone(),
                current: bytes.clone(),
                pending: Vec::new(),
            });
            let entries = model.folders.entry(*folder).or_default();
            entries.durable.insert(name.clone(), file);
            entries.current.insert(name.clone(), file);
        }
        (Log::over(names), model)
    }
}

impl Model {
    /// Takes one change.
    pub(crate) fn apply(&mut self, change: &Change) {
        match change {
            Change::MakeFolders => self.made = true,
            Change::Create(folder, name, file) => {
                self.files.resize(self.files.len().max(file + 1), Bytes::default());
                self.entries(*folder).change(EntryChange::Set(name.clone(), *file));
            }
            Change::Write(file, offset, bytes) => {
                let offset = usize::try_from(*offset).unwrap();
                let file = &mut self.files[*file];
                put(&mut file.current, offset, bytes);
                file.pending.push((offset, bytes.clone()));
            }
            Change::SyncFile(file) => {
                let file = &mut self.files[*file];
                file.durable.clone_from(&file.current);
                file.pending.clear();
            }
            Change::Rename(folder, from, to) => {
                let entries = self.entries(*folder);
                let file = entries.current[from];
                entries.change(EntryChange::Move(from.clone(), to.clone(), file));
            }
            Change::Link(folder, from, to) => {
                let entries = self.entries(*folder);
                let file = entries.current[from];
                entries.change(EntryChange::Set(to.clone(), file));
            }
            Change::Remove(folder, name) => {
                let entries = self.entries(*folder);
                if entries.current.contains_key(name) {
                    entries.change(EntryChange::Unset(name.clone()));
                }
            }
            Change::SyncFolder(folder) => {
                self.made_durable |= self.made && *folder == Folder::Root;
                let entries = self.entries(*folder);
                entries.durable.clone_from(&entries.current);
                entries.pending.clear();
            }
            Change::Committing(_) | Change::Acknowledged(..) => {}
        }
    }

    fn entries(&mut self, folder: Folder) -> &mut Entries {
        self.folders.entry(folder).or_default()
    }

    /// Returns what is seen now: what a kill leaves.
    pub(crate) fn as_seen(&self) -> Image {
        self.image(
            |folder| (self.made || folder == Folder::Root, folder_now(self, folder)),
            |file| file.current.clone(),
        )
    }

    /// Returns what a power cut may leave.
    pub(crate) fn cut(&self, random: &mut Random) -> Image {
        let mut draw = Random(random.next());
        let mut bytes_draw = Random(random.next());
        self.image(
            |folder| {
                let is_there =
                    folder == Folder::Root || self.made_durable || (self.made && draw.chance(50));
                let mut entries = self.folders.get(&folder).cloned().unwrap_or_default();
                let percent = draw.pick(&[0, 10, 50, 50, 90, 100]);
                for change in &entries.pending {
                    if draw.chance(percent) {
                        apply(&mut entries.durable, change);
                    }
                }
                (is_there, entries.durable)
            },
            |file| keep_some(file, &mut bytes_draw),
        )
    }

    fn image(
        &self,
        mut entries: impl FnMut(Folder) -> (bool, BTreeMap<String, usize>),
        mut bytes: impl FnMut(&Bytes) -> Vec<u8>,
    ) -> Image {
        let mut image = Image::default();
        // Two names of one file show the same bytes.
        let mut drawn: BTreeMap<usize, Vec<u8>> = BTreeMap::new();
        for folder in FOLDERS {
            let (is_there, entries) = entries(folder);
            if !is_there {
                continue;
            }
            image.folders.push(folder);
            for (name, file) in entries {
                let bytes = drawn.entry(file).or_insert_with(|| bytes(&self.files[file]));
                image.files.insert((folder, name), bytes.clone());
            }
        }
        image
    }
}

fn folder_now(model: &Model, folder: Folder) -> BTreeMap<String, usize> {
    model.folders.get(&folder).map(|entries| entries.current.clone()).unwrap_or_default()
}

fn put(bytes: &mut Vec<u8>, offset: usize, more: &[u8]) {
    if !more.is_empty() {
        bytes.resize(bytes.len().max(offset + more.len()), 0);
        bytes[offset..offset + more.len()].copy_from_slice(more);
    }
}

fn keep_some(file: &Bytes, random: &mut Random) -> Vec<u8> {
    let mut bytes = file.durable.clone();
    let percent = random.pick(&[0, 30, 50, 80, 100]);
    for (offset, written) in &file.pending {
        let mut at = 0;
        while at < written.len() {
            let end = ((offset + at + SECTOR) / SECTOR * SECTOR - offset).min(written.len());
            if random.chance(percent) {
                put(&mut bytes, offset + at, &written[at..end]);
            }
            at = end;
        }
    }
    if let Some((offset, written)) = file.pending.last()
        && random.chance(30)
    {
        // The last write is torn in the middle of a sector.
        put(&mut bytes, *offset, &written[..random.index(written.len() + 1)]);
    }
    if random.chance(40) {
        // The size is there, the bytes are not.
        bytes.resize(bytes.len().max(file.current.len()), 0);
    }
    bytes
}
