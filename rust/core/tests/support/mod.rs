//! A made-up capture whose every value is known, and the check that a store holds it.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use lamina_core::disk::{Directory, Disk};
use lamina_core::dtype::Dtype;
use lamina_core::layout::SiteSpec;
use lamina_core::source::Source;
use lamina_core::{NewStore, Pace, Store, Window, Writer};
use tempfile::TempDir;

/// The numbers of a few windows: what was appended, and what a store must give back.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Data {
    pub(crate) columns: [Vec<u8>; 2],
    pub(crate) tokens: Vec<u8>,
    pub(crate) positions: Vec<u32>,
    pub(crate) flags: Vec<u8>,
    pub(crate) prompt_rows: Vec<u64>,
    pub(crate) prompt_lengths: Vec<u64>,
    pub(crate) prompt_ids: Vec<u8>,
    pub(crate) texts: Vec<String>,
    pub(crate) overflow: Vec<(u64, u64, u64)>,
    /// Per site: NaN, infinite, overflowed.
    pub(crate) counts: [[u64; 3]; 2],
}

impl Data {
    /// Appends a prompt of `length` tokens whose last `rows` are stored.
    fn push(&mut self, (row, prompt): (u64, u64), (rows, length): (u64, u64)) {
        for (index, position) in (length - rows..length).enumerate() {
            let row = row + index as u64;
            let here = self.positions.len() as u64;
            for part in 0..3 {
                let bits = match (part, row % 17, row % 23) {
                    (0, 3, _) => f32::NAN.to_bits(),
                    (1, _, 5) => f32::INFINITY.to_bits(),
                    _ => u32::try_from((row * 3 + part) % (1 << 23)).unwrap() | 0x3f80_0000,
                };
                self.columns[0].extend(bits.to_le_bytes());
            }
            self.counts[0][0] += u64::from(row % 17 == 3);
            self.counts[0][1] += u64::from(row % 23 == 5);
            self.columns[1].push((row % 251).to_le_bytes()[0]);
            if row % 13 == 4 {
                self.overflow.push((1, here, 2));
                self.counts[1][2] += 2;
            }
            self.tokens.extend(token(prompt, position).to_le_bytes());
            self.positions.push(u32::try_from(position).unwrap());
            self.flags.push(u8::from(row.is_multiple_of(5)));
        }
        self.prompt_rows.push(rows);
        self.prompt_lengths.push(length);
        self.prompt_ids.extend((0..length).flat_map(|at| token(prompt, at).to_le_bytes()));
        self.texts.push(format!(
            "prompt {prompt}, {} é",
            "x".repeat(usize::from((prompt % 9).to_le_bytes()[0]))
        ));
    }

    pub(crate) fn rows(&self) -> u64 {
        self.positions.len() as u64
    }

