//! A TOML document that is read with all its problems, not only the first, each with line and column.
//!
//! [`Document::parse`] never fails: a statement with a syntax error becomes a [`Problem`], and everything around it is
//! there. Readers walk it as [`Section`]s, which resolve `${NAME}` and `${file:PATH}` in strings and remember what was
//! asked for, so that [`Section::finish`] can report the rest. What came from a variable or a file is never part of a
//! problem's message.
//!
//! This part knows TOML and references. It does not know what any key means.

mod reference;
mod syntax;
mod unresolved;
mod words;

use std::cell::RefCell;
use std::fmt;
use std::ops::Range;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use toml::Spanned;
use toml::de::{DeString, DeTable, DeValue, ValueDeserializer};
use utoipa::ToSchema;

use crate::template::Template;

pub use reference::{Environment, Lookup, resolved};
pub(crate) use reference::{Piece, pieces};
pub use unresolved::{Unresolved, refers};

/// Something wrong, or worth a warning, at a place in a file. Displays as `routes.toml:12:8: message`; which of the two it
/// is, whoever shows it says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[schema(as = RulesProblem)]
pub struct Problem {
    /// The file, as it was called in [`Document::parse`].
    pub file: String,
    /// Counted from 1.
    pub line: usize,
    /// In characters, counted from 1.
    pub column: usize,
    /// Whether the file can be used in spite of it.
    pub severity: Severity,
    /// What is wrong, and where possible what to do. Never holds a value that came from a variable or a file.
    pub message: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { file, line, column, severity: _, message } = self;
        write!(f, "{file}:{line}:{column}: {message}")
    }
}

/// What a [`Problem`] means for the document.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// Nothing of the document may be applied.
    Error,
    /// It can be applied, but is probably not what was meant.
    Warning,
}

/// A parsed document and the problems found in it so far.
pub struct Document<'l> {
    file: String,
    source: &'l str,
    root: DeTable<'l>,
    /// What could not be read because of a syntax error.
    lost: Vec<Range<usize>>,
    lookup: &'l dyn Lookup,
    problems: RefCell<Vec<(Range<usize>, Severity, String)>>,
}

impl<'l> Document<'l> {
    /// Never fails: syntax errors become problems, and what could be parsed is there.
    pub fn parse(file: &str, source: &'l str, lookup: &'l dyn Lookup) -> Self {
        let syntax::Recovered { root, errors, lost } = syntax::parse(source);
        let problems = errors.into_iter().map(|(at, message)| (at..at, Severity::Error, message)).collect();
        Self { file: file.to_owned(), source, root, lost, lookup, problems: RefCell::new(problems) }
    }

