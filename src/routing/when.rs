//! The conditions of a route, on their own.

use std::io;

use serde_json::{Map, Value};

use super::condition::{Condition, Subject, Values};
use super::read::Reader;
use crate::document::{Document, Lookup, Severity};
use crate::event::Event;

/// What the `when` of a route says.
#[derive(Clone, Debug)]
pub struct When {
    subjects: Vec<Subject>,
    conditions: Vec<Condition>,
}

/// Conditions that come from outside may not ask for variables and files.
struct Nothing;

impl Lookup for Nothing {
    fn variable(&self, _: &str) -> Option<String> {
        None
    }

    fn file(&self, _: &str) -> io::Result<String> {
        Err(io::ErrorKind::PermissionDenied.into())
    }
}

impl When {
    /// Compiles conditions that are given as JSON, in the shape that `when` has in `routes.toml`.
    ///
    /// # Errors
    ///
    /// All that is wrong with them.
    pub fn from_json(when: &Map<String, Value>) -> Result<Self, String> {
        match when.values().any(has_fraction) {
            // How it was written is lost by now, and that is what it is compared by.
            true => Err("a number with a fraction or an exponent has to be in quotes".to_owned()),
            false => Self::compile(&inline(when)),
        }
    }

    fn compile(inline: &str) -> Result<Self, String> {
        let source = format!("when = {inline}");
        let document = Document::parse("when", &source, &Nothing);
        let mut reader = Reader::default();
        let mut root = document.root();
        let conditions = root.table("when").map(|when| reader.conditions(&when)).unwrap_or_default();
        root.finish();
        let subjects = reader.into_subjects();
        let problems = document.into_problems();
        let errors = problems.iter().filter(|problem| problem.severity == Severity::Error);
        let errors: Vec<_> = errors.map(|problem| problem.message.clone()).collect();
        if errors.is_empty() { Ok(Self { subjects, conditions }) } else { Err(errors.join("; ")) }
    }

    /// Whether all of them hold.
    pub fn holds(&self, event: &Event) -> bool {
        let values = Values::new(event, &self.subjects);
        self.conditions.iter().all(|condition| condition.holds(&values))
    }
}

fn has_fraction(value: &Value) -> bool {
    match value {
        Value::Number(number) => number.is_f64(),
        Value::Array(values) => values.iter().any(has_fraction),
        Value::Object(table) => table.values().any(has_fraction),
        Value::Null | Value::Bool(_) | Value::String(_) => false,
    }
}

/// As an inline table of TOML.
fn inline(table: &Map<String, Value>) -> String {
    let entries = table.iter().map(|(key, value)| format!("{} = {}", quoted(key), toml(value)));
    format!("{{ {} }}", entries.collect::<Vec<_>>().join(", "))
}

fn toml(value: &Value) -> String {
    match value {
        // There is none in TOML; the empty table is refused with a message that fits.
        Value::Null => "{}".to_owned(),
        Value::Bool(_) | Value::Number(_) => value.to_string(),
        Value::String(text) => quoted(text),
        Value::Array(values) => format!("[{}]", values.iter().map(toml).collect::<Vec<_>>().join(", ")),
        Value::Object(table) => inline(table),
    }
}

fn quoted(text: &str) -> String {
    let mut quoted = String::from('"');
    for c in text.chars() {
        match c {
            '"' | '\\' => quoted.extend(['\\', c]),
            c if c.is_control() => quoted.push_str(&format!("\\U{:08X}", u32::from(c))),
            c => quoted.push(c),
        }
    }
    quoted.push('"');
    quoted
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event;

    #[test]
    fn json_says_the_same_as_toml() {
        let body =
            r#"{"message_id":"a\"b","message_status":"error","channel":{"sender_id":"54911"},"error":{"code":7}}"#;
        let event = &event::sample(body.as_bytes(), "aivo").unwrap()[0];
        let check = |json: &str, toml: &str, expected| {
            let json = When::from_json(&serde_json::from_str(json).unwrap()).unwrap();
            assert_eq!((json.holds(event), When::compile(toml).unwrap().holds(event)), (expected, expected), "{toml}");
        };
        check("{}", "{}", true);
        check(r#"{"status":"error"}"#, "{ status = 'error' }", true);
        check(r#"{"status":["read","err*"],"token":"aivo"}"#, "{ status = ['read', 'err*'], token = 'aivo' }", true);
        check(
            r#"{"sender_id":{"prefix":"54","not":"54911"}}"#,
            "{ sender_id = { prefix = '54', not = '54911' } }",
            false,
        );
        check(r#"{"message_id":"a\"b","/error/code":7}"#, "{ message_id = 'a\"b', '/error/code' = 7 }", true);
        check(r#"{"campaign_id":{"exists":false}}"#, "{ campaign_id = { exists = false } }", true);
    }

    #[test]
    fn what_is_wrong_is_said() {
        let check = |json: &str, expected: &str| {
            let message = When::from_json(&serde_json::from_str(json).unwrap()).unwrap_err();
            assert!(message.contains(expected), "{message}");
        };
        check(r#"{"staus":"error"}"#, "did you mean `status`?");
        check(r#"{"status":null}"#, "an empty table is no condition");
        check(r#"{"status":{"regex":"("}}"#, "the regex is not valid");
        check(r#"{"/n":{"not_in":[1,1.50]}}"#, "has to be in quotes");
        check(r#"{"status":"${HOME}"}"#, "HOME");
        check(r#"{"status\u0000\n":"x"}"#, "unknown field");
        assert!(When::compile("{ status = }").is_err());
    }
}
