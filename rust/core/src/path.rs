//! Paths: the names of sites and targets.
//!
//! Promises: one grammar, read by one function per rule (`path/parse.rs`); printing gives one
//! canonical text for everything that parses, and parsing that text gives the same value back; no
//! text makes it panic; the derived order is the structural order, so nothing sorts names as text.
//!
//! ```text
//! path     = "model" *step "." port [ "@" call ] *element [ ".grad" ] [ position ]
//! step     = "." name / "." number / selector            ; ".2" is read as "[2]"
//! port     = "input" / "output"                          ; the last segment called so
//! call     = number / [ number ] ":" [ number ]          ; numbers below 2^32; "@0" prints as nothing
//! element  = "." name / "." number / "[" index "]"       ; no name "grad"
//! position = selector
//! selector = "[" ( index / slice / list ) "]"            ; white space inside brackets is skipped
//! slice    = [ index ] ":" [ index ] [ ":" [ index ] ]   ; the step is 1 or more
//! list     = index "," [ index *( "," index ) [ "," ] ]
//! index    = "0" / [ "-" ] digit1-9 *digit               ; 64 bits with sign
//! number   = "0" / digit1-9 *digit                       ; other digits, such as "02", are a name
//! name     = 1*char                                      ; without "." "[" "]" "@" and white space
//! ```
//!
//! Syntax alone cannot tell whether the last `[3]` after a port is an element or a position: it is
//! kept as an element, and [`Path::split`] or a [`SiteIndex`] decides by the port's structure. A
//! slice or a list, and a bracket after `.grad`, can only be a position. `docs/paths.md` has the
//! meaning of each part and the texts that are accepted and refused.

use std::str::FromStr;

mod error;
mod expand;
mod index;
mod nearest;
mod parse;
mod print;
mod tree;

pub use error::{Expected, FindError, Found, PathError};
pub use expand::ModuleTree;
pub use index::{Match, SiteIndex};

/// The longest text of a path: far above any real one, so that errors stay small.
pub const MAX_TEXT_BYTES: usize = 64 * 1024;

/// The most entries of a list in brackets: work on a list is bounded by it.
pub const MAX_LIST_ENTRIES: usize = 4096;

/// A path: modules, a port, and what follows it. Made by parsing only.
///
/// The order of the fields is the structural order: outer modules first, `input` before `output`,
/// earlier calls first, indices by number (so negative ones first), names by text.
///
/// # Examples
/// ```
/// use lamina_core::path::{Path, Selector};
///
/// let path: Path = "model.h.2.attn.output@0[ 0 ][-1]".parse()?;
/// assert_eq!(path.to_string(), "model.h[2].attn.output[0][-1]");
/// assert_eq!(path.module()?, "h.2.attn");
/// let (site, position) = path.split(1)?; // the port carries a tuple
/// assert_eq!(site, "model.h[2].attn.output[0]".parse()?);
/// assert_eq!(position, Some(Selector::Index(-1)));
/// # Ok::<(), lamina_core::path::PathError>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Path {
    steps: Box<[Step]>,
    port: Port,
    call: Call,
    elements: Vec<Element>,
    grad: bool,
    position: Option<Selector>, // where syntax alone says that it is one
}

/// One step from a module to those inside it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Step {
    /// One or several numbered children.
    Select(Selector),
    /// The child with this name.
    Name(Box<str>),
}

/// What stands in brackets. What selects several comes before what selects one.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Selector {
    /// A range with a step.
    Slice(Box<Slice>),
    /// A list of indices, as written.
    List(List),
    /// One index; a negative one counts from the end.
    Index(i64),
}

/// A range in brackets: `[start:stop:step]`, with the step 1 or more.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Slice {
    start: Option<i64>, // 0 is None, so that equal ranges are equal values
    stop: Option<i64>,
    step: i64,
}

/// A list in brackets: one entry at least.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct List(Box<[i64]>);

/// An element of what a port carries; also the name of a child of a module.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Element {
    /// By number; a negative one counts from the end.
    Index(i64),
    /// By name.
    Name(Box<str>),
}

/// The side of a module at which a tensor is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Port {
    /// What the module was given.
    Input,
    /// What it returned.
    Output,
}

/// Which calls of the module within one run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Call {
    /// The calls from `start` up to `stop`, or to the last.
    Range {
        /// The first call.
        start: u32,
        /// The call to stop before, above `start`; none for all that follow.
        stop: Option<u32>,
    },
    /// One call; the first is 0.
    One(u32),
}

impl Path {
    /// Returns the steps from the model itself to the module.
    pub fn steps(&self) -> &[Step] {
        &self.steps
    }

    /// Returns the side of the module.
    pub fn port(&self) -> Port {
        self.port
    }

    /// Returns which calls are meant.
    pub fn call(&self) -> Call {
        self.call
    }

    /// Returns the names and single brackets between the port and `.grad`; without `.grad`, the
    /// last bracket may be the position: [`Path::split`] tells by the port's structure.
    pub fn elements(&self) -> &[Element] {
        &self.elements
    }

    /// Returns whether the gradient is meant.
    pub fn grad(&self) -> bool {
        self.grad
    }

    /// Returns the position where syntax alone shows one: a slice, a list, a bracket after `.grad`.
    pub fn position(&self) -> Option<&Selector> {
        self.position.as_ref()
    }

