//! What can be wrong with a path, and with looking one up, as facts.

use std::fmt::{self, Display, Formatter};

use thiserror::Error as ThisError;

use super::{MAX_LIST_ENTRIES, MAX_TEXT_BYTES};

/// How many bytes of a text are shown around the place of an error.
const EXCERPT_BYTES: usize = 120;

/// A text that is no path, or a path used as what it is not.
#[derive(Clone, Debug, PartialEq, Eq, ThisError)]
pub enum PathError {
    /// The text does not follow the grammar.
    #[error("invalid path `{text}` at byte {at}: expected {expected}, found {found}")]
    Syntax {
        /// The text, or what surrounds the error where it is long.
        text: Box<str>,
        /// The byte offset of the error in the whole text.
        at: usize,
        /// What the grammar wants there.
        expected: Expected,
        /// What stands there.
        found: Found,
    },
    /// The text is too long to be a path.
    #[error("invalid path of {bytes} bytes: at most {MAX_TEXT_BYTES} are read")]
    LongText {
        /// Its length.
        bytes: usize,
    },
    /// One module was asked of a pattern.
    #[error("`{path}` is a pattern, not one module: expand it against a model first")]
    Pattern {
        /// The path.
        path: Box<str>,
    },
    /// The port carries several tensors and the path does not say which.
    #[error(
        "`{path}` names {written} of the {elements} elements that lead to a tensor of its port"
    )]
    MissingElement {
        /// The path.
        path: Box<str>,
        /// How many the port's structure needs.
        elements: usize,
        /// How many are written.
        written: usize,
    },
    /// More is written after the port than its elements and a position.
    #[error(
        "`{path}` has `{rest}` after the {elements} elements of its port: \
         expected one bracket at most, the position"
    )]
    Surplus {
        /// The path.
        path: Box<str>,
        /// How many elements the port's structure needs.
        elements: usize,
        /// What is left.
        rest: Box<str>,
    },
    /// A second position.
    #[error("`{path}` has a position already")]
    PositionTaken {
        /// The path.
        path: Box<str>,
    },
    /// A step backwards or nowhere.
    #[error("expected a slice with a step of 1 or more, found {step}")]
    SliceStep {
        /// The step.
        step: i64,
    },
    /// A list that selects nothing.
    #[error("expected a list of one index or more, found none")]
    EmptyList,
    /// A list beyond the limit.
    #[error("expected a list of at most {MAX_LIST_ENTRIES} indices, found {entries}")]
    LongList {
        /// Its length.
        entries: usize,
    },
}

/// A path that names nothing where it was looked up.
#[derive(Clone, Debug, PartialEq, Eq, ThisError)]
pub enum FindError {
    /// The text is no path.
    #[error(transparent)]
    Path(#[from] PathError),
    /// No module or site of that name.
    #[error("`{path}` names nothing here{}", Names("nearest", nearest))]
    Unknown {
        /// The path.
        path: Box<str>,
        /// The nearest that exist, best first.
        nearest: Vec<String>,
    },
    /// An index that its container does not have.
    #[error("`{path}` names nothing here: `{container}` has {}", Children(*index, *length, children))]
    Index {
        /// The path.
        path: Box<str>,
        /// The container, as a path without a port.
        container: Box<str>,
        /// The index as written.
        index: i64,
        /// One more than the container's highest number.
        length: u64,
        /// The numbers nearest to the index that exist; empty where all below the length do.
        children: Vec<i64>,
    },
    /// A slice that selects none of a container's children.
    #[error(
        "`{path}` names nothing here: `{selector}` selects none of the {length} in `{container}`"
    )]
    Slice {
        /// The path.
        path: Box<str>,
        /// The container, as a path without a port.
        container: Box<str>,
        /// The slice.
        selector: Box<str>,
        /// One more than the container's highest number.
        length: u64,
    },
    /// The port was recorded by elements, and the path names none of them.
    #[error(
        "`{path}` names none of the recorded elements of its port{}",
        Names("recorded", elements)
    )]
    Element {
        /// The path.
        path: Box<str>,
        /// The first of the elements recorded.
        elements: Vec<String>,
    },
}

