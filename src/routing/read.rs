//! From `[[routes]]` to the compiled table, with every problem at its place.

use std::collections::{HashMap, HashSet};

use regex::{Regex, RegexBuilder};

use super::condition::{Condition, Patterns, Subject, SubjectId, Test};
use super::index::Index;
use super::{Route, SinkId, Table, UNROUTED};
use crate::document::{Key, Section, Shape, Value, refers, unknown};
use crate::event::Field;
use crate::pointer::Pointer;

/// Bytes that a compiled regex may take.
const MAX_REGEX: usize = 1024 * 1024;
/// Bytes of a sink's name.
const MAX_SINK_NAME: usize = 64;

impl Table {
    /// Reads `[[routes]]` and `[unrouted]` of a document's root. `sinks` are the document's sinks in the order that
    /// [`SinkId`] counts, also those that have problems. The table may be used only if the document then has no errors.
    pub fn read(root: &mut Section<'_>, sinks: &[Key<'_>]) -> Self {
        Self::read_with(root, sinks, None)
    }

    /// As [`Table::read`], but of a document whose references were not looked up. A condition with references is taken
    /// from `running`, where one on the same field is written alike; else it is a problem.
    pub fn read_beside(root: &mut Section<'_>, sinks: &[Key<'_>], running: &Self) -> Self {
        Self::read_with(root, sinks, Some(running))
    }

    fn read_with(root: &mut Section<'_>, sinks: &[Key<'_>], running: Option<&Self>) -> Self {
        let mut reader = Reader {
            running,
            sinks: sinks.iter().enumerate().map(|(place, sink)| (sink.name, SinkId(place))).collect(),
            ..Reader::default()
        };
        let routes: Vec<_> =
            (1..).zip(root.array("routes")).map(|(number, route)| reader.route(number, route)).collect();
        let used: HashSet<_> = routes.iter().flat_map(|route| &route.to).collect();
        for (place, sink) in sinks.iter().enumerate() {
            if !used.contains(&SinkId(place)) && !root.lost(sink.name) {
                root.warning_at(&sink.place, format!("no route leads to the sink `{}`", sink.name));
            }
        }
        let mut keep_unrouted = true;
        if let Some(mut unrouted) = root.table("unrouted") {
            keep_unrouted = unrouted.get("keep").unwrap_or(true);
            unrouted.finish();
        }
        let sinks = sinks.iter().map(|sink| sink.name.to_owned()).collect();
        Self { sinks, index: Index::new(&routes), routes, subjects: reader.into_subjects(), keep_unrouted }
    }
}

impl Table {
    /// The tests of a condition on that field that is written so, if there is one.
    fn tests(&self, field: &str, written: &str) -> Option<&[Test]> {
        let mut conditions = self.routes.iter().flat_map(|route| &route.when);
        let names = |condition: &Condition| self.subjects.get(condition.subject.0).is_some_and(|s| s.name() == field);
        let found = conditions.find(|condition| condition.written == written && names(condition));
        found.map(|condition| condition.tests.as_slice())
    }
}

/// Whether a sink may have that name: up to 64 letters, digits, `.`, `_` and `-`, and not reserved.
///
/// # Errors
///
/// What is wrong with it.
pub fn check_sink_name(name: &str) -> Result<(), String> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    if name == UNROUTED {
        return Err(format!("the name `{UNROUTED}` is reserved for events that no route matches"));
    }
    if name.is_empty() || name.len() > MAX_SINK_NAME || !name.chars().all(allowed) {
        return Err(format!("a sink's name has 1 to {MAX_SINK_NAME} letters, digits, `.`, `_` or `-`"));
    }
    Ok(())
}

/// What has been seen so far.
#[derive(Default)]
pub(super) struct Reader<'d> {
    /// Where conditions with references come from, if these are not looked up.
    running: Option<&'d Table>,
    sinks: HashMap<&'d str, SinkId>,
    names: HashSet<String>,
    subjects: Subjects,
}

/// What conditions look at, each once.
#[derive(Default)]
pub(super) struct Subjects {
    list: Vec<Subject>,
    places: HashMap<String, SubjectId>,
}

impl Subjects {
    /// The place of a subject that rules call so.
    ///
    /// # Errors
    ///
    /// There is none of the name.
    pub(super) fn place(&mut self, name: &str) -> Result<SubjectId, String> {
        if let Some(known) = self.places.get(name) {
            return Ok(*known);
        }
        let subject = if let Some(field) = Field::from_name(name) {
            Subject::Field(field)
        } else if name == "token" {
            Subject::Token
        } else if name.starts_with('/') {
            let pointers = self.list.iter().filter(|subject| matches!(subject, Subject::Pointer(..)));
            Subject::Pointer(pointers.count(), name.to_owned(), Pointer::parse(name)?)
        } else {
            let names = Field::NAMED.iter().map(|(name, _)| *name);
            return Err(unknown("field", name, &names.chain(["token", "/json/pointer"]).collect::<Vec<_>>()));
        };
        let place = SubjectId(self.list.len());
        self.list.push(subject);
        self.places.insert(name.to_owned(), place);
        Ok(place)
    }

    pub(super) fn into_list(self) -> Vec<Subject> {
        self.list
    }
}

