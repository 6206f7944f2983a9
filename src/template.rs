//! Text with `{fields}` of the event in it.

use crate::document::Lookup;
use crate::event::Event;

/// A compiled template: literals, secrets, fields and JSON pointers.
#[derive(Clone, Debug)]
pub struct Template { /* parts */ }

/// How values are written into the text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Escape {
    /// As they are.
    None,
    /// Percent-encoded: everything but unreserved characters.
    Url,
}

impl Template {
    /// # Errors
    ///
    /// Every problem of the text: unknown names, unclosed braces, missing `${…}`.
    pub fn parse(text: &str, lookup: &dyn Lookup) -> Result<Self, Vec<String>> { unimplemented!() }
    /// A template without fields.
    pub fn literal(text: impl Into<String>) -> Self { unimplemented!() }
    /// The whole text where no part depends on the event.
    pub fn as_literal(&self) -> Option<&str> { unimplemented!() }
    pub fn render(&self, event: &Event, escape: Escape) -> String { unimplemented!() }
    /// As `render`, with `${NAME}` in place of what came from a variable or a file: for people's eyes.
    pub fn render_redacted(&self, event: &Event, escape: Escape) -> String { unimplemented!() }
    /// The text with `sample` in place of every field: to check at load time what values could change.
    pub fn render_sample(&self, sample: &str) -> String { unimplemented!() }
}
