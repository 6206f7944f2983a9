//! House rules that no linter knows, as a test: who may import whom, how long things may be, what must be documented.
//!
//! Each rule is a function from text to complaints, with small bad examples beside it, and one test that applies it to
//! the whole tree. Sources are looked at as text, with comments and strings blanked out.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::ops::Range;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use regex::Regex;

/// Which module imports which, tests aside. A row names only modules of rows above it, so that data and imports have
/// one direction; [`MUTUAL`] is the one exception. A new import is a decision: change this table with it.
const IMPORTS: [(&str, &[&str]); 20] = [
    // What the words are made of.
    ("pointer", &[]),
    ("event", &["pointer"]),
    ("document", &["template"]),
    ("template", &["document", "event", "pointer"]),
    ("telemetry", &[]),
    // What those need who speak to the world.
    ("signature", &[]),
    ("tls", &[]),
    ("kafka", &[]),
    // ingress → journal ┈ disk ┈ journal → lane → sink
    ("journal", &["kafka"]),
    ("ledger", &["journal", "kafka"]),
    ("ingress", &["event", "journal", "signature", "telemetry", "tls"]),
    ("routing", &["document", "event", "pointer"]),
    ("sink", &["document", "event", "kafka", "signature", "telemetry", "template"]),
    ("lane", &["document", "event", "journal", "ledger", "routing", "sink", "telemetry"]),
    // Where it is all put together.
    ("rules", &["document", "event", "lane", "routing", "sink"]),
    ("admin", &["document", "event", "ingress", "journal", "lane", "ledger", "routing", "rules", "telemetry", "tls"]),
    ("config", &["admin", "document", "ingress", "journal", "telemetry", "tls"]),
    ("reload", &["config", "document", "event", "journal", "lane", "rules"]),
    (
        "relay",
        &[
            "admin",
            "config",
            "event",
            "ingress",
            "journal",
            "lane",
            "ledger",
            "reload",
            "routing",
            "rules",
            "sink",
            "telemetry",
        ],
    ),
    (
        "cli",
        &[
            "config",
            "document",
            "event",
            "ingress",
            "journal",
            "ledger",
            "relay",
            "reload",
            "routing",
            "rules",
            "sink",
            "telemetry",
        ],
    ),
];
/// Documents hold templates, and templates the references that documents resolve.
const MUTUAL: (&str, &str) = ("document", "template");
/// Sinks that must not know each other; what they share lies beside them.
const SINKS: [&str; 4] = ["http", "kafka", "rabbitmq", "stdout"];
/// Names that say nothing of what is in a module.
const NAMELESS: [&str; 7] = ["utils", "util", "common", "helpers", "misc", "types", "prelude"];
const MAX_FUNCTION: usize = 70;
const MAX_FILE: usize = 500;

/// Where settings are declared: the file, the struct, and what stands before its fields' names in the README.
const SETTINGS: [(&str, &str, &str); 11] = [
    ("src/config.rs", "Config", ""),
    ("src/admin/mod.rs", "Config", "admin."),
    ("src/config.rs", "ShutdownConfig", "shutdown."),
    ("src/ingress/mod.rs", "Config", "ingress."),
    ("src/tls.rs", "Config", "ingress.tls."),
    ("src/tls.rs", "Config", "admin.tls."),
    ("src/ingress/auth.rs", "Table", "ingress.auth."),
    ("src/ingress/auth.rs", "TokenConfig", "ingress.auth.tokens[]."),
    ("src/ingress/signed.rs", "SignatureConfig", "ingress.signature."),
    ("src/journal/config.rs", "Config", "journal."),
    ("src/telemetry.rs", "Config", "telemetry."),
];

// ---- text --------------------------------------------------------------------------------------------------------

/// What [`code`] blanks: comments, strings, raw strings, characters.
static QUOTED: LazyLock<Regex> = LazyLock::new(|| {
    regex(concat!(
        r#"(?s)//[^\n]*|/\*.*?\*/|\bb?r"[^"]*"|\bb?r#".*?"#,
        r##""#|\bb?r##".*?"##,
        r###""##|b?"(?:\\.|[^"\\])*"|b?'(?:\\(?:'|[^']+)|[^'\\])'"###,
    ))
});
static FUNCTION: LazyLock<Regex> = LazyLock::new(|| regex(r"\bfn\s+(\w+)"));

