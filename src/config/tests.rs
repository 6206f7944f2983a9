use std::io::{Error, ErrorKind, Result as IoResult};

use bytesize::ByteSize;

use super::*;
use crate::ingress::AuthConfig;

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
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("relay.toml");
    std::fs::write(&path, file).unwrap();
    let variables = variables.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
    let shorter = |problem: String| problem.replace(&format!("{}/", dir.path().display()), "");
    Config::compose(Some(&path), variables, &Sample)
        .map_err(|ConfigError(problems)| problems.into_iter().map(shorter).collect())
}

fn good(file: &str, variables: &[(&str, &str)]) -> Config {
    let (config, warnings) = load(file, variables).unwrap_or_else(|problems| panic!("{file}: {problems:?}"));
    assert_eq!(warnings, [""; 0], "{file}");
    config
}

#[test]
fn the_defaults_work() {
    let (config, warnings) = Config::compose(None, std::iter::empty(), &Sample).unwrap();
    assert_eq!(warnings, [""; 0]);
    assert_eq!(format!("{config:?}"), format!("{:?}", Config::default()));
    assert_eq!(format!("{:?}", good("", &[])), format!("{config:?}"));
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
        warnings[0].starts_with("RELAY_PORT: there is no such setting; known are data_dir, routes, "),
        "{warnings:?}"
    );
}

#[test]
fn says_what_is_wrong_and_where() {
    let check = |file: &str, variables: &[(&str, &str)], expected: &[&str]| {
        let problems = load(file, variables).map(|_| ()).unwrap_err();
        assert_eq!(problems.len(), expected.len(), "{problems:#?}");
        for (problem, expected) in problems.iter().zip(expected) {
            assert!(problem.contains(expected), "{problem}\n should have {expected}");
        }
    };
    // A misspelt name, in every place.
    check(
        "",
        &[("RELAY_INGRES__LISTEN", "x"), ("RELAY_X__Y", "z")],
        &["RELAY_INGRES__LISTEN: there is no", "RELAY_X__Y: "],
    );
    check(
        "",
        &[("RELAY_INGRESS__LITSEN", "x")],
        &["RELAY_INGRESS__LITSEN: ingress.litsen: there is no setting `litsen` here"],
    );
    check(
        "[ingress]\nlitsen = 'x'\n",
        &[],
        &["relay.toml: ingress.litsen: there is no setting `litsen` here; known are `listen`"],
    );
    check("[ingres]\n", &[], &["there is no setting `ingres` here"]);
    // A value of the wrong kind.
    check("[ingress]\nmax_connections = 'many'\n", &[], &["relay.toml: ingress.max_connections: is text, should be"]);
    check(
        "",
        &[("RELAY_INGRESS__LISTEN", "9000")],
        &["RELAY_INGRESS__LISTEN: ingress.listen: is an integer, should be"],
    );
    check("data_dir = 3\n", &[], &["relay.toml: data_dir: is an integer, should be"]);
    check("[journal]\ndurability = 'disk'\n", &[], &["relay.toml: journal.durability: is none of `fsync`, `os`"]);
    check("not toml\n", &[], &["relay.toml"]);
    // A value that does not work; all of those at once.
    check(
        "[ingress]\nmax_body = '1GiB'\n[journal]\nmax_disk = '1MiB'\n[admin]\nlisten = '0.0.0.0:9090'\n[telemetry]\nlog = 'a=b=c'\n",
        &[],
        &["ingress.max_body is ", "journal.max_disk is ", "admin.listen is 0.0.0.0:9090", "telemetry.log is "],
    );
    check("[ingress.auth]\ntokens = [{ name = 'a', value = ' ' }]\n", &[], &["the value of \"a\" is empty"]);
    check(
        "[ingress]\nallow = ['10.0.0.0/33']\nsignature = { scheme = 'standard-webhooks', secret = 'x' }\n",
        &[],
        &["ingress.allow: \"10.0.0.0/33\" is neither", "ingress.signature.secret: a signing secret starts with"],
    );
    // References.
    check("[admin]\ntoken = '${NONE}'\n", &[], &["admin.token: the environment variable `NONE` is not set"]);
    check("[admin]\ntoken = '${file:/none}'\n", &[], &["cannot read the file `/none`"]);
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
    assert!(problems[0].starts_with("telemetry.trace_sample is 2; "), "{problems:?}");
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
        load("", &[("RELAY_ADMIN__TOKEN", "12345678")]),
        load("", &[("RELAY_ADMIN__TOKEN", "[12345678]")]),
        load("", &[("RELAY_INGRESS__AUTH", "12345678")]),
        load("", &[("RELAY_INGRESS__AUTH", "s3cret")]),
        load("[ingress]\nauth = '${TOKEN}'\n", &[]),
        load("[ingress]\nlisten = '${TOKEN}'\n", &[]),
        load("[journal]\ndurability = '${TOKEN}'\n", &[]),
        load("[shutdown]\ndelay = '${TOKEN}'\n", &[]),
    ];
    for result in shown {
        let problems = result.map(drop).unwrap_err().join("\n");
        assert!(!problems.contains("12345678") && !problems.contains("s3cret"), "{problems}");
    }
    let config = good(&tokens("'${TOKEN}'"), &[]);
    assert!(!format!("{config:?}").contains("s3cret"), "{config:?}");
}
