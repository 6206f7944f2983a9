//! Text with `{fields}` of the event in it.
//!
//! [`Template::parse`] compiles a text once, and [`Template::render`] fills it in for each event. What came from a
//! variable or a file (`${…}`) is a part of its own: braces in it are never taken for fields, and
//! [`Template::render_redacted`] leaves it out.

use std::fmt::{self, Write};

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};

use crate::document::{Lookup, Piece, pieces, unknown};
use crate::event::{Event, EventId, Field};
use crate::pointer::Pointer;

/// A compiled template: literals, secrets, fields and JSON pointers.
#[derive(Clone, PartialEq)]
pub struct Template {
    parts: Vec<Part>,
    /// The whole text where no part depends on the event.
    literal: Option<String>,
    /// Bytes that a rendered text probably has.
    size: usize,
}

/// How values are written into the text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Escape {
    /// As they are.
    None,
    /// Percent-encoded: everything but unreserved characters. The values `.` and `..` are encoded twice, because in a
    /// path they would remove segments, even as `%2E`.
    Url,
}

#[derive(Clone, PartialEq)]
enum Part {
    Literal(String),
    Secret { written: String, value: String },
    EventId,
    Field { field: Field, default: String },
    Pointer { pointer: Pointer, default: String },
}

/// Shows no secret.
impl fmt::Debug for Template {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Template").field(&self.parts).finish()
    }
}

/// Shows no secret.
impl fmt::Debug for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Literal(text) | Self::Secret { written: text, .. } => write!(f, "{text:?}"),
            Self::EventId => f.write_str("{event_id}"),
            Self::Field { field, .. } => write!(f, "{{{}}}", field.name()),
            Self::Pointer { pointer, .. } => write!(f, "{pointer:?}"),
        }
    }
}

/// What stands for a value that the event lacks, unless the template says otherwise.
const ABSENT: &str = "-";
/// Bytes reserved for each value.
const USUAL_VALUE: usize = 32;
/// All but what RFC 3986 calls unreserved: what is percent-encoded in a part of a URI.
pub(crate) const ALL_BUT_UNRESERVED: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~');

impl Template {
    /// Compiles a text.
    ///
    /// # Errors
    ///
    /// Every problem of the text: unknown names, unclosed braces, missing `${…}`.
    pub fn parse(text: &str, lookup: &dyn Lookup) -> Result<Self, Vec<String>> {
        let (pieces, problems) = pieces(text, lookup);
        let mut parser = Parser { parts: Vec::new(), problems };
        pieces.into_iter().for_each(|piece| parser.piece(piece));
        parser.finish()
    }

    /// A template without fields.
    pub fn literal(text: impl Into<String>) -> Self {
        Self::new(vec![Part::Literal(text.into())])
    }

    fn new(parts: Vec<Part>) -> Self {
        let size = |part: &Part| match part {
            Part::Literal(text) | Part::Secret { value: text, .. } => text.len(),
            Part::EventId => EventId::LEN,
            Part::Field { .. } | Part::Pointer { .. } => USUAL_VALUE,
        };
        let fixed = |part: &Part| match part {
            Part::Literal(text) | Part::Secret { value: text, .. } => Some(text.clone()),
            Part::EventId | Part::Field { .. } | Part::Pointer { .. } => None,
        };
        Self { literal: parts.iter().map(fixed).collect(), size: parts.iter().map(size).sum(), parts }
    }

    /// The whole text where no part depends on the event.
    pub fn as_literal(&self) -> Option<&str> {
        self.literal.as_deref()
    }

    /// The text for an event.
    pub fn render(&self, event: &Event, escape: Escape) -> String {
        self.fill(event, escape, |_, value| value)
    }

    /// As `render`, with `${NAME}` in place of what came from a variable or a file: for people's eyes.
    pub fn render_redacted(&self, event: &Event, escape: Escape) -> String {
        self.fill(event, escape, |written, _| written)
    }