fn regex(pattern: &str) -> Regex {
    Regex::new(pattern).expect("a valid pattern")
}

/// The source with blanks in place of comments and of what is in quotes, byte for byte.
fn code(source: &str) -> String {
    let blank = |found: &regex::Captures<'_>| {
        let text = found.get(0).map_or("", |text| text.as_str());
        text.bytes().map(|byte| if byte == b'\n' { '\n' } else { ' ' }).collect::<String>()
    };
    QUOTED.replace_all(source, blank).into_owned()
}

/// Where the block that opens at `open` ends, in blanked code.
fn block_end(code: &str, open: usize) -> usize {
    let mut depth = 0;
    for (at, byte) in code.bytes().enumerate().skip(open) {
        match byte {
            b'{' => depth += 1,
            b'}' if depth == 1 => return at + 1,
            b'}' => depth -= 1,
            _ => {}
        }
    }
    code.len()
}

/// The source without items that only tests have.
fn without_tests(source: &str) -> String {
    let code = code(source);
    let mut kept = source.to_owned();
    let tests: Vec<Range<usize>> = code
        .match_indices("#[cfg(test)]")
        .map(|(start, _)| {
            let open = start + code.get(start..).and_then(|item| item.find(['{', ';'])).unwrap_or(0);
            start..if code.get(open..).is_some_and(|item| item.starts_with('{')) {
                block_end(&code, open)
            } else {
                open + 1
            }
        })
        .collect();
    for range in tests.into_iter().rev() {
        kept.replace_range(range, "");
    }
    kept
}

fn line_of(text: &str, at: usize) -> usize {
    text.get(..at).map_or(0, |before| before.matches('\n').count()) + 1
}

// ---- rules -------------------------------------------------------------------------------------------------------

/// The crate's modules that a source imports or names, tests aside.
fn imports(source: &str) -> BTreeSet<String> {
    let code = code(&without_tests(source));
    let mut found = BTreeSet::new();
    for (at, path) in code.match_indices("crate::") {
        let rest = code.get(at + path.len()..).unwrap_or_default();
        let group =
            rest.strip_prefix('{').map(|group| group.get(..group.find("};").unwrap_or(group.len())).unwrap_or(""));
        let mut depth = 0;
        let split = |c: char| {
            depth += i32::from(c == '{') - i32::from(c == '}');
            c == ',' && depth == 0
        };
        match group {
            Some(group) => found.extend(group.split(split).map(first_name).filter(|name| !name.is_empty())),
            None => drop(found.insert(first_name(rest))),
        }
    }
    found
}

fn first_name(path: &str) -> String {
    path.trim_start().chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect()
}

/// Whether a table of imports has one direction but for `mutual`.
fn has_direction(table: &[(&str, &[&str])], mutual: (&str, &str)) -> Result<(), String> {
    let mut above = BTreeSet::new();
    for (module, imports) in table {
        for import in *imports {
            if !above.contains(import) && (*module, *import) != mutual {
                return Err(format!("{module} imports {import}, which is not above it"));
            }
        }
        above.insert(*module);
    }
    Ok(())
}

/// Which other sinks a sink's source names.
fn other_sinks(sink: &str, source: &str) -> Vec<String> {
    let path = regex(&format!(r"\b(?:super|sink)::({})\b", SINKS.join("|")));
    let code = code(source);
    path.captures_iter(&code)
        .filter_map(|found| Some(found.get(1)?.as_str().to_owned()))
        .filter(|name| name != sink)
        .collect()
}

/// Functions with more lines of code than a page has, as `line: name has so many`.
fn long_functions(source: &str) -> Vec<String> {
    let code = code(source);
    let mut long = Vec::new();
    for function in FUNCTION.captures_iter(&code) {
        let (Some(all), Some(name)) = (function.get(0), function.get(1)) else { continue };
        let mut depth = 0;
        let body = code.bytes().enumerate().skip(all.end()).find(|(_, byte)| {
            depth += i32::from(matches!(byte, b'(' | b'[')) - i32::from(matches!(byte, b')' | b']'));
            depth == 0 && matches!(byte, b'{' | b';')
        });
        let Some((open, b'{')) = body else { continue };
        let body = code.get(open + 1..block_end(&code, open) - 1).unwrap_or_default();
        let lines = body.lines().filter(|line| !line.trim().is_empty()).count();
        if lines > MAX_FUNCTION {
            long.push(format!("{}: `{}` has {lines} lines", line_of(&code, all.start()), name.as_str()));
        }
    }
    long
}

