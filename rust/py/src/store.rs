//! Reading a store, for `lamina.store`.

use std::path::PathBuf;
use std::sync::Arc;

use lamina_core::PromptRows;
use lamina_core::dtype::Dtype;
use lamina_core::map::OwnedMap;
use lamina_core::shard::Start;
use lamina_core::source::Sink;
use pyo3::prelude::*;
use pyo3::types::PyString;

use crate::dlpack::{InputBuffer, OutputBuffer, Tensor};
use crate::errors::{convert, raise, run};
use crate::sites::{SiteTuple, sites_to};

/// A store at one version. Readers take no lock.
#[pyclass(frozen, module = "lamina._core")]
pub(crate) struct Store {
    directory: PathBuf,
    store: Arc<lamina_core::Store>,
}

/// One damaged place, as `Store.verify` reports it: global rows and prompts, half-open.
#[pyclass(frozen, get_all, module = "lamina._core")]
pub(crate) struct Damage {
    shard: String,
    site: String,
    row_start: u64,
    row_stop: u64,
    prompt_start: u64,
    prompt_stop: u64,
    message: String,
}

#[pymethods]
impl Damage {
    fn __repr__(&self) -> String {
        format!(
            "Damage({}, {}, rows {}..{} of prompts {}..{}: {})",
            self.shard,
            self.site,
            self.row_start,
            self.row_stop,
            self.prompt_start,
            self.prompt_stop,
            self.message
        )
    }
}

type ShardTuple = (String, u64, u64, u64, u64, u64, bool);

/// Returns memory of its own with these bytes, as a tensor.
fn owned(py: Python<'_>, bytes: &[u8], dtype: Dtype, shape: &[usize]) -> PyResult<Tensor> {
    let mut memory =
        OwnedMap::anonymous(bytes.len()).map_err(|error| convert(py, &error.into()))?;
    memory.bytes_mut().copy_from_slice(bytes);
    Tensor::owning(memory, dtype, shape)
}

fn owned_i64(py: Python<'_>, values: &[i64]) -> PyResult<Tensor> {
    let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    owned(py, &bytes, Dtype::I64, &[values.len()])
}

impl Store {
    /// Returns dtype, feature shape and row bytes of a site.
    fn site(&self, py: Python<'_>, site: usize) -> PyResult<(Dtype, Vec<usize>, usize)> {
        let Some(found) = self.store.plan().sites().get(site) else {
            let sites = self.store.plan().sites().len();
            let message = format!("site {site} is out of range: there are {sites} sites");
            return Err(raise(py, "InputError", message));
        };
        let shape = found.shape.iter().map(|&n| usize::try_from(n)).collect::<Result<_, _>>()?;
        Ok((found.dtype, shape, usize::try_from(self.store.plan().row_bytes(site))?))
    }
}

#[pymethods]
impl Store {
    /// Open the newest version, or `version`. Reads `FORMAT` and one manifest, nothing else.
    #[staticmethod]
    #[pyo3(signature = (directory, version = None))]
    fn open(py: Python<'_>, directory: PathBuf, version: Option<u64>) -> PyResult<Self> {
        let store = run(py, || lamina_core::Store::open(&directory, version))?;
        Ok(Self { directory, store: Arc::new(store) })
    }

    /// The store's directory.
    #[getter]
    fn directory(&self) -> &std::path::Path {
        &self.directory
    }

    /// The version that was opened.
    #[getter]
    fn version(&self) -> u64 {
        self.store.manifest().version
    }

    /// The random id that all versions of a store share.
    #[getter]
    fn store_id(&self) -> &str {
        &self.store.manifest().store
    }

    /// Whether the capture, or the writer, had ended well.
    #[getter]
    fn complete(&self) -> bool {
        self.store.manifest().complete
    }

    /// Windows done.
    #[getter]
    fn windows(&self) -> u64 {
        self.store.manifest().windows
    }

    /// Rows.
    #[getter]
    fn rows(&self) -> u64 {
        self.store.rows()
    }

    /// Prompts.
    #[getter]
    fn prompts(&self) -> u64 {
        self.store.prompts()
    }

