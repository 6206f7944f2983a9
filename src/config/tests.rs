use std::io::{Error, ErrorKind, Result as IoResult};

use bytesize::ByteSize;

use super::*;
use crate::ingress::AuthConfig;
use crate::signature;

struct Sample;

impl Lookup for Sample {
    fn variable(&self, name: &str) -> Option<String> {
        (name == "TOKEN").then(|| "s3cret".to_owned())
    }

    fn file(&self, path: &str) -> IoResult<String> {
        if path == "/token" { Ok("fr0m-file\n".to_owned()) } else { Err(Error::from(ErrorKind::NotFound)) }
    }
}

/// The settings of a file and variables: and warnings, or what is wrong.
fn load(file: &str, variables: &[(&str, &str)]) -> Result<(Config, Vec<String>), Vec<String>> {
    let read = read(file, variables);
    match read.problems.is_empty() {
        true => Ok((read.config, read.warnings)),
        false => Err(read.problems.iter().map(ToString::to_string).collect()),
    }
}

fn read(file: &str, variables: &[(&str, &str)]) -> Read {
    let variables = variables.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
    Read::new("relay.toml", file, variables, &Sample)
}

fn good(file: &str, variables: &[(&str, &str)]) -> Config {
    let (config, warnings) = load(file, variables).unwrap_or_else(|problems| panic!("{file}: {problems:?}"));
    assert_eq!(warnings, [""; 0], "{file}");
    config
}

#[test]
fn the_defaults_work() {
    assert_eq!(format!("{:?}", good("", &[])), format!("{:?}", Config::default()));
}

#[test]
fn later_layers_win() {
    let file = "data_dir = 'file'\n[ingress]\nlisten = '127.0.0.1:1'\nmax_body = '1MiB'\n[shutdown]\ndelay = '1s'\n";
    let config = good(file, &[("RELAY_INGRESS__LISTEN", "127.0.0.1:2"), ("RELAY_SHUTDOWN__DELAY", "0s")]);
    assert_eq!(config.ingress.listen.port(), 2, "a variable over the file");
    assert_eq!(config.ingress.max_body, ByteSize::mib(1), "the file over the default, beside a variable");
    assert_eq!(config.data_dir, PathBuf::from("file"));
    assert_eq!((config.shutdown.delay, config.shutdown.grace), (Duration::ZERO, Duration::from_secs(20)));
}

#[test]
fn the_more_precise_of_two_variables_wins() {
    let variables = [("RELAY_INGRESS__AUTH", "none"), ("RELAY_INGRESS__AUTH__HEADER", "x-key")];
    let (config, warnings) = load("", &variables).unwrap();
    assert!(matches!(config.ingress.auth, AuthConfig::Tokens { header, .. } if header == "x-key"));
    assert_eq!(
        warnings,
        ["RELAY_INGRESS__AUTH has no effect beside RELAY_INGRESS__AUTH__HEADER, which is more precise"]
    );
}

#[test]
fn variables_say_everything_that_a_file_says() {
    let config = good(
        "",
        &[
            ("RELAY_DATA_DIR", "/var/lib/relay"),
            ("RELAY_ROUTES", "/etc/relay/routes.toml"),
            ("RELAY_INGRESS__MAX_CONNECTIONS", "7"),
            ("RELAY_INGRESS__AUTH__HEADER", "x-key"),
            ("RELAY_INGRESS__AUTH__TOKENS", "[{name=\"a\",value=\"${TOKEN}\"},{name=\"b\",value=\"${file:/token}\"}]"),
            ("RELAY_JOURNAL__DURABILITY", "os"),
            ("relay_ignored", "x"),
            ("OTHER", "x"),
        ],
    );
    assert_eq!((config.data_dir, config.routes), ("/var/lib/relay".into(), "/etc/relay/routes.toml".into()));
    assert_eq!(config.ingress.max_connections, 7);
    assert_eq!(config.journal.disk().durability, journal::Durability::Os);
    let AuthConfig::Tokens { header, tokens } = config.ingress.auth else { panic!("tokens") };
    let tokens: Vec<_> = tokens.iter().map(|token| (token.name.as_str(), token.value.as_str())).collect();
    assert_eq!((header.as_str(), &tokens[..]), ("x-key", &[("a", "s3cret"), ("b", "fr0m-file")][..]));
    assert!(matches!(good("", &[("RELAY_INGRESS__AUTH", "none")]).ingress.auth, AuthConfig::None));
}