    /// The top-level table.
    pub fn root(&self) -> Section<'_> {
        Section { document: self, table: &self.root, place: Place(0..0), known: Vec::new(), given_up: false }
    }

    /// All problems, in the file's order, each once.
    pub fn into_problems(self) -> Vec<Problem> {
        let mut found = self.problems.into_inner();
        found.sort_by_key(|(at, ..)| at.start);
        found.dedup_by(|one, other| one.0.start == other.0.start && (one.1, &one.2) == (other.1, &other.2));
        let mut line = 1;
        let mut line_start = 0;
        let mut problems = Vec::with_capacity(found.len());
        for (Range { start: at, .. }, severity, message) in found {
            let passed = self.source.get(line_start..at).unwrap_or_default();
            line += passed.matches('\n').count();
            line_start = passed.rfind('\n').map_or(line_start, |end| line_start + end + 1);
            let before = self.source.get(line_start..at).unwrap_or_default();
            let column = before.trim_start_matches('\u{feff}').chars().count() + 1;
            problems.push(Problem { file: self.file.clone(), line, column, severity, message });
        }
        problems
    }

    fn report(&self, place: &Place, severity: Severity, message: String) {
        self.problems.borrow_mut().push((place.0.clone(), severity, message));
    }

    /// Whether unreadable text mentions the word: its absence elsewhere may be a consequence of that.
    fn lost(&self, word: &str) -> bool {
        let part_of_word = |c: char| c.is_alphanumeric() || matches!(c, '.' | '_' | '-');
        let mut lost = self.lost.iter().filter_map(|range| self.source.get(range.clone()));
        lost.any(|text| {
            let mut words = text.split(|c| !part_of_word(c));
            words.any(|found| found == word || found.split('.').any(|part| part == word))
        })
    }

    /// The text with its references resolved, and whether it has any. Missing ones are reported at `place`.
    fn resolve(&self, text: &str, place: &Place) -> Option<(String, bool)> {
        let (pieces, problems) = pieces(text, self.lookup);
        let referring = pieces.iter().any(|piece| matches!(piece, Piece::Reference { .. }));
        let resolved = problems.is_empty().then(|| (pieces.iter().map(Piece::value).collect(), referring));
        problems.into_iter().for_each(|message| self.report(place, Severity::Error, message));
        resolved
    }

    /// Resolves all strings of a value in place and notes where there were references. False: one was missing.
    fn resolve_all(&self, value: &mut Spanned<DeValue<'l>>, referring: &mut Vec<Range<usize>>) -> bool {
        let span = value.span();
        match value.get_mut() {
            DeValue::String(text) => {
                let Some((resolved, refers)) = self.resolve(text, &Place(span.clone())) else { return false };
                *text = resolved.into();
                referring.extend(refers.then_some(span));
                true
            }
            DeValue::Array(array) => self.resolve_each(array.iter_mut(), referring),
            DeValue::Table(table) => self.resolve_each(table.iter_mut().map(|(_, value)| value), referring),
            DeValue::Integer(_) | DeValue::Float(_) | DeValue::Boolean(_) | DeValue::Datetime(_) => true,
        }
    }

    /// Goes on after a missing reference, so that each is reported.
    fn resolve_each<'v>(
        &self,
        values: impl Iterator<Item = &'v mut Spanned<DeValue<'l>>>,
        referring: &mut Vec<Range<usize>>,
    ) -> bool
    where
        'l: 'v,
    {
        let mut good = true;
        for value in values {
            good &= self.resolve_all(value, referring);
        }
        good
    }
}

/// Where in a document something stands, for [`Section::problem_at`].
#[derive(Clone, Debug)]
pub struct Place(Range<usize>);

/// A key as it was written.
#[derive(Clone, Debug)]
pub struct Key<'d> {
    /// The key itself.
    pub name: &'d str,
    /// Where it stands.
    pub place: Place,
}

/// One table of the document. Keys that nobody asked for are unknown keys: `finish` reports them.
pub struct Section<'d> {
    document: &'d Document<'d>,
    table: &'d DeTable<'d>,
    place: Place,
    known: Vec<&'static str>,
    given_up: bool,
}

impl<'d> Section<'d> {
    /// The key's value, with `${…}` resolved in all strings in it; absent or wrong (then reported): `None`.
    pub fn get<T: DeserializeOwned>(&mut self, key: &'static str) -> Option<T> {
        self.value(key)?.read()
    }

    /// As `get`, but an absent key is a problem.
    pub fn require<T: DeserializeOwned>(&mut self, key: &'static str) -> Option<T> {
        let value = self.value(key);
        if value.is_none() && !self.document.lost(key) {
            self.problem(key, format!("`{key}` is missing"));
        }
        value?.read()
    }

    /// A value that reads itself from text ("15s", "256KiB"); its error is reported at the value.
    pub fn parse<T, E: fmt::Display>(
        &mut self,
        key: &'static str,
        parse: impl FnOnce(&str) -> Result<T, E>,
    ) -> Option<T> {
        let value = self.value(key)?;
        let (text, referring) = self.document.resolve(value.string()?, &value.place())?;
        match parse(&text) {
            Ok(parsed) => return Some(parsed),
            Err(_) if referring => value.problem(AFTER_RESOLVING),
            Err(error) => value.problem(error.to_string()),
        }
        None
    }

    /// A template; unknown `{names}` and missing `${…}` are reported.
    pub fn template(&mut self, key: &'static str) -> Option<Template> {
        self.value(key)?.template()
    }

    /// A table of templates, in the file's order (`headers = { name = "template" }`).
    pub fn templates(&mut self, key: &'static str) -> Vec<(Key<'d>, Template)> {
        let entries = self.table(key).map(|section| section.entries()).unwrap_or_default();
        entries.into_iter().filter_map(|(key, value)| Some((key, value.template()?))).collect()
    }

