//! From Rust errors to the classes of `lamina.errors`: one exhaustive match.

use lamina_core::Error;
use pyo3::prelude::*;
use pyo3::types::PyTuple;

/// Returns an instance of a class of `lamina.errors` with this message.
pub(crate) fn raise(py: Python<'_>, class: &str, message: String) -> PyErr {
    instance(py, class, (message,))
}

fn instance<'py>(
    py: Python<'py>,
    class: &str,
    arguments: impl IntoPyObject<'py, Target = PyTuple, Output = Bound<'py, PyTuple>, Error = PyErr>,
) -> PyErr {
    let made = arguments
        .into_pyobject(py)
        .and_then(|arguments| py.import("lamina.errors")?.call_method1(class, arguments));
    made.map_or_else(|error| error, PyErr::from_value)
}

/// Returns the Python exception for an error of the core.
pub(crate) fn convert(py: Python<'_>, error: &Error) -> PyErr {
    let message = error.to_string();
    let class = match error {
        Error::Io { path, .. } => {
            let path = path.display().to_string();
            return instance(py, "DiskError", (message, error.errno(), path));
        }
        Error::Map(_) => return instance(py, "DiskError", (message, error.errno())),
        Error::Full { path, .. } => {
            let path = path.display().to_string();
            return instance(py, "DiskFullError", (message, error.errno(), path));
        }
        Error::Path(_) => "PathError",
        Error::UnknownDtype { .. } => "DtypeError",
        Error::NotFound { .. } => "StoreNotFoundError",
        Error::Exists { .. } => "StoreExistsError",
        Error::Foreign { .. } => "ForeignDirectoryError",
        Error::NotReady { .. } => "StoreNotReadyError",
        Error::InUse { .. } | Error::Overtaken { .. } => "StoreInUseError",
        Error::Newer { .. } => "FormatVersionError",
        Error::NoVersion { .. } => "VersionNotFoundError",
        Error::Manifest { .. } | Error::Damaged { .. } => "CorruptError",
        Error::Missing { .. } => "MissingShardError",
        Error::Row { .. } | Error::Prompt { .. } => "PositionError",
        Error::Mismatch { .. } | Error::Json { .. } => "InputError",
        Error::Site { .. } => "SiteError",
        Error::Closed { .. } => "ClosedError",
    };
    raise(py, class, message)
}

/// Runs disk work without the GIL: the one door out of it.
pub(crate) fn run<T: Send>(
    py: Python<'_>,
    work: impl FnOnce() -> lamina_core::Result<T> + Send,
) -> PyResult<T> {
    py.detach(work).map_err(|error| convert(py, &error))
}
