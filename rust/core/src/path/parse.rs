//! The parser: one function per rule of the grammar at the head of `path.rs`.

use super::error::{Expected, Found, PathError, excerpt};
use super::{
    Call, Element, List, MAX_LIST_ENTRIES, MAX_TEXT_BYTES, Path, Port, Selector, Slice, Step,
};

type Result<T> = std::result::Result<T, PathError>;

pub(super) fn path(text: &str) -> Result<Path> {
    if text.len() > MAX_TEXT_BYTES {
        return Err(PathError::LongText { bytes: text.len() });
    }
    Parser { text, at: 0 }.path()
}

/// Returns whether a segment between dots could be written as a step or an element.
pub(super) fn is_segment(text: &str) -> bool {
    !text.is_empty() && !text.contains(is_delimiter)
}

fn is_delimiter(character: char) -> bool {
    matches!(character, '.' | '[' | ']' | '@') || character.is_whitespace()
}

/// Reads from the left; `at` is always a character boundary.
struct Parser<'text> {
    text: &'text str,
    at: usize,
}

impl<'text> Parser<'text> {
    /// `path = "model" *step "." port [ "@" call ] *element [ ".grad" ] [ position ]`
    fn path(mut self) -> Result<Path> {
        self.root()?;
        let port_at = self.port_offset().unwrap_or(self.text.len());
        let mut steps = Vec::with_capacity(self.segments_before(port_at));
        while self.at < port_at {
            steps.push(self.step()?);
        }
        let port = self.port()?;
        let call = self.call()?;
        let (elements, grad, position) = self.tail()?;
        if self.at < self.text.len() {
            return Err(self.expected(Expected::End));
        }
        Ok(Path { steps: steps.into(), port, call, elements, grad, position })
    }

    /// `"model"`
    fn root(&mut self) -> Result<()> {
        let start = self.at;
        match self.word() {
            "model" => Ok(()),
            "" => Err(self.expected(Expected::Root)),
            other => Err(self.error(start, Expected::Root, Found::Text(excerpt(other, 0)))),
        }
    }

    /// Returns where the port begins: at the dot before the last segment called `input` or
    /// `output`. Earlier ones are modules of that name.
    fn port_offset(&self) -> Option<usize> {
        let is_port = |dot: &usize| {
            let segment = self.text.get(dot + 1..).unwrap_or_default();
            let rest = segment.strip_prefix("output").or_else(|| segment.strip_prefix("input"));
            rest.is_some_and(|rest| rest.is_empty() || rest.starts_with(['.', '[', '@']))
        };
        let bytes = self.text.as_bytes().iter().enumerate().rev();
        bytes.filter(|(_, byte)| **byte == b'.').map(|(dot, _)| dot).find(is_port)
    }

    /// Returns how many steps there are at most before the port, so that one allocation does.
    fn segments_before(&self, port_at: usize) -> usize {
        let steps = self.text.as_bytes().get(self.at..port_at).unwrap_or_default();
        steps.iter().filter(|byte| matches!(byte, b'.' | b'[')).count()
    }

    /// `step = "." name / "." number / selector`
    fn step(&mut self) -> Result<Step> {
        match self.peek() {
            Some(b'.') => Ok(self.segment()?.into()),
            Some(b'[') => Ok(Step::Select(self.selector()?)),
            _ => Err(self.expected(Expected::Step)),
        }
    }

    /// `port = "input" / "output"`, with the dot before it
    fn port(&mut self) -> Result<Port> {
        for port in [Port::Output, Port::Input] {
            let rest = self.rest().strip_prefix('.');
            if rest.is_some_and(|rest| rest.starts_with(port.name())) {
                self.at += 1 + port.name().len();
                return Ok(port);
            }
        }
        Err(self.expected(Expected::Port))
    }

    /// `call = number / [ number ] ":" [ number ]`, with the `@` before it
    fn call(&mut self) -> Result<Call> {
        if !self.skip(b'@') {
            return Ok(Call::One(0));
        }
        let start = self.call_number()?;
        if !self.skip(b':') {
            return start.map(Call::One).ok_or_else(|| self.expected(Expected::Call));
        }
        let start = start.unwrap_or(0);
        let stop_at = self.at;
        let stop = self.call_number()?;
        if let Some(stop) = stop.filter(|stop| *stop <= start) {
            let found = Found::Text(stop.to_string().into());
            return Err(self.error(stop_at, Expected::CallAbove(start), found));
        }
        Ok(Call::Range { start, stop })
    }

    /// `number`, where there is one
    fn call_number(&mut self) -> Result<Option<u32>> {
        if !self.peek().is_some_and(|byte| byte.is_ascii_digit()) {
            return Ok(None);
        }
        let start = self.at;
        let number = self.index(Expected::Call)?;
        u32::try_from(number).map(Some).map_err(|_| {
            let found = Found::Text(number.to_string().into());
            self.error(start, Expected::CallLimit, found)
        })
    }

