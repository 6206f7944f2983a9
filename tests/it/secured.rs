//! Sinks, and the journal, over TLS, with a password or a certificate.

use std::fs;
use std::path::Path;

use serde_json::Value;

use crate::access::{Authority, https};
use crate::brokers::{Kind, OwnBroker, unique};
use crate::harness::{Relay, Setup, TOKEN, event};

/// A certificate authority, and a broker that shows a certificate of it.
async fn broker(kind: Kind) -> (Authority, OwnBroker) {
    let authority = Authority::new();
    for (from, to) in [("server.pem", "cert.pem"), ("server.key", "key.pem")] {
        fs::copy(authority.file(from), authority.file(to)).expect("a file");
    }
    let broker = OwnBroker::start_with_tls(kind, authority.ca().parent().expect("a folder")).await;
    (authority, broker)
}

/// Posts four events, and waits until five are delivered.
async fn deliver(relay: &Relay, sink: &str) {
    for number in 0..4 {
        assert_eq!(relay.post(event(number, "sent")).await.status, 200);
    }
    relay.sink_is(sink, "has delivered five events", |sink| sink["delivered"] == 5).await;
}

async fn last_error(relay: &Relay, sink: &str) -> String {
    let failed = relay.sink_is(sink, "has failed", |sink| sink["last_error"] != Value::Null).await;
    failed["last_error"].to_string()
}

#[tokio::test]
async fn kafka_takes_a_password_over_tls() {
    let (authority, broker) = broker(Kind::Kafka).await;
    let address = broker.address();
    let options = |mechanism: &str, password: &str, ca: &Path| {
        format!(
            "options = {{ \"security.protocol\" = \"sasl_ssl\", \"sasl.mechanisms\" = \"{mechanism}\", \
             \"sasl.username\" = \"relay\", \"sasl.password\" = \"{password}\", \"ssl.ca.location\" = {ca:?} }}\n"
        )
    };
    let rules = |password: &str, timeout: &str| {
        format!(
            "[sinks.kafka]\ntype = \"kafka\"\nbrokers = [\"{address}\"]\ntopic = \"secured\"\ntimeout = \"{timeout}\"\n{}\
             [[routes]]\nname = \"all\"\nto = [\"kafka\"]\n",
            options("PLAIN", password, &authority.ca())
        )
    };
    let journal = |options: &str| {
        let prefix = unique("secured");
        format!(
            "[journal]\nkind = \"kafka\"\nbrokers = [\"{address}\"]\nprefix = \"{prefix}\"\npartitions = 2\n\
             replication = 1\nmin_insync = 1\n{options}"
        )
    };
    let setup = Setup::new(&rules("wrong", "2s"));
    let other = Authority::new();
    for (options, expected) in [
        (options("SCRAM-SHA-512", "wrong", &authority.ca()), "invalid credentials with SASL mechanism SCRAM-SHA-512"),
        (options("SCRAM-SHA-512", "secret", &other.ca()), "verify that ssl.ca.location is correctly configured"),
        (String::new(), "Disconnected"),
    ] {
        setup.file("relay.toml", &journal(&options));
        let done = setup.run(&["check", "--connect"], "").await;
        assert!(done.code == Some(1) && done.stdout.contains(expected), "{done:?}\n should have {expected}");
    }
    setup.file("relay.toml", &journal(&options("SCRAM-SHA-512", "secret", &authority.ca())));
    let relay = setup.start().await;
    assert_eq!(relay.post(event(9, "sent")).await.status, 200);
    last_error(&relay, "kafka").await;
    let log = relay.log();
    let reasons = log.iter().filter(|line| line["sink"] == "kafka").map(|line| line["reason"].to_string());
    let said: Vec<_> = reasons.filter(|reason| reason.contains("Invalid username or password")).collect();
    assert!(!said.is_empty() && said.windows(2).all(|pair| pair[0] != pair[1]), "{log:#?}");
    relay.change_rules(&rules("secret", "10s"));
    relay.operate("/api/v1/reload", &Value::Null).await;
    deliver(&relay, "kafka").await;
    relay.stop().await;
}

