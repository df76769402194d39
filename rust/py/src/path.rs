//! Paths, expansion and lookup, as `lamina._core.Path`, `ModuleTree` and `SiteIndex`.
#![expect(clippy::doc_markdown, reason = "the comments on methods are Python docstrings")]

use std::collections::BTreeMap;

use lamina_core::path::{self as core, Call, Element, FindError, PathError, Selector, Step};
use pyo3::IntoPyObjectExt;
use pyo3::exceptions::{PyOverflowError, PyTypeError};
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedStr;
use pyo3::types::{PyList, PySlice, PyString, PyTuple};

use crate::errors::raise;

/// The path of a site, a target or a pattern.
#[pyclass(frozen, eq, ord, hash, str, module = "lamina._core")]
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Path(core::Path);

impl std::fmt::Display for Path {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(formatter)
    }
}

#[pymethods]
impl Path {
    /// Parse a text.
    ///
    /// Raises:
    ///     PathError: The text does not follow the grammar; the message gives the byte.
    #[new]
    fn new(text: &Bound<'_, PyString>) -> PyResult<Self> {
        let parsed = unicode(text)?.parse();
        parsed.map(Self).map_err(|error| path_error(text.py(), &error))
    }

    fn __repr__(&self, py: Python<'_>) -> PyResult<String> {
        Ok(format!("Path({})", PyString::new(py, &self.0.to_string()).repr()?))
    }

    fn __getnewargs__(&self) -> (String,) {
        (self.0.to_string(),)
    }

    /// The canonical text, the same as `str(path)`.
    #[getter]
    fn text(&self) -> String {
        self.0.to_string()
    }

    /// Whether this is one call of one module, named without counting from the end.
    #[getter]
    fn is_concrete(&self) -> bool {
        self.0.is_concrete()
    }

    /// The module's name as in `named_modules()`, "" for the root; PathError for a pattern.
    #[getter]
    fn module(&self, py: Python<'_>) -> PyResult<String> {
        self.0.module().map_err(|error| path_error(py, &error))
    }

    /// The steps from the root to the module: names, indices, slices, lists.
    #[getter]
    fn steps<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        let steps: PyResult<Vec<_>> = self.0.steps().iter().map(|step| step_to(py, step)).collect();
        PyTuple::new(py, steps?)
    }

    /// Either "input" or "output".
    #[getter]
    fn port(&self) -> &'static str {
        self.0.port().name()
    }

    /// The call, 0 where none is written, or a slice of calls.
    #[getter]
    fn call<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        match self.0.call() {
            Call::One(call) => call.into_bound_py_any(py),
            Call::Range { start, stop } => {
                slice_to(py, [Some(start).filter(|start| *start > 0), stop, None])
            }
        }
    }

    /// Names and single indices after the port; the last index may be the position: see `split`.
    #[getter]
    fn elements<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        let elements = self.0.elements().iter();
        let elements: PyResult<Vec<_>> = elements.map(|element| element_to(py, element)).collect();
        PyTuple::new(py, elements?)
    }

    /// Whether the gradient is meant.
    #[getter]
    fn grad(&self) -> bool {
        self.0.grad()
    }

    /// The position where syntax alone shows one: a slice, a list, a bracket after `.grad`.
    #[getter]
    fn position<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyAny>>> {
        self.0.position().map(|position| selector_to(py, position)).transpose()
    }

    /// Return the site without its position, and the position.
    ///
    /// Args:
    ///     elements: How many selectors the port's structure consumes; the rest, at most one
    ///         bracket, is the position.
    ///
    /// Raises:
    ///     PathError: Fewer are written, or more than one bracket is left.
    fn split<'py>(
        &self,
        py: Python<'py>,
        elements: usize,
    ) -> PyResult<(Self, Option<Bound<'py, PyAny>>)> {
        let split = self.0.split(elements);
        let (site, position) = split.map_err(|error| path_error(py, &error))?;
        let position = position.map(|position| selector_to(py, &position)).transpose()?;
        Ok((Self(site), position))
    }

    /// Return this site at a position; `None` gives the path itself.
    ///
    /// Raises:
    ///     PathError: A position is written already, or the new one is empty or backwards.
    fn at(&self, position: Option<&Bound<'_, PyAny>>) -> PyResult<Self> {
        let Some(position) = position else {
            return Ok(self.clone());
        };
        let selected = self.0.at(selector_from(position)?);
        selected.map(Self).map_err(|error| path_error(position.py(), &error))
    }
}

/// The modules of a model, by name.
#[pyclass(frozen, module = "lamina._core")]
pub(crate) struct ModuleTree(core::ModuleTree);

#[pymethods]
impl ModuleTree {
    /// Make the tree of names as in `named_modules()`: "" is the model itself.
    #[new]
    fn new(names: Vec<PyBackedStr>) -> Self {
        Self(core::ModuleTree::new(names))
    }

    /// Return the concrete paths that a path stands for, in structural order, each once.
    ///
    /// Raises:
    ///     SiteNotFoundError: There is none; the message lists the nearest, or what there is.
    fn expand(&self, py: Python<'_>, path: &Bound<'_, Path>) -> PyResult<Vec<Path>> {
        let paths = self.0.expand(&path.get().0).map_err(|error| find_error(py, &error))?;
        Ok(paths.into_iter().map(Path).collect())
    }