/// What must not be in any source, as `line: what`.
fn forbidden(source: &str) -> Vec<String> {
    let code = code(source);
    let words = [
        (r"#!?\[allow\b", "a bare `allow`; write #[expect(lint, reason = \"…\")]"),
        (r"\b(?:todo|unimplemented|dbg)!", "a macro for unfinished work"),
    ];
    let find = |(pattern, what): (&str, &str)| {
        let lines: Vec<_> = regex(pattern).find_iter(&code).map(|found| line_of(&code, found.start())).collect();
        lines.into_iter().map(move |line| format!("{line}: {what}")).collect::<Vec<_>>()
    };
    words.into_iter().flat_map(find).collect()
}

fn has_doc(source: &str) -> bool {
    source.starts_with("//! ")
}

fn is_nameless(path: &Path) -> bool {
    path.with_extension("").components().any(|part| NAMELESS.iter().any(|name| part.as_os_str() == *name))
}

/// The names of a struct's fields.
fn fields(source: &str, name: &str) -> Vec<String> {
    let code = code(source);
    let Some(found) = regex(&format!(r"\bstruct {name} \{{")).find(&code) else { return Vec::new() };
    let body = code.get(found.end()..block_end(&code, found.end() - 1)).unwrap_or_default();
    let field = regex(r"(?m)^\s*(?:pub )?(\w+): ");
    field.captures_iter(body).filter_map(|found| Some(found.get(1)?.as_str().to_owned())).collect()
}

/// The keys of `routes.toml` that a source asks for.
fn keys(source: &str) -> BTreeSet<String> {
    let source = without_tests(source);
    let key = regex(concat!(
        r#"(?:\.(?:get(?:::<[^("]*>)?|require(?:::<[^("]*>)?|parse|template|templates|table|tables|array|value)\("#,
        r#"|\((?:section|&mut \w+), )"([a-z_]+)""#
    ));
    key.captures_iter(&source).filter_map(|found| Some(found.get(1)?.as_str().to_owned())).collect()
}

// ---- the tree ----------------------------------------------------------------------------------------------------

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The Rust files below a folder: path from the root, and content.
fn sources(folder: &str) -> Vec<(PathBuf, String)> {
    let mut found = Vec::new();
    let mut folders = vec![root().join(folder)];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).into_iter().flatten() {
            let path = entry.expect("a readable folder").path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|ending| ending == "rs") {
                let source = fs::read_to_string(&path).expect("a readable source");
                found.push((path.strip_prefix(root()).expect("below the root").to_owned(), source));
            }
        }
    }
    found.sort();
    assert!(!found.is_empty(), "there are sources in {folder}");
    found
}

fn all_sources() -> impl Iterator<Item = (PathBuf, String)> {
    ["src", "tests", "benches"].into_iter().flat_map(sources)
}

fn is_tests(path: &Path) -> bool {
    path.file_name().is_some_and(|name| name == "tests.rs")
}

