//! `lamina._core`: the bindings. They translate; all logic is in `lamina-core`.

mod dlpack;
mod errors;
mod path;
mod sites;
mod store;
mod writer;

/// The compiled core of lamina.
#[pyo3::pymodule]
mod _core {
    #[pymodule_export]
    use super::dlpack::Tensor;
    #[pymodule_export]
    use super::path::{ModuleTree, Path, SiteIndex};
    #[pymodule_export]
    use super::sites::{dtype_name, dtype_size, row_bytes, rows_per_shard};
    #[pymodule_export]
    use super::store::{Damage, Store};
    #[pymodule_export]
    use super::writer::{Writer, free_bytes, hash_bytes, probe};

    /// The format that this version writes.
    #[pymodule_export]
    const FORMAT: &str = lamina_core::FORMAT;
}
