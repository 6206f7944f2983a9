use std::collections::HashMap;

use serde::Deserialize;

use super::*;

struct Fixed;

impl Lookup for Fixed {
    fn variable(&self, name: &str) -> Option<String> {
        matches!(name, "SECRET" | "EMPTY").then(|| if name == "EMPTY" { "" } else { "hunter2" }.to_owned())
    }

    fn file(&self, path: &str) -> std::io::Result<String> {
        match path {
            "/unix" => Ok("hunter2\n".to_owned()),
            "/dos" => Ok("hunter2\r\n".to_owned()),
            "/two" => Ok("hunter2\n\n".to_owned()),
            _ => Err(std::io::ErrorKind::NotFound.into()),
        }
    }
}

impl Problem {
    /// As `line:column: message`, and whether it is a warning.
    pub(crate) fn said(&self) -> String {
        let Self { line, column, severity, message, .. } = self;
        let severity = if *severity == Severity::Warning { "warning: " } else { "" };
        format!("{line}:{column}: {severity}{message}")
    }
}

/// Reads a document and checks what is reported, as `line:column: message`.
fn check(source: &str, read: impl FnOnce(&mut Section<'_>), expected: &[&str]) {
    let document = Document::parse("f", source, &Fixed);
    let mut root = document.root();
    read(&mut root);
    root.finish();
    let problems: Vec<_> = document.into_problems().iter().map(Problem::said).collect();
    assert_eq!(problems, expected, "{source}");
    assert!(problems.iter().all(|problem| !problem.contains("hunter2")), "{problems:?}");
}

#[derive(Debug, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
struct Pair {
    a: u16,
    b: Option<String>,
}

#[test]
fn reads_values() {
    let source = "n = 3\ns = 'x'\nl = ['a', '${SECRET}']\nt = { a = 1, b = '${SECRET}' }\nd = '15s'";
    let read = |root: &mut Section<'_>| {
        assert_eq!(root.get::<u16>("n"), Some(3));
        assert_eq!(root.require::<String>("s").as_deref(), Some("x"));
        assert_eq!(root.get::<Vec<String>>("l"), Some(vec!["a".to_owned(), "hunter2".to_owned()]));
        assert_eq!(root.get::<Pair>("t"), Some(Pair { a: 1, b: Some("hunter2".to_owned()) }));
        assert_eq!(root.parse("d", humantime::parse_duration), Some(std::time::Duration::from_secs(15)));
        assert_eq!(root.get::<u16>("absent"), None);
    };
    check(source, read, &[]);
}

#[test]
fn resolves_references() {
    let check = |text: &str, expected: &str| {
        let source = format!("s = '{text}'");
        let document = Document::parse("f", &source, &Fixed);
        assert_eq!(document.root().get::<String>("s").as_deref(), Some(expected), "{text}");
        assert_eq!(document.into_problems(), []);
    };
    check("a${SECRET}b", "ahunter2b");
    check("${SECRET}${SECRET}", "hunter2hunter2");
    check("${NONE:-x}", "x");
    check("${NONE:-}", "");
    check("${EMPTY}", "");
    check("${EMPTY:-x}", "x");
    check("${NONE:-a:-b}", "a:-b");
    check("${file:/unix}", "hunter2");
    check("${file:/dos}", "hunter2");
    check("${file:/two}", "hunter2\n");
    check("$${SECRET}", "${SECRET}");
    check("$${", "${");
    check("$$${SECRET}", "$${SECRET}");
    check("a$b{c}", "a$b{c}");
    check("{${SECRET}}", "{hunter2}");
}

#[test]
fn reports_wrong_values_without_secrets() {
    let number = |root: &mut Section<'_>| assert_eq!(root.get::<u16>("x"), None);
    check("x = 'a'", number, &["1:5: should be an integer, is a string"]);
    check("\n\n  x = 70000", number, &["3:7: is a number that is too small or too large"]);
    check("x = '${SECRET}'", number, &["1:5: the value is not valid after its `${…}` have been put in"]);
    check("x = '${NONE}'", number, &["1:5: the environment variable `NONE` is not set"]);
    check(
        "x = '${NONE}${file:/none}'",
        number,
        &["1:5: the environment variable `NONE` is not set", "1:5: cannot read the file `/none`: entity not found"],
    );
    let list = |root: &mut Section<'_>| assert_eq!(root.get::<Vec<u8>>("x"), None);
    check("x = [\n  1,\n 'é', 2]", list, &["3:2: should be an integer, is a string"]);
    check("x = [1, '${SECRET}']", list, &["1:9: the value is not valid after its `${…}` have been put in"]);
    check(
        "x = ['${NONE}', '${OTHER}']",
        list,
        &["1:6: the environment variable `NONE` is not set", "1:17: the environment variable `OTHER` is not set"],
    );
    let pair = |root: &mut Section<'_>| assert_eq!(root.get::<Pair>("x"), None);
    check("x = { b = '${SECRET}', a = 'é' }", pair, &["1:28: should be an integer, is a string"]);
    check("x = { b = '${SECRET}' }", pair, &["1:5: the value is not valid after its `${…}` have been put in"]);
    check("x = { b = 'b' }", pair, &["1:5: missing field `a`"]);
    check("x = { a = 1, c = 2 }", pair, &["1:14: unknown field `c`, expected `a` or `b`"]);
    let duration = |root: &mut Section<'_>| assert_eq!(root.parse("x", humantime::parse_duration), None);
    check("x = 'é'", duration, &["1:5: expected number at 0"]);
    check("x = '${SECRET}'", duration, &["1:5: the value is not valid after its `${…}` have been put in"]);
    check("x = 15", duration, &["1:5: should be a string, is an integer"]);
    let template = |root: &mut Section<'_>| assert!(root.template("x").is_none());
    check(
        "x = 'a{b}${SECRET}'",
        template,
        &[concat!(
            "1:5: unknown field `b`; known are sender_id, campaign_id, status, campaign_name, channel_type, ",
            "channel_name, event_name, recipient_id, message_id, event_id, /json/pointer"
        )],
    );
    check("x = 3", template, &["1:5: should be a string, is an integer"]);
}

