use super::super::tests::{check_problems, config, event};
use super::super::{Sink, Verdict};
use super::*;

const ATTEMPT: Attempt<'_> = Attempt { number: 1, route: "all", traceparent: None };

#[test]
fn problems() {
    let check = |table: &str, expected: &[&str]| check_problems(&format!("type = \"rabbitmq\"\n{table}"), expected);
    let base = "urls = [\"amqp://h\"]\nexchange = \"e\"\n";
    let with = |line: &str| format!("{base}{line}");
    check(base, &[]);
    check("urls = [\"amqp://h/%2f\"]\nrouting_key = \"queue\"", &[]);
    check("", &["`urls` is missing", "the default exchange needs a `routing_key`"]);
    check("urls = []\nexchange = \"e\"", &["2: the list of URLs is empty"]);
    check(
        "urls = [\"amqp://u:${TOKEN}@h\", \"http://u:${TOKEN}@h\", \"amqps:\"]\nexchange = \"e\"",
        &["2: URL 2: not an AMQP URL", "2: URL 3: "],
    );
    check(&format!("urls = [\"amqp://h\"]\nexchange = \"{}\"", "x".repeat(256)), &["3: AMQP allows 255 bytes"]);
    check(
        &with("headers = { relay-attempt = \"x\", CloudEvents_id = \"y\" }"),
        &["set by the relay", "set by the relay"],
    );
    check(&with("headers = { \"\" = \"x\" }"), &["4: \"\" is not a header name"]);
    check(&with("tls = { ca = \"ca.pem\" }"), &["4: no URL uses TLS; write amqps://"]);
    check(&with("declare = {}"), &[]);
    check(&with("declare = { type = \"fanout\", durable = false }"), &[]);
    check(&with("declare = { type = \"x\" }"), &["4: "]);
    check(&with("declare = { auto_delete = true }"), &["4: unknown key `auto_delete`"]);
    check("urls = [\"amqp://h\"]\nexchange = \"{status}\"\ndeclare = {}", &["4: only an exchange without fields"]);
    check("urls = [\"amqp://h\"]\nrouting_key = \"q\"\ndeclare = {}", &["4: the default exchange is there already"]);
}

#[test]
fn urls() {
    fn check(text: &str, expected: Result<(&str, &str), &str>) {
        let url = AmqpUrl::parse(text);
        let found = url.as_ref().map(|url| (url.to_string(), url.0.vhost.clone()));
        let found = found.as_ref().map(|(address, vhost)| (address.as_str(), vhost.as_str())).map_err(|error| **error);
        match (found, expected) {
            (Err(problem), Err(part)) => assert!(problem.contains(part), "{text}: {problem}"),
            (found, expected) => assert_eq!(found, expected, "{text}"),
        }
        assert!(!format!("{url:?}").contains("s3cret"), "{url:?}");
    }
    check("amqp://user:s3cret@host", Ok(("host:5672", "/")));
    check("amqps://user:s3cret@host/%2f", Ok(("host:5671", "/")));
    check("amqp://10.1.2.3:5673/v", Ok(("10.1.2.3:5673", "v")));
    check("amqp://[::1]:5673/v", Ok(("::1:5673", "v")));
    check("amqp://user:s3cret@host/", Ok(("host:5672", "")));
    check("amqp://", Err("no host"));
    check("amqp:///v", Err("no host"));
    check("amqp:host", Err("not an AMQP URL"));
    check("user:s3cret@host", Err("not an AMQP URL"));
    check("redis://user:s3cret@host", Err("not an AMQP URL"));
    check("amqp://host?heartbeat=often", Err("not an AMQP URL"));
    check("amqp://host?heartbeat=5&s3cret=1", Err("a parameter of the URL is none of"));
    check("amqp://host/a%2fb", Ok(("host:5672", "a/b")));
    check("amqp://host/a/b", Err("a / within the virtual host is written %2f"));
    check("amqp://host/%2f#x", Err("what follows # in a URL is never sent"));
    check("amqp://host:0/", Err("port 0"));
    let heartbeat = |text| AmqpUrl::parse(text).unwrap().0.query.heartbeat;
    assert_eq!(heartbeat("amqp://host"), Some(DEFAULT_HEARTBEAT));
    assert_eq!(heartbeat("amqp://host?heartbeat=5"), Some(5));
}

#[test]
fn names_that_are_not_to_be_shown() {
    fn check(url: &str, exchange: &str, expected: &[&str]) {
        let table = format!("type = \"rabbitmq\"\nurls = [\"amqp://h\", {url:?}]\nexchange = {exchange:?}");
        let Ok(super::super::Config::RabbitMq(config)) = config(&table) else { panic!("{table}") };
        assert_eq!(config.unsaid, Unsaid::new(expected.iter().map(ToString::to_string)), "{table}");
    }
    check("amqp://u:p@h/v", "e", &[]);
    check("amqp://u:${TOKEN}@h/v", "e", &["guest", "/", "u", "v"]);
    check("amqp://u:p@h/v", "x.${TOKEN}", &["x.s3cret"]);
    check("amqp://u:p@h/v", "{status}.${TOKEN}", &[]);
}