#[test]
fn variables_of_others_are_ignored() {
    let kubernetes = [
        ("RELAY_PORT", "tcp://10.0.0.1:8080"),
        ("RELAY_SERVICE_HOST", "10.0.0.1"),
        ("RELAY_PORT_8080_TCP_PROTO", "tcp"),
        ("RELAY_ADMIN_PORT", "tcp://10.0.0.1:9090"),
    ];
    let (config, warnings) = load("", &kubernetes).unwrap();
    assert_eq!(format!("{config:?}"), format!("{:?}", Config::default()));
    assert_eq!(warnings.len(), kubernetes.len());
    assert!(
        warnings[1].starts_with("RELAY_PORT: there is no such setting; known are data_dir, routes, "),
        "{warnings:?}"
    );
}

#[test]
fn a_variable_is_text_where_its_setting_is() {
    for text in ["12345", "00123", "1.5", "true", "[a]", "{a=1}", "\"quoted\"", "'q'", "[", "a, b", "0x10", "-1", "{}"]
    {
        let config = good("", &[("RELAY_ADMIN__TOKEN", text), ("RELAY_DATA_DIR", text)]);
        assert_eq!(config.admin.token.as_deref(), Some(text));
        assert_eq!(config.data_dir, PathBuf::from(text));
    }
    let variables = [("RELAY_TELEMETRY__OTLP_HEADERS__X", "00123"), ("RELAY_INGRESS__AUTH__HEADER", "1")];
    assert_eq!(format!("{:?}", good("", &variables).telemetry.otlp_headers), "{\"x\"}");
    assert_eq!(good("", &[("RELAY_ADMIN__TOKEN", "<${TOKEN}>")]).admin.token.as_deref(), Some("<s3cret>"));

    let kafka = [("RELAY_JOURNAL__KIND", "kafka"), ("RELAY_JOURNAL__BROKERS", "[kafka-0:9092, \"kafka-1:9092\"]")];
    let file = "[ingress.auth]\ntokens = [{ name = 'a', value = 'b' }]\n";
    let options = [kafka[0], kafka[1], ("RELAY_JOURNAL__OPTIONS__SASL__PASSWORD", "00123")];
    let journal = good(file, &options).journal.kafka();
    assert_eq!(journal.brokers, ["kafka-0:9092", "kafka-1:9092"]);
    assert_eq!(journal.options["sasl.password"], "00123");

    let secret = |text| {
        let variables =
            [("RELAY_INGRESS__SIGNATURE__SCHEME", "hub-sha256"), ("RELAY_INGRESS__SIGNATURE__SECRET", text)];
        good("", &variables).ingress.signature.unwrap().secret
    };
    assert!(matches!(secret("123"), signature::OneOrMore::One(one) if one == "123"));
    assert!(matches!(secret("[\"a\", \"b\"]"), signature::OneOrMore::More(more) if more == ["a", "b"]));
    let sizes = [("RELAY_INGRESS__MAX_BODY", "65536"), ("RELAY_TELEMETRY__TRACE_SAMPLE", "1")];
    assert_eq!(good("", &sizes).ingress.max_body, ByteSize::kib(64));
    let whole = [("RELAY_INGRESS__AUTH", "{ header = \"x-a\" }"), ("RELAY_INGRESS__AUTH__HEADER", "x-b")];
    assert!(matches!(good("", &whole).ingress.auth, AuthConfig::Tokens { header, .. } if header == "x-b"));
}

