use std::io::{Error, ErrorKind, Result as IoResult};
use std::time::{Duration, SystemTime};

use tempfile::TempDir;

use super::*;
use crate::event::{self, Event};
use crate::lane::{BreakerConfig, OrderBy, Rate, Retry, StartAt, Waits};
use crate::routing::Scratch;

/// What the shipped file's examples need, and nothing else.
struct Sample;

impl Lookup for Sample {
    fn variable(&self, name: &str) -> Option<String> {
        let variables = [("CRM_TOKEN", "s3cret-token"), ("KAFKA_PASSWORD", "s3cret-password")];
        variables.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).to_owned())
    }

    fn file(&self, path: &str) -> IoResult<String> {
        match path {
            "/run/secrets/crm-signing" => Ok("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw\n".to_owned()),
            _ => Err(Error::from(ErrorKind::NotFound)),
        }
    }
}

const SHIPPED: &str = include_str!("../../routes.toml");

/// The shipped file with its examples in use: every line that begins with `#:` without that. The files that they name are
/// in the folder.
fn uncommented() -> (String, TempDir) {
    let dir = tempfile::tempdir().unwrap();
    let rcgen::CertifiedKey { cert, signing_key } = rcgen::generate_simple_self_signed(["relay".to_owned()]).unwrap();
    for (name, pem) in [("ca.pem", cert.pem()), ("client.pem", cert.pem()), ("client.key", signing_key.serialize_pem())]
    {
        std::fs::write(dir.path().join(name), pem).unwrap();
    }
    let lines = SHIPPED.lines().map(|line| line.strip_prefix("#:").unwrap_or(line).to_owned() + "\n");
    (lines.collect::<String>().replace("/etc/relay", &dir.path().to_string_lossy()), dir)
}

fn compile(source: &str) -> Result<(Rules, Vec<Problem>), Vec<String>> {
    Rules::compile("r", source, &Sample).map_err(|error| match error {
        RulesError::Problems { problems } => problems.iter().map(Problem::said).collect(),
        RulesError::Read { .. } => panic!("{error}"),
    })
}

fn event(body: &str) -> Event {
    let parsed = event::parse(body.as_bytes()).unwrap().pop().unwrap();
    let mut record = Vec::new();
    parsed.encode(parsed.id(), SystemTime::UNIX_EPOCH, "aivo", None, &mut record);
    Event::decode(record.into()).unwrap()
}

/// Which sinks an event goes to.
fn sinks(rules: &Rules, body: &str) -> Vec<String> {
    let mut scratch = Scratch::default();
    let matches = rules.table.matches(&event(body), &mut scratch).to_vec();
    matches.iter().map(|found| rules.table.sinks()[found.sink.0].clone()).collect()
}

#[test]
fn the_shipped_file_works_as_it_is() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("routes.toml");
    let (rules, problems) = Rules::load(&path, &Sample).unwrap();
    assert_eq!(problems, []);
    assert_eq!(rules.sinks.len(), 1);
    assert_eq!(rules.sinks[0].sink.type_name(), "stdout");
    assert_eq!(sinks(&rules, "{}"), ["screen"]);
}