/// What the grammar wants at some place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expected {
    /// `model`, the beginning of every path.
    Root,
    /// A further step towards a module.
    Step,
    /// The port.
    Port,
    /// A name after a dot.
    Name,
    /// What may follow the port.
    Element,
    /// The inside of a bracket.
    Selector,
    /// An index.
    Index,
    /// A closing bracket.
    Bracket,
    /// A call.
    Call,
    /// A call that makes the range hold something.
    CallAbove(u32),
    /// A call within the limit.
    CallLimit,
    /// A slice's step.
    StepAbove,
    /// An index within the limit.
    IndexLimit,
    /// A number without leading zeros.
    PlainNumber,
    /// The end of a list at its limit.
    ShorterList,
    /// Nothing more.
    End,
}

/// What stands at the place of an error.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Found {
    /// Nothing more.
    End,
    /// A character.
    Character(char),
    /// Several characters that belong together.
    Text(Box<str>),
}

impl Display for Expected {
    fn fmt(&self, formatter: &mut Formatter<'_>) -> fmt::Result {
        let text = match self {
            Self::Root => "`model`",
            Self::Step => "`.` or `[`",
            Self::Port => "a port, `.input` or `.output`",
            Self::Name => "a name",
            Self::Element => "`.`, `[` or end of input",
            Self::Selector => "an index, a slice or a list",
            Self::Index => "an index",
            Self::Bracket => "`]`",
            Self::Call => "a call, such as `@2` or `@:`",
            Self::CallAbove(start) => return write!(formatter, "a call above {start}"),
            Self::CallLimit => "a call below 2^32",
            Self::StepAbove => "a step of 1 or more",
            Self::IndexLimit => "an index of at most 64 bits",
            Self::PlainNumber => "a number without leading zeros",
            Self::ShorterList => {
                return write!(formatter, "`]` after {MAX_LIST_ENTRIES} indices, the limit");
            }
            Self::End => "end of input",
        };
        formatter.write_str(text)
    }
}

impl Display for Found {
    fn fmt(&self, formatter: &mut Formatter<'_>) -> fmt::Result {
        match self {
            Self::End => formatter.write_str("end of input"),
            Self::Character(space) if space.is_whitespace() => formatter.write_str("white space"),
            Self::Character(character) => write!(formatter, "`{}`", character.escape_debug()),
            Self::Text(text) => write!(formatter, "`{text}`"),
        }
    }
}

/// Prints names behind a word that says what they are, where there are any.
struct Names<'names>(&'static str, &'names [String]);

impl Display for Names<'_> {
    fn fmt(&self, formatter: &mut Formatter<'_>) -> fmt::Result {
        let Self(word, names) = self;
        for (place, name) in names.iter().enumerate() {
            match place {
                0 => write!(formatter, "; {word}: `{name}`")?,
                _ => write!(formatter, ", `{name}`")?,
            }
        }
        Ok(())
    }
}

/// Prints which numbered children there are: index asked for, length, nearest.
struct Children<'numbers>(i64, u64, &'numbers [i64]);

impl Display for Children<'_> {
    fn fmt(&self, formatter: &mut Formatter<'_>) -> fmt::Result {
        let Self(index, length, children) = self;
        if children.is_empty() {
            let last = length.saturating_sub(1);
            return write!(formatter, "{length} entries, [0] to [{last}], and no [{index}]");
        }
        write!(formatter, "no [{index}]")?;
        let from_end = i128::from(*index) + i128::from(*length);
        if *index < 0 && from_end >= 0 {
            write!(formatter, ", which is [{from_end}]")?;
        }
        for (place, child) in children.iter().enumerate() {
            write!(formatter, "{}[{child}]", if place == 0 { "; nearest: " } else { ", " })?;
        }
        Ok(())
    }
}

/// Returns a text fit for a message: without control characters, and only what surrounds the byte
/// `at` where it is long.
pub(super) fn excerpt(text: &str, at: usize) -> Box<str> {
    let mut start = 0;
    let mut stop = text.len();
    if text.len() > EXCERPT_BYTES {
        start = boundary(text, at.saturating_sub(EXCERPT_BYTES / 2));
        stop = boundary(text, start.saturating_add(EXCERPT_BYTES));
    }
    let shown = text.get(start..stop).unwrap_or_default();
    let mut excerpt = String::with_capacity(shown.len());
    excerpt.push_str(if start > 0 { "..." } else { "" });
    for character in shown.chars() {
        if character.is_control() {
            excerpt.extend(character.escape_debug());
        } else {
            excerpt.push(character);
        }
    }
    excerpt.push_str(if stop < text.len() { "..." } else { "" });
    excerpt.into()
}

/// Returns the last character boundary at or before a byte.
fn boundary(text: &str, at: usize) -> usize {
    let mut at = at.min(text.len());
    while !text.is_char_boundary(at) {
        at -= 1;
    }
    at
}