    /// A sub-table.
    pub fn table(&mut self, key: &'static str) -> Option<Section<'d>> {
        self.value(key)?.table()
    }

    /// All tables in a table of tables (`[sinks.crm]`, `[sinks.ops]`), in the file's order.
    pub fn tables(&mut self, key: &'static str) -> Vec<(Key<'d>, Section<'d>)> {
        let entries = self.table(key).map(|section| section.entries()).unwrap_or_default();
        entries.into_iter().filter_map(|(key, value)| Some((key, value.table()?))).collect()
    }

    /// The tables of an array (`[[routes]]`), in the file's order.
    pub fn array(&mut self, key: &'static str) -> Vec<Section<'d>> {
        let Some(value) = self.value(key) else { return Vec::new() };
        match value.shape() {
            Shape::Array(elements) => elements.into_iter().filter_map(Value::table).collect(),
            Shape::Text(_) | Shape::Scalar(_) | Shape::Table(_) | Shape::Datetime => {
                value.problem(format!("should be an array of tables, is {}", value.kind()));
                Vec::new()
            }
        }
    }

    /// The key's value, of whatever type.
    pub fn value(&mut self, key: &'static str) -> Option<Value<'d>> {
        if !self.known.contains(&key) {
            self.known.push(key);
        }
        self.table.get(key).map(|value| Value { document: self.document, value })
    }

    /// All keys and values, for a table whose keys are data. There is no need for `finish` then.
    pub fn entries(&self) -> Vec<(Key<'d>, Value<'d>)> {
        let entry = |(key, value): (&'d Spanned<DeString<'d>>, _)| {
            (Key { name: key.get_ref(), place: Place(key.span()) }, Value { document: self.document, value })
        };
        self.table.iter().map(entry).collect()
    }

    /// Reports a problem at the key's value (or at the table where the key is absent).
    pub fn problem(&self, key: &str, message: impl Into<String>) {
        self.document.report(&self.place_of(key), Severity::Error, message.into());
    }

    /// As [`Section::problem`], but the document can be used.
    pub fn warning(&self, key: &str, message: impl Into<String>) {
        self.document.report(&self.place_of(key), Severity::Warning, message.into());
    }

    /// Reports a problem at a key or value of this document.
    pub fn problem_at(&self, place: &Place, message: impl Into<String>) {
        self.document.report(place, Severity::Error, message.into());
    }

    /// As [`Section::problem_at`], but the document can be used.
    pub fn warning_at(&self, place: &Place, message: impl Into<String>) {
        self.document.report(place, Severity::Warning, message.into());
    }

    /// Whether text that has a syntax error mentions the name: that it is nowhere else may be a consequence, and is
    /// then not worth a problem of its own.
    pub fn lost(&self, name: &str) -> bool {
        self.document.lost(name)
    }

    /// The section's header, or its braces.
    pub fn place(&self) -> &Place {
        &self.place
    }

    /// Says that the section's other keys can't be judged, since what they mean depends on one that is wrong.
    pub fn give_up(&mut self) {
        self.given_up = true;
    }

    /// Reports the keys that nobody asked for, with the nearest known one.
    pub fn finish(self) {
        for (key, _) in self.entries() {
            if !self.given_up && !self.known.contains(&key.name) {
                self.problem_at(&key.place, unknown("key", key.name, &self.known));
            }
        }
    }

    fn place_of(&self, key: &str) -> Place {
        self.table.get(key).map_or_else(|| self.place.clone(), |value| Place(value.span()))
    }
}

/// A value of the document.
#[derive(Clone, Copy)]
pub struct Value<'d> {
    document: &'d Document<'d>,
    value: &'d Spanned<DeValue<'d>>,
}

/// A [`Value`] by type.
pub enum Shape<'d> {
    /// A string, with its references not yet resolved: see [`Value::text`].
    Text(&'d str),
    /// An integer, float or boolean as it was written.
    Scalar(String),
    /// An array.
    Array(Vec<Value<'d>>),
    /// A table.
    Table(Section<'d>),
    /// A date or time.
    Datetime,
}

impl<'d> Value<'d> {
    /// What the value is.
    pub fn shape(self) -> Shape<'d> {
        match self.value.get_ref() {
            DeValue::String(text) => Shape::Text(text),
            DeValue::Integer(integer) => Shape::Scalar(integer.to_string()),
            DeValue::Float(float) => Shape::Scalar(float.to_string()),
            DeValue::Boolean(boolean) => Shape::Scalar(boolean.to_string()),
            DeValue::Datetime(_) => Shape::Datetime,
            DeValue::Array(array) => {
                Shape::Array(array.iter().map(|value| Self { document: self.document, value }).collect())
            }
            DeValue::Table(table) => Shape::Table(Section {
                document: self.document,
                table,
                place: self.place(),
                known: Vec::new(),
                given_up: false,
            }),
        }
    }

    /// A string with its references resolved, or an integer, float or boolean as it was written; and whether there were
    /// references, so that it must not be shown. Anything else, or a missing reference: reported, `None`.
    pub fn text(self) -> Option<(String, bool)> {
        match self.shape() {
            Shape::Text(text) => self.document.resolve(text, &self.place()),
            Shape::Scalar(text) => Some((text, false)),
            Shape::Array(_) | Shape::Table(_) | Shape::Datetime => {
                self.problem(format!("should be a string, is {}", self.kind()));
                None
            }
        }
    }

    /// The value as it stands in the file, with its references not resolved: safe to show.
    pub fn source(self) -> &'d str {
        self.document.source.get(self.value.span()).unwrap_or_default()
    }

    /// Where it stands.
    pub fn place(self) -> Place {
        Place(self.value.span())
    }

    /// Reports a problem with the value.
    pub fn problem(self, message: impl Into<String>) {
        self.document.report(&self.place(), Severity::Error, message.into());
    }

    /// The type, with its article.
    pub fn kind(self) -> &'static str {
        match self.value.get_ref() {
            DeValue::String(_) => "a string",
            DeValue::Integer(_) => "an integer",
            DeValue::Float(_) => "a float",
            DeValue::Boolean(_) => "a boolean",
            DeValue::Datetime(_) => "a date or time",
            DeValue::Array(_) => "an array",
            DeValue::Table(_) => "a table",
        }
    }

    /// The value, with `${…}` resolved in all strings in it; wrong (then reported): `None`.
    pub fn read<T: DeserializeOwned>(self) -> Option<T> {
        let mut resolved = self.value.clone();
        let mut referring = Vec::new();
        if !self.document.resolve_all(&mut resolved, &mut referring) {
            return None;
        }
        let error = match T::deserialize(ValueDeserializer::from(resolved)) {
            Ok(value) => return Some(value),
            Err(error) => error,
        };
        // An error about a table or an array may quote anything in it.
        let at = error.span().filter(|span| *span != (0..0)).unwrap_or_else(|| self.value.span());
        let inside = |span: &Range<usize>| self.value.span().start <= span.start && span.end <= self.value.span().end;
        let apart = |span: &Range<usize>| inside(&at) && (span.end <= at.start || at.end <= span.start);
        let message =
            if referring.iter().all(apart) { words::plain(error.message()) } else { AFTER_RESOLVING.to_owned() };
        self.document.report(&Place(at), Severity::Error, message);
        None
    }

    fn string(self) -> Option<&'d str> {
        match self.shape() {
            Shape::Text(text) => Some(text),
            Shape::Scalar(_) | Shape::Array(_) | Shape::Table(_) | Shape::Datetime => {
                self.problem(format!("should be a string, is {}", self.kind()));
                None
            }
        }
    }