fn check(file: &str, variables: &[(&str, &str)], expected: &[&str]) {
    let problems = load(file, variables).map(|_| ()).unwrap_err();
    assert_eq!(problems.len(), expected.len(), "{problems:#?}");
    for (problem, expected) in problems.iter().zip(expected) {
        assert!(problem.starts_with(expected), "{problem}\n should be {expected}");
    }
}

#[test]
fn says_what_is_wrong_and_where() {
    // A misspelt name, in every place.
    check(
        "",
        &[("RELAY_INGRES__LISTEN", "x"), ("RELAY_X__Y", "z")],
        &["RELAY_INGRES__LISTEN: there is no", "RELAY_X__Y: "],
    );
    check(
        "",
        &[("RELAY_INGRESS__LITSEN", "x")],
        &["RELAY_INGRESS__LITSEN: ingress.litsen: there is no setting `litsen` here; known are `listen`"],
    );
    check(
        "[ingress]\n litsen = 'x'\n",
        &[],
        &["relay.toml:2:2: ingress.litsen: there is no setting `litsen` here; known"],
    );
    check("[ingres]\n", &[], &["relay.toml:1:2: ingres: there is no setting `ingres` here"]);
}

#[test]
fn says_what_a_value_should_be() {
    check(
        "[ingress]\nmax_connections = 'many'\n",
        &[],
        &["relay.toml:2:19: ingress.max_connections: is text, should be a whole number"],
    );
    check("data_dir = 3\n", &[], &["relay.toml:1:12: data_dir: is a whole number, should be text"]);
    check("data_dir = 2024-01-01\n", &[], &["relay.toml:1:12: is a date or a time"]);
    check("ingress = 3\n", &[], &["relay.toml:1:11: ingress: is a whole number, should be a table"]);
    check(
        "[ingress]\nmax_connections = 1.5\n",
        &[],
        &["relay.toml:2:19: ingress.max_connections: is a number with a frac"],
    );
    check(
        "[ingress]\nmax_connections = -1\n",
        &[],
        &["relay.toml:2:19: ingress.max_connections: is a number that is too"],
    );
    check(
        "[ingress]\nmax_body = 'much'\n",
        &[],
        &["relay.toml:2:12: ingress.max_body: is not a size such as \"64KiB\""],
    );
    check(
        "[ingress]\nmax_body = true\n",
        &[],
        &["relay.toml:2:12: ingress.max_body: is true or false, should be a size"],
    );
    check("[ingress]\nallow = '::1'\n", &[], &["relay.toml:2:9: ingress.allow: is text, should be a list"]);
    check("[shutdown]\ndelay = 'soon'\n", &[], &["relay.toml:2:9: shutdown.delay: is not a time such as \"10s\""]);
    check(
        "[ingress]\nlisten = '9000'\n",
        &[],
        &["relay.toml:2:10: ingress.listen: is not an address with a port, such"],
    );
    check(
        "[ingress]\nauth = 'nobody'\n",
        &[],
        &["relay.toml:2:8: ingress.auth: is not \"none\", or a table with `header`"],
    );
    check("[journal]\ndurability = 'disk'\n", &[], &["relay.toml:2:14: journal.durability: is none of `fsync`, `os`"]);
    check("[ingress.tls]\ncert = 'x'\n", &[], &["relay.toml:1:1: ingress.tls: `key` is missing"]);
    check(
        "",
        &[("RELAY_INGRESS__LISTEN", "9000")],
        &["RELAY_INGRESS__LISTEN: ingress.listen: is not an address with a port"],
    );
    check(
        "",
        &[("RELAY_INGRESS__MAX_CONNECTIONS", "many")],
        &["RELAY_INGRESS__MAX_CONNECTIONS: ingress.max_connections: is"],
    );
}