    /// Lends the numbers as a window.
    pub(crate) fn lend<T>(&self, with: impl FnOnce(&Window<'_>) -> T) -> T {
        let columns: [&dyn Source; 2] = [&self.columns[0], &self.columns[1]];
        with(&Window {
            columns: &columns,
            tokens: &self.tokens,
            positions: &self.positions,
            flags: &self.flags,
            prompt_rows: &self.prompt_rows,
            prompt_lengths: &self.prompt_lengths,
            prompt_ids: &self.prompt_ids,
            texts: Some(&self.texts),
            overflow: &self.overflow,
        })
    }

    fn add(&mut self, more: &Self) {
        for (column, more) in self.columns.iter_mut().zip(&more.columns) {
            column.extend(more);
        }
        self.tokens.extend(&more.tokens);
        self.positions.extend(&more.positions);
        self.flags.extend(&more.flags);
        self.prompt_rows.extend(&more.prompt_rows);
        self.prompt_lengths.extend(&more.prompt_lengths);
        self.prompt_ids.extend(&more.prompt_ids);
        self.texts.extend(more.texts.iter().cloned());
        for (site, counts) in more.counts.iter().enumerate() {
            for (kind, count) in counts.iter().enumerate() {
                self.counts[site][kind] += count;
            }
        }
    }
}

fn token(prompt: u64, position: u64) -> u32 {
    u32::try_from(prompt * 1000 + position).unwrap()
}

/// A capture: its windows, and what decides the files.
#[derive(Clone, Debug)]
pub(crate) struct Job {
    pub(crate) windows: Vec<Data>,
    /// The numbers of the first n windows, for every n.
    pub(crate) upto: Vec<Data>,
    pub(crate) shard_bytes: u64,
    /// Whether the number of rows is known from the start.
    pub(crate) total: bool,
    pub(crate) texts: bool,
}

pub(crate) fn sites() -> Vec<SiteSpec> {
    let site = |path: &str, dtype, shape| SiteSpec { path: path.to_owned(), dtype, shape };
    vec![site("model.a.output", Dtype::F32, vec![3]), site("model.b.output", Dtype::I8, vec![])]
}

/// Bytes that a row of these sites takes, row tables counted.
pub(crate) const ROW_BYTES: u64 = 3 * 4 + 1 + 9;

impl Job {
    /// Returns the capture of these windows of `(rows, length)` prompts, with at most `rows` rows
    /// in a shard (a power of two).
    pub(crate) fn new(windows: &[Vec<(u64, u64)>], rows: u64) -> Self {
        let (mut row, mut prompt) = (0, 0);
        let mut upto = vec![Data::default()];
        let windows: Vec<Data> = windows
            .iter()
            .map(|prompts| {
                let mut data = Data::default();
                for &(rows, length) in prompts {
                    data.push((row, prompt), (rows, length));
                    row += rows;
                    prompt += 1;
                }
                let mut sum = upto.last().unwrap().clone();
                sum.add(&data);
                upto.push(sum);
                data
            })
            .collect();
        Self { windows, upto, shard_bytes: rows * ROW_BYTES, total: false, texts: true }
    }

