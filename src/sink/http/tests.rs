use std::convert::Infallible;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::UNIX_EPOCH;

use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::net::TcpListener;

use super::super::tests::{check_problems, config, event, template};
use super::super::{Config as AnyConfig, Sink};
use super::*;

const ATTEMPT: Attempt<'_> = Attempt { number: 2, route: "all", traceparent: None };

#[test]
fn verdicts() {
    fn check(status: u16, headers: &[(&str, &str)], expected: Option<(Verdict, &str)>) {
        let now = UNIX_EPOCH + Duration::from_secs(784_111_777 - 30);
        let headers = headers.iter().map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap())).collect();
        let error = judge(StatusCode::from_u16(status).unwrap(), &headers, now).err();
        assert_eq!(error.as_ref().map(|error| (error.verdict, &*error.kind)), expected, "{status} {headers:?}");
    }
    let retry = |seconds: Option<u64>| Verdict::Retry { after: seconds.map(Duration::from_secs) };
    for status in [200, 201, 202, 204, 299] {
        check(status, &[], None);
    }
    check(408, &[], Some((retry(None), "http_408")));
    check(425, &[], Some((retry(None), "http_425")));
    check(429, &[], Some((retry(None), "http_429")));
    check(500, &[], Some((retry(None), "http_500")));
    check(503, &[], Some((retry(None), "http_503")));
    check(599, &[], Some((retry(None), "http_599")));
    check(999, &[], Some((retry(None), "http_999")));
    check(429, &[("retry-after", "17")], Some((retry(Some(17)), "http_429")));
    check(503, &[("retry-after", " 0 ")], Some((retry(Some(0)), "http_503")));
    check(503, &[("retry-after", "Sun, 06 Nov 1994 08:49:37 GMT")], Some((retry(Some(30)), "http_503")));
    check(503, &[("retry-after", "Sun, 06 Nov 1994 08:00:00 GMT")], Some((retry(Some(0)), "http_503")));
    check(503, &[("retry-after", "18446744073709551615")], Some((retry(Some(86_400)), "http_503")));
    check(503, &[("retry-after", "18446744073709551616")], Some((retry(Some(86_400)), "http_503")));
    check(503, &[("retry-after", "")], Some((retry(None), "http_503")));
    check(503, &[("retry-after", "-1")], Some((retry(None), "http_503")));
    check(503, &[("retry-after", "soon")], Some((retry(None), "http_503")));
    for (status, kind) in [(101, "http_101"), (301, "http_301"), (304, "http_304"), (307, "http_307")] {
        check(status, &[("retry-after", "5")], Some((Verdict::Reject, kind)));
    }
    for (status, kind) in
        [(400, "http_400"), (401, "http_401"), (404, "http_404"), (413, "http_413"), (422, "http_422")]
    {
        check(status, &[], Some((Verdict::Reject, kind)));
    }
    check(410, &[], Some((Verdict::Gone, "gone")));
}

#[test]
fn problems() {
    let check = |table: &str, expected: &[&str]| check_problems(&format!("type = \"http\"\n{table}"), expected);
    check("url = \"https://example.com/{sender_id}\"", &[]);
    check("", &["url"]);
    check("url = \"https://{sender_id}/\"", &["2: fields may stand in the path"]);
    check("url = \"http://h/\"\nmethod = \"put\"", &["3: methods are case-sensitive; did you mean \"PUT\""]);
    for method in ["CONNECT", "GET", "HEAD", "OPTIONS", "TRACE"] {
        let problem = format!("3: {method:?} is not a method that can carry an event");
        check(&format!("url = \"http://h/\"\nmethod = {method:?}"), &[&problem]);
    }
    for method in ["POST", "PUT", "PATCH", "NOTIFY"] {
        check(&format!("url = \"http://h/\"\nmethod = {method:?}"), &[]);
    }
    check("url = \"http://h/\"\nmethod = \"A B\"", &["3: \"A B\" is not a method"]);
    check("url = \"http://h/\"\nheaders = { \"a b\" = \"x\" }", &["3: \"a b\" is not a header name"]);
    check("url = \"http://h/\"\nheaders = { Host = \"x\" }", &["3: \"Host\" cannot be set"]);
    check("url = \"http://h/\"\nheaders = { Webhook-Id = \"x\" }", &["3: \"Webhook-Id\" is set by the relay"]);
    check("url = \"http://h/\"\nheaders = { a = \"x\", A = \"y\" }", &["3: \"A\" is there twice"]);
    check("url = \"http://h/\"\nheaders = { a = \"x\\ny\" }", &["3: the value of \"a\" holds a line break"]);
    check("url = \"http://h/\"\nsigning_secret = \"abc\"", &["3: a signing secret starts with"]);
    check("url = \"http://h/\"\nsigning_secret = []", &["3: the list of secrets is empty"]);
    check("url = \"http://h/\"\nsigning_secret = 3", &["3: should be text, or a list of texts"]);
    check("url = \"http://h/\"\nsigning_secret = [\"${SIGNING}\", \"whsec_!\"]", &["3: what follows"]);
    check("url = \"http://h/\"\ntimeout = \"0s\"", &["3: a time-out is at least 1ms"]);
    check("url = \"http://h/\"\ntimeout = \"2h\"", &["3: a time-out is at most 1h"]);
    check("url = \"http://h/\"\ntimeout = \"soon\"", &["3: not a duration"]);
    check("url = \"http://h/\"\ntls = {}", &[]);
    check("url = \"http://h/\"\ntls = { ca = \"x\" }", &["3: the URL does not use TLS; write https://"]);
    check("url = \"https://h/\"\ntls = { ca = \"x\" }", &[]);
    check("url = \"http://h/\"\ntls = { cert = \"x\" }", &["3: a client certificate needs its private key"]);
    check("url = \"http://h/\"\ntls = { key = \"x\" }", &["3: a private key needs its client certificate"]);
    check("url = \"http://h/\"\nformat = \"cloud\"", &["3: "]);
    check("url = \"http://localhost/\"\ndeny_private = true", &[]);
    check("url = \"http://10.0.0.1/\"\ndeny_private = false", &[]);
    check("url = \"http://10.0.0.1/\"\ndeny_private = true", &["2: the host is not a public address"]);
    check("url = \"http://[::1]:80/\"\ndeny_private = true", &["2: the host is not a public address"]);
    check(
        "url = \"x\"\nmethod = \"get\"\nsigning_secret = \"x\"",
        &["2: not an absolute URL", "3: methods", "4: a signing"],
    );
}