#[test]
fn reports_absent_and_unknown_keys() {
    let read = |root: &mut Section<'_>| {
        if let Some(mut table) = root.table("table") {
            table.get::<u8>("timeout");
            table.require::<u8>("url");
            // Asked for twice, and known once.
            table.value("url");
            table.problem("url", "no url here");
            table.warning("timeout", "odd");
            table.finish();
        }
    };
    check("", read, &[]);
    check("table = 3", read, &["1:9: should be a table, is an integer"]);
    check("\n[table]\ntimeout = 1\nurl = 2", read, &["3:11: warning: odd", "4:7: no url here"]);
    check(
        "[table]\ntiemout = 1\nzzz = 2\n[tabel]",
        read,
        &[
            "1:1: `url` is missing",
            "1:1: no url here",
            "1:1: warning: odd",
            "2:1: unknown key `tiemout`; did you mean `timeout`?",
            "3:1: unknown key `zzz`; known are timeout, url",
            "4:2: unknown key `tabel`; did you mean `table`?",
        ],
    );
    check("table = { timeout = 1 }", read, &["1:9: `url` is missing", "1:9: no url here", "1:21: warning: odd"]);
    check("table.timeout = 1", read, &["1:1: `url` is missing", "1:1: no url here", "1:17: warning: odd"]);
    check("é = 'ü', ", |_| {}, &["1:1: invalid unquoted key, expected letters, numbers, `-`, `_`"]);
    check("\"é\" = 1", |_| {}, &["1:1: unknown key `é`"]);
    check("\u{feff}x = 1", |_| {}, &["1:1: unknown key `x`"]);
    check("\r\n\r\nx = 1\r\n", |_| {}, &["3:1: unknown key `x`"]);
}

#[test]
fn walks_tables_and_arrays_in_order() {
    let source = "[[routes]]\nto = 1\n[sinks.z]\nk = 1\n[[routes]]\nto = 2\n[sinks.a]\nk = 2\n[sinks.a.headers]\ny = '1'\nx = '2'";
    let read = |root: &mut Section<'_>| {
        let mut sinks = root.tables("sinks");
        assert_eq!(sinks.iter().map(|(key, _)| key.name).collect::<Vec<_>>(), ["z", "a"]);
        let headers = sinks[1].1.templates("headers");
        assert_eq!(headers.iter().map(|(key, _)| key.name).collect::<Vec<_>>(), ["y", "x"]);
        let routes = root.array("routes").into_iter().map(|mut route| route.get::<u8>("to"));
        assert_eq!(routes.collect::<Vec<_>>(), [Some(1), Some(2)]);
    };
    check(source, read, &[]);
    check(
        "routes = [{ to = 1 }, 3]",
        |root| assert_eq!(root.array("routes").len(), 1),
        &["1:23: should be a table, is an integer"],
    );
    check(
        "routes = 3",
        |root| assert!(root.array("routes").is_empty()),
        &["1:10: should be an array of tables, is an integer"],
    );
    check(
        "sinks = { a = 3 }",
        |root| assert!(root.tables("sinks").is_empty()),
        &["1:15: should be a table, is an integer"],
    );
}

/// What a document with syntax errors is read as: all keys, and all problems.
fn recovered(source: &str, keys: &str, expected: &[&str]) {
    let document = Document::parse("f", source, &Fixed);
    let names = |section: &Section<'_>| {
        let mut names = Vec::new();
        for (key, value) in section.entries() {
            match value.shape() {
                Shape::Table(table) => names.push(format!("{}({})", key.name, table.entries().len())),
                Shape::Array(array) => names.push(format!("{}[{}]", key.name, array.len())),
                Shape::Scalar(text) => names.push(format!("{}={text}", key.name)),
                Shape::Text(_) | Shape::Datetime => names.push(key.name.to_owned()),
            }
        }
        names.join(" ")
    };
    assert_eq!(names(&document.root()), keys, "{source}");
    let problems: Vec<_> = document.into_problems().iter().map(Problem::said).collect();
    assert_eq!(problems, expected, "{source}");
}