    pub(crate) fn new_store(&self) -> NewStore {
        NewStore {
            sites: sites(),
            identity: String::from(r#"{"made":"up"}"#),
            about: String::from("{}"),
            shard_bytes: self.shard_bytes,
            texts: self.texts,
        }
    }

    /// Returns a pace that commits only when asked to.
    pub(crate) fn pace(&self) -> Pace {
        self.paced(Duration::from_secs(1 << 30))
    }

    pub(crate) fn paced(&self, commit_every: Duration) -> Pace {
        Pace { rows_total: self.total.then(|| self.all().rows()), commit_every }
    }

    pub(crate) fn all(&self) -> &Data {
        self.upto.last().unwrap()
    }

    pub(crate) fn begin(&self, disk: &Arc<dyn Disk>) -> lamina_core::Result<Writer> {
        Writer::begin(Arc::clone(disk), disk.lock()?, self.new_store(), self.pace())
    }

    pub(crate) fn append(&self, writer: &mut Writer, window: usize) -> lamina_core::Result<bool> {
        self.windows[window].lend(|window| writer.append(window))
    }

    /// Appends windows `from..to`.
    pub(crate) fn append_all(&self, writer: &mut Writer, from: usize, to: usize) {
        for window in from..to {
            self.append(writer, window).unwrap();
        }
    }

    /// Captures everything without interruption and returns the names of the shards.
    pub(crate) fn names(&self) -> Vec<String> {
        let directory = folder();
        let mut writer = self.begin(&disk(directory.path())).unwrap();
        self.append_all(&mut writer, 0, self.windows.len());
        writer.finish().unwrap();
        shard_names(writer.manifest())
    }

    /// Says what is wrong with the store at `path`, if it is to hold the first `windows` windows.
    pub(crate) fn compare(&self, store: &Store, windows: usize) -> Result<(), String> {
        let expected = &self.upto[windows];
        let (found, counts) = read(store)?;
        let texts = if self.texts { expected.texts.clone() } else { Vec::new() };
        let expected = Data { texts, overflow: Vec::new(), ..expected.clone() };
        if counts != expected.counts {
            return Err(format!("counts are {counts:?}, not {:?}", expected.counts));
        }
        if (Data { counts, ..found }) != expected {
            return Err(format!("the numbers are not those of {windows} windows"));
        }
        let identity = store.manifest().identity.get();
        if identity != r#"{"made":"up"}"# {
            return Err(format!("identity is {identity}"));
        }
        Ok(())
    }
}

pub(crate) fn verify(store: &Store) -> Result<(), String> {
    match store.verify(1, &mut |_, _| true) {
        Ok(damages) if damages.is_empty() => Ok(()),
        Ok(damages) => Err(format!("damaged: {damages:?}")),
        Err(error) => Err(error.to_string()),
    }
}

/// Reads all that a store holds, in every way that there is.
pub(crate) fn read(store: &Store) -> Result<(Data, [[u64; 3]; 2]), String> {
    let failed = |error: lamina_core::Error| error.to_string();
    let mut data = Data::default();
    let rows: Vec<i64> = (0..i64::try_from(store.rows()).unwrap()).collect();
    for (site, bytes) in data.columns.iter_mut().enumerate() {
        let row_bytes = usize::try_from(store.plan().row_bytes(site)).unwrap();
        bytes.resize(rows.len() * row_bytes, 0);
        store.gather(site, &rows, bytes, (0, row_bytes), true).map_err(failed)?;
        let column = store.column(site).map_err(failed)?;
        let mut mapped = vec![0; column.len()];
        column.copy_to(0, &mut mapped).map_err(|error| error.to_string())?;
        if mapped != *bytes {
            return Err(format!("column {site} and what is gathered from it differ"));
        }
    }
    let [tokens, positions, flags] = store.row_tables(0, store.rows()).map_err(failed)?;
    (data.tokens, data.flags) = (tokens, flags);
    let (chunks, _) = positions.as_chunks::<4>();
    data.positions = chunks.iter().map(|&bytes| u32::from_le_bytes(bytes)).collect();
    let mut start = 0;
    let mut owners = Vec::new();
    for (prompt, rows) in store.prompt_rows(0, store.prompts()).map_err(failed)?.iter().enumerate()
    {
        if rows.start != start {
            return Err(format!("prompt {prompt} starts at {}, not {start}", rows.start));
        }
        start += rows.rows;
        if start > store.rows() {
            return Err(format!("prompt {prompt} ends behind the last row"));
        }
        owners.resize(usize::try_from(start).unwrap(), i64::try_from(prompt).unwrap());
        data.prompt_rows.push(rows.rows);
        data.prompt_lengths.push(rows.length);
        let prompt = i64::try_from(prompt).unwrap();
        data.prompt_ids.extend(store.prompt_ids(prompt).map_err(failed)?);
        data.texts.extend(store.prompt_text(prompt).map_err(failed)?);
    }
    let positions: Vec<i64> = data.positions.iter().map(|&position| position.into()).collect();
    if store.prompts_of(&rows).map_err(failed)? != owners {
        return Err(String::from("rows have other prompts than the prompts have rows"));
    }
    if store.locate(&owners, &positions).map_err(failed)? != rows {
        return Err(String::from("tokens are found in other rows"));
    }
    let mut counts = [[0; 3]; 2];
    for &[site, nan, infinite, overflow] in store.manifest().shards.iter().flat_map(|s| &s.counts) {
        let counts = &mut counts[usize::try_from(site).unwrap()];
        for (count, more) in counts.iter_mut().zip([nan, infinite, overflow]) {
            *count += more;
        }
    }
    Ok((data, counts))
}

pub(crate) fn shard_names(manifest: &lamina_core::manifest::Manifest) -> Vec<String> {
    manifest.shards.iter().map(|shard| shard.name.clone()).collect()
}

/// Returns an empty directory, in memory where the system has one.
pub(crate) fn folder() -> TempDir {
    let memory = Path::new("/dev/shm");
    if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() }.unwrap()
}

pub(crate) fn disk(path: &Path) -> Arc<dyn Disk> {
    Arc::new(Directory::create(path).unwrap())
}