#[test]
fn says_what_does_not_work() {
    check(
        "[ingress.auth]\ntokens = [{ name = 'a', value = ' ' }]\n",
        &[],
        &["relay.toml:2:10: ingress.auth.tokens: the val"],
    );
    check("[journal]\nkind = 'kafka'\n[ingress]\nauth = 'none'\n", &[], &["relay.toml:1:1: journal.brokers: the list"]);
    check("", &[("RELAY_ADMIN__TOKEN", " x")], &["RELAY_ADMIN__TOKEN: admin.token begins or ends with white space"]);
    check("", &[("RELAY_ADMIN__TOKEN", "x\ty\u{1}")], &["RELAY_ADMIN__TOKEN: admin.token has a control character"]);
    check("data_dir = ''\n", &[], &["relay.toml:1:12: data_dir is empty; name a folder"]);
    check("data_dir = 'x'", &[("RELAY_DATA_DIR", "")], &["RELAY_DATA_DIR: data_dir is empty; name a folder"]);
    check("", &[("RELAY_ROUTES", "")], &["RELAY_ROUTES: routes is empty; name the file with the rules"]);
    let a_day = [("RELAY_SHUTDOWN__DELAY", "24h"), ("RELAY_SHUTDOWN__GRACE", "24h")];
    good("", &a_day);
    check(
        "",
        &a_day.map(|(name, _)| (name, "86401s")),
        &[
            "RELAY_SHUTDOWN__DELAY: shutdown.delay is longer than a day, which is the most",
            "RELAY_SHUTDOWN__GRACE: shutdown.grace is longer than a day, which is the most",
        ],
    );
    // Syntax.
    check("not toml\n", &[], &["relay.toml:1:"]);
    check("[admin]\ntoken = \"S3CRET\" x\nlisten = '0.0.0.0:1'\n", &[], &["relay.toml:2:18: "]);
    // References.
    check("[admin]\ntoken = '${NONE}'\n", &[], &["relay.toml:2:9: the environment variable `NONE` is not set"]);
    check("[admin]\ntoken = '${file:/none}'\n", &[], &["relay.toml:2:9: cannot read the file `/none`"]);
    check(
        "",
        &[("RELAY_ADMIN__TOKEN", "${NONE}")],
        &["RELAY_ADMIN__TOKEN: admin.token: the environment variable `NONE`"],
    );
    check(
        "",
        &[("RELAY_ADMIN__TOKEN", "[${NONE}]")],
        &["RELAY_ADMIN__TOKEN: admin.token: the environment variable `NONE`"],
    );
}

#[test]
fn says_all_that_is_wrong_at_once() {
    let file = "\
data_dir = 1
rotues = 'x'
[ingress]
max_body = '1B'
path = 'x'
max_connections = 0
header_timeout = 'soon'
allow = ['10.0.0.0/33', 'x']
auth = { tokens = [{ name = 1, value = 'a' }, { name = 'b', value = 'c' }, { name = 'd', valeu = 'e' }] }
[journal]
segment = '1B'
max_disk = 'much'
[admin]
listen = '0.0.0.0:9090'
token = '${NONE}'
[telemetry]
log = 'inof'
trace_sample = 2
";
    let lines =
        |places: &[(usize, usize)]| places.iter().map(|(l, c)| format!("relay.toml:{l}:{c}: ")).collect::<Vec<_>>();
    let mut expected = lines(&[
        (1, 12),
        (2, 1),
        (4, 12),
        (5, 8),
        (6, 19),
        (7, 18),
        (8, 9),
        (8, 9),
        (9, 29),
        (9, 76),
        (9, 90),
        (11, 11),
        (12, 12),
        (15, 9),
        (17, 7),
        (18, 16),
    ]);
    expected.extend(["RELAY_INGRESS__BODY_TIMEOUT: ", "RELAY_INGRES__X: ", "RELAY_SHUTDOWN: "].map(str::to_owned));
    let variables = [("RELAY_INGRESS__BODY_TIMEOUT", "0s"), ("RELAY_INGRES__X", "x"), ("RELAY_SHUTDOWN", "now")];
    let problems = load(file, &variables).map(drop).unwrap_err();
    for expected in &expected {
        assert!(problems.iter().any(|problem| problem.starts_with(expected)), "{expected} is not in {problems:#?}");
    }
    assert_eq!(problems.len(), expected.len(), "{problems:#?}");
    let tokens = "[ingress.auth]\ntokens = [{ name = 1, value = 'a' }, { name = 2, value = 'a' }]\n";
    check(
        tokens,
        &[],
        &["relay.toml:2:20: ingress.auth.tokens.0.name: is", "relay.toml:2:47: ingress.auth.tokens.1.name: is"],
    );
}

