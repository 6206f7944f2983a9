//! What the tests of all sinks use, and tests of what sinks share.

use std::time::{Duration, SystemTime};

use bytes::Bytes;

use super::*;
use crate::document::{Document, Lookup, Severity};
use crate::event;

pub(super) const RECEIVED_AT_MS: u64 = 1_700_000_000_123;

/// An event with this body, received on 14 November 2023.
pub(super) fn event(body: &str) -> Event {
    event_at(body, SystemTime::UNIX_EPOCH + Duration::from_millis(RECEIVED_AT_MS))
}

pub(super) fn event_at(body: &str, received_at: SystemTime) -> Event {
    let parsed = event::parse(body.as_bytes()).unwrap().remove(0);
    let mut record = Vec::new();
    parsed.encode(parsed.id(), received_at, "aivo", None, &mut record);
    Event::decode(Bytes::from(record)).unwrap()
}

/// Variables for tests: `TOKEN` is `s3cret`, and `SIGNING` a signing secret.
struct Variables;

impl Lookup for Variables {
    fn variable(&self, name: &str) -> Option<String> {
        match name {
            "TOKEN" => Some("s3cret".into()),
            "SIGNING" => Some("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw".into()),
            _ => None,
        }
    }

    fn file(&self, _path: &str) -> std::io::Result<String> {
        Err(std::io::ErrorKind::NotFound.into())
    }
}

pub(super) fn template(text: &str) -> Template {
    Template::parse(text, &Variables).unwrap()
}

/// The sink of a table, or its problems.
pub(super) fn config(table: &str) -> Result<Config, Vec<String>> {
    let document = Document::parse("routes.toml", table, &Variables);
    let mut section = document.root();
    let config = Config::read(&mut section);
    section.finish();
    let problems = document.into_problems().into_iter().filter(|problem| problem.severity == Severity::Error);
    let problems: Vec<_> = problems.map(|problem| format!("{}: {}", problem.line, problem.message)).collect();
    if problems.is_empty() { Ok(config.unwrap()) } else { Err(problems) }
}

/// Checks that a table has these problems and no others: a part of each message, in the file's order.
pub(super) fn check_problems(table: &str, expected: &[&str]) {
    let problems = config(table).err().unwrap_or_default();
    assert_eq!(problems.len(), expected.len(), "{table}: {problems:#?}");
    for (problem, expected) in problems.iter().zip(expected) {
        assert!(problem.contains(expected), "{table}: {problem:?} lacks {expected:?}");
    }
}
