use std::time::{Duration, SystemTime};

use proptest::prelude::*;
use proptest::sample::select;

use super::*;
use crate::document::{Document, Lookup, Problem};
use crate::event;

struct Fixed;

impl Lookup for Fixed {
    fn variable(&self, name: &str) -> Option<String> {
        (name == "SENDER").then(|| "hunter2[".to_owned())
    }

    fn file(&self, _: &str) -> std::io::Result<String> {
        Err(std::io::ErrorKind::NotFound.into())
    }
}

/// Reads a table as the caller does: sinks first, then routes, then what is left.
fn read(source: &str) -> (Table, Vec<Problem>) {
    let document = Document::parse("r", source, &Fixed);
    let mut root = document.root();
    let mut names = Vec::new();
    for (key, mut section) in root.tables("sinks") {
        if let Err(problem) = check_sink_name(key.name) {
            section.problem_at(&key.place, problem);
        }
        section.require::<String>("type");
        section.finish();
        names.push(key);
    }
    let table = Table::read(&mut root, &names);
    root.finish();
    (table, document.into_problems())
}

const SINKS: &str = "[sinks.a]\ntype = ''\n[sinks.b]\ntype = ''\n[sinks.c]\ntype = ''\n";

pub(super) fn table(routes: &str) -> Table {
    let (table, problems) = read(&format!("{SINKS}{routes}"));
    let errors: Vec<_> = problems.iter().filter(|p| p.severity == crate::document::Severity::Error).collect();
    assert!(errors.is_empty(), "{routes}\n{errors:?}");
    table
}

pub(super) fn event(body: &str) -> Event {
    let parsed = event::parse(body.as_bytes()).unwrap().pop().unwrap();
    let mut record = Vec::new();
    parsed.encode(parsed.id(), SystemTime::UNIX_EPOCH + Duration::from_secs(1), "aivo", None, &mut record);
    Event::decode(record.into()).unwrap()
}

const BODY: &str = concat!(
    r#"{"message_id":"wamid.A==","message_status":"read","channel":{"channel_type":"Whatsapp","name":"C\u00e9 \"1\"","#,
    r#""sender_id":5491122223333},"campaign":{"id":null,"name":""},"event_name":"msg_status","#,
    r#""recipient":{"id":"541112341234"},"extra":{"n":1.50,"yes":true,"list":[1, "x"],"null":null,"a/b":"c"}}"#
);

/// Which sinks an event goes to and by which routes, as `a<first b<second`, and that the other ways say the same.
fn routed(table: &Table, event: &Event) -> String {
    let mut scratch = Scratch::default();
    let matches = table.matches(event, &mut scratch).to_vec();
    for (place, name) in table.sinks().iter().enumerate() {
        let expected = matches.iter().find(|found| found.sink == SinkId(place)).map(|found| found.route);
        assert_eq!(table.route_to(event, SinkId(place), &mut scratch), expected, "{name}");
    }
    let shown = |found: &Match| format!("{}<{}", table.sinks()[found.sink.0], table.route_name(found.route));
    matches.iter().map(shown).collect::<Vec<_>>().join(" ")
}

/// Whether an event with [`BODY`] matches.
fn check(when: &str, expected: bool) {
    let table = table(&format!("[[routes]]\nto = ['a']\nwhen = {{ {when} }}"));
    assert_eq!(routed(&table, &event(BODY)), if expected { "a<route-1" } else { "" }, "{when}");
}

#[test]
fn compares_values() {
    check("", true);
    check("status = 'read'", true);
    check("status = 'Read'", false);
    check("status = 'rea'", false);
    check("status = ''", false);
    check("status = ['sent', 'read']", true);
    check("status = ['sent', 'delivered']", false);
    check("status = ['sent', 're*']", true);
    check("status = ['read', 'read']", true);
    check("token = 'aivo'", true);
    check("token = 'other'", false);
    check("message_id = 'wamid.A=='", true);
    check("channel_type = 'Whatsapp', channel_name = 'Cé \"1\"', event_name = 'msg_status'", true);
    check("recipient_id = '541112341234', status = 'sent'", false);
    check("sender_id = 5491122223333", true);
    check("sender_id = '5491122223333'", true);
    check("sender_id = 549", false);
    check("sender_id = [1, 5491122223333]", true);
    check("'/extra/n' = 1.50", true);
    check("'/extra/n' = '1.50'", true);
    check("'/extra/n' = '1.5'", false);
    check("'/extra/yes' = true", true);
    check("'/extra/yes' = 'true'", true);
    check("'/extra/list' = '[1,\"x\"]'", true);
    check("'/extra/list/1' = 'x', '/extra/list/0' = 1", true);
    check("'/extra/a~1b' = 'c'", true);
    check("'/extra/null' = '*'", false);
    check("'/extra/null' = { exists = false }", true);
    check("'/extra' = { exists = true }", true);
    check("'/message_status' = 'read'", true);
}