    /// The text with `sample` in place of every field: to check at load time what values could change.
    pub fn render_sample(&self, sample: &str) -> String {
        let parts = self.parts.iter().map(|part| match part {
            Part::Literal(text) | Part::Secret { value: text, .. } => text.as_str(),
            Part::EventId | Part::Field { .. } | Part::Pointer { .. } => sample,
        });
        parts.collect()
    }

    fn fill<'t>(&'t self, event: &Event, escape: Escape, secret: fn(&'t str, &'t str) -> &'t str) -> String {
        let mut out = String::with_capacity(self.size);
        for part in &self.parts {
            match part {
                Part::Literal(text) => out.push_str(text),
                Part::Secret { written, value } => out.push_str(secret(written, value)),
                // Neither needs escaping nor can fail: it goes to a String.
                Part::EventId => write!(out, "{}", event.id()).unwrap_or_default(),
                Part::Field { field, default } => push(&mut out, event.field(*field).unwrap_or(default), escape),
                Part::Pointer { pointer, default } => {
                    push(&mut out, pointer.find(event.body_str()).as_deref().unwrap_or(default), escape);
                }
            }
        }
        out
    }
}

fn push(out: &mut String, value: &str, escape: Escape) {
    match (escape, value) {
        (Escape::None, value) => out.push_str(value),
        (Escape::Url, ".") => out.push_str("%252E"),
        (Escape::Url, "..") => out.push_str("%252E%252E"),
        (Escape::Url, value) => out.extend(utf8_percent_encode(value, ALL_BUT_UNRESERVED)),
    }
}

/// Collects parts and problems.
struct Parser {
    parts: Vec<Part>,
    problems: Vec<String>,
}

impl Parser {
    fn piece(&mut self, piece: Piece<'_>) {
        match piece {
            Piece::Text(text) => self.text(text),
            Piece::Escaped(text) => self.literal(text),
            Piece::Reference { written, value } => self.parts.push(Part::Secret { written: written.to_owned(), value }),
        }
    }

    fn text(&mut self, mut text: &str) {
        while let Some(brace) = text.find(['{', '}']) {
            let (before, rest) = text.split_at(brace);
            self.literal(before);
            if let Some(rest) = rest.strip_prefix("{{") {
                self.literal("{");
                text = rest;
            } else if let Some(rest) = rest.strip_prefix("}}") {
                self.literal("}");
                text = rest;
            } else if let Some(field) = rest.strip_prefix('{') {
                let Some((field, after)) = field.split_once('}') else {
                    self.problems.push("`{` is not closed by `}`, and no `${…}` can stand between the two; for a literal brace write `{{`".to_owned());
                    return;
                };
                self.field(field);
                text = after;
            } else {
                self.problems.push("`}` closes nothing; for a literal brace write `}}`".to_owned());
                text = rest.get(1..).unwrap_or_default();
            }
        }
        self.literal(text);
    }

    fn field(&mut self, written: &str) {
        let (name, default) = written.split_once('|').unwrap_or((written, ABSENT));
        let default = default.to_owned();
        if name == "event_id" {
            self.parts.push(Part::EventId);
        } else if let Some(field) = Field::from_name(name) {
            self.parts.push(Part::Field { field, default });
        } else if name.starts_with('/') {
            match Pointer::parse(name) {
                Ok(pointer) => self.parts.push(Part::Pointer { pointer, default }),
                Err(problem) => self.problems.push(format!("`{{{name}}}`: {problem}")),
            }
        } else {
            let known: Vec<_> =
                Field::NAMED.iter().map(|(name, _)| *name).chain(["event_id", "/json/pointer"]).collect();
            self.problems.push(unknown("field", name, &known));
        }
    }

    fn literal(&mut self, text: &str) {
        match self.parts.last_mut() {
            _ if text.is_empty() => {}
            Some(Part::Literal(last)) => last.push_str(text),
            _ => self.parts.push(Part::Literal(text.to_owned())),
        }
    }

    fn finish(self) -> Result<Template, Vec<String>> {
        if self.problems.is_empty() { Ok(Template::new(self.parts)) } else { Err(self.problems) }
    }
}

#[cfg(test)]
mod tests;