    /// Return the length of every container on the way to these sites, by the container's name.
    fn lengths(&self, sites: Vec<Bound<'_, Path>>) -> BTreeMap<String, u64> {
        self.0.lengths(sites.iter().map(|site| &site.get().0))
    }
}

/// The sites of a store, by path.
#[pyclass(frozen, module = "lamina._core")]
pub(crate) struct SiteIndex(core::SiteIndex);

#[pymethods]
impl SiteIndex {
    /// Index canonical texts, in store order; `lengths` as from `ModuleTree.lengths`.
    #[new]
    #[pyo3(signature = (sites, lengths = None))]
    fn new(sites: &Bound<'_, PyList>, lengths: Option<BTreeMap<String, u64>>) -> PyResult<Self> {
        let sites = sites.iter().map(|site| Ok(site.cast_into::<PyString>()?));
        let sites: Vec<Bound<'_, PyString>> = sites.collect::<PyResult<_>>()?;
        let texts: Vec<&str> = sites.iter().map(unicode).collect::<PyResult<_>>()?;
        Ok(Self(core::SiteIndex::new(texts, lengths.unwrap_or_default())))
    }

    /// Return the sites that a text stands for, in store order, each with the position or `None`.
    ///
    /// Raises:
    ///     PathError: The text is no path.
    ///     SiteNotFoundError: It stands for none; the message lists the nearest.
    fn find<'py>(
        &self,
        text: &Bound<'py, PyString>,
    ) -> PyResult<Vec<(usize, Option<Bound<'py, PyAny>>)>> {
        let py = text.py();
        let found = self.0.find(unicode(text)?).map_err(|error| find_error(py, &error))?;
        let pair = |(site, position): core::Match| {
            Ok((site, position.map(|position| selector_to(py, &position)).transpose()?))
        };
        found.into_iter().map(pair).collect()
    }
}

pub(crate) fn path_error(py: Python<'_>, error: &PathError) -> PyErr {
    raise(py, "PathError", error.to_string())
}

pub(crate) fn find_error(py: Python<'_>, error: &FindError) -> PyErr {
    let class = match error {
        FindError::Path(_) => "PathError",
        FindError::Unknown { .. }
        | FindError::Index { .. }
        | FindError::Slice { .. }
        | FindError::Element { .. } => "SiteNotFoundError",
    };
    raise(py, class, error.to_string())
}

/// Returns the text itself; a lone surrogate is an error of the path.
fn unicode<'text>(text: &'text Bound<'_, PyString>) -> PyResult<&'text str> {
    text.to_str().map_err(|error| {
        raise(text.py(), "PathError", format!("invalid path: no valid Unicode ({error})"))
    })
}

fn step_to<'py>(py: Python<'py>, step: &Step) -> PyResult<Bound<'py, PyAny>> {
    match step {
        Step::Name(name) => name.as_ref().into_bound_py_any(py),
        Step::Select(selector) => selector_to(py, selector),
    }
}

fn element_to<'py>(py: Python<'py>, element: &Element) -> PyResult<Bound<'py, PyAny>> {
    match element {
        Element::Index(index) => index.into_bound_py_any(py),
        Element::Name(name) => name.as_ref().into_bound_py_any(py),
    }
}

fn selector_to<'py>(py: Python<'py>, selector: &Selector) -> PyResult<Bound<'py, PyAny>> {
    match selector {
        Selector::Index(index) => index.into_bound_py_any(py),
        Selector::List(list) => list.entries().to_vec().into_bound_py_any(py),
        Selector::Slice(slice) => {
            let every = Some(slice.step()).filter(|every| *every > 1);
            slice_to(py, [slice.start(), slice.stop(), every])
        }
    }
}

/// Makes a slice through its class: the C function takes numbers only, and no `None`.
fn slice_to<'py, Number: IntoPyObject<'py>>(
    py: Python<'py>,
    bounds: [Option<Number>; 3],
) -> PyResult<Bound<'py, PyAny>> {
    let [start, stop, every] = bounds;
    py.get_type::<PySlice>().call1((start, stop, every))
}

fn selector_from(position: &Bound<'_, PyAny>) -> PyResult<Selector> {
    let refuse = |error: PathError| path_error(position.py(), &error);
    if position.is_instance_of::<PySlice>() {
        let bound = |name: &str| {
            let bound = position.getattr(name)?;
            if bound.is_none() { Ok(None) } else { index_from(&bound).map(Some) }
        };
        let slice = core::Slice::new(bound("start")?, bound("stop")?, bound("step")?);
        return Ok(Selector::Slice(Box::new(slice.map_err(refuse)?)));
    }
    if position.is_instance_of::<PyList>() || position.is_instance_of::<PyTuple>() {
        let entries: PyResult<_> = position.try_iter()?.map(|entry| index_from(&entry?)).collect();
        return Ok(Selector::List(core::List::new(entries?).map_err(refuse)?));
    }
    index_from(position).map(Selector::Index)
}

fn index_from(number: &Bound<'_, PyAny>) -> PyResult<i64> {
    let py = number.py();
    number.extract().map_err(|error: PyErr| {
        if error.is_instance_of::<PyOverflowError>(py) {
            return raise(py, "PathError", "expected an index of at most 64 bits".into());
        }
        let kind = number.get_type().name().map_or_else(|_| "?".into(), |name| name.to_string());
        let expected = "expected a position as int, slice, list of int or None";
        PyTypeError::new_err(format!("{expected}, found {kind}"))
    })
}