#[test]
fn matches_wildcards() {
    check("status = '*'", true);
    check("status = '**'", true);
    check("status = 'r*'", true);
    check("status = '*d'", true);
    check("status = 'r*d'", true);
    check("status = 'read*'", true);
    check("status = '*read*'", true);
    check("status = 're*ead'", false);
    check("status = '*e*a*'", true);
    check("status = '*a*e*'", false);
    check("status = 'r*x*d'", false);
    check("message_id = 'w*.*=='", true);
    check("campaign_name = '*'", true);
    check("campaign_id = '*'", false);
}

#[test]
fn tries_tests() {
    check("status = { is = 'read' }", true);
    check("status = { is = 're*' }", true);
    check("status = { in = ['sent', 'r*'] }", true);
    check("status = { in = ['sent'] }", false);
    check("status = { not = 'read' }", false);
    check("status = { not = 'r*' }", false);
    check("status = { not = 'sent' }", true);
    check("status = { not_in = ['sent', 'error'] }", true);
    check("status = { not_in = ['sent', 'read'] }", false);
    check("status = { prefix = 're' }", true);
    check("status = { prefix = 're*' }", false);
    check("status = { prefix = '' }", true);
    check("sender_id = { prefix = 549 }", true);
    check("status = { regex = 'ea' }", true);
    check("status = { regex = '^ea' }", false);
    check("status = { regex = '(?i)^READ$' }", true);
    check("status = { exists = true }", true);
    check("status = { exists = false }", false);
    check("status = { prefix = 'r', not = 'read' }", false);
    check("status = { prefix = 'r', not = 'rest', exists = true }", true);
    check("status.prefix = 'r'", true);
}

#[test]
fn matches_what_is_absent_only_by_exists() {
    check("campaign_id = { exists = false }", true);
    check("campaign_id = { exists = true }", false);
    check("campaign_id = { not = 'x' }", false);
    check("campaign_id = { not_in = ['x'] }", false);
    check("campaign_id = { prefix = '' }", false);
    check("campaign_id = { regex = '' }", false);
    check("campaign_id = { exists = false, not = 'x' }", false);
    check("campaign_name = ''", true);
    check("campaign_name = { exists = true }", true);
    check("sender_id = '${NONE:-549}*'", true);
}

#[test]
fn tries_routes_from_the_top() {
    let check = |routes: &str, expected: &str| assert_eq!(routed(&table(routes), &event(BODY)), expected, "{routes}");
    check("", "");
    check("[[routes]]\nto = ['b', 'a', 'b']", "b<route-1 a<route-1");
    check("[[routes]]\nto = ['a']\n[[routes]]\nname = 'x'\nto = ['a', 'b']", "a<route-1 b<x");
    check("[[routes]]\nto = ['a']\nfinal = true\n[[routes]]\nto = ['b']", "a<route-1");
    check("[[routes]]\nto = ['a']\nfinal = true\nwhen = { status = 'sent' }\n[[routes]]\nto = ['b']", "b<route-2");
    check("[[routes]]\nto = ['a']\nfinal = false\n[[routes]]\nto = ['b']", "a<route-1 b<route-2");
    check(
        "[[routes]]\nto = ['a']\n[[routes]]\nto = ['b']\nwhen.status = 'read'\nfinal = true\n[[routes]]\nto = ['c']\nwhen.status = 'read'",
        "a<route-1 b<route-2",
    );
}

#[test]
fn keeps_unrouted_events_unless_told() {
    assert!(table("").keeps_unrouted());
    assert!(table("[unrouted]").keeps_unrouted());
    assert!(!table("[unrouted]\nkeep = false").keeps_unrouted());
}