impl Reader<'_> {
    /// What the conditions look at.
    pub(super) fn into_subjects(self) -> Vec<Subject> {
        self.subjects.into_list()
    }

    fn route(&mut self, number: usize, mut section: Section<'_>) -> Route {
        let name = section.get("name").unwrap_or_else(|| format!("route-{number}"));
        if name.is_empty() {
            section.problem("name", "a route's name cannot be empty; without `name` it is called by its number");
        } else if !self.names.insert(name.clone()) {
            section.problem("name", "another route has this name");
        }
        let when = section.table("when").map(|when| self.conditions(&when)).unwrap_or_default();
        let to = self.destinations(&mut section);
        let is_final = section.get("final").unwrap_or(false);
        section.finish();
        Route { name, when, to, is_final }
    }

    fn destinations(&self, section: &mut Section<'_>) -> Vec<SinkId> {
        let Some(value) = section.value("to") else {
            if !section.lost("to") {
                section.problem("to", "`to` is missing: a route names at least one sink");
            }
            return Vec::new();
        };
        let Shape::Array(names) = value.shape() else {
            value.problem(format!("should be an array of sink names, is {}", value.kind()));
            return Vec::new();
        };
        if names.is_empty() {
            value.problem("a route names at least one sink");
        }
        let mut to = Vec::with_capacity(names.len());
        for value in names {
            let Some((name, secret)) = value.text() else { continue };
            match self.sinks.get(name.as_str()) {
                Some(sink) if to.contains(sink) => {}
                Some(sink) => to.push(*sink),
                None if section.lost(&name) => {}
                None if secret => value.problem("no sink has this name"),
                None => {
                    let mut known: Vec<_> = self.sinks.keys().copied().collect();
                    known.sort_unstable();
                    value.problem(unknown("sink", &name, &known));
                }
            }
        }
        to
    }

    pub(super) fn conditions(&mut self, when: &Section<'_>) -> Vec<Condition> {
        let condition = |(key, value): (Key<'_>, Value<'_>)| {
            let subject = self.subjects.place(key.name).map_err(|problem| when.problem_at(&key.place, problem)).ok()?;
            let (mut tests, written) = tests(value);
            if let Some(running) = self.running.filter(|_| refers(&written)) {
                match running.tests(key.name, &written) {
                    Some(known) => tests = known.to_vec(),
                    None => when.problem_at(&key.place, UNRESOLVED),
                }
            }
            Some(Condition { subject, tests, written })
        };
        when.entries().into_iter().filter_map(condition).collect()
    }
}

const UNRESOLVED: &str = "the value of a reference is not looked up for a comparison, unless the running rules have the \
    same condition; write the value itself, or compare with events from a file";

/// The tests of a condition, and how it was written.
fn tests(value: Value<'_>) -> (Vec<Test>, String) {
    let Shape::Table(table) = value.shape() else {
        return (patterns(value).map(Test::OneOf).into_iter().collect(), value.source().to_owned());
    };
    let entries = table.entries();
    if entries.is_empty() {
        value.problem("an empty table is no condition; for any value write { exists = true }");
    }
    let written: Vec<_> = entries.iter().map(|(key, value)| format!("{} = {}", key.name, value.source())).collect();
    let tests = entries.into_iter().filter_map(|(key, value)| match key.name {
        "is" => single(value).map(Test::OneOf),
        "not" => single(value).map(Test::NoneOf),
        "in" => list(value).map(Test::OneOf),
        "not_in" => list(value).map(Test::NoneOf),
        "prefix" => value.text().map(|(prefix, _)| Test::Prefix(prefix)),
        "regex" => regex(value),
        "exists" => exists(value),
        name => {
            table.problem_at(&key.place, unknown("test", name, &KNOWN_TESTS));
            None
        }
    });
    (tests.collect(), written.join(", "))
}

const KNOWN_TESTS: [&str; 7] = ["is", "in", "not", "not_in", "prefix", "regex", "exists"];

fn patterns(value: Value<'_>) -> Option<Patterns> {
    match value.shape() {
        Shape::Array(_) => list(value),
        Shape::Text(_) | Shape::Scalar(_) => single(value),
        Shape::Table(_) | Shape::Datetime => {
            value.problem(format!("should be a string, an array of strings or a table of tests, is {}", value.kind()));
            None
        }
    }
}

fn single(value: Value<'_>) -> Option<Patterns> {
    value.text().map(|(pattern, _)| Patterns::from_iter([pattern]))
}

fn list(value: Value<'_>) -> Option<Patterns> {
    let Shape::Array(elements) = value.shape() else {
        value.problem(format!("should be an array of strings, is {}", value.kind()));
        return None;
    };
    if elements.is_empty() {
        value.problem("an empty array is no condition: name at least one value");
    }
    Some(elements.into_iter().filter_map(Value::text).map(|(pattern, _)| pattern).collect())
}

fn regex(value: Value<'_>) -> Option<Test> {
    let (pattern, secret) = value.text()?;
    match regex_of(&pattern) {
        Ok(regex) => return Some(Test::Regex(regex)),
        Err(_) if secret => value.problem("the regex is not valid"),
        Err(regex::Error::CompiledTooBig(limit)) => {
            value.problem(format!("the regex is not valid: compiled it is larger than {limit} bytes"));
        }
        Err(error) => {
            // The pattern with carets under it, then the error.
            let error = error.to_string();
            let cause = error.lines().last().unwrap_or_default().trim_start_matches("error: ");
            value.problem(format!("the regex is not valid: {cause}"));
        }
    }
    None
}

pub(super) fn regex_of(pattern: &str) -> Result<Regex, regex::Error> {
    RegexBuilder::new(pattern).size_limit(MAX_REGEX).build()
}

fn exists(value: Value<'_>) -> Option<Test> {
    match value.shape() {
        Shape::Scalar(text) if text == "true" || text == "false" => Some(Test::Exists(text == "true")),
        Shape::Scalar(_) | Shape::Text(_) | Shape::Array(_) | Shape::Table(_) | Shape::Datetime => {
            value.problem(format!("should be true or false, is {}", value.kind()));
            None
        }
    }
}