#[test]
fn messages() {
    let table = "type = \"rabbitmq\"\nurls = [\"amqp://u:${TOKEN}@h\"]\nexchange = \"e.{channel_type}\"\n\
        routing_key = \"{status}.{sender_id}\"\nheaders = { t = \"${TOKEN}\" }\nformat = \"cloudevents\"";
    let config = config(table).unwrap();
    let event = event(r#"{"message_status":"read","channel":{"sender_id":54911}}"#);
    let preview = config.preview("ops", &event, &ATTEMPT).unwrap();
    let target = |label| preview.target.iter().find(|(known, _)| *known == label).map(|(_, value)| value.as_str());
    assert_eq!((target("exchange"), target("routing_key")), (Some("e.-"), Some("read.54911")));
    assert_eq!((target("content_type"), target("delivery_mode")), (Some("application/json"), Some("2")));
    assert_eq!(target("message_id"), Some(&*event.id().to_string()));
    assert!(preview.headers.contains(&("t".into(), "${TOKEN}".into())));
    assert!(preview.headers.contains(&("cloudEvents_source".into(), "/aivo/engage/54911".into())));

    let super::super::Config::RabbitMq(config) = config else { panic!("another sink") };
    let message = config.message(&event, &ATTEMPT, SystemTime::now(), View::Real).unwrap();
    let properties = message.properties();
    assert_eq!(properties.delivery_mode(), &Some(2));
    assert_eq!(properties.timestamp(), &Some(message.timestamp));
    let headers = properties.headers().as_ref().unwrap();
    assert_eq!(headers.inner().get("t"), Some(&AMQPValue::LongString("s3cret".into())));
}

#[test]
fn messages_that_amqp_cannot_hold() {
    fn check(length: usize, expected: Option<&str>) {
        let table = "type = \"rabbitmq\"\nurls = [\"amqp://h\"]\nexchange = \"e\"\nrouting_key = \"{status}\"";
        let body = serde_json::json!({ "message_status": "x".repeat(length) });
        let error = config(table).unwrap().preview("ops", &event(&body.to_string()), &ATTEMPT).err();
        assert!(error.iter().all(|error| error.verdict == Verdict::Reject));
        assert_eq!(error.as_ref().map(|error| &*error.kind), expected, "{length}");
    }
    check(255, None);
    check(256, Some("name_too_long"));
}

#[tokio::test(start_paused = true)]
async fn the_clock_stops_while_blocked() {
    async fn check(blocked: &[(u64, bool)], work_s: u64, expected: Option<u64>) {
        let (sender, receiver) = watch::channel(false);
        let start = Instant::now();
        let work = pin!(tokio::time::sleep(Duration::from_secs(work_s)));
        let block = async {
            for (at_s, blocked) in blocked {
                tokio::time::sleep_until(start + Duration::from_secs(*at_s)).await;
                sender.send_replace(*blocked);
            }
            std::future::pending::<()>().await;
        };
        let done = tokio::select! {
            biased;
            done = within(Duration::from_secs(10), receiver, work) => done,
            () = block => None,
        };
        assert_eq!((done.is_some(), start.elapsed().as_secs()), (expected.is_none(), expected.unwrap_or(work_s)));
    }
    check(&[], 9, None).await;
    check(&[], 11, Some(10)).await;
    check(&[(5, true)], 1000, None).await;
    check(&[(5, true), (100, false)], 1000, Some(105)).await;
    check(&[(5, true), (100, false), (101, true), (200, false)], 1000, Some(204)).await;
    check(&[(0, true), (100, false)], 105, None).await;
}

/// A broker that is not there: the attempt that comes while the first try is under way waits for it, the next fails at
/// once.
#[tokio::test(flavor = "multi_thread")]
async fn no_broker() {
    let nobody = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let table = format!(
        "type = \"rabbitmq\"\nurls = [\"amqp://u:${{TOKEN}}@{nobody}\", \"amqp://u:${{TOKEN}}@{nobody}/v\"]\nexchange = \"e\""
    );
    let sink = Sink::build("ops", &config(&table).unwrap()).unwrap();
    for _ in 0..2 {
        let error = sink.deliver(&event("{}"), &ATTEMPT).await.unwrap_err();
        assert_eq!((error.verdict, &*error.kind), (Verdict::Retry { after: None }, "not_connected"));
        assert!(error.text.contains(&nobody.to_string()) && !error.text.contains("s3cret"), "{error}");
    }
    sink.close().await;
}

/// A peer that accepts connections and says nothing: attempts time out, and giving up closes the connection.
#[tokio::test(flavor = "multi_thread")]
async fn a_mute_broker() {
    let mute = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = mute.local_addr().unwrap();
    let table = format!("type = \"rabbitmq\"\nurls = [\"amqp://{address}\"]\nexchange = \"e\"\ntimeout = \"300ms\"");
    let sink = Sink::build("ops", &config(&table).unwrap()).unwrap();
    let error = sink.deliver(&event("{}"), &ATTEMPT).await.unwrap_err();
    assert_eq!((error.verdict, &*error.kind), (Verdict::Retry { after: None }, "timeout"));
    let (mut connection, _) = mute.accept().await.unwrap();
    drop(sink);
    let mut sent = Vec::new();
    tokio::io::AsyncReadExt::read_to_end(&mut connection, &mut sent).await.unwrap();
    assert!(sent.starts_with(b"AMQP"));
}