#[test]
fn reads_on_after_syntax_errors() {
    recovered("a = 1\nb = \"x\nc = 0x10\n", "a=1 c=0x10", &["2:7: invalid basic string, expected `\"`"]);
    recovered("a = 1\nfoo bar\nc = 3.50\n", "a=1 c=3.50", &["2:5: key with no value, expected `=`"]);
    recovered("a = 1\na = 2\nb = 3\na = 4", "a=1 b=3", &["2:1: duplicate key `a`", "4:1: duplicate key `a`"]);
    recovered("[s]\nx = 1\n[s]\ny = 2\n[t]\nx = 1", "s(1) t(1)", &["3:2: duplicate key `s`"]);
    recovered(
        "a = 1 # x\ry\r\nb = \"x\nc = 2\r\n",
        "c=2",
        &[
            "1:11: carriage return must be followed by newline, expected newline",
            "2:7: invalid basic string, expected `\"`",
        ],
    );
    recovered("[s\nx = 1\n[t]\nx = 1", "t(1)", &["1:3: unclosed table, expected `]`"]);
    recovered("a = [1, 2\nb = 3\n[t]\nx = 1\n", "b=3 t(1)", &["1:5: this value is not closed"]);
    recovered("a = [\n  1\n  2\n]\nb = [3]\n", "b[1]", &["3:3: missing comma between array elements, expected `,`"]);
    recovered("a = \"\"\"x\n\n[t]\ny = 2\n", "t(1)", &["1:5: this value is not closed"]);
    recovered("[t]\na = { b = 1, b = 2 }\nc = 1", "t(1)", &["2:14: duplicate key `b`"]);
    recovered(
        "a = tru\nb = 2026-13-01\nc = 01\nd = \"\\q\"\ne = 5",
        "e=5",
        &[
            "1:5: invalid boolean, expected `true`",
            "2:5: invalid date, expected month between 01 and 12",
            "3:5: unexpected leading zero, expected nothing",
            "4:7: missing escaped value, expected `b`, `e`, `f`, `n`, `r`, `\\`, `\"`, `x`, `u`, `U`",
        ],
    );
    let source = "x = tru\n".repeat(60);
    let problems = Document::parse("f", &source, &Fixed).into_problems();
    assert_eq!(problems.len(), 51);
    assert!(problems.iter().any(|p| p.message.starts_with("too many")), "{problems:?}");
}

#[test]
fn lost_text_excuses_what_is_absent() {
    let read = |root: &mut Section<'_>| {
        root.get::<u8>("timeout");
        root.require::<String>("url");
        root.require::<String>("type");
        assert!(!root.lost("crm"));
    };
    check("url = \"x\ntimeout = 1", read, &["1:1: `type` is missing", "1:9: invalid basic string, expected `\"`"]);
}

#[test]
fn looks_up_the_process() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("secret");
    std::fs::write(&path, "x\n").unwrap();
    assert_eq!(Environment.file(path.to_str().unwrap()).unwrap(), "x\n");
    std::fs::write(&path, [b'x'; 1024 * 1024 + 1]).unwrap();
    assert!(Environment.file(path.to_str().unwrap()).is_err());
    std::fs::write(&path, [0xff]).unwrap();
    assert!(Environment.file(path.to_str().unwrap()).is_err());
    let digest = Environment.digest(&path);
    std::fs::write(&path, [0xfe]).unwrap();
    assert!(digest.is_some() && Environment.digest(&path) != digest, "whatever it holds");
    // It has no end.
    assert!(Environment.file("/dev/zero").is_err() && Environment.digest("/dev/zero".as_ref()).is_none());
    assert_eq!(Environment.variable("NO_SUCH_VARIABLE_HERE"), None);
    let cargo: HashMap<_, _> = std::env::vars().collect();
    assert_eq!(Environment.variable("PATH"), cargo.get("PATH").cloned());
}

const FRAGMENTS: [&str; 26] = [
    "[",
    "]",
    "[[",
    "]]",
    "{",
    "}",
    "\"",
    "'",
    "\"\"\"",
    "'''",
    "=",
    ",",
    ".",
    "#",
    "\n",
    "\r\n",
    " ",
    "a",
    "b",
    "é",
    "1",
    "[a]\n",
    "[a.b]\n",
    "[[c]]\n",
    "a = 1\n",
    "a.b = { c = [1, 'é'] }\n",
];

proptest::proptest! {
    /// Whatever the text, reading it ends, and says that something is wrong exactly if TOML says so.
    #[test]
    fn reads_any_text(
        parts in proptest::collection::vec(proptest::sample::select(&FRAGMENTS), 0..40),
    ) {
        let source = parts.concat();
        let document = Document::parse("f", &source, &Fixed);
        let good = document.into_problems().is_empty();
        proptest::prop_assert_eq!(good, DeTable::parse(&source).is_ok(), "{}", source);
    }
}