#[test]
fn the_shipped_files_examples_work() {
    let (shipped, _dir) = uncommented();
    let (rules, problems) = compile(&shipped).unwrap();
    assert_eq!(problems, [], "not even a warning");
    let types: Vec<_> = rules.sinks.iter().map(|sink| (sink.name.as_str(), sink.sink.type_name())).collect();
    let expected = [
        ("screen", "stdout"),
        ("crm", "http"),
        ("analytics", "kafka"),
        ("ops", "rabbitmq"),
        ("archive", "http"),
        ("audit", "http"),
    ];
    assert_eq!(types, expected);
    let argentina = r#"{"message_status":"read","channel":{"sender_id":"5491122223333"},"campaign":{"id":"x"}}"#;
    assert_eq!(sinks(&rules, argentina), ["screen", "crm", "analytics"]);
    let every = r#"{"message_id":"wamid.A","message_status":"error","event_name":"msg_status","error":{"code":1},
        "channel":{"channel_type":"Whatsapp","name":"Main","sender_id":"5491122223333"},
        "campaign":{"id":"074116ff-76f3-47b7-8be2-92f465718a3e","name":"spring"},"recipient":{"id":"541112341234"}}"#;
    assert_eq!(sinks(&rules, every), ["screen", "ops", "archive", "audit"]);
    assert_eq!(sinks(&rules, &every.replace("spring", "test 1")), ["screen"]);
    assert_eq!(sinks(&rules, &every.replace(r#""code":1"#, r#""code":131026"#)), ["screen"]);
    assert!(!rules.table.keeps_unrouted());
}

/// What only building a sink shows is told like all else: with its place.
#[test]
fn files_and_options_that_do_not_work_are_problems() {
    let check = |sink: &str, expected: &str| {
        let problems = compile(&format!("[sinks.a]\n{sink}[[routes]]\nto = ['a']\n")).map(drop).unwrap_err();
        assert!(problems.len() == 1 && problems[0].contains(expected), "{problems:?}\n should have {expected}");
    };
    let (shipped, dir) = uncommented();
    let (file, pem) = (|name: &str| dir.path().join(name).display().to_string(), "type = 'http'\nurl = 'https://h/'\n");
    std::fs::write(file("junk.pem"), "junk").unwrap();
    std::fs::write(file("other.key"), rcgen::KeyPair::generate().unwrap().serialize_pem()).unwrap();
    check(&format!("{pem}tls = {{ ca = '/none' }}\n"), "4:7: cannot read /none: No such file");
    check(&format!("{pem}tls = {{ ca = '{}' }}\n", file("junk.pem")), "holds no PEM certificate");
    let pair = format!("{pem}tls = {{ cert = '{}', key = '{}' }}\n", file("client.pem"), file("other.key"));
    check(&pair, "4:7: cannot build the client: builder error: keys may not be consistent: KeyMismatch");
    let rabbit = "type = 'rabbitmq'\nurls = ['amqps://h']\nrouting_key = 'k'\n";
    check(&format!("{rabbit}tls = {{ ca = '/none' }}\n"), "5:7: cannot read /none: No such file");
    let kafka = "type = 'kafka'\nbrokers = ['h']\ntopic = 't'\noptions = ";
    check(
        &format!("{kafka}{{ \"sasl.mechanisms\" = 'NOPE', security.protocol = 'sasl_plaintext' }}\n"),
        "5:11: cannot build",
    );
    let unknown = compile(&format!("[sinks.a]\n{kafka}{{ foo = 1, bar = 2, acks = 1 }}\n[[routes]]\nto = ['a']\n"))
        .map(drop)
        .unwrap_err();
    assert_eq!(unknown.len(), 3, "each of them: {unknown:?}");
    assert!(routes_of("r", &shipped.replace("ca.pem", "none.pem"), &Sample).is_ok(), "they run elsewhere");
}

/// The example of all of `delivery` shows the defaults, as it says.
#[test]
fn the_shipped_files_defaults_are_the_defaults() {
    let (shipped, _dir) = uncommented();
    let (rules, _) = compile(&shipped).unwrap();
    let archive = rules.sinks.iter().find(|sink| sink.name == "archive").unwrap();
    assert_eq!(archive.lane, lane::Config::new(archive.sink.default_concurrency()));
    let wide = rules.sinks.iter().filter(|sink| matches!(sink.sink.type_name(), "kafka" | "rabbitmq"));
    assert!(wide.map(|sink| sink.lane.concurrency).eq([1024, 1024]));
}

#[test]
fn examples_hide_what_is_secret() {
    let (shipped, _dir) = uncommented();
    let (rules, _) = compile(&shipped).unwrap();
    let shown = format!("{:?}", rules.sinks.iter().map(|sink| &sink.sink).collect::<Vec<_>>());
    // Options of librdkafka are kept as they are given to it, and are never printed.
    assert!(!shown.contains("s3cret-token"), "{shown}");
    for sink in &rules.sinks {
        let preview = sink
            .sink
            .preview(&sink.name, &event("{}"), &sink::Attempt { number: 1, route: "r", traceparent: None })
            .unwrap();
        assert!(!format!("{preview:?}").contains("s3cret"), "{preview:?}");
    }
}

#[test]
fn lanes_take_what_the_sink_says() {
    let lane = |delivery: &str| {
        let source = format!(
            "[sinks.a]\ntype = 'stdout'\nstart = 'earliest'\n[sinks.a.delivery]\n{delivery}\n[[routes]]\nto = ['a']\n"
        );
        let (rules, problems) = compile(&source).unwrap();
        assert_eq!(problems, []);
        rules.sinks[0].lane.clone()
    };
    let seconds = Duration::from_secs;
    let all = lane(
        "concurrency = 7\norder_by = 'none'\nrate = '120/m'\nmax_attempts = 20\nmax_age = '72h'\nmax_parked = 5\n\
        backoff = { initial = '2s', max = '3s' }\nbreaker = { failures = 4, probe = '5s' }",
    );
    let expected = lane::Config {
        concurrency: 7,
        order_by: OrderBy::None,
        rate: Some(Rate { interval: Duration::from_millis(500) }),
        retry: Retry {
            waits: Waits::Backoff { initial: seconds(2), max: seconds(3) },
            max_attempts: Some(20),
            max_age: Some(seconds(72 * 3600)),
        },
        max_parked: 5,
        window_bytes: lane::Config::new(7).window_bytes,
        breaker: BreakerConfig { failures: 4, probe: seconds(5) },
        start: StartAt::Earliest,
    };
    assert_eq!(all, expected);
    let schedule = lane("schedule = ['5s', '5m']");
    assert_eq!(schedule.retry.waits, Waits::Schedule(vec![seconds(5), seconds(300)]));
    assert_eq!(lane("max_age = '87600h'").retry.max_age, Some(seconds(10 * 365 * 24 * 3600)));
    let limits = lane("concurrency = 100000\nmax_parked = 10000000\nmax_attempts = 4294967295\nrate = '1000000000/s'");
    assert_eq!(
        (limits.concurrency, limits.max_parked, limits.retry.max_attempts),
        (100_000, 10_000_000, Some(u32::MAX))
    );
    assert_eq!(lane("max_attempts = 1\nmax_parked = 1").retry.max_attempts, Some(1));
}

#[test]
fn reports_problems_of_all_parts() {
    let check = |source: &str, expected: &[&str]| {
        let found = compile(source).map(|(_, problems)| problems.iter().map(Problem::said).collect::<Vec<_>>());
        let (Ok(found) | Err(found)) = found;
        assert_eq!(found, expected, "{source}");
    };
    const A: &str = "[sinks.a]\ntype = 'stdout'\n";
    const ROUTE: &str = "[[routes]]\nto = ['a']\n";
    check(&format!("{A}{ROUTE}"), &[]);
    check(A, &["1:8: warning: no route leads to the sink `a`"]);
    check("", &[]);
    check(&format!("{A}{ROUTE}[unrouted]\nkeep = true\n[sink]\n"), &["7:2: unknown key `sink`; did you mean `sinks`?"]);
    check(
        &format!("{A}{ROUTE}[sinks.unrouted]\ntype = 'stdout'\n[[routes]]\nto = ['unrouted']\n"),
        &["5:8: the name `unrouted` is reserved for events that no route matches"],
    );
    check(
        &format!("{A}strat = 1\ndelivery = {{ concurrency = 0, rate = '5/s', oder_by = 'none' }}\n{ROUTE}"),
        &[
            "3:1: unknown key `strat`; did you mean `start`?",
            "4:28: `concurrency` is 0; it must be from 1 to 100000",
            "4:45: unknown key `oder_by`; did you mean `order_by`?",
        ],
    );
    check(
        &format!("{A}[sinks.a.delivery]\nbackoff = {{ initial = '2s', max = '1s' }}\nbreaker.failures = 0\n{ROUTE}"),
        &["4:35: `max` is shorter than `initial`", "5:20: `failures` is 0; it must be at least 1"],
    );
    let delivery = |delivery: &str, expected: &str| {
        check(&format!("{A}[sinks.a.delivery]\n{delivery}\n{ROUTE}"), &[expected]);
    };
    const RATE: &str = "; give a number per time, such as \"200/s\", \"90/m\" or \"1000/h\"";
    for rate in ["5", "0/s", "-1/s", "5/d", "x/s", "1000000001/s"] {
        delivery(&format!("rate = '{rate}'"), &format!("4:8: `rate` is \"{rate}\"{RATE}"));
    }
    delivery("max_attempts = 0", "4:16: `max_attempts` is 0; it must be from 1 to 4294967295");
    delivery("max_parked = 0", "4:14: `max_parked` is 0; it must be from 1 to 10000000");
    delivery("max_parked = 10000001", "4:14: `max_parked` is 10000001; it must be from 1 to 10000000");
    delivery("max_age = '0s'", "4:11: `max_age` is 0; give a time such as \"10s\"");
    delivery("max_age = 'x'", "4:11: not a duration such as \"10s\": expected number at 0");
    delivery("max_age = '87601h'", "4:11: a time is at most 10 years");
    delivery("schedule = ['1s', '87601h']", "4:12: a time is at most 10 years");
    delivery("schedule = []", "4:12: `schedule` is empty; give the waits, such as [\"5s\", \"5m\"]");
    delivery("schedule = ['5s']\nbackoff = { initial = '1s' }", "4:12: `schedule` and `backoff` exclude each other");
    // A sink with problems is there for routes: the problem is reported once.
    check(
        &format!("[sinks.a]\ntype = 'stdin'\n{ROUTE}"),
        &["2:8: unknown variant `stdin`, expected one of `http`, `kafka`, `rabbitmq`, `stdout`"],
    );
    check(&format!("[sinks.a]\n{ROUTE}"), &["1:1: `type` is missing"]);
    check(
        &format!("[sinks.a]\ntype = 'http'\nurl = 'http://h/'\nheaders = {{ host = 'x', a = 'y', A = 'z' }}\n{ROUTE}"),
        &["4:13: \"host\" cannot be set: it belongs to the connection", "4:34: \"A\" is there twice"],
    );
    check(
        &format!("{A}{ROUTE}[sinks.b]\ntype = 'http'\nurl = 'https://x/${{CRM_TOKEN}}/{{staus}}'\n"),
        &["5:8: warning: no route leads to the sink `b`", "7:7: unknown field `staus`; did you mean `status`?"],
    );
}

/// What is refused says what has to be mended. A warning beside it may be a consequence.
#[test]
fn refusals_are_of_errors() {
    let source = "[sinks.a]\ntype = 'stdout'\n[[routes]]\nto = ['b']\n";
    let Err(error) = Rules::compile("r", source, &Sample) else { panic!("there is no sink b") };
    assert_eq!(error.to_string(), "r:4:7: unknown sink `b`; known are a");
    assert!(matches!(error, RulesError::Problems { problems } if problems.len() == 2));
}

#[test]
fn a_file_that_is_not_there_is_named() {
    let error = Rules::load(Path::new("/nowhere/routes.toml"), &Sample).map(drop).unwrap_err();
    assert!(error.to_string().starts_with("/nowhere/routes.toml: "), "{error}");
}

/// What a relay's secrets are need not be known to compare rules.
#[test]
fn sinks_are_not_judged_by_what_is_not_known() {
    let own = "[sinks.all]\ntype = '${TYPE}'\n[sinks.ops]\ntype = 'rabbitmq'\nrouting_key = 'k'\nurls = ['${URL}']\ntls = { ca = '${CA}' }\n\
        [[routes]]\nto = ['all', 'ops']\n";
    for source in [&uncommented().0, own] {
        assert_eq!(routes_of("r", source, &Unresolved).map(|(_, problems)| problems).unwrap(), []);
    }
    let wrong = own.replace("tls", "tsl") + "[[routes]]\nto = ['${SINK}']\n";
    let problems = routes_of("r", &wrong, &Unresolved).map(|_| ()).unwrap_err().to_string();
    assert_eq!(problems, "r:7:1: unknown key `tsl`; did you mean `tls`?\nr:11:7: no sink has this name");
}

/// Rules from elsewhere have nothing looked up; what the running ones have is theirs too.
#[test]
fn conditions_with_references_are_those_of_the_running_rules() {
    let rules = |when: &str| format!("[sinks.a]\ntype = 'stdout'\n[[routes]]\nwhen = {{ {when} }}\nto = ['a']\n");
    let (running, _) =
        compile(&rules("sender_id = \"${CRM_TOKEN}\", '/a' = { prefix = '${KAFKA_PASSWORD}' }")).unwrap();
    let beside = |when: &str| routes_beside("r", &rules(when), &running.table);
    let (table, _) =
        beside("status = 'read', '/a' = { prefix = '${KAFKA_PASSWORD}' }, sender_id = \"${CRM_TOKEN}\"").unwrap();
    let goes = |body: &str| !table.matches(&event(body), &mut Scratch::default()).is_empty();
    assert!(goes(r#"{"message_status":"read","channel":{"sender_id":"s3cret-token"},"a":"s3cret-password-1"}"#));
    assert!(!goes(r#"{"message_status":"read","channel":{"sender_id":"CRM_TOKEN"},"a":"KAFKA_PASSWORD"}"#));
    for when in [
        "sender_id = { not = \"${CRM_TOKEN}\" }",
        "recipient_id = \"${CRM_TOKEN}\"",
        "sender_id = '${KAFKA_PASSWORD}'",
        "sender_id = '${file:/run/secrets/crm-signing}'",
        "sender_id = { regex = '[${CRM_TOKEN}]' }",
    ] {
        let problems = beside(when).map(|_| ()).unwrap_err().to_string();
        assert!(problems.starts_with("r:4:10: the value of a reference is not looked up"), "{problems}");
        assert!(!problems.contains("s3cret"));
    }
}