    /// `*element [ ".grad" ] [ position ]`
    fn tail(&mut self) -> Result<(Vec<Element>, bool, Option<Selector>)> {
        let mut elements = Vec::new();
        while let Some(next) = self.peek() {
            if next == b'[' {
                match self.selector()? {
                    Selector::Index(index) => elements.push(Element::Index(index)),
                    position @ (Selector::Slice(_) | Selector::List(_)) => {
                        return Ok((elements, false, Some(position)));
                    }
                }
            } else if next != b'.' {
                return Err(self.expected(Expected::Element));
            } else if self.is_grad() {
                self.at += ".grad".len();
                let here = self.peek() == Some(b'[');
                let position = if here { Some(self.selector()?) } else { None };
                return Ok((elements, true, position));
            } else {
                elements.push(self.segment()?);
            }
        }
        Ok((elements, false, None))
    }

    /// Returns whether the next segment is `.grad`, which is no element's name.
    fn is_grad(&self) -> bool {
        let rest = self.rest().strip_prefix(".grad");
        rest.is_some_and(|rest| !rest.starts_with(|next| !is_delimiter(next)))
    }

    /// `"." name` or `"." number`
    fn segment(&mut self) -> Result<Element> {
        self.at += 1;
        match self.word() {
            "" => Err(self.expected(Expected::Name)),
            word => Ok(Element::of_segment(word)),
        }
    }

    /// `selector = "[" ( index / slice / list ) "]"`
    fn selector(&mut self) -> Result<Selector> {
        self.at += 1;
        self.skip_space();
        let first = match self.peek() {
            Some(b':') => None,
            _ => Some(self.index(Expected::Selector)?),
        };
        self.skip_space();
        let selector = match (self.peek(), first) {
            (Some(b','), Some(first)) => Selector::List(self.list(first)?),
            (_, Some(first)) if self.peek() != Some(b':') => Selector::Index(first),
            (_, start) => Selector::Slice(Box::new(self.slice(start)?)),
        };
        self.skip_space();
        if self.skip(b']') { Ok(selector) } else { Err(self.expected(Expected::Bracket)) }
    }

    /// `slice = [ index ] ":" [ index ] [ ":" [ index ] ]`, from the first colon on
    fn slice(&mut self, start: Option<i64>) -> Result<Slice> {
        self.at += 1;
        let stop = self.optional_index()?;
        if !self.skip(b':') {
            return Slice::new(start, stop, None);
        }
        self.skip_space();
        let at = self.at;
        let every = self.optional_index()?;
        Slice::new(start, stop, every).map_err(|_| {
            let found = Found::Text(every.unwrap_or(0).to_string().into());
            self.error(at, Expected::StepAbove, found)
        })
    }

    /// `list = index "," [ index *( "," index ) [ "," ] ]`, from the first comma on
    fn list(&mut self, first: i64) -> Result<List> {
        let mut entries = vec![first];
        while self.skip(b',') {
            self.skip_space();
            if self.peek() == Some(b']') {
                break;
            }
            if entries.len() == MAX_LIST_ENTRIES {
                return Err(self.expected(Expected::ShorterList));
            }
            entries.push(self.index(Expected::Index)?);
            self.skip_space();
        }
        List::new(entries)
    }

    /// `[ index ]`, with the white space around it
    fn optional_index(&mut self) -> Result<Option<i64>> {
        self.skip_space();
        let written = self.peek().is_some_and(|byte| byte == b'-' || byte.is_ascii_digit());
        let index = if written { Some(self.index(Expected::Index)?) } else { None };
        self.skip_space();
        Ok(index)
    }

    /// `index = "0" / [ "-" ] digit1-9 *digit`
    fn index(&mut self, expected: Expected) -> Result<i64> {
        let rest = self.rest();
        let unsigned = rest.strip_prefix('-').unwrap_or(rest);
        let digits = unsigned.bytes().take_while(u8::is_ascii_digit).count();
        if digits == 0 {
            return Err(self.expected(expected));
        }
        let length = rest.len() - unsigned.len() + digits;
        let written = rest.get(..length).unwrap_or_default();
        let refuse = |expected| self.error(self.at, expected, Found::Text(excerpt(written, 0)));
        if unsigned.starts_with('0') && length > 1 {
            return Err(refuse(Expected::PlainNumber));
        }
        let index = written.parse().map_err(|_| refuse(Expected::IndexLimit))?;
        self.at += length;
        Ok(index)
    }

    /// Takes what stands before the next delimiter, perhaps nothing.
    fn word(&mut self) -> &'text str {
        let rest = self.rest();
        let word = rest.get(..rest.find(is_delimiter).unwrap_or(rest.len())).unwrap_or_default();
        self.at += word.len();
        word
    }

    fn rest(&self) -> &'text str {
        self.text.get(self.at..).unwrap_or_default()
    }

    fn peek(&self) -> Option<u8> {
        self.text.as_bytes().get(self.at).copied()
    }

    fn skip(&mut self, byte: u8) -> bool {
        let here = self.peek() == Some(byte);
        self.at += usize::from(here);
        here
    }

    fn skip_space(&mut self) {
        let rest = self.rest();
        self.at += rest.len() - rest.trim_start().len();
    }

    fn expected(&self, expected: Expected) -> PathError {
        let found = self.rest().chars().next().map_or(Found::End, Found::Character);
        self.error(self.at, expected, found)
    }

    fn error(&self, at: usize, expected: Expected, found: Found) -> PathError {
        PathError::Syntax { text: excerpt(self.text, at), at, expected, found }
    }
}
