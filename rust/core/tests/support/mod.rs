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

/// A small generator of numbers (splitmix64), so that a seed says everything.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// Returns a number below `limit`, which is not zero.
    pub fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    pub fn index(&mut self, limit: usize) -> usize {
        usize::try_from(self.below(limit as u64)).unwrap()
    }

    pub fn chance(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }

    pub fn pick<T: Copy>(&mut self, values: &[T]) -> T {
        values[self.index(values.len())]
    }
}

/// The numbers of a few windows: what was appended, and what a store must give back.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Data {
    pub columns: [Vec<u8>; 2],
    pub tokens: Vec<u8>,
    pub positions: Vec<u32>,
    pub flags: Vec<u8>,
    pub prompt_rows: Vec<u64>,
    pub prompt_lengths: Vec<u64>,
    pub prompt_ids: Vec<u8>,
    pub texts: Vec<String>,
    pub overflow: Vec<(u64, u64, u64)>,
    /// Per site: NaN, infinite, overflowed.
    pub counts: [[u64; 3]; 2],
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
            self.flags.push(u8::from(row % 5 == 0));
        }
        self.prompt_rows.push(rows);
        self.prompt_lengths.push(length);
        self.prompt_ids.extend((0..length).flat_map(|at| token(prompt, at).to_le_bytes()));
        self.texts.push(format!("prompt {prompt}, {} é", "x".repeat(prompt as usize % 9)));
    }

    pub fn rows(&self) -> u64 {
        self.positions.len() as u64
    }

    /// Lends the numbers as a window.
    pub fn lend<T>(&self, with: impl FnOnce(&Window<'_>) -> T) -> T {
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
pub struct Job {
    pub windows: Vec<Data>,
    /// The numbers of the first n windows, for every n.
    pub upto: Vec<Data>,
    pub shard_bytes: u64,
    /// Whether the number of rows is known from the start.
    pub total: bool,
    pub texts: bool,
}

pub fn sites() -> Vec<SiteSpec> {
    let site = |path: &str, dtype, shape| SiteSpec { path: path.to_owned(), dtype, shape };
    vec![site("model.a.output", Dtype::F32, vec![3]), site("model.b.output", Dtype::I8, vec![])]
}

/// Bytes that a row of these sites takes, row tables counted.
pub const ROW_BYTES: u64 = 3 * 4 + 1 + 9;

impl Job {
    /// Returns the capture of these windows of `(rows, length)` prompts, with at most `rows` rows
    /// in a shard (a power of two).
    pub fn new(windows: &[Vec<(u64, u64)>], rows: u64) -> Self {
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

    pub fn with_total(self) -> Self {
        Self { total: true, ..self }
    }

    /// Returns a capture of random windows: prompts longer than a shard, without rows, none.
    pub fn random(random: &mut Random, windows: usize) -> Self {
        let rows = random.pick(&[2, 4, 16]);
        let windows: Vec<Vec<(u64, u64)>> = (0..windows)
            .map(|_| {
                (0..random.below(4))
                    .map(|_| {
                        let length = random.pick(&[1, 1, 2, rows / 2, rows, 2 * rows + 1]);
                        let some = random.below(length + 1);
                        (random.pick(&[0, length, length, some]), length)
                    })
                    .collect()
            })
            .collect();
        let mut job = Self::new(&windows, rows);
        job.total = random.chance(50);
        job.texts = random.chance(50);
        job
    }

    pub fn new_store(&self) -> NewStore {
        NewStore {
            sites: sites(),
            identity: String::from(r#"{"made":"up"}"#),
            about: String::from("{}"),
            shard_bytes: self.shard_bytes,
            texts: self.texts,
        }
    }

    /// Returns a pace that commits only when asked to.
    pub fn pace(&self) -> Pace {
        self.paced(Duration::from_secs(1 << 30))
    }

    pub fn paced(&self, commit_every: Duration) -> Pace {
        Pace { rows_total: self.total.then(|| self.all().rows()), commit_every }
    }

    pub fn all(&self) -> &Data {
        self.upto.last().unwrap()
    }

    pub fn begin(&self, disk: &Arc<dyn Disk>) -> lamina_core::Result<Writer> {
        Writer::begin(Arc::clone(disk), disk.lock()?, self.new_store(), self.pace())
    }

    pub fn resume(&self, disk: &Arc<dyn Disk>) -> lamina_core::Result<Writer> {
        Writer::resume(Arc::clone(disk), disk.lock()?, self.pace())
    }

    pub fn append(&self, writer: &mut Writer, window: usize) -> lamina_core::Result<bool> {
        self.windows[window].lend(|window| writer.append(window))
    }

    /// Appends windows `from..to`.
    pub fn append_all(&self, writer: &mut Writer, from: usize, to: usize) {
        for window in from..to {
            self.append(writer, window).unwrap();
        }
    }

    /// Captures everything without interruption and returns the names of the shards.
    pub fn names(&self) -> Vec<String> {
        let directory = folder();
        let mut writer = self.begin(&disk(directory.path())).unwrap();
        self.append_all(&mut writer, 0, self.windows.len());
        writer.finish().unwrap();
        shard_names(writer.manifest())
    }

    /// Says what is wrong with the store at `path`, if it is to hold the first `windows` windows.
    pub fn compare(&self, store: &Store, windows: usize) -> Result<(), String> {
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

    pub fn check(&self, path: &Path, windows: usize) {
        let store = Store::open(path, None).unwrap();
        self.compare(&store, windows).unwrap();
        assert_eq!(verify(&store), Ok(()));
    }
}

pub fn verify(store: &Store) -> Result<(), String> {
    match store.verify(1, &mut |_, _| true) {
        Ok(damages) if damages.is_empty() => Ok(()),
        Ok(damages) => Err(format!("damaged: {damages:?}")),
        Err(error) => Err(error.to_string()),
    }
}

/// Reads all that a store holds, in every way that there is.
pub fn read(store: &Store) -> Result<(Data, [[u64; 3]; 2]), String> {
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

pub fn shard_names(manifest: &lamina_core::manifest::Manifest) -> Vec<String> {
    manifest.shards.iter().map(|shard| shard.name.clone()).collect()
}

/// Returns an empty directory, in memory where the system has one.
pub fn folder() -> TempDir {
    let memory = Path::new("/dev/shm");
    if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() }.unwrap()
}

pub fn disk(path: &Path) -> Arc<dyn Disk> {
    Arc::new(Directory::create(path).unwrap())
}
