//! Sites as Python writes them: `(path, dtype, feature shape)`.

use lamina_core::layout::{Plan, SiteSpec};
use pyo3::prelude::*;
use pyo3::types::PyTuple;

use crate::errors::convert;

/// A site as it comes in.
pub(crate) type SiteArgument = (String, String, Vec<u64>);

/// A site as it goes out.
pub(crate) type SiteTuple<'py> = (String, &'static str, Bound<'py, PyTuple>);

pub(crate) fn sites_from(py: Python<'_>, sites: Vec<SiteArgument>) -> PyResult<Vec<SiteSpec>> {
    sites
        .into_iter()
        .map(|(path, dtype, shape)| {
            let dtype = dtype.parse().map_err(|error| convert(py, &error))?;
            Ok(SiteSpec { path, dtype, shape })
        })
        .collect()
}

pub(crate) fn sites_to<'py>(py: Python<'py>, plan: &Plan) -> PyResult<Vec<SiteTuple<'py>>> {
    plan.sites()
        .iter()
        .map(|site| {
            Ok((site.path.clone(), site.dtype.name(), PyTuple::new(py, site.shape.iter())?))
        })
        .collect()
}

/// Return R, the rows of a full shard: the largest power of two, at most 2^20, whose bytes (row
/// tables counted) are at most `shard_bytes`.
#[pyfunction]
pub(crate) fn rows_per_shard(
    py: Python<'_>,
    sites: Vec<SiteArgument>,
    shard_bytes: u64,
) -> PyResult<u64> {
    let sites = sites_from(py, sites)?;
    lamina_core::layout::rows_per_shard(&sites, shard_bytes).map_err(|error| convert(py, &error))
}

/// Return the bytes that one row of all these sites takes, the row tables' 9 bytes counted.
#[pyfunction]
pub(crate) fn row_bytes(py: Python<'_>, sites: Vec<SiteArgument>) -> PyResult<u64> {
    let sites = sites_from(py, sites)?;
    sites.iter().try_fold(lamina_core::layout::ROW_TABLE_BYTES, |sum, site| {
        let bytes = site.row_bytes().map_err(|error| convert(py, &error))?;
        Ok(sum.saturating_add(bytes))
    })
}

/// Return the bytes of one element. Any name of the dtype goes in.
#[pyfunction]
pub(crate) fn dtype_size(py: Python<'_>, dtype: &str) -> PyResult<u64> {
    let dtype = dtype.parse::<lamina_core::dtype::Dtype>();
    dtype.map(lamina_core::dtype::Dtype::size).map_err(|error| convert(py, &error))
}

/// Return the torch name of a dtype given under any of its names.
#[pyfunction]
pub(crate) fn dtype_name(py: Python<'_>, dtype: &str) -> PyResult<&'static str> {
    let dtype = dtype.parse::<lamina_core::dtype::Dtype>();
    dtype.map(lamina_core::dtype::Dtype::name).map_err(|error| convert(py, &error))
}