/// The keys `ca`, and `cert` and `key`, of the rules' `tls`.
fn ca(authority: &Authority) -> String {
    format!("ca = {:?}", authority.ca())
}

fn certificate(authority: &Authority) -> String {
    format!("cert = {:?}, key = {:?}", authority.file("client.pem"), authority.file("client.key"))
}

#[tokio::test]
async fn http_takes_a_certificate_over_tls() {
    let (authority, clients) = (Authority::new(), Authority::new());
    let to = Setup::new(include_str!("../../routes.toml")).env("RELAY_INGRESS__TLS", authority.setting(Some(&clients)));
    let to = to.start().await;
    let rules = |tls: &str| {
        let (url, (header, token)) = (https(to.address()), TOKEN);
        format!(
            "[sinks.http]\ntype = \"http\"\nurl = \"{url}\"\nheaders = {{ {header} = \"{token}\" }}\n\
             tls = {{ {tls} }}\n[[routes]]\nname = \"all\"\nto = [\"http\"]\n"
        )
    };
    // The system's authorities, and another.
    for tls in [String::new(), format!("{}, {}", ca(&clients), certificate(&clients))] {
        let relay = Setup::new(&rules(&tls)).start().await;
        assert_eq!(relay.post(event(9, "sent")).await.status, 200);
        let error = last_error(&relay, "http").await;
        assert!(error.contains("UnknownIssuer"), "{error}");
        let log = relay.stop().await;
        let unlike = |line: &&Value| !line["target"].as_str().is_some_and(|target| target.starts_with("engage_relay"));
        assert_eq!(log.iter().find(unlike), None, "the lane says it");
    }
    let relay = Setup::new(&rules(&ca(&clients))).start().await;
    assert_eq!(relay.post(event(9, "sent")).await.status, 200);
    last_error(&relay, "http").await;
    relay.change_rules(&rules(&ca(&authority)));
    relay.operate("/api/v1/reload", &Value::Null).await;
    let is_refused =
        |sink: &Value| sink["last_error"]["text"].as_str().is_some_and(|error| !error.contains("UnknownIssuer"));
    relay.sink_is("http", "is refused without a certificate", is_refused).await;
    relay.change_rules(&rules(&format!("{}, {}", ca(&authority), certificate(&clients))));
    relay.operate("/api/v1/reload", &Value::Null).await;
    deliver(&relay, "http").await;
    relay.stop().await;
    to.stop().await;
}

#[tokio::test]
async fn rabbitmq_takes_a_certificate_over_tls() {
    let (authority, broker) = broker(Kind::RabbitMq).await;
    let queue =
        "rabbit_amqqueue:declare({resource, <<\"/\">>, queue, <<\"secured\">>}, true, false, [], none, <<\"it\">>).";
    broker.ctl(&["eval", queue]).await;
    let url = broker.address().replace("127.0.0.1", "localhost");
    let rules = |tls: &str| {
        format!(
            "[sinks.rabbit]\ntype = \"rabbitmq\"\nurls = [\"{url}\"]\nrouting_key = \"secured\"\ntls = {{ {tls} }}\n\
             [[routes]]\nname = \"all\"\nto = [\"rabbit\"]\n"
        )
    };
    let certificate = certificate(&authority);
    let other = Authority::new();
    for (tls, expected) in
        [(format!("{}, {certificate}", ca(&other)), "UnknownIssuer"), (ca(&authority), "cannot connect")]
    {
        let relay = Setup::new(&rules(&tls)).start().await;
        assert_eq!(relay.post(event(9, "sent")).await.status, 200);
        let error = last_error(&relay, "rabbit").await;
        assert!(error.contains(expected), "{error} should have {expected}; {:?}", relay.log());
        relay.kill().await;
    }
    let relay = Setup::new(&rules(&format!("{}, {certificate}", ca(&authority)))).start().await;
    assert_eq!(relay.post(event(9, "sent")).await.status, 200);
    deliver(&relay, "rabbit").await;
    relay.stop().await;
    let queues = broker.ctl(&["-q", "list_queues"]).await;
    assert!(queues.contains("secured\t5"), "{queues}");
}
