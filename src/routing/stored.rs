//! Routes as text, for those who have to know after a restart what they were: with every reference in its place, so that the
//! text decides as the table did, whatever the file and the variables are by then.

use regex::Regex;
use serde::{Deserialize, Serialize};

use super::condition::{Condition, Patterns, Subject, SubjectId, Test};
use super::index::Index;
use super::read::{Subjects, regex_of};
use super::{Route, SinkId, Table};

#[derive(Serialize, Deserialize)]
struct StoredTable {
    sinks: Vec<String>,
    routes: Vec<StoredRoute>,
    keep_unrouted: bool,
}

#[derive(Serialize, Deserialize)]
struct StoredRoute {
    name: String,
    when: Vec<(String, Vec<StoredTest>)>,
    /// Places among the sinks.
    to: Vec<usize>,
    is_final: bool,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum StoredTest {
    OneOf(Vec<String>),
    NoneOf(Vec<String>),
    Prefix(String),
    Regex(String),
    Exists(bool),
}

impl Table {
    /// The table as text. Tables that decide alike and call things alike have the same.
    pub fn to_text(&self) -> String {
        let condition = |condition: &Condition| {
            let subject = self.subjects.get(condition.subject.0).map_or("", Subject::name);
            (subject.to_owned(), condition.tests.iter().map(StoredTest::from).collect())
        };
        let route = |route: &Route| StoredRoute {
            name: route.name.clone(),
            when: route.when.iter().map(condition).collect(),
            to: route.to.iter().map(|sink| sink.0).collect(),
            is_final: route.is_final,
        };
        let routes = self.routes.iter().map(route).collect();
        let stored = StoredTable { sinks: self.sinks.clone(), routes, keep_unrouted: self.keep_unrouted };
        // Nothing in it can fail.
        serde_json::to_string(&stored).unwrap_or_default()
    }

    /// The table that has become this text.
    ///
    /// # Errors
    ///
    /// It is none, or one of a version that knows more.
    pub fn from_text(text: &str) -> Result<Self, String> {
        let StoredTable { sinks, routes, keep_unrouted } =
            serde_json::from_str(text).map_err(|error| error.to_string())?;
        let mut subjects = Subjects::default();
        let route = |StoredRoute { name, when, to, is_final }| {
            let conditions = when.into_iter().map(|(subject, tests)| condition(&mut subjects, &subject, tests));
            let to = to.into_iter().map(SinkId).filter(|sink| sink.0 < sinks.len()).collect();
            Ok::<_, String>(Route { name, when: conditions.collect::<Result<_, _>>()?, to, is_final })
        };
        let routes = routes.into_iter().map(route).collect::<Result<Vec<_>, _>>()?;
        Ok(Self { sinks, index: Index::new(&routes), routes, subjects: subjects.into_list(), keep_unrouted })
    }
}

fn condition(subjects: &mut Subjects, subject: &str, tests: Vec<StoredTest>) -> Result<Condition, String> {
    let subject: SubjectId = subjects.place(subject)?;
    let tests = tests.into_iter().map(Test::try_from).collect::<Result<_, _>>()?;
    Ok(Condition { subject, tests, written: String::new() })
}

impl From<&Test> for StoredTest {
    fn from(test: &Test) -> Self {
        match test {
            Test::OneOf(patterns) => Self::OneOf(patterns.written()),
            Test::NoneOf(patterns) => Self::NoneOf(patterns.written()),
            Test::Prefix(prefix) => Self::Prefix(prefix.clone()),
            Test::Regex(regex) => Self::Regex(regex.as_str().to_owned()),
            Test::Exists(exists) => Self::Exists(*exists),
        }
    }
}

impl TryFrom<StoredTest> for Test {
    type Error = String;

    fn try_from(stored: StoredTest) -> Result<Self, String> {
        Ok(match stored {
            StoredTest::OneOf(patterns) => Self::OneOf(Patterns::from_iter(patterns)),
            StoredTest::NoneOf(patterns) => Self::NoneOf(Patterns::from_iter(patterns)),
            StoredTest::Prefix(prefix) => Self::Prefix(prefix),
            StoredTest::Regex(pattern) => {
                let regex: Result<Regex, _> = regex_of(&pattern);
                Self::Regex(regex.map_err(|error| error.to_string())?)
            }
            StoredTest::Exists(exists) => Self::Exists(exists),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::document::{Document, Environment};
    use crate::event;
    use crate::routing::{Scratch, SinkId};

    fn read(source: &str) -> Table {
        let document = Document::parse("routes.toml", source, &Environment);
        let mut root = document.root();
        let names: Vec<_> = root.tables("sinks").into_iter().map(|(key, _)| key).collect();
        Table::read(&mut root, &names)
    }

    #[test]
    fn what_is_read_again_decides_alike() {
        const SINKS: &str = "[sinks.a]\n[sinks.b]\n";
        let bodies = [
            r#"{"message_status":"error","channel":{"sender_id":"54911"},"n":{"x":7}}"#,
            r#"{"message_status":"read","channel":{"sender_id":"55"},"n":{"x":8}}"#,
            r#"{"message_status":"a*b"}"#,
            r#"{}"#,
        ];
        for when in [
            "status = 'error'",
            "status = ['e*r', 'x', '*ea*']",
            "sender_id = { prefix = '54', not = '54912', not_in = ['1*', '2'] }",
            "status = { regex = '^e.*r$', exists = true }, token = 't'",
            "'/n/x' = 7, '/n' = { exists = false }",
            "'/n/x' = [7, 8], campaign_id = { exists = false }",
            "status = '**'",
        ] {
            let table = read(&format!(
                "{SINKS}[[routes]]\nname = 'x'\nwhen = {{ {when} }}\nto = ['b']\nfinal = true\n[[routes]]\nto = ['a']\n\
                 [unrouted]\nkeep = false\n"
            ));
            let again = Table::from_text(&table.to_text()).unwrap();
            assert_eq!(again.to_text(), table.to_text(), "{when}");
            assert_eq!((again.sinks(), again.keeps_unrouted()), (table.sinks(), false));
            for body in bodies {
                let event = event::sample(body.as_bytes(), "t").unwrap().remove(0);
                let (mut one, mut other) = (Scratch::default(), Scratch::default());
                assert_eq!(again.matches(&event, &mut one), table.matches(&event, &mut other), "{when}: {body}");
                for sink in [SinkId(0), SinkId(1)] {
                    let (one, other) =
                        (again.route_to(&event, sink, &mut one), table.route_to(&event, sink, &mut other));
                    assert_eq!(one.map(|id| again.route_name(id)), other.map(|id| table.route_name(id)));
                }
            }
        }
    }

    #[test]
    fn how_it_is_written_does_not_matter_and_what_it_says_does() {
        let text = |routes: &str| read(&format!("[sinks.a]\n{routes}")).to_text();
        let one = text("[[routes]]\nname = 'x'\nwhen = { status = ['b', 'a'] }\nto = ['a']\n");
        assert_eq!(one, text("# .\n[[routes]]\nto=[\"a\"]\nname='x'\n[routes.when]\nstatus = { in = ['a', 'b'] }\n"));
        assert_ne!(one, text("[[routes]]\nname = 'x'\nwhen = { status = ['b'] }\nto = ['a']\n"));
        assert!(Table::from_text("{}").is_err() && Table::from_text("").is_err());
        let unknown = one.replace("\"status\"", "\"statuses\"");
        assert!(Table::from_text(&unknown).unwrap_err().contains("statuses"), "{unknown}");
    }
}
