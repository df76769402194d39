//! The writer, for `lamina.capture` and `lamina.writer`.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use lamina_core::disk::{Directory, Disk};
use lamina_core::source::Source;
use lamina_core::{Error, Lock, NewStore, Pace, Probe, Window};
use pyo3::prelude::*;

use crate::dlpack::InputBuffer;
use crate::errors::run;
use crate::sites::{SiteArgument, SiteTuple, sites_from, sites_to};

/// A store's one writer. Making it takes the lock; `begin` or `resume` comes next.
#[pyclass(frozen, module = "lamina._core")]
pub(crate) struct Writer {
    directory: PathBuf,
    has_store: bool,
    state: Mutex<State>,
}

enum State {
    Locked(Arc<dyn Disk>, Box<dyn Lock>),
    Open(Box<lamina_core::Writer>),
    Ended,
}

fn pace(rows_total: Option<u64>, commit_seconds: f64) -> Pace {
    let commit_every = Duration::try_from_secs_f64(commit_seconds).unwrap_or(Duration::MAX);
    Pace { rows_total, commit_every }
}

fn closed() -> Error {
    Error::Closed { reason: String::from("it has no store open") }
}

impl Writer {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs `step` on the open writer, without the GIL.
    fn with<T: Send>(
        &self,
        py: Python<'_>,
        step: impl FnOnce(&mut lamina_core::Writer) -> lamina_core::Result<T> + Send,
    ) -> PyResult<T> {
        run(py, || match &mut *self.state() {
            State::Open(writer) => step(writer),
            State::Locked(..) | State::Ended => Err(closed()),
        })
    }

    /// Turns the lock into an open writer.
    fn start(
        &self,
        py: Python<'_>,
        make: impl FnOnce(Arc<dyn Disk>, Box<dyn Lock>) -> lamina_core::Result<lamina_core::Writer>
        + Send,
    ) -> PyResult<()> {
        run(py, || {
            let mut state = self.state();
            match std::mem::replace(&mut *state, State::Ended) {
                State::Locked(disk, lock) => {
                    *state = State::Open(Box::new(make(disk, lock)?));
                    Ok(())
                }
                other => {
                    *state = other;
                    Err(closed())
                }
            }
        })
    }
}

#[pymethods]
impl Writer {
    /// Take the lock of the store in `directory`, which is made if it is missing.
    ///
    /// Raises:
    ///     StoreInUseError: Another writer holds it.
    ///     ForeignDirectoryError: The directory holds something else; nothing is touched.
    ///     FormatVersionError: The store there is of a newer format.
    #[new]
    fn new(py: Python<'_>, directory: PathBuf) -> PyResult<Self> {
        let (disk, lock, has_store) = run(py, || {
            lamina_core::probe(&directory)?;
            let disk: Arc<dyn Disk> = Arc::new(Directory::create(&directory)?);
            let lock = disk.lock()?;
            let has_store = lamina_core::probe(&directory)? == Probe::Store;
            Ok((disk, lock, has_store))
        })?;
        Ok(Self { directory, has_store, state: Mutex::new(State::Locked(disk, lock)) })
    }

    /// Whether a committed version was there when the lock was taken.
    #[getter]
    fn has_store(&self) -> bool {
        self.has_store
    }

    /// The store's directory.
    #[getter]
    fn directory(&self) -> &std::path::Path {
        &self.directory
    }

    /// Begin a new store: `FORMAT`, then version 1 without shards.
    #[pyo3(signature = (sites, *, identity, about, rows_total, shard_bytes = lamina_core::layout::SHARD_BYTES, texts = false, commit_seconds = 60.0))]
    #[expect(clippy::too_many_arguments, reason = "keywords in Python")]
    fn begin(
        &self,
        py: Python<'_>,
        sites: Vec<SiteArgument>,
        identity: String,
        about: String,
        rows_total: Option<u64>,
        shard_bytes: u64,
        texts: bool,
        commit_seconds: f64,
    ) -> PyResult<()> {
        let sites = sites_from(py, sites)?;
        let new = NewStore { sites, identity, about, shard_bytes, texts };
        self.start(py, |disk, lock| {
            lamina_core::Writer::begin(disk, lock, new, pace(rows_total, commit_seconds))
        })
    }

    /// Continue the store at its newest version.
    #[pyo3(signature = (*, rows_total, commit_seconds = 60.0))]
    fn resume(&self, py: Python<'_>, rows_total: Option<u64>, commit_seconds: f64) -> PyResult<()> {
        self.start(py, |disk, lock| {
            lamina_core::Writer::resume(disk, lock, pace(rows_total, commit_seconds))
        })
    }

    /// The newest committed version.
    #[getter]
    fn version(&self, py: Python<'_>) -> PyResult<u64> {
        self.with(py, |writer| Ok(writer.manifest().version))
    }

    /// The random id that all versions of a store share.
    #[getter]
    fn store_id(&self, py: Python<'_>) -> PyResult<String> {
        self.with(py, |writer| Ok(writer.manifest().store.clone()))
    }

    /// The identity, as JSON text.
    #[getter]
    fn identity(&self, py: Python<'_>) -> PyResult<String> {
        self.with(py, |writer| Ok(writer.manifest().identity.get().to_owned()))
    }

    /// What else is known of the making, as JSON text.
    #[getter]
    fn about(&self, py: Python<'_>) -> PyResult<String> {
        self.with(py, |writer| Ok(writer.manifest().about.get().to_owned()))
    }