#[test]
fn a_preview_hides_secrets() {
    let table = "type = \"http\"\nurl = \"https://u:${TOKEN}@example.com/{sender_id}\"\nmethod = \"PUT\"\n\
        headers = { authorization = \"Bearer ${TOKEN}\", x-name = \"{campaign_name}\" }\nsigning_secret = \"${SIGNING}\"";
    let event = event(r#"{"channel":{"sender_id":"54 911"},"campaign":{"name":"Año\r\nx: y"}}"#);
    let preview = config(table).unwrap().preview("crm", &event, &ATTEMPT).unwrap();
    let url = "https://u:${TOKEN}@example.com/54%20911".to_owned();
    assert_eq!(preview.target, [("method", "PUT".to_owned()), ("url", url)]);
    let header = |name| preview.headers.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str());
    assert_eq!(header("authorization"), Some("Bearer ${TOKEN}"));
    assert_eq!(header("x-name"), Some("A%C3%B1o%0D%0Ax: y"));
    assert_eq!(header("content-type"), Some("application/json"));
    assert_eq!(header("relay-attempt"), Some("2"));
    assert!(header("webhook-signature").is_some_and(|signature| signature.starts_with("v1,")));
}

/// A server that answers everything alike, and what it has seen.
struct Server {
    url: String,
    requests: Arc<Mutex<Vec<(http::request::Parts, Bytes)>>>,
    connections: Arc<AtomicUsize>,
}

impl Server {
    async fn start(status: u16, answer: Bytes) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let server = Self { url, requests: Arc::default(), connections: Arc::default() };
        let (requests, connections) = (Arc::clone(&server.requests), Arc::clone(&server.connections));
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                connections.fetch_add(1, Ordering::SeqCst);
                let (requests, answer) = (Arc::clone(&requests), answer.clone());
                let service = service_fn(move |request: http::Request<Incoming>| {
                    let (requests, answer) = (Arc::clone(&requests), answer.clone());
                    async move {
                        let (head, body) = request.into_parts();
                        let body = body.collect().await.unwrap().to_bytes();
                        requests.lock().unwrap().push((head, body));
                        let head = http::Response::builder().status(status).header("location", "/elsewhere");
                        Ok::<_, Infallible>(head.body(Full::new(answer)).unwrap())
                    }
                });
                let builder = hyper_util::server::conn::auto::Builder::new(TokioExecutor::new());
                tokio::spawn(async move { builder.serve_connection(TokioIo::new(stream), service).await });
            }
        });
        server
    }

    fn requests(&self) -> Vec<(http::request::Parts, Bytes)> {
        self.requests.lock().unwrap().clone()
    }
}

fn sink(url: &str) -> Sink {
    let config = Config {
        target: Target::new(template(url)).unwrap(),
        method: Method::POST,
        headers: vec![("x-token".parse().unwrap(), template("${TOKEN} {status}"))],
        format: Format::CloudEvents,
        secrets: Secrets::default(),
        timeout: Duration::from_millis(500),
        tls: Tls::default(),
        deny_private: false,
    };
    Sink::build("crm", &AnyConfig::Http(config)).unwrap()
}