#[test]
fn explains() {
    let table = table(concat!(
        "[[routes]]\nname = 'errors'\nto = ['a']\n",
        "when = { status = ['error', 's*'], sender_id = 'x${SENDER}', event_name = 'msg_status' }\n",
        "[[routes]]\nto = ['b', 'c']\nfinal = true\n[routes.when]\nstatus.prefix = 'r'\n",
        "[[routes]]\nto = ['c']\n[routes.when.campaign_id]\nexists = true\nprefix = 'x'\n",
    ));
    let explained = |body: &str| serde_json::to_value(table.explain(&event(body))).unwrap();
    assert_eq!(
        explained(BODY),
        serde_json::json!([
            { "route": "errors", "outcome": "not_matched", "because": [
                { "field": "status", "wanted": "['error', 's*']", "found": "read" },
                { "field": "sender_id", "wanted": "'x${SENDER}'", "found": "5491122223333" },
            ] },
            { "route": "route-2", "outcome": "matched", "to": ["b", "c"], "final": true },
            { "route": "route-3", "outcome": "not_tried", "after": "route-2" },
        ])
    );
    assert_eq!(
        explained("{}")[2],
        serde_json::json!({ "route": "route-3", "outcome": "not_matched", "because": [
            { "field": "campaign_id", "wanted": "exists = true, prefix = 'x'", "found": null },
        ] })
    );
}

const MISTAKES: &str = "\
[sinks.crm]
type = 'http'
[sinks.idle]
type = 'http'
[sinks.unrouted]
type = 'http'
[sinks.'a b']
typ = 'http'
[[routes]]
name = 'x'
to = ['crm', 'cmr']
when = { statsu = 'read', status = [], campaign_id = { exist = true }, '/a~' = 1 }
[[routes]]
name = 'x'
to = []
finale = true
when = { status = { regex = '(' }, sender_id = { is = ['a'], in = 'a', exists = 'yes' }, event_name = {} }
[[routes]]
when = { recipient_id = 2026-01-01, message_id = '${NONE}', sender_id = { regex = '${SENDER}' } }
final = 3
[[routes]]
to = 'crm'
name = ''
when = 3
[[routes]]
to = [3, ['crm'], '${SENDER}']
name = \"é
when = { status = { regex = '\\w{9999}{9}' }, channel_name = { not = {} } }
[unrouted]
keep = 'no'
[route]
";

const PROBLEMS: [&str; 36] = [
    "3:8: warning: no route leads to the sink `idle`",
    "5:8: the name `unrouted` is reserved for events that no route matches",
    "5:8: warning: no route leads to the sink `unrouted`",
    "7:1: `type` is missing",
    "7:8: a sink's name has 1 to 64 letters, digits, `.`, `_` or `-`",
    "7:8: warning: no route leads to the sink `a b`",
    "8:1: unknown key `typ`; did you mean `type`?",
    "11:14: unknown sink `cmr`; did you mean `crm`?",
    "12:10: unknown field `statsu`; did you mean `status`?",
    "12:36: an empty array is no condition: name at least one value",
    "12:56: unknown test `exist`; did you mean `exists`?",
    "12:72: in a JSON pointer `~` is written `~0`, and `/` in a name `~1`",
    "14:8: another route has this name",
    "15:6: a route names at least one sink",
    "16:1: unknown key `finale`; did you mean `final`?",
    "17:29: the regex is not valid: unclosed group",
    "17:55: should be a string, is an array",
    "17:67: should be an array of strings, is a string",
    "17:81: should be true or false, is a string",
    "17:103: an empty table is no condition; for any value write { exists = true }",
    "18:1: `to` is missing: a route names at least one sink",
    "19:25: should be a string, an array of strings or a table of tests, is a date or time",
    "19:50: the environment variable `NONE` is not set",
    "19:83: the regex is not valid",
    "20:9: should be true or false, is an integer",
    "22:6: should be an array of sink names, is a string",
    "23:8: a route's name cannot be empty; without `name` it is called by its number",
    "24:8: should be a table, is an integer",
    "26:7: unknown sink `3`; known are a b, crm, idle, unrouted",
    "26:10: should be a string, is an array",
    "26:19: no sink has this name",
    "27:10: invalid basic string, expected `\"`",
    "28:29: the regex is not valid: compiled it is larger than 1048576 bytes",
    "28:69: should be a string, is a table",
    "30:8: should be true or false, is a string",
    "31:2: unknown key `route`; did you mean `routes`?",
];

