//! Conditions on the values of an event.

use std::borrow::Cow;
use std::cell::OnceCell;

use regex::Regex;

use crate::event::{Event, Field};
use crate::pointer::Pointer;

/// What a condition looks at.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum Subject {
    Field(Field),
    /// The name of the token that the sender used.
    Token,
    /// The place among the table's pointers, and what was written.
    Pointer(usize, String, Pointer),
}

impl Subject {
    /// What rules call it.
    pub(super) fn name(&self) -> &str {
        match self {
            Self::Field(field) => field.name(),
            Self::Token => "token",
            Self::Pointer(_, written, _) => written,
        }
    }
}

/// A subject's place in the table's list of subjects.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct SubjectId(pub(super) usize);

/// An event's values. What pointers lead to is looked up when it is first asked for, once.
pub(super) struct Values<'e> {
    event: &'e Event,
    subjects: &'e [Subject],
    pointed: Vec<OnceCell<Option<Cow<'e, str>>>>,
}

impl<'e> Values<'e> {
    pub(super) fn new(event: &'e Event, subjects: &'e [Subject]) -> Self {
        let pointers = subjects.iter().filter(|subject| matches!(subject, Subject::Pointer(..))).count();
        Self { event, subjects, pointed: vec![OnceCell::new(); pointers] }
    }

    /// The subject's value, if the event has one.
    pub(super) fn get(&self, subject: SubjectId) -> Option<&str> {
        match self.subjects.get(subject.0)? {
            Subject::Field(field) => self.event.field(*field),
            Subject::Token => Some(self.event.token()),
            Subject::Pointer(place, _, pointer) => {
                self.pointed.get(*place)?.get_or_init(|| pointer.find(self.event.body_str())).as_deref()
            }
        }
    }
}

/// What a route wants of one subject: that all of its tests hold.
#[derive(Clone, Debug)]
pub(super) struct Condition {
    pub(super) subject: SubjectId,
    pub(super) tests: Vec<Test>,
    /// As it was written, with references not resolved: safe to show.
    pub(super) written: String,
}

impl Condition {
    /// Whether the event is as the condition wants it. What the event lacks is only ever matched by `exists = false`.
    pub(super) fn holds(&self, values: &Values<'_>) -> bool {
        let value = values.get(self.subject);
        self.tests.iter().all(|test| test.holds(value))
    }

    /// The only values with which the condition can hold, where it names them all.
    pub(super) fn exact(&self) -> Option<impl Iterator<Item = &str>> {
        let exact = self.tests.iter().find_map(|test| match test {
            Test::OneOf(patterns) if patterns.wildcards.is_empty() => Some(&patterns.exact),
            Test::OneOf(_) | Test::NoneOf(_) | Test::Prefix(_) | Test::Regex(_) | Test::Exists(_) => None,
        });
        exact.map(|values| values.iter().map(String::as_str))
    }
}

/// One test of a value.
#[derive(Clone, Debug)]
pub(super) enum Test {
    OneOf(Patterns),
    NoneOf(Patterns),
    Prefix(String),
    Regex(Regex),
    Exists(bool),
}

impl Test {
    fn holds(&self, value: Option<&str>) -> bool {
        match (self, value) {
            (Self::Exists(wanted), value) => *wanted == value.is_some(),
            (_, None) => false,
            (Self::OneOf(patterns), Some(value)) => patterns.match_any(value),
            (Self::NoneOf(patterns), Some(value)) => !patterns.match_any(value),
            (Self::Prefix(prefix), Some(value)) => value.starts_with(prefix.as_str()),
            (Self::Regex(regex), Some(value)) => regex.is_match(value),
        }
    }
}

/// Exact values, and patterns with `*`.
#[derive(Clone, Debug, Default)]
pub(super) struct Patterns {
    /// Sorted, each once.
    exact: Vec<String>,
    wildcards: Vec<Wildcard>,
}

impl Patterns {
    fn match_any(&self, value: &str) -> bool {
        self.exact.binary_search_by(|exact| exact.as_str().cmp(value)).is_ok()
            || self.wildcards.iter().any(|wildcard| wildcard.matches(value))
    }

    /// What they can be made of again.
    pub(super) fn written(&self) -> Vec<String> {
        self.exact.iter().cloned().chain(self.wildcards.iter().map(Wildcard::written)).collect()
    }
}

impl FromIterator<String> for Patterns {
    fn from_iter<I: IntoIterator<Item = String>>(patterns: I) -> Self {
        let mut compiled = Self::default();
        for pattern in patterns {
            match Wildcard::parse(&pattern) {
                Some(wildcard) => compiled.wildcards.push(wildcard),
                None => compiled.exact.push(pattern),
            }
        }
        compiled.exact.sort_unstable();
        compiled.exact.dedup();
        compiled
    }
}

/// A pattern in which `*` stands for any text, also none.
#[derive(Clone, Debug)]
struct Wildcard {
    first: String,
    middle: Vec<String>,
    last: String,
}

impl Wildcard {
    /// `None` where the text has no `*`.
    fn parse(pattern: &str) -> Option<Self> {
        let (first, rest) = pattern.split_once('*')?;
        let (middle, last) = rest.rsplit_once('*').unwrap_or(("", rest));
        let middle = middle.split('*').filter(|text| !text.is_empty()).map(str::to_owned).collect();
        Some(Self { first: first.to_owned(), middle, last: last.to_owned() })
    }

    fn written(&self) -> String {
        let between: String = self.middle.iter().map(|text| format!("*{text}")).collect();
        format!("{}{between}*{}", self.first, self.last)
    }

    /// Takes each text at its first place, which leaves the most for those after it: no backtracking, linear time.
    fn matches(&self, value: &str) -> bool {
        let between = value.strip_prefix(self.first.as_str()).and_then(|rest| rest.strip_suffix(self.last.as_str()));
        let found = between.and_then(|between| {
            self.middle.iter().try_fold(between, |rest, text| rest.split_once(text.as_str()).map(|(_, rest)| rest))
        });
        found.is_some()
    }
}