const BODY: &str = "{ \"message_status\":\"read\",\r\n \"channel\":{\"sender_id\":\"54911\"} }";

#[tokio::test]
async fn what_arrives() {
    let server = Server::start(204, Bytes::new()).await;
    let event = event(BODY);
    sink(&format!("{}/in/{{sender_id}}", server.url)).deliver(&event, &ATTEMPT).await.unwrap();
    let (head, body) = server.requests().remove(0);
    assert_eq!((head.method, head.uri.path(), &*body), (Method::POST, "/in/54911", BODY.as_bytes()));
    let header = |name: &str| head.headers.get(name).map(|value| value.to_str().unwrap());
    assert_eq!(header("webhook-id"), Some(&*event.id().to_string()));
    assert_eq!(header("relay-attempt"), Some("2"));
    assert_eq!(header("content-type"), Some("application/json"));
    assert_eq!(header("ce-type"), Some("com.aivo.engage.-.read"));
    assert_eq!(header("x-token"), Some("s3cret read"));
    assert_eq!(header("user-agent"), Some(concat!("engage-relay/", env!("CARGO_PKG_VERSION"))));
    assert_eq!(header("webhook-signature"), None);
}

#[tokio::test]
async fn answers_and_their_connections() {
    async fn check(status: u16, answer_len: usize, expected_kind: Option<&str>, expected_connections: usize) {
        let server = Server::start(status, vec![b'x'; answer_len].into()).await;
        let sink = sink(&server.url);
        for _ in 0..2 {
            let error = sink.deliver(&event(BODY), &ATTEMPT).await.err();
            assert_eq!(error.as_ref().map(|error| &*error.kind), expected_kind);
        }
        assert_eq!(server.requests().len(), 2, "nothing is repeated, no redirect is followed: {status}");
        assert_eq!(server.connections.load(Ordering::SeqCst), expected_connections, "{status} {answer_len}");
    }
    check(200, 0, None, 1).await;
    check(200, MAX_DISCARDED, None, 1).await;
    check(200, 8 * 1024 * 1024, None, 2).await;
    check(307, 10, Some("http_307"), 1).await;
    check(410, 10, Some("gone"), 1).await;
    check(503, 10, Some("http_503"), 1).await;
}

#[tokio::test]
async fn transport_errors_are_retried() {
    async fn check(url: &str, expected_kind: &str) {
        let error = sink(url).deliver(&event(BODY), &ATTEMPT).await.unwrap_err();
        assert_eq!((error.verdict, &*error.kind), (Verdict::Retry { after: None }, expected_kind), "{error}");
        for secret in ["54911", "/private", "s3cret"] {
            assert!(!error.text.contains(secret), "{error}");
        }
    }
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let silent = (silent.local_addr().unwrap(), silent);
    check(&format!("http://{}/private/{{sender_id}}?t=${{TOKEN}}", silent.0), "timeout").await;
    let gone = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    check(&format!("http://{gone}/private/{{sender_id}}?t=${{TOKEN}}"), "refused").await;
    let closing = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = closing.local_addr().unwrap();
    let closer = tokio::spawn(async move {
        while let Ok((stream, _)) = closing.accept().await {
            drop(stream);
        }
    });
    check(&format!("http://{address}/private/{{sender_id}}"), "transport").await;
    check(&format!("https://{address}/private/{{sender_id}}"), "connect").await;
    closer.abort();
}

#[tokio::test]
async fn a_segment_that_vanishes_is_rejected() {
    let server = Server::start(200, Bytes::new()).await;
    let event = event(r#"{"channel":{"sender_id":""}}"#);
    let error = sink(&format!("{}/a/..{{sender_id}}/b", server.url)).deliver(&event, &ATTEMPT).await.unwrap_err();
    assert_eq!((error.verdict, &*error.kind), (Verdict::Reject, "invalid_url"));
    assert!(server.requests().is_empty());
}

#[tokio::test]
async fn only_public_addresses_are_connected_to() {
    let server = Server::start(200, Bytes::new()).await;
    let port = server.url.rsplit(':').next().unwrap();
    let sink = |deny_private: bool| {
        let table = format!("type = \"http\"\nurl = \"http://localhost:{port}/\"\ndeny_private = {deny_private}");
        Sink::build("crm", &config(&table).unwrap()).unwrap()
    };
    let error = sink(true).deliver(&event(BODY), &ATTEMPT).await.unwrap_err();
    assert_eq!((error.verdict, &*error.kind), (Verdict::Retry { after: None }, "private_address"), "{error}");
    assert!(error.text.contains("the host has no public address"), "{error}");
    assert_eq!(server.connections.load(Ordering::SeqCst), 0);
    sink(false).deliver(&event(BODY), &ATTEMPT).await.unwrap();
}