#[test]
fn reports_all_problems_at_once() {
    let problems: Vec<_> = read(MISTAKES).1.iter().map(Problem::said).collect();
    for (found, expected) in problems.iter().zip(PROBLEMS) {
        assert_eq!(found, expected);
    }
    assert_eq!(problems.len(), PROBLEMS.len(), "{problems:#?}");
}

#[test]
fn syntax_errors_have_no_consequences() {
    let check = |source: &str, expected: &[&str]| {
        let problems: Vec<_> = read(source).1.iter().map(Problem::said).collect();
        assert_eq!(problems, expected, "{source}");
    };
    // The sink that got lost is not unknown, and the one that only the lost line names not unused.
    check("[sinks.a\ntype = 'x'\n[[routes]]\nto = ['a']\n", &["1:9: unclosed table, expected `]`"]);
    check("[sinks.a]\ntype = 'x'\n[[routes]]\nto = ['a'\n", &["4:10: unclosed array, expected `]`"]);
    check(
        "[sinks.a]\ntype = x\n[[routes]]\nto = ['a', 'b']\n",
        &["2:8: string values must be quoted, expected literal string", "4:12: unknown sink `b`; known are a"],
    );
}

#[test]
fn checks_sink_names() {
    for name in ["a", "A-b_c.9", &"x".repeat(64)] {
        assert_eq!(check_sink_name(name), Ok(()), "{name}");
    }
    for name in ["", "a b", "é", "a/b", UNROUTED, &"x".repeat(65)] {
        assert!(check_sink_name(name).is_err(), "{name}");
    }
}

const FIELDS: [&str; 5] = ["status", "sender_id", "campaign_id", "token", "'/extra'"];

fn value() -> impl Strategy<Value = &'static str> {
    select(&["", "x", "y", "xy", "aivo"])
}

fn condition() -> impl Strategy<Value = String> {
    prop_oneof![
        4 => value().prop_map(|a| format!("'{a}'")),
        2 => (value(), value()).prop_map(|(a, b)| format!("['{a}', '{b}']")),
        1 => value().prop_map(|a| format!("'{a}*'")),
        1 => (value(), value()).prop_map(|(a, b)| format!("['{a}', '*{b}']")),
        1 => value().prop_map(|a| format!("{{ not = '{a}', in = ['x', 'xy'] }}")),
        1 => value().prop_map(|a| format!("{{ prefix = '{a}' }}")),
        1 => any::<bool>().prop_map(|exists| format!("{{ exists = {exists} }}")),
    ]
}

fn route() -> impl Strategy<Value = String> {
    let when = proptest::collection::btree_map(select(&FIELDS), condition(), 0..4);
    let to = proptest::sample::subsequence(vec!["'a'", "'b'", "'c'"], 1..=3);
    (when, to, proptest::bool::weighted(0.2)).prop_map(|(when, to, is_final)| {
        let when: Vec<_> = when.iter().map(|(field, wanted)| format!("{field} = {wanted}")).collect();
        format!("[[routes]]\nwhen = {{ {} }}\nto = [{}]\nfinal = {is_final}\n", when.join(", "), to.join(", "))
    })
}

fn body() -> impl Strategy<Value = String> {
    let json =
        || proptest::option::weighted(0.8, value()).prop_map(|v| v.map_or("null".to_owned(), |v| format!("\"{v}\"")));
    (json(), json(), json(), json()).prop_map(|(status, sender, campaign, extra)| {
        format!(
            r#"{{"message_status":{status},"channel":{{"sender_id":{sender}}},"campaign":{{"id":{campaign}}},"extra":{extra}}}"#
        )
    })
}

proptest! {
    /// The index finds exactly what trying all routes one by one finds.
    #[test]
    fn the_index_changes_nothing(
        routes in proptest::collection::vec(route(), 0..12),
        bodies in proptest::collection::vec(body(), 1..8),
    ) {
        let table = table(&routes.concat());
        for body in bodies {
            let event = event(&body);
            let mut expected: Vec<String> = Vec::new();
            for Explanation { route, outcome } in table.explain(&event) {
                if let Outcome::Matched { to, .. } = outcome {
                    for sink in to {
                        if !expected.iter().any(|found| found.starts_with(&sink)) {
                            expected.push(format!("{sink}<{route}"));
                        }
                    }
                }
            }
            prop_assert_eq!(routed(&table, &event), expected.join(" "));
        }
    }
}