#[test]
fn what_follows_from_a_problem_is_none() {
    // Each has a default instead, which would not go together with the rest.
    check("[admin]\nlisten = '0.0.0.0:1'\ntoken = 1\n", &[], &["relay.toml:3:9: admin.token: is a whole number"]);
    check("[journal]\nsegment = 1.5\nmax_disk = '100MiB'\n", &[], &["relay.toml:2:11: journal.segment: is a number"]);
    check("[journal]\nkind = 'kafak'\nbrokers = ['k:1']\n", &[], &["relay.toml:2:8: journal.kind: is none of"]);
    check("[ingress]\nallow = 1\ntrusted_proxies = ['::1']\n", &[], &["relay.toml:2:9: ingress.allow: is a"]);
    check("[ingress.tls]\ncert = '${NONE}'\nkey = 'x'\n", &[], &["relay.toml:2:8: the environment variable"]);
    assert_eq!(read("[ingress]\nallow = 1\ntrusted_proxies = ['::1']\n", &[]).warnings, [""; 0]);
}

#[test]
fn problems_have_a_limit() {
    let file: String = (0..1000).map(|index| format!("unknown{index} = 1\n")).collect();
    let problems = load(&file, &[]).map(drop).unwrap_err();
    assert_eq!(problems.len(), 101);
    assert!(problems[100].starts_with("too many problems"), "{problems:?}");
}

#[test]
fn the_rules_are_looked_at_where_their_file_is_known() {
    let check = |file: &str, expected| assert_eq!(read(file, &[]).knows_routes, expected, "{file}");
    check("", true);
    check("routes = 'r.toml'\n[ingress]\nmax_body = 1.5\n", true);
    check("routes = 1\n", false);
    check("routes = '${NONE}'\n", false);
    check("routes = 'r.toml' x\n", false);
    assert_eq!(read("routes = 'r.toml'\n[ingress]\nlisten = 1\n", &[]).config.routes, PathBuf::from("r.toml"));
}

#[test]
fn listeners_need_ports_of_their_own() {
    let listen = |ingress, admin| {
        let variables =
            [("RELAY_INGRESS__LISTEN", ingress), ("RELAY_ADMIN__LISTEN", admin), ("RELAY_ADMIN__TOKEN", "x")];
        load("", &variables).map(drop)
    };
    let together = [
        ("127.0.0.1:1", "127.0.0.2:1"),
        ("127.0.0.1:0", "127.0.0.1:0"),
        ("0.0.0.0:1", "127.0.0.1:2"),
        ("0.0.0.0:1", "[::1]:1"),
    ];
    for (ingress, admin) in together {
        assert_eq!(listen(ingress, admin), Ok(()), "{ingress} {admin}");
    }
    for (ingress, admin) in [("[::1]:1", "[::1]:1"), ("0.0.0.0:1", "127.0.0.1:1"), ("[::1]:1", "[::]:1")] {
        let problem = format!("RELAY_ADMIN__LISTEN: admin.listen is {admin}, and ingress.listen is {ingress}: each");
        assert!(listen(ingress, admin).unwrap_err()[0].starts_with(&problem), "{ingress} {admin}");
    }
    check("[ingress]\nlisten = '127.0.0.1:9090'\n", &[], &["relay.toml:2:10: admin.listen is 127.0.0.1:9090, and"]);
}