    /// Returns whether this is one call of one module, named without counting from the end.
    pub fn is_concrete(&self) -> bool {
        matches!(self.call, Call::One(_)) && self.steps.iter().all(Step::is_concrete)
    }

    /// Returns the module's name below the root as `named_modules()` prints it, "" for the root.
    ///
    /// # Errors
    /// [`PathError::Pattern`] where the path is not concrete in its modules.
    pub fn module(&self) -> Result<String, PathError> {
        if !self.steps.iter().all(Step::is_concrete) {
            return Err(PathError::Pattern { path: self.boxed() });
        }
        Ok(print::module_name(&self.steps))
    }

    /// Returns the site without its position, and the position, given that the port's structure
    /// consumes `elements` selectors.
    ///
    /// # Errors
    /// [`PathError::MissingElement`] where fewer are written, [`PathError::Surplus`] where more
    /// than one bracket is left.
    pub fn split(&self, elements: usize) -> Result<(Self, Option<Selector>), PathError> {
        let written = self.elements.len();
        let surplus = |at: usize| {
            let rest = self.elements.get(at..).unwrap_or_default();
            let rest = rest.iter().map(ToString::to_string).collect::<String>();
            Err(PathError::Surplus { path: self.boxed(), elements, rest: rest.into() })
        };
        if written < elements {
            return Err(PathError::MissingElement { path: self.boxed(), elements, written });
        }
        let mut site = self.clone();
        let position = site.position.take();
        if written == elements {
            return Ok((site, position));
        }
        match (site.elements.pop(), position) {
            (Some(Element::Index(index)), None) if written == elements + 1 && !self.grad => {
                Ok((site, Some(Selector::Index(index))))
            }
            _ => surplus(elements),
        }
    }

    /// Returns this site at a position.
    ///
    /// # Errors
    /// [`PathError::PositionTaken`] where a position is written already.
    pub fn at(&self, position: Selector) -> Result<Self, PathError> {
        if self.position.is_some() {
            return Err(PathError::PositionTaken { path: self.boxed() });
        }
        let mut target = self.clone();
        if let (Selector::Index(index), false) = (&position, self.grad) {
            target.elements.push(Element::Index(*index));
        } else {
            target.position = Some(position);
        }
        Ok(target)
    }

    /// Returns the same path at another module.
    fn with_steps(&self, steps: Vec<Step>) -> Self {
        Self { steps: steps.into(), ..self.clone() }
    }

    fn boxed(&self) -> Box<str> {
        error::excerpt(&self.to_string(), 0)
    }
}

impl FromStr for Path {
    type Err = PathError;

    fn from_str(text: &str) -> Result<Self, PathError> {
        parse::path(text)
    }
}

impl Step {
    fn is_concrete(&self) -> bool {
        matches!(self, Self::Name(_) | Self::Select(Selector::Index(0..)))
    }
}

impl From<Element> for Step {
    fn from(child: Element) -> Self {
        match child {
            Element::Index(index) => Self::Select(Selector::Index(index)),
            Element::Name(name) => Self::Name(name),
        }
    }
}

impl Element {
    /// Returns what a segment between dots names: a number where it is written as one.
    fn of_segment(segment: &str) -> Self {
        let digits = segment.bytes().all(|byte| byte.is_ascii_digit());
        let plain = digits && (segment == "0" || !segment.starts_with('0'));
        match segment.parse() {
            Ok(index) if plain => Self::Index(index),
            _ => Self::Name(segment.into()),
        }
    }
}

impl Port {
    /// Returns the port's name, as written in a path.
    pub fn name(self) -> &'static str {
        match self {
            Self::Input => "input",
            Self::Output => "output",
        }
    }
}

impl Slice {
    /// Makes a range; a start of 0 and none are the same, as are a step of 1 and none.
    ///
    /// # Errors
    /// [`PathError::SliceStep`] where the step is not 1 or more.
    #[expect(clippy::similar_names, reason = "Python's names of a slice's parts")]
    pub fn new(
        start: Option<i64>,
        stop: Option<i64>,
        step: Option<i64>,
    ) -> Result<Self, PathError> {
        let start = start.filter(|start| *start != 0);
        let step = step.unwrap_or(1);
        if step < 1 { Err(PathError::SliceStep { step }) } else { Ok(Self { start, stop, step }) }
    }

    /// Returns where the range starts; none is the beginning.
    pub fn start(&self) -> Option<i64> {
        self.start
    }

    /// Returns where it stops, exclusive; none is the end.
    pub fn stop(&self) -> Option<i64> {
        self.stop
    }

    /// Returns its step, 1 or more.
    pub fn step(&self) -> i64 {
        self.step
    }
}

impl List {
    /// Makes a list; order and repetitions are kept.
    ///
    /// # Errors
    /// [`PathError::EmptyList`] and [`PathError::LongList`].
    pub fn new(entries: Vec<i64>) -> Result<Self, PathError> {
        match entries.len() {
            0 => Err(PathError::EmptyList),
            1..=MAX_LIST_ENTRIES => Ok(Self(entries.into())),
            entries => Err(PathError::LongList { entries }),
        }
    }

    /// Returns the entries, as written.
    pub fn entries(&self) -> &[i64] {
        &self.0
    }
}