    fn template(self) -> Option<Template> {
        let parsed = Template::parse(self.string()?, self.document.lookup);
        parsed.map_err(|messages| messages.into_iter().for_each(|message| self.problem(message))).ok()
    }

    fn table(self) -> Option<Section<'d>> {
        match self.shape() {
            Shape::Table(section) => Some(section),
            Shape::Text(_) | Shape::Scalar(_) | Shape::Array(_) | Shape::Datetime => {
                self.problem(format!("should be a table, is {}", self.kind()));
                None
            }
        }
    }
}

const AFTER_RESOLVING: &str = "the value is not valid after its `${…}` have been put in";

/// The message about a name that is none of the known ones: with the one that was probably meant, or else all.
pub fn unknown(what: &str, name: &str, known: &[&str]) -> String {
    let distance = |known: &&&str| strsim::damerau_levenshtein(name, known);
    match known.iter().min_by_key(distance) {
        Some(nearest) if distance(&nearest) <= (name.chars().count() + 1) / 3 => {
            format!("unknown {what} `{name}`; did you mean `{nearest}`?")
        }
        Some(_) => format!("unknown {what} `{name}`; known are {}", known.join(", ")),
        None => format!("unknown {what} `{name}`"),
    }
}

#[cfg(test)]
mod tests;