    /// Whether the newest committed version is complete.
    #[getter]
    fn complete(&self, py: Python<'_>) -> PyResult<bool> {
        self.with(py, |writer| Ok(writer.manifest().complete))
    }

    /// Windows appended, committed or not.
    #[getter]
    fn windows(&self, py: Python<'_>) -> PyResult<u64> {
        self.with(py, |writer| Ok(writer.appended().0))
    }

    /// Windows of the newest committed version.
    #[getter]
    fn committed_windows(&self, py: Python<'_>) -> PyResult<u64> {
        self.with(py, |writer| Ok(writer.manifest().windows))
    }

    /// Rows appended, committed or not.
    #[getter]
    fn rows(&self, py: Python<'_>) -> PyResult<u64> {
        self.with(py, |writer| Ok(writer.appended().1))
    }

    /// Prompts appended, committed or not.
    #[getter]
    fn prompts(&self, py: Python<'_>) -> PyResult<u64> {
        self.with(py, |writer| Ok(writer.appended().2))
    }

    /// The sites: `(path, dtype, feature shape)` each.
    #[getter]
    fn sites<'py>(&self, py: Python<'py>) -> PyResult<Vec<SiteTuple<'py>>> {
        let plan = self.with(py, |writer| Ok(Arc::clone(&writer.manifest().plan)))?;
        sites_to(py, &plan)
    }

    /// Whether prompts carry their text.
    #[getter]
    fn has_texts(&self, py: Python<'_>) -> PyResult<bool> {
        self.with(py, |writer| Ok(writer.manifest().plan.texts()))
    }

    /// Set what is known of the making, from the next commit on.
    fn set_about(&self, py: Python<'_>, about: String) -> PyResult<()> {
        self.with(py, |writer| writer.set_about(about))
    }

    /// Append one window; commit if it is time. Returns whether it was.
    #[pyo3(signature = (columns, *, tokens, positions, flags, prompt_rows, prompt_lengths, prompt_ids, texts = None, overflow = Vec::new()))]
    #[expect(clippy::too_many_arguments, reason = "keywords in Python")]
    fn append(
        &self,
        py: Python<'_>,
        columns: Vec<InputBuffer>,
        tokens: InputBuffer,
        positions: InputBuffer,
        flags: InputBuffer,
        prompt_rows: InputBuffer,
        prompt_lengths: InputBuffer,
        prompt_ids: InputBuffer,
        texts: Option<Vec<String>>,
        overflow: Vec<(u64, u64, u64)>,
    ) -> PyResult<bool> {
        let positions: Vec<u32> = positions.items(py)?;
        let prompt_rows: Vec<u64> = prompt_rows.items(py)?;
        let prompt_lengths: Vec<u64> = prompt_lengths.items(py)?;
        self.with(py, |writer| {
            let columns: Vec<&dyn Source> =
                columns.iter().map(|column| column as &dyn Source).collect();
            let mut ids = vec![0; prompt_ids.len()];
            prompt_ids.copy_to(0, &mut ids);
            writer.append(&Window {
                columns: &columns,
                tokens: &tokens,
                positions: &positions,
                flags: &flags,
                prompt_rows: &prompt_rows,
                prompt_lengths: &prompt_lengths,
                prompt_ids: &ids,
                texts: texts.as_deref(),
                overflow: &overflow,
            })
        })
    }

    /// Commit every window appended so far, as a piece if need be.
    fn commit(&self, py: Python<'_>) -> PyResult<()> {
        self.with(py, lamina_core::Writer::commit)
    }

    /// Replace pieces by the last shard, mark the store complete, release the lock.
    fn finish(&self, py: Python<'_>) -> PyResult<()> {
        self.with(py, lamina_core::Writer::finish)?;
        self.close(py);
        Ok(())
    }

    /// Release the lock; what was not committed is lost. May be called again.
    fn close(&self, py: Python<'_>) {
        py.detach(|| *self.state() = State::Ended);
    }

    fn __repr__(&self) -> String {
        format!("Writer({:?})", self.directory.display().to_string())
    }
}

/// Return what a directory holds: "missing", "empty", "unready" (begun, without a version) or
/// "store". Writes nothing.
///
/// Raises:
///     ForeignDirectoryError: It holds something that is not lamina's.
///     FormatVersionError: It holds a store of a newer format.
#[pyfunction]
pub(crate) fn probe(py: Python<'_>, directory: PathBuf) -> PyResult<&'static str> {
    let found = run(py, || lamina_core::probe(&directory))?;
    Ok(match found {
        Probe::Missing => "missing",
        Probe::Empty => "empty",
        Probe::Unready => "unready",
        Probe::Store => "store",
    })
}

/// Return the bytes that may still be written on the file system of `directory`, or of its
/// nearest parent that exists.
#[pyfunction]
pub(crate) fn free_bytes(py: Python<'_>, directory: PathBuf) -> PyResult<u64> {
    run(py, || {
        let absolute = std::path::absolute(&directory).unwrap_or_else(|_| directory.clone());
        let mut last = Error::NotFound { path: directory.clone() };
        for parent in absolute.ancestors() {
            match Directory::open(parent) {
                Ok(opened) => return opened.free_bytes(),
                Err(error) => last = error,
            }
        }
        Err(last)
    })
}

/// Return XXH3-128 over the bytes of all buffers, one after another, as 32 hex digits.
#[pyfunction]
pub(crate) fn hash_bytes(py: Python<'_>, buffers: Vec<InputBuffer>) -> String {
    py.detach(|| {
        let sources = buffers.iter().map(|buffer| buffer as &dyn Source);
        lamina_core::checksum::hash(sources)
    })
}
