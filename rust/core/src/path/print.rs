//! The canonical text: one printer per rule of the grammar.

use std::fmt::{self, Display, Formatter, Write as _};

use super::{Call, Element, List, Path, Selector, Slice, Step};

impl Display for Path {
    fn fmt(&self, formatter: &mut Formatter<'_>) -> fmt::Result {
        formatter.write_str("model")?;
        for step in &self.steps {
            step.fmt(formatter)?;
        }
        formatter.write_char('.')?;
        formatter.write_str(self.port.name())?;
        self.call.fmt(formatter)?;
        for element in &self.elements {
            element.fmt(formatter)?;
        }
        if self.grad {
            formatter.write_str(".grad")?;
        }
        self.position.as_ref().map_or(Ok(()), |position| position.fmt(formatter))
    }
}

impl Display for Step {
    fn fmt(&self, formatter: &mut Formatter<'_>) -> fmt::Result {
        match self {
            Self::Select(selector) => selector.fmt(formatter),
            Self::Name(name) => named(name, formatter),
        }
    }
}

impl Display for Element {
    fn fmt(&self, formatter: &mut Formatter<'_>) -> fmt::Result {
        match self {
            Self::Index(index) => write!(formatter, "[{index}]"),
            Self::Name(name) => named(name, formatter),
        }
    }
}

impl Display for Selector {
    fn fmt(&self, formatter: &mut Formatter<'_>) -> fmt::Result {
        match self {
            Self::Slice(slice) => slice.fmt(formatter),
            Self::List(list) => list.fmt(formatter),
            Self::Index(index) => write!(formatter, "[{index}]"),
        }
    }
}

impl Display for Slice {
    fn fmt(&self, formatter: &mut Formatter<'_>) -> fmt::Result {
        formatter.write_char('[')?;
        optional(self.start, formatter)?;
        formatter.write_char(':')?;
        optional(self.stop, formatter)?;
        if self.step != 1 {
            write!(formatter, ":{}", self.step)?;
        }
        formatter.write_char(']')
    }
}

impl Display for List {
    /// Prints a list of one with a comma behind it, as Python does for a tuple.
    fn fmt(&self, formatter: &mut Formatter<'_>) -> fmt::Result {
        for (place, entry) in self.0.iter().enumerate() {
            formatter.write_char(if place == 0 { '[' } else { ',' })?;
            entry.fmt(formatter)?;
        }
        formatter.write_str(if self.0.len() == 1 { ",]" } else { "]" })
    }
}

impl Display for Call {
    fn fmt(&self, formatter: &mut Formatter<'_>) -> fmt::Result {
        match self {
            Self::One(0) => Ok(()),
            Self::One(call) => write!(formatter, "@{call}"),
            Self::Range { start, stop } => {
                formatter.write_char('@')?;
                optional(Some(*start).filter(|start| *start > 0), formatter)?;
                formatter.write_char(':')?;
                optional(*stop, formatter)
            }
        }
    }
}

fn named(name: &str, formatter: &mut Formatter<'_>) -> fmt::Result {
    formatter.write_char('.')?;
    formatter.write_str(name)
}

fn optional(number: Option<impl Display>, formatter: &mut Formatter<'_>) -> fmt::Result {
    number.map_or(Ok(()), |number| number.fmt(formatter))
}

/// Returns the name of a module as `named_modules()` prints it: segments with dots between them.
pub(super) fn module_name(steps: &[Step]) -> String {
    let mut name = String::new();
    for step in steps {
        if !name.is_empty() {
            name.push('.');
        }
        match step {
            Step::Name(segment) => name.push_str(segment),
            Step::Select(Selector::Index(index)) => name.push_str(&index.to_string()),
            Step::Select(several) => name.push_str(&several.to_string()),
        }
    }
    name
}