#[test]
fn warns_of_what_has_no_effect() {
    let (_, warnings) = load("[ingress]\ntrusted_proxies = ['10.0.0.0/8']\n", &[]).unwrap();
    assert_eq!(warnings, ["ingress.trusted_proxies has no effect without ingress.allow"]);
}

#[test]
fn traces_go_where_they_are_told_to() {
    let file = "[telemetry]\notlp_endpoint = 'http://localhost:4318'\notlp_protocol = 'http'\ntrace_sample = 0.25\n\
        otlp_headers = { authorization = 'Bearer ${TOKEN}' }\n";
    let config = good(file, &[]);
    assert_eq!(config.telemetry.otlp_protocol, telemetry::OtlpProtocol::Http);
    assert!(!format!("{config:?}").contains("s3cret"), "{config:?}");
    let problems = load("", &[("RELAY_TELEMETRY__TRACE_SAMPLE", "2")]).map(drop).unwrap_err();
    assert!(problems[0].starts_with("RELAY_TELEMETRY__TRACE_SAMPLE: telemetry.trace_sample is 2; "), "{problems:?}");
}

#[test]
fn never_shows_a_secret() {
    let tokens = |value: &str| format!("[ingress.auth]\ntokens = [{{ name = 'a', value = {value} }}]\n");
    let shown = [
        load(&tokens("12345678"), &[]),
        load(&tokens("['12345678']"), &[]),
        load(&format!("{}[ingress]\nmax_body = 1\n", tokens("'12345678'")), &[]),
        load("[admin]\nlisten = '0.0.0.0:1'\ntoken = 12345678\n", &[]),
        load("[ingress]\nsignature = { scheme = 'hub-sha256', secret = 12345678 }\n", &[]),
        load("[ingress]\nsignature = { scheme = 'standard-webhooks', secret = '12345678' }\n", &[]),
        load("", &[("RELAY_ADMIN__TOKEN", "12345678 ")]),
        load("[admin]\ntoken = '12345678' x\n", &[]),
        load("", &[("RELAY_INGRESS__AUTH", "12345678")]),
        load("", &[("RELAY_INGRESS__AUTH", "s3cret")]),
        load("[ingress]\nauth = '${TOKEN}'\n", &[]),
        load("[ingress]\nlisten = '${TOKEN}'\n", &[]),
        load("[journal]\ndurability = '${TOKEN}'\n", &[]),
        load("[shutdown]\ndelay = '${TOKEN}'\n", &[]),
        load("[ingress]\npath = '${TOKEN}'\n", &[]),
        load("[ingress.auth]\nheader = ' ${TOKEN}'\n", &[]),
        load("[ingress]\nallow = ['::1', '${TOKEN}']\n", &[]),
        load("[telemetry]\nlog = 'info,${TOKEN}'\n", &[]),
        load("", &[("RELAY_TELEMETRY__LOG", "${TOKEN}")]),
    ];
    for result in shown {
        let problems = result.map(drop).unwrap_err().join("\n");
        assert!(!problems.contains("12345678") && !problems.contains("s3cret"), "{problems}");
    }
    let (_, warnings) = load(
        "[ingress.auth]\ntokens = [{ name = 'a', value = '12345678' }, { name = 'b', value = '12345678' }]\n",
        &[],
    )
    .unwrap();
    assert!(warnings.len() == 1 && !warnings[0].contains("12345678"), "{warnings:?}");
    let config = good(&tokens("'${TOKEN}'"), &[]);
    assert!(!format!("{config:?}").contains("s3cret"), "{config:?}");
}
