//! A TOML document that is read with all its problems, not only the first, each with line and column.

use std::cell::RefCell;
use std::ops::Range;

use serde::de::DeserializeOwned;

use crate::template::Template;

/// Something wrong, or worth a warning, at a place in a file. Displays as `routes.toml:12:8: message`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    pub file: String,
    pub line: usize,
    pub column: usize,
    pub severity: Severity,
    pub message: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Severity { Error, Warning }

/// What `${NAME}` and `${file:PATH}` are looked up in; tests pass their own.
pub trait Lookup {
    fn variable(&self, name: &str) -> Option<String>;
    fn file(&self, path: &str) -> std::io::Result<String>;
}

/// A parsed document and the problems found in it so far.
pub struct Document { /* source text, parsed toml::de::DeTable, RefCell<Vec<Problem>>, lookup */ }

impl Document {
    /// Never fails: syntax errors become problems, and what could be parsed is there.
    pub fn parse(file: &str, source: &str, lookup: &dyn Lookup) -> Self { unimplemented!() }
    pub fn root(&self) -> Section<'_> { unimplemented!() }
    /// All problems, in the file's order.
    pub fn into_problems(self) -> Vec<Problem> { unimplemented!() }
}

/// One table of the document. Keys that nobody asked for are unknown keys: `finish` reports them.
pub struct Section<'d> { document: &'d Document }

impl<'d> Section<'d> {
    /// The key's value, with `${…}` resolved in all strings in it; absent or wrong (then reported): `None`.
    pub fn get<T: DeserializeOwned>(&mut self, key: &'static str) -> Option<T> { unimplemented!() }
    /// As `get`, but an absent key is a problem.
    pub fn require<T: DeserializeOwned>(&mut self, key: &'static str) -> Option<T> { unimplemented!() }
    /// A value that reads itself with units: "15s", "256KiB", via FromStr-like function; its error is reported at the value.
    pub fn parse<T, E: std::fmt::Display>(&mut self, key: &'static str, parse: impl FnOnce(&str) -> Result<T, E>) -> Option<T> { unimplemented!() }
    /// A template; unknown `{names}` and missing `${…}` are reported.
    pub fn template(&mut self, key: &'static str) -> Option<Template> { unimplemented!() }
    /// A table of templates, in the file's order (`headers = { name = "template" }`).
    pub fn templates(&mut self, key: &'static str) -> Vec<(String, Template)> { unimplemented!() }
    /// A sub-table.
    pub fn table(&mut self, key: &'static str) -> Option<Section<'d>> { unimplemented!() }
    /// Reports a problem at the key's value (or at the table where the key is absent).
    pub fn problem(&self, key: &str, message: impl Into<String>) { unimplemented!() }
    pub fn warning(&self, key: &str, message: impl Into<String>) { unimplemented!() }
    /// The source range of the section: equal text means an unchanged section (for reload).
    pub fn span(&self) -> Range<usize> { unimplemented!() }
    /// Reports the keys that nobody asked for, with the nearest known one.
    pub fn finish(self) { unimplemented!() }
}