    /// The identity, as JSON text.
    #[getter]
    fn identity(&self) -> &str {
        self.store.manifest().identity.get()
    }

    /// What else is known of the making, as JSON text.
    #[getter]
    fn about(&self) -> &str {
        self.store.manifest().about.get()
    }

    /// Whether prompts carry their text.
    #[getter]
    fn has_texts(&self) -> bool {
        self.store.plan().texts()
    }

    /// When the store was begun, in seconds since 1970.
    #[getter]
    fn created(&self) -> u64 {
        self.store.manifest().created
    }

    /// The sites in execution order: `(path, dtype, feature shape)` each.
    #[getter]
    fn sites<'py>(&self, py: Python<'py>) -> PyResult<Vec<SiteTuple<'py>>> {
        sites_to(py, self.store.plan())
    }

    /// The number of sites.
    #[getter]
    fn site_count(&self) -> usize {
        self.store.plan().sites().len()
    }

    /// Return the index of a site given by its canonical path, or None.
    fn site_index(&self, path: &str) -> Option<usize> {
        self.store.plan().sites().iter().position(|site| site.path == path)
    }

    /// Return `(path, dtype, feature shape)` of one site.
    fn site_at<'py>(&self, py: Python<'py>, site: usize) -> PyResult<SiteTuple<'py>> {
        let (dtype, shape, _) = self.site(py, site)?;
        let path = self.store.plan().sites().get(site).map(|site| site.path.clone());
        Ok((path.unwrap_or_default(), dtype.name(), pyo3::types::PyTuple::new(py, shape)?))
    }

    /// R, the rows of a full shard.
    #[getter]
    fn rows_per_shard(&self) -> u64 {
        self.store.plan().rows_per_shard()
    }

    /// The shards: `(file name, first row, rows, first prompt, prompts, bytes, full)` each; 0 bytes
    /// where no file can be as the manifest says.
    #[getter]
    fn shards(&self) -> Vec<ShardTuple> {
        let plan = self.store.plan();
        let mut start = Start::default();
        let mut shards = Vec::new();
        for entry in &self.store.manifest().shards {
            shards.push((
                entry.file_name(),
                start.row,
                entry.rows,
                start.prompt,
                entry.prompts,
                plan.layout(&entry.size()).map_or(0, |layout| layout.file_bytes),
                entry.rows == plan.rows_per_shard(),
            ));
            start.row += entry.rows;
            start.prompt += entry.prompts;
        }
        shards
    }

    /// Return how each site's column is mapped: "2 MiB", "64 KiB", "4 KiB" or "copy".
    fn tiers(&self) -> Vec<&'static str> {
        let plan = self.store.plan();
        (0..plan.sites().len()).map(|site| plan.tier(site).name()).collect()
    }

    /// Return per site how many values are NaN, infinite, and became infinite in a cast.
    fn counts(&self) -> Vec<(u64, u64, u64)> {
        let mut sums = vec![(0, 0, 0); self.store.plan().sites().len()];
        for entry in &self.store.manifest().shards {
            for &[site, nan, infinite, overflow] in &entry.counts {
                if let Some(sum) = usize::try_from(site).ok().and_then(|site| sums.get_mut(site)) {
                    sum.0 += nan;
                    sum.1 += infinite;
                    sum.2 += overflow;
                }
            }
        }
        sums
    }

    /// Return a newer version of the same store, or None.
    fn newer(&self, py: Python<'_>) -> PyResult<Option<Self>> {
        let newer = run(py, || self.store.newer())?;
        let directory = self.directory.clone();
        Ok(newer.map(|store| Self { directory, store: Arc::new(store) }))
    }

    /// Return all rows of a site without a copy, in a mapping of its own.
    fn column(&self, py: Python<'_>, site: usize) -> PyResult<Tensor> {
        let (dtype, feature, _) = self.site(py, site)?;
        let map = run(py, || self.store.column(site))?;
        let mut shape = vec![usize::try_from(self.store.rows())?];
        shape.extend(feature);
        Tensor::new(Arc::new(map), 0, dtype, &shape)
    }

    /// Copy rows of one or many sites, into fresh memory or the buffers in `out`.
    ///
    /// One `[n, site, *feature]` if all sites have one dtype and shape, else `[n, *feature]` each.
    #[pyo3(signature = (sites, rows, out = None, *, verify = false))]
    fn gather(
        &self,
        py: Python<'_>,
        sites: Vec<usize>,
        rows: InputBuffer,
        out: Option<Vec<OutputBuffer>>,
        verify: bool,
    ) -> PyResult<Vec<Tensor>> {
        let rows: Vec<i64> = rows.items(py)?;
        let facts = sites.iter().map(|&site| self.site(py, site)).collect::<PyResult<Vec<_>>>()?;
        let uniform =
            facts.windows(2).all(|pair| matches!(pair, [first, second] if first == second));
        // Per site: which buffer, where in it, and how far apart its rows are.
        let wide = facts.first().map_or(0, |(.., bytes)| bytes * sites.len());
        let mut plan: Vec<(usize, usize, usize)> = Vec::with_capacity(sites.len());
        let mut shapes: Vec<(Dtype, Vec<usize>, usize)> = Vec::new();
        for (index, (dtype, feature, bytes)) in facts.iter().enumerate() {
            let mut shape = vec![rows.len()];
            if uniform {
                plan.push((0, index * bytes, wide));
                shape.push(sites.len());
            } else {
                plan.push((index, 0, *bytes));
            }
            shape.extend(feature);
            if !uniform || index == 0 {
                let total = shape.iter().try_fold(dtype.size(), |n, &d| n.checked_mul(d as u64));
                let total = usize::try_from(total.unwrap_or(u64::MAX))?;
                shapes.push((*dtype, shape, total));
            }
        }
        let work = |sinks: &mut [&mut dyn Sink]| {
            for (&site, &(sink, offset, stride)) in sites.iter().zip(&plan) {
                if let Some(sink) = sinks.get_mut(sink) {
                    self.store.gather(site, &rows, &mut **sink, (offset, stride), verify)?;
                }
            }
            Ok(())
        };
        let Some(mut buffers) = out else {
            let mut maps = shapes
                .iter()
                .map(|&(.., total)| OwnedMap::anonymous(total))
                .collect::<Result<Vec<_>, _>>()
                .map_err(|error| convert(py, &error.into()))?;
            run(py, || {
                let mut sinks: Vec<&mut dyn Sink> =
                    maps.iter_mut().map(|map| map as &mut dyn Sink).collect();
                work(&mut sinks)
            })?;
            return maps
                .into_iter()
                .zip(shapes)
                .map(|(map, (dtype, shape, _))| Tensor::owning(map, dtype, &shape))
                .collect();
        };
        let needed: Vec<usize> = shapes.iter().map(|&(.., total)| total).collect();
        let found: Vec<usize> = buffers.iter().map(Sink::len).collect();
        if needed != found {
            let message = format!("`out` needs buffers of {needed:?} bytes, found {found:?}");
            return Err(raise(py, "InputError", message));
        }
        run(py, || {
            let mut sinks: Vec<&mut dyn Sink> =
                buffers.iter_mut().map(|buffer| buffer as &mut dyn Sink).collect();
            work(&mut sinks)
        })?;
        Ok(Vec::new())
    }

    /// Return a checked copy of the rows `start..stop` of a site.
    fn read(&self, py: Python<'_>, site: usize, start: i64, stop: i64) -> PyResult<Tensor> {
        let (dtype, feature, bytes) = self.site(py, site)?;
        // Refused before anything of that size is made.
        let limit = self.store.rows();
        for row in [start, stop] {
            if u64::try_from(row).map_or(true, |row| row > limit) {
                return Err(convert(py, &lamina_core::Error::Row { row, rows: limit }));
            }
        }
        let rows: Vec<i64> = (start..stop).collect();
        let mut map = OwnedMap::anonymous(rows.len().saturating_mul(bytes))
            .map_err(|error| convert(py, &error.into()))?;
        run(py, || self.store.gather(site, &rows, &mut map, (0, bytes), true))?;
        let mut shape = vec![rows.len()];
        shape.extend(feature);
        Tensor::owning(map, dtype, &shape)
    }

    /// Return tokens (uint32), positions (uint32) and flags (uint8) of the rows `start..stop`.
    fn row_table(
        &self,
        py: Python<'_>,
        start: u64,
        stop: u64,
    ) -> PyResult<(Tensor, Tensor, Tensor)> {
        let [tokens, positions, flags] = run(py, || self.store.row_tables(start, stop))?;
        let rows = flags.len();
        Ok((
            owned(py, &tokens, Dtype::U32, &[rows])?,
            owned(py, &positions, Dtype::U32, &[rows])?,
            owned(py, &flags, Dtype::U8, &[rows])?,
        ))
    }

    /// Return first row, rows and tokens (uint64 each) of the prompts `start..stop`.
    fn prompt_table(
        &self,
        py: Python<'_>,
        start: u64,
        stop: u64,
    ) -> PyResult<(Tensor, Tensor, Tensor)> {
        let table = run(py, || self.store.prompt_rows(start, stop))?;
        let column = |value: fn(&PromptRows) -> u64| {
            let bytes: Vec<u8> =
                table.iter().flat_map(|prompt| value(prompt).to_le_bytes()).collect();
            owned(py, &bytes, Dtype::U64, &[table.len()])
        };
        Ok((
            column(|prompt| prompt.start)?,
            column(|prompt| prompt.rows)?,
            column(|prompt| prompt.length)?,
        ))
    }

    /// Return the token ids (uint32) of a prompt.
    fn prompt_ids(&self, py: Python<'_>, prompt: i64) -> PyResult<Tensor> {
        let bytes = run(py, || self.store.prompt_ids(prompt))?;
        owned(py, &bytes, Dtype::U32, &[bytes.len() / 4])
    }

    /// Return the text of a prompt, or None where the store keeps none.
    fn prompt_text<'py>(
        &self,
        py: Python<'py>,
        prompt: i64,
    ) -> PyResult<Option<Bound<'py, PyString>>> {
        let text = run(py, || self.store.prompt_text(prompt))?;
        Ok(text.map(|text| PyString::new(py, &text)))
    }

    /// Return the row (int64) of each prompt's token at each position, -1 where it is not stored.
    fn locate(
        &self,
        py: Python<'_>,
        prompts: InputBuffer,
        positions: InputBuffer,
    ) -> PyResult<Tensor> {
        let (prompts, positions) = (prompts.items(py)?, positions.items(py)?);
        let rows = run(py, || self.store.locate(&prompts, &positions))?;
        owned_i64(py, &rows)
    }

    /// Return the prompt (int64) of each row.
    fn prompts_of(&self, py: Python<'_>, rows: InputBuffer) -> PyResult<Tensor> {
        let rows = rows.items(py)?;
        let prompts = run(py, || self.store.prompts_of(&rows))?;
        owned_i64(py, &prompts)
    }

    /// Read every byte and return what is damaged. `progress(done, total)` counts bytes.
    #[pyo3(signature = (threads = 0, progress = None))]
    fn verify(
        &self,
        py: Python<'_>,
        threads: usize,
        progress: Option<Py<PyAny>>,
    ) -> PyResult<Vec<Damage>> {
        let mut failure: Option<PyErr> = None;
        let result = py.detach(|| {
            self.store.verify(threads, &mut |done, total| {
                let called = Python::attach(|py| {
                    py.check_signals()?;
                    match &progress {
                        Some(progress) => progress.call1(py, (done, total)).map(|_| ()),
                        None => Ok(()),
                    }
                });
                failure = called.err();
                failure.is_none()
            })
        });
        if let Some(failure) = failure {
            return Err(failure);
        }
        let damages = result.map_err(|error| convert(py, &error))?;
        Ok(damages
            .into_iter()
            .map(|damage| Damage {
                shard: damage.place.shard,
                site: damage.place.site,
                row_start: damage.place.rows.0,
                row_stop: damage.place.rows.1,
                prompt_start: damage.place.prompts.0,
                prompt_stop: damage.place.prompts.1,
                message: damage.found,
            })
            .collect())
    }

    fn __repr__(&self) -> String {
        format!("Store({:?}, version {})", self.directory.display().to_string(), self.version())
    }
}