fn read(path: &str) -> String {
    fs::read_to_string(root().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

#[track_caller]
fn assert_none(complaints: &[String]) {
    assert!(complaints.is_empty(), "\n{}", complaints.join("\n"));
}

#[test]
fn imports_are_those_of_the_table() {
    let mut graph: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for (path, source) in sources("src").iter().filter(|(path, _)| !is_tests(path)) {
        let module = path.with_extension("");
        let module = module.components().nth(1).map(|part| part.as_os_str().to_string_lossy().into_owned());
        let module = module.filter(|module| module != "lib" && module != "main");
        if let Some(module) = module {
            let mut found = imports(source);
            found.remove(&module);
            graph.entry(module).or_default().extend(found);
        }
    }
    let table: BTreeMap<_, BTreeSet<_>> = IMPORTS
        .iter()
        .map(|(module, of)| ((*module).to_owned(), of.iter().map(|m| (*m).to_owned()).collect()))
        .collect();
    let modules: BTreeSet<_> = graph.keys().chain(table.keys()).collect();
    let differs = |module: &&String| graph.get(*module) != table.get(*module);
    let complaint =
        |module: &String| format!("{module} imports {:?}; the table has {:?}", graph.get(module), table.get(module));
    assert_none(&modules.into_iter().filter(differs).map(complaint).collect::<Vec<_>>());
    assert_eq!(has_direction(&IMPORTS, MUTUAL), Ok(()));
}

#[test]
fn sinks_do_not_know_each_other() {
    let mut complaints = Vec::new();
    for (path, source) in sources("src/sink") {
        let part =
            path.with_extension("").components().nth(2).map(|part| part.as_os_str().to_string_lossy().into_owned());
        if let Some(sink) = part.filter(|part| SINKS.contains(&part.as_str())) {
            complaints
                .extend(other_sinks(&sink, &source).iter().map(|other| format!("{}: names {other}", path.display())));
        }
    }
    assert_none(&complaints);
}

#[test]
fn sources_keep_the_limits_and_words() {
    let mut complaints = Vec::new();
    for (path, source) in all_sources() {
        let place = path.display();
        complaints
            .extend(long_functions(&source).iter().map(|long| format!("{place}:{long}; {MAX_FUNCTION} are allowed")));
        complaints.extend(forbidden(&source).iter().map(|found| format!("{place}:{found}")));
        if is_nameless(&path) {
            complaints.push(format!("{place}: name the module after what is in it"));
        }
        if is_tests(&path) {
            continue;
        }
        let lines = without_tests(&source).lines().count();
        if lines > MAX_FILE && !path.starts_with("tests") {
            complaints.push(format!("{place}: {lines} lines without tests; {MAX_FILE} are allowed"));
        }
        if !has_doc(&source) {
            complaints.push(format!("{place}: begins without a `//!` that says what it is for"));
        }
    }
    assert_none(&complaints);
}

/// Lanes, ingress and sinks are the same over either kind of journal.
#[test]
fn only_those_who_open_a_journal_know_its_kind() {
    let mut complaints = Vec::new();
    for (path, source) in ["src/lane", "src/ingress", "src/sink"].into_iter().flat_map(sources) {
        let code = code(&without_tests(&source));
        for kind in ["journal::disk", "journal::kafka"] {
            complaints.extend(code.contains(kind).then(|| format!("{} names {kind}", path.display())));
        }
    }
    assert_none(&complaints);
}

#[test]
fn scripts_are_executable() {
    for folder in ["scripts", ".ci"] {
        for entry in fs::read_dir(root().join(folder)).expect("a folder of scripts") {
            let path = entry.expect("a readable folder").path();
            let executable = fs::metadata(&path).is_ok_and(|file| file.permissions().mode() & 0o111 == 0o111);
            assert!(executable, "{} is not executable", path.display());
        }
    }
}

#[test]
fn the_readme_names_every_setting() {
    let readme = read("README.md");
    let mut complaints = Vec::new();
    for (file, name, prefix) in SETTINGS {
        let fields = fields(&read(file), name);
        assert!(!fields.is_empty(), "{file} has no struct {name}");
        let missing =
            fields.iter().map(|field| format!("{prefix}{field}")).filter(|name| !readme.contains(&format!("`{name}")));
        complaints.extend(missing.map(|name| format!("README.md does not name the setting `{name}`")));
    }
    assert_none(&complaints);
}

#[test]
fn the_readme_and_the_example_name_every_key_of_the_rules() {
    let (readme, example) = (read("README.md"), read("routes.toml"));
    let mut complaints = Vec::new();
    let sources = sources("src/sink").into_iter().filter(|(path, _)| !is_tests(path)).map(|(_, source)| source);
    let rules = ["src/rules.rs", "src/routing/read.rs", "src/lane/config.rs"].map(read);
    let keys: BTreeSet<_> = sources.chain(rules).flat_map(|source| keys(&source)).collect();
    assert!(keys.len() > 30, "{keys:?}");
    for key in keys {
        let word = regex(&format!(r"\b{key}\b"));
        for (name, text) in [("README.md", &readme), ("routes.toml", &example)] {
            if !word.is_match(text) {
                complaints.push(format!("{name} does not show the key `{key}`"));
            }
        }
    }
    assert_none(&complaints);
}

// ---- the rules can fail ------------------------------------------------------------------------------------------

#[test]
fn blanks_comments_and_quotes() {
    let check = |source: &str, expected: &str| assert_eq!(code(source), expected, "{source}");
    check("a // b\nc", "a     \nc");
    check("a /* b\n{ */ c", "a     \n     c");
    check(r#"f("}\"{", 'x', '\'', '{')"#, "f(      ,    ,     ,    )");
    check("r#\"a\"b\"#;", "        ;");
    check("fn f<'a>(x: &'a str) {}", "fn f<'a>(x: &'a str) {}");
}

#[test]
fn finds_imports() {
    let check = |source: &str, expected: &[&str]| {
        assert_eq!(imports(source).iter().map(String::as_str).collect::<Vec<_>>(), expected, "{source}");
    };
    check("use crate::event::{Event, Field};\nuse crate::journal;", &["event", "journal"]);
    check("use crate::{ingress, journal::{A, B}, sink::C};", &["ingress", "journal", "sink"]);
    check("fn f() { crate::lane::g(); }", &["lane"]);
    check("// use crate::lane;\nconst A: &str = \"crate::sink\";", &[]);
    check("use crate::a;\n#[cfg(test)]\nmod tests {\n use crate::b;\n}\nuse crate::c;", &["a", "c"]);
    check("#[cfg(test)]\nmod tests;\nuse crate::c;", &["c"]);
}

#[test]
fn finds_circles() {
    assert_eq!(has_direction(&[("a", &[]), ("b", &["a"])], ("", "")), Ok(()));
    assert_eq!(has_direction(&[("a", &["b"]), ("b", &["a"])], ("a", "b")), Ok(()));
    assert!(has_direction(&[("a", &["b"]), ("b", &["a"])], ("b", "a")).is_err());
    assert!(has_direction(&[("a", &["b"]), ("b", &[])], ("", "")).is_err());
}

#[test]
fn finds_other_sinks() {
    assert_eq!(other_sinks("kafka", "use super::http::Http;\nuse super::super::stdout;"), ["http", "stdout"]);
    assert_eq!(other_sinks("kafka", "use crate::sink::rabbitmq;"), ["rabbitmq"]);
    assert!(other_sinks("http", "use http::HeaderMap;\nuse super::{Attempt, View};\nuse super::http;").is_empty());
}

#[test]
fn finds_long_functions() {
    let function = |lines| format!("fn f(x: [u8; 3]) -> u8 {{\n{}}}\n", "    g(\"}\");\n\n    // and\n".repeat(lines));
    assert!(long_functions(&function(MAX_FUNCTION)).is_empty());
    let long = long_functions(&format!("fn g();\n{}", function(MAX_FUNCTION + 1)));
    assert_eq!(long, ["2: `f` has 71 lines"]);
}

#[test]
fn finds_forbidden_words() {
    let check = |source: &str, expected: usize| assert_eq!(forbidden(source).len(), expected, "{source}");
    check("#[allow(dead_code)]", 1);
    check("#![allow(dead_code)]", 1);
    check("fn f() { todo!() }\nfn g() { unimplemented!(\"later\") }\nfn h() { dbg!(1); }", 3);
    check("#[expect(dead_code, reason = \"why\")]\n// todo!\nfn f() { \"dbg!\"; }", 0);
}

#[test]
fn finds_what_is_not_documented_or_named() {
    assert!(has_doc("//! What it is for.\n") && !has_doc("use std::fs;\n//! late\n") && !has_doc("// not a doc\n"));
    let check = |path: &str, expected| assert_eq!(is_nameless(Path::new(path)), expected, "{path}");
    check("src/utils.rs", true);
    check("src/common/mod.rs", true);
    check("tests/it/helpers.rs", true);
    check("src/sink/metadata.rs", false);
}

#[test]
fn drops_tests() {
    let source = "fn a() {}\n#[cfg(test)]\nmod tests {\n  fn b() { \"}\"; }\n}\nfn c() {}\n";
    assert_eq!(without_tests(source), "fn a() {}\n\nfn c() {}\n");
}

#[test]
fn finds_settings_and_keys() {
    let source = "/// It.\npub struct Config {\n    /// First: one.\n    pub one: u8,\n    #[serde(with = \"x\")]\n    two: String,\n}";
    assert_eq!(fields(source, "Config"), ["one", "two"]);
    assert!(fields(source, "Other").is_empty());
    let source =
        "section.get::<Vec<String>>(\"a\"); x.require(\"b\"); read(section, \"c\"); d(&mut t, \"d\"); e.f(\"e\");";
    assert_eq!(keys(source).into_iter().collect::<String>(), "abcd");
}
