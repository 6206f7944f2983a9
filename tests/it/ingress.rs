//! The ingress over real sockets: every answer, every limit.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::{HeaderName, HeaderValue, Method, Request};
use http_body_util::Full;
use rustix::process::Signal;
use serde_json::Value;

use crate::harness::{
    Answer, Client, PATH, Raw, Receiver, Relay, Reply, Setup, TOKEN, event, eventually, webhook, within,
};

/// Rules under which nothing is delivered anywhere that a test looks at.
const SCREEN: &str = include_str!("../../routes.toml");

async fn relay() -> Relay {
    Setup::new(SCREEN).start().await
}

/// A request's line and headers, with a right token, for an HTTP/1.1 connection.
pub(crate) fn head(more: &str) -> String {
    format!("POST {PATH} HTTP/1.1\r\nhost: relay\r\n{}: {}\r\n{more}\r\n", TOKEN.0, TOKEN.1)
}

/// A whole request with a body of known length.
fn whole(body: &str) -> String {
    format!("{}{body}", head(&format!("content-length: {}\r\n", body.len())))
}

/// A body in chunks, with its end.
fn chunked(body: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    for chunk in body.chunks(1000) {
        out.extend_from_slice(format!("{:x}\r\n", chunk.len()).as_bytes());
        out.extend_from_slice(chunk);
        out.extend_from_slice(b"\r\n");
    }
    out.extend_from_slice(b"0\r\n\r\n");
    out
}

/// An object of exactly this many bytes.
fn object_of(len: usize) -> String {
    let body = format!("{{\"pad\":\"{}\"}}", "x".repeat(len - 10));
    assert_eq!(body.len(), len);
    body
}

fn request(method: Method, path: &str, token: Option<&str>, body: &[u8]) -> Request<Full<Bytes>> {
    let mut request = Request::builder().method(method).uri(path).header("host", "relay");
    if let Some(token) = token {
        request = request.header(TOKEN.0, token);
    }
    request.body(Full::new(Bytes::copy_from_slice(body))).unwrap()
}

/// A refusal is a problem document that says what to do.
fn check_problem(answer: &Answer, status: u16) {
    assert_eq!(answer.status, status, "{answer:?}");
    assert_eq!(answer.header("content-type"), "application/problem+json", "{answer:?}");
    let problem: Value = serde_json::from_slice(&answer.body).unwrap();
    assert_eq!(problem["status"], status, "{problem}");
    for member in ["type", "title", "detail"] {
        assert!(problem[member].as_str().is_some_and(|text| !text.is_empty()), "{member} in {problem}");
    }
}

#[tokio::test]
async fn every_answer_of_the_table() {
    let relay = Setup::new(SCREEN).env("RELAY_INGRESS__MAX_BODY", "2KiB").start().await;
    for client in [Client::http1(relay.address()).await, Client::http2(relay.address()).await] {
        accepts(&client).await;
        refuses_bodies(&client).await;
        refuses_requests(&client).await;
    }
    relay.stop().await;
}

async fn accepts(client: &Client) {
    let first = client.send(webhook(event(1, "sent"))).await;
    assert_eq!(first.header("content-type"), "application/json");
    let ids = first.ids();
    assert!(ids.len() == 1 && ids[0].len() == 30 && ids[0].starts_with("evt_"), "{ids:?}");
    assert_eq!(client.send(webhook(event(1, "sent"))).await.ids(), ids, "a resent webhook has the same id");
    let other = client.send(webhook(event(1, "read"))).await.ids();
    assert_ne!(other, ids, "another status has another id");
    let array = format!("[{},{{}},{}]", event(1, "read"), event(1, "sent"));
    let of_array = client.send(webhook(array)).await.ids();
    assert_eq!((of_array.len(), &of_array[0], &of_array[2]), (3, &other[0], &ids[0]), "in the array's order");
    let query = request(Method::POST, &format!("{PATH}?a=b"), Some(TOKEN.1), b"{}");
    assert_eq!(client.send(query).await.ids().len(), 1, "a query does not matter");
}

async fn refuses_bodies(client: &Client) {
    let bodies: [&[u8]; 17] = [
        b"",
        b" ",
        b"hello",
        b"1",
        b"\"a\"",
        b"null",
        b"{",
        b"{\"a\":1,}",
        b"{} {}",
        b"{}x",
        b"[]",
        b"[1]",
        b"[{},2]",
        b"[{}",
        b"[[{}]]",
        b"\xff{}",
        b"{\"a\":\"\xff\"}",
    ];
    for body in bodies {
        check_problem(&client.send(request(Method::POST, PATH, Some(TOKEN.1), body)).await, 400);
    }
    let mut encoded = request(Method::POST, PATH, Some(TOKEN.1), b"\x1f\x8b\x08");
    encoded.headers_mut().insert("content-encoding", "gzip".parse().unwrap());
    let answer = client.send(encoded).await;
    check_problem(&answer, 400);
    assert!(String::from_utf8_lossy(&answer.body).contains("content-encoding"), "{answer:?}");
    check_problem(&client.send(webhook(object_of(2049))).await, 413);
    assert_eq!(client.send(webhook(object_of(2048))).await.ids().len(), 1, "after refusals the connection still works");
}

async fn refuses_requests(client: &Client) {
    let mut unauthorized = Vec::new();
    for token in [None, Some(""), Some("wrong"), Some("a-token-of-the-test"), Some("A-TOKEN-OF-THE-TESTS")] {
        let mut answer = client.send(request(Method::POST, PATH, token, b"{}")).await;
        check_problem(&answer, 401);
        answer.headers.remove("date");
        unauthorized.push((answer.headers, answer.body));
    }
    assert!(unauthorized.iter().all(|answer| *answer == unauthorized[0]), "they differ: {unauthorized:#?}");
    for path in ["/", "/webhooks", "/webhooks/engage/", "/webhooks/engage/x", "/WEBHOOKS/ENGAGE"] {
        check_problem(&client.send(request(Method::POST, path, Some(TOKEN.1), b"{}")).await, 404);
    }
    for method in [Method::GET, Method::PUT, Method::DELETE, Method::PATCH, Method::OPTIONS] {
        let answer = client.send(request(method, PATH, Some(TOKEN.1), b"")).await;
        check_problem(&answer, 405);
        assert_eq!(answer.header("allow"), "POST");
    }
    let answer = client.send(request(Method::HEAD, PATH, Some(TOKEN.1), b"")).await;
    assert_eq!((answer.status, answer.header("allow")), (405, "POST"));
}

#[tokio::test]
async fn a_body_of_the_limit_and_one_byte_more() {
    async fn check(relay: &Relay, len: usize, in_chunks: bool, expected: u16) {
        let body = object_of(len);
        let mut raw = Raw::connect(relay.address()).await;
        if in_chunks {
            raw.write(head("transfer-encoding: chunked\r\n")).await;
            raw.write(chunked(body.as_bytes())).await;
        } else {
            raw.write(whole(&body)).await;
        }
        assert_eq!(raw.answer().await.status, expected, "{len} bytes, in chunks: {in_chunks}");
    }
    let relay = Setup::new(SCREEN).env("RELAY_INGRESS__MAX_BODY", "64KiB").start().await;
    for in_chunks in [false, true] {
        check(&relay, 65_536, in_chunks, 200).await;
        check(&relay, 65_537, in_chunks, 413).await;
    }
}

#[tokio::test]
async fn who_still_sends_a_large_body_reads_the_refusal() {
    async fn check(relay: &Relay, head: String, body: &[u8], expected: u16) {
        let mut raw = Raw::connect(relay.address()).await;
        raw.write(&head).await;
        for part in body.chunks(10_000) {
            raw.write(part).await;
        }
        check_problem(&raw.answer().await, expected);
    }
    let relay = Setup::new(SCREEN).env("RELAY_INGRESS__MAX_BODY", "64KiB").start().await;
    let body = object_of(900_000);
    let length = format!("content-length: {}\r\n", body.len());
    check(&relay, head(&length), body.as_bytes(), 413).await;
    check(&relay, head("transfer-encoding: chunked\r\n"), &chunked(body.as_bytes()), 413).await;
    check(&relay, head(&length).replace(TOKEN.1, "wrong"), body.as_bytes(), 401).await;
    check(&relay, head(&length).replace(PATH, "/elsewhere"), body.as_bytes(), 404).await;
}

#[tokio::test]
async fn expect_100_continue() {
    async fn check(relay: &Relay, head: String, expected: u16) {
        let mut raw = Raw::connect(relay.address()).await;
        raw.write(head).await;
        check_problem(&raw.answer().await, expected);
    }
    let relay = relay().await;
    let mut raw = Raw::connect(relay.address()).await;
    raw.write(head("content-length: 2\r\nexpect: 100-continue\r\n")).await;
    assert_eq!(raw.answer().await.status, 100);
    raw.write("{}").await;
    assert_eq!(raw.answer().await.ids().len(), 1);
    // Who is refused is not told to go on.
    check(&relay, head("content-length: 300000\r\nexpect: 100-continue\r\n"), 413).await;
    check(&relay, head("content-length: 2\r\nexpect: 100-continue\r\n").replace(TOKEN.1, "wrong"), 401).await;
}

const SHORT: Duration = Duration::from_millis(400);

/// Times that are short enough to wait for.
fn impatient() -> Setup {
    Setup::new(SCREEN)
        .env("RELAY_INGRESS__HEADER_TIMEOUT", "400ms")
        .env("RELAY_INGRESS__BODY_TIMEOUT", "400ms")
        .env("RELAY_INGRESS__IDLE_TIMEOUT", "400ms")
}

#[tokio::test]
async fn too_slow_is_408() {
    /// Sends `begin`, then one byte of `rest` after the other, and expects to be told off although bytes keep coming.
    async fn check(relay: &Relay, begin: &str, rest: &str) {
        let mut raw = Raw::connect(relay.address()).await;
        let started = Instant::now();
        raw.write(begin).await;
        let mut bytes = rest.bytes().cycle();
        let trickle = async {
            loop {
                tokio::select! {
                    answer = raw.answer() => return answer,
                    () = tokio::time::sleep(SHORT / 8) => {}
                }
                // The relay may close while this is sent.
                drop(raw.try_write([bytes.next().unwrap_or(b'x')]).await);
            }
        };
        let answer = within("the relay to lose patience", trickle).await;
        assert!(started.elapsed() >= SHORT, "after {:?}", started.elapsed());
        check_problem(&answer, 408);
        assert_eq!(answer.header("connection"), "close");
        assert!(raw.closed().await.is_empty());
    }
    let relay = impatient().start().await;
    let (line, headers) = (format!("POST {PATH} HTTP/1.1\r\nx-long: "), "abcdefgh");
    let length = head("content-length: 100\r\n") + "{";
    let chunked = head("transfer-encoding: chunked\r\n") + "1000\r\n{";
    tokio::join!(
        check(&relay, &line, headers),
        check(&relay, "PO", "ST"),
        check(&relay, &length, " "),
        check(&relay, &chunked, " "),
    );
}

/// The beginning of HTTP/2, or of another method, and then nothing.
#[tokio::test]
async fn half_a_preface_is_408() {
    let relay = impatient().start().await;
    for begin in ["P", "PRI"] {
        let mut raw = Raw::connect(relay.address()).await;
        raw.write(begin).await;
        check_problem(&raw.answer().await, 408);
    }
}

/// Balancers open connections before they need them.
#[tokio::test]
async fn a_connection_may_wait_for_its_first_request() {
    let relay = impatient().env("RELAY_INGRESS__IDLE_TIMEOUT", "60s").start().await;
    let mut raw = Raw::connect(relay.address()).await;
    tokio::time::sleep(SHORT * 2).await;
    raw.write(whole("{}")).await;
    raw.answer().await.ids();
}

/// The rest of a body that was refused is not the beginning of another request.
#[tokio::test]
async fn what_is_read_after_a_refusal_is_no_request() {
    let relay = impatient().env("RELAY_INGRESS__IDLE_TIMEOUT", "60s").start().await;
    let mut raw = Raw::connect(relay.address()).await;
    raw.write(head("content-length: 10\r\n").replace(TOKEN.1, "wrong")).await;
    check_problem(&raw.answer().await, 401);
    raw.write("0123456789").await;
    tokio::time::sleep(SHORT * 2).await;
    raw.write(whole("{}")).await;
    raw.answer().await.ids();
}

#[tokio::test]
async fn too_slow_on_http2_costs_only_the_stream() {
    use futures_util::stream;
    use http_body_util::StreamBody;
    use hyper_util::rt::{TokioExecutor, TokioIo};

    let relay = impatient().start().await;
    let stream_ = tokio::net::TcpStream::connect(relay.address()).await.unwrap();
    let handshake = hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream_));
    let (mut sender, connection) = handshake.await.unwrap();
    tokio::spawn(connection);
    let never = StreamBody::new(stream::pending::<Result<hyper::body::Frame<Bytes>, std::convert::Infallible>>());
    let slow = Request::post(format!("http://relay{PATH}")).header(TOKEN.0, TOKEN.1).body(never).unwrap();
    let first = sender.send_request(slow.clone()).await.unwrap();
    assert_eq!(first.status(), 408);
    assert_eq!(sender.send_request(slow).await.unwrap().status(), 408, "the connection still serves");
}

#[tokio::test]
async fn an_idle_connection_is_closed() {
    let relay = impatient().start().await;
    let started = Instant::now();
    let (mut silent, mut served) = (Raw::connect(relay.address()).await, Raw::connect(relay.address()).await);
    served.write(whole("{}")).await;
    served.answer().await;
    assert!(silent.closed().await.is_empty(), "nobody asked anything");
    assert!(served.closed().await.is_empty(), "everything was answered");
    assert!(started.elapsed() >= SHORT, "after {:?}", started.elapsed());
}

/// Pings, and headers that never end, are no requests.
#[tokio::test]
async fn an_http2_connection_without_requests_is_closed() {
    const SETTINGS: &[u8] = b"\0\0\0\x04\0\0\0\0\0";
    const PING: &[u8] = b"\0\0\x08\x06\0\0\0\0\0engaged?";
    /// The first header of stream 1, `:method: POST`, with more to come.
    const HEADERS: &[u8] = b"\0\0\x01\x01\0\0\0\0\x01\x83";
    async fn check(relay: &Relay, begin: &[u8], more: &[u8]) {
        let mut raw = Raw::connect(relay.address()).await;
        raw.write([b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", SETTINGS, begin].concat()).await;
        let chatter = async {
            loop {
                tokio::select! {
                    _ = raw.closed() => return,
                    () = tokio::time::sleep(SHORT / 8) => {}
                }
                // The relay may close while this is sent.
                drop(raw.try_write(more).await);
            }
        };
        within("the relay to close", chatter).await;
    }
    let relay = impatient().start().await;
    tokio::join!(check(&relay, b"", PING), check(&relay, HEADERS, b""));
}

#[tokio::test]
async fn half_requests_hold_only_their_own_connection() {
    let relay = relay().await;
    let mut halves = Vec::new();
    for number in 0..200 {
        let mut raw = Raw::connect(relay.address()).await;
        raw.write(if number % 2 == 0 {
            head("content-length: 2\r\n") + "{"
        } else {
            format!("POST {PATH} HTTP/1.1\r\nho")
        })
        .await;
        halves.push(raw);
    }
    let started = Instant::now();
    for number in 0..20 {
        relay.post(event(number, "sent")).await.ids();
    }
    assert!(started.elapsed() < Duration::from_secs(5), "20 requests took {:?}", started.elapsed());
    for (number, raw) in halves.iter_mut().enumerate() {
        let rest =
            if number % 2 == 0 { "}".to_owned() } else { whole("{}").split_once("\r\nho").unwrap().1.to_owned() };
        raw.write(rest).await;
        raw.answer().await.ids();
    }
}

#[tokio::test]
async fn connections_at_the_limit() {
    let relay = Setup::new(SCREEN).env("RELAY_INGRESS__MAX_CONNECTIONS", "3").start().await;
    let mut served = Vec::new();
    for _ in 0..3 {
        let mut raw = Raw::connect(relay.address()).await;
        raw.write(whole("{}")).await;
        raw.answer().await.ids();
        served.push(raw);
    }
    let mut fourth = Raw::connect(relay.address()).await;
    fourth.write(whole("{}")).await;
    let early = tokio::time::timeout(Duration::from_millis(300), fourth.answer()).await;
    assert!(early.is_err(), "a fourth connection was served: {early:?}");
    served[0].write(whole("{}")).await;
    served[0].answer().await.ids();
    served.remove(0);
    fourth.answer().await.ids();
}

#[tokio::test]
async fn clients_that_go_away() {
    let receiver = Receiver::accepting().await;
    let relay = Setup::new(&receiver.routes()).start().await;
    let mut sent = BTreeSet::new();
    for number in 0..60 {
        let (half, full) = (event(number, "half"), event(number, "whole"));
        let mut raw = Raw::connect(relay.address()).await;
        raw.write(format!("{}{}", head(&format!("content-length: {}\r\n", half.len())), &half[..half.len() - 1])).await;
        drop(raw);
        let mut raw = Raw::connect(relay.address()).await;
        raw.write(whole(&full)).await;
        drop(raw);
        sent.insert(full);
    }
    let array = format!("[{},{}]", event(1, "array"), event(2, "array"));
    relay.post(array).await.ids();
    sent.extend([event(1, "array"), event(2, "array")]);
    let is_last = |body: &[u8]| body == event(2, "array").as_bytes();
    eventually("the last event", async || receiver.received().iter().any(|received| is_last(&received.body))).await;
    relay.stop().await;
    for received in receiver.received() {
        let body = String::from_utf8(received.body.to_vec()).unwrap();
        assert!(sent.remove(&body), "not sent, or delivered twice: {body}");
    }
}

#[tokio::test]
async fn headers_at_the_limits() {
    async fn check(relay: &Relay, more: &str, expected: u16) {
        let mut raw = Raw::connect(relay.address()).await;
        raw.write(head(&format!("content-length: 2\r\n{more}"))).await;
        raw.write("{}").await;
        assert_eq!(raw.answer().await.status, expected, "{} bytes of headers", more.len());
    }
    let relay = relay().await;
    // With traces there is one more header, which does not count.
    let traced = Setup::new(SCREEN).env("RELAY_TELEMETRY__OTLP_ENDPOINT", "http://127.0.0.1:9").start().await;
    for relay in [&relay, &traced] {
        let client = Client::http2(relay.address()).await;
        for (count, expected) in [(64, 200), (65, 431)] {
            let mut many = webhook("{}");
            let headers = many.headers_mut();
            // The client adds the content's length, and leaves the host out.
            for number in headers.len()..count {
                headers.insert(HeaderName::try_from(format!("x-{number}")).unwrap(), HeaderValue::from_static("y"));
            }
            let answer = client.send(many).await;
            assert_eq!(answer.status, expected, "{count} headers on HTTP/2: {answer:?}");
        }
    }
    // Besides these there are host, token and content-length.
    let headers = |count: usize| (0..count).map(|number| format!("x-{number}: y\r\n")).collect::<String>();
    check(&relay, &headers(61), 200).await;
    check(&relay, &headers(62), 431).await;
    let length_without = head("content-length: 2\r\n").len();
    let long = |len: usize| format!("x: {}\r\n", "y".repeat(len - length_without - 5));
    check(&relay, &long(32 << 10), 200).await;
    // What comes in one piece with the last byte that is allowed may be longer, but not by much.
    check(&relay, &long(100 << 10), 431).await;
    let client = Client::http2(relay.address()).await;
    for (len, expected) in [(31 << 10, 200), (33 << 10, 431)] {
        let mut large = webhook("{}");
        large.headers_mut().insert("x", "y".repeat(len).parse().unwrap());
        assert_eq!(client.send(large).await.status, expected, "{len} bytes on HTTP/2");
    }
}

#[tokio::test]
async fn named_tokens() {
    let receiver = Receiver::accepting().await;
    let routes = format!(
        "[sinks.old]\ntype = \"http\"\nurl = \"{}\"\n[sinks.new]\ntype = \"http\"\nurl = \"{}\"\n\
         [[routes]]\nname = \"old\"\nwhen = {{ token = \"old\" }}\nto = [\"old\"]\n\
         [[routes]]\nname = \"new\"\nwhen = {{ token = \"new\" }}\nto = [\"new\"]\n",
        receiver.url("/old"),
        receiver.url("/new")
    );
    let tokens = "[{name=\"old\",value=\"first-value\"},{name=\"new\",value=\"second-value\"}]";
    let setup = Setup::new(&routes)
        .env("RELAY_INGRESS__AUTH__TOKENS", tokens)
        .env("RELAY_INGRESS__AUTH__HEADER", "authorization");
    let relay = setup.start().await;
    for (number, token, expected) in [(1, "first-value", 200), (2, "second-value", 200), (3, "third-value", 401)] {
        let mut request = webhook(event(number, "sent"));
        request.headers_mut().insert("authorization", token.parse().unwrap());
        assert_eq!(relay.send(request).await.status, expected, "{token}");
    }
    let came: BTreeMap<_, _> = receiver
        .wait_for(2)
        .await
        .into_iter()
        .map(|received| (received.uri.path().to_owned(), received.body))
        .collect();
    assert_eq!(
        came,
        [("/old".to_owned(), event(1, "sent").into()), ("/new".to_owned(), event(2, "sent").into())].into()
    );
}

#[tokio::test]
async fn a_token_that_is_made_up_and_none_at_all() {
    use std::os::unix::fs::PermissionsExt as _;

    let made_up = Setup::new(SCREEN).without("RELAY_INGRESS__AUTH__TOKENS");
    let path = made_up.dir().join("data/ingress-token");
    let mut tokens = Vec::new();
    for _ in 0..2 {
        let relay = made_up.start().await;
        let token = std::fs::read_to_string(&path).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        let authorized = request(Method::POST, PATH, Some(token.trim()), b"{}");
        relay.send(authorized).await.ids();
        assert_eq!(relay.post("{}").await.status, 401);
        let log = relay.stop().await;
        assert!(
            log.iter().any(|line| line["file"].as_str().is_some_and(|file| file.ends_with("ingress-token"))),
            "{log:#?}"
        );
        assert!(!format!("{log:?}").contains(token.trim()), "the token is in the log");
        tokens.push(token);
    }
    assert_eq!(tokens[0], tokens[1], "it stays the same");
    let none =
        Setup::new(SCREEN).without("RELAY_INGRESS__AUTH__TOKENS").env("RELAY_INGRESS__AUTH", "none").start().await;
    none.send(request(Method::POST, PATH, None, b"{}")).await.ids();
}

#[tokio::test]
async fn pipelined_requests_are_answered_in_order() {
    let relay = relay().await;
    let mut expected = Vec::new();
    for number in 0..5 {
        expected.push(relay.post(event(number, "sent")).await.ids());
    }
    let mut raw = Raw::connect(relay.address()).await;
    raw.write((0..5).map(|number| whole(&event(number, "sent"))).collect::<String>()).await;
    for ids in expected {
        assert_eq!(raw.answer().await.ids(), ids);
    }
    // An answer does not wait for the end of a request that has begun to come in.
    let next = whole("{}");
    let (begin, rest) = next.split_at(next.len() / 2);
    raw.write(whole("{}") + begin).await;
    raw.answer().await.ids();
    raw.write(rest).await;
    raw.answer().await.ids();
}

#[tokio::test]
async fn what_is_not_http_is_refused() {
    async fn check(relay: &Relay, bytes: &[u8], expected: u16) {
        let mut raw = Raw::connect(relay.address()).await;
        raw.write(bytes).await;
        assert_eq!(raw.answer().await.status, expected, "{}", String::from_utf8_lossy(bytes));
        raw.closed().await;
    }
    let relay = relay().await;
    check(&relay, b"\x16\x03\x01 this may be TLS\r\n\r\n", 400).await;
    check(&relay, b"POST /webhooks/engage\r\n\r\n", 400).await;
    check(&relay, b"POST /webhooks/engage HTTP/1.1\r\nno colon here\r\n\r\n", 400).await;
    check(&relay, head("content-length: many\r\n").as_bytes(), 400).await;
    check(&relay, head("content-length: 2\r\ncontent-length: 3\r\n").as_bytes(), 400).await;
    check(&relay, head("transfer-encoding: gzip\r\n").as_bytes(), 400).await;
    relay.post("{}").await.ids();
}

#[tokio::test]
async fn many_streams_of_one_http2_connection() {
    let receiver = Receiver::accepting().await;
    let relay = Setup::new(&receiver.routes()).start().await;
    let client = Client::http2(relay.address()).await;
    let requests = (0..100).map(|number| client.send(webhook(event(number, "sent"))));
    let ids: BTreeSet<_> = futures_util::future::join_all(requests).await.iter().flat_map(Answer::ids).collect();
    assert_eq!(ids.len(), 100);
    let came: BTreeSet<_> = receiver.wait_for(100).await.iter().map(|received| received.id().to_owned()).collect();
    assert_eq!(came, ids);
}

#[tokio::test]
async fn bodies_arrive_byte_for_byte() {
    let receiver = Receiver::accepting().await;
    let routes = receiver.routes().replace("to = ", "when = { \"/keep\" = { exists = false } }\nto = ");
    let relay = Setup::new(&routes).start().await;
    let deep = format!("{{\"deep\":{}{}}}", "[".repeat(2000), "]".repeat(2000));
    let bodies: Vec<String> = vec![
        event(1, "sent"),
        "{}".into(),
        " \t\r\n { } \r\n ".into(),
        "{\"message_id\":17,\"message_status\":true,\"channel\":{\"sender_id\":5491122223333},\"event_timestamp\":1687548944}".into(),
        "{\"message_id\":\"a\",\"message_status\":\"sent\",\"campaign\":null,\"channel\":[1]}".into(),
        "{\"message_id\" : \"\\u0061\\ud83d\\ude00\", \"message_status\":\"\\u0073ent\",\"é😀\":\"\\/\"}".into(),
        "{\"message_id\":\"x\",\"message_id\":\"y\",\"message_status\":\"sent\",\"message_status\":\"read\"}".into(),
        "{\"n\":[1.50,1e5,-0,123456789012345678901234567890,1E+2]}".into(),
        "{\"message_id\":null,\"message_status\":\"new-status\",\"further\":{\"a\":[{}]}}".into(),
        deep,
    ];
    for body in &bodies {
        relay.post(body.clone()).await.ids();
    }
    let array = "[ {\"in\" : \"array\", \"x\":1.0} , {\"second\":[ ]}]";
    relay.post(array).await.ids();
    let mut expected: Vec<_> = bodies;
    expected.extend(["{\"in\" : \"array\", \"x\":1.0}".into(), "{\"second\":[ ]}".into()]);
    let mut came: Vec<_> = receiver
        .wait_for(expected.len())
        .await
        .iter()
        .map(|received| String::from_utf8(received.body.to_vec()).unwrap())
        .collect();
    expected.sort();
    came.sort();
    assert_eq!(came, expected);
}

#[tokio::test]
async fn odd_fields_are_routed() {
    let receiver = Receiver::accepting().await;
    let routes = format!(
        "[sinks.http]\ntype = \"http\"\nurl = \"{}\"\n[[routes]]\nname = \"one\"\n\
         when = {{ sender_id = \"549*\", status = \"read\", campaign_id = {{ exists = false }} }}\nto = [\"http\"]\n",
        receiver.url("/{message_id|none}")
    );
    let relay = Setup::new(&routes).start().await;
    let matching = [
        "{\"message_id\":17,\"message_status\":\"read\",\"channel\":{\"sender_id\":5491122223333}}",
        "{\"message_id\":\"b\",\"message_status\":\"\\u0072ead\",\"channel\":{\"sender_id\":\"\\u0035491\"},\"campaign\":{\"id\":null}}",
        "{\"message_status\":\"read\",\"channel\":{\"sender_id\":\"549\"},\"campaign\":\"none\"}",
    ];
    let others =
        ["{\"message_status\":\"read\"}", "{\"message_status\":[\"read\"],\"channel\":{\"sender_id\":\"549\"}}", "{}"];
    for body in others.iter().chain(&matching) {
        relay.post(*body).await.ids();
    }
    let paths: BTreeSet<_> = receiver.wait_for(3).await.iter().map(|received| received.uri.path().to_owned()).collect();
    assert_eq!(paths, ["/17", "/b", "/none"].map(str::to_owned).into());
    relay.stop().await;
    assert_eq!(receiver.received().len(), 3);
}

#[tokio::test]
async fn what_travels_beside_the_body() {
    let receiver = Receiver::accepting().await;
    let relay = Setup::new(&receiver.routes()).start().await;
    let traceparent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    let mut traced = webhook(event(1, "sent"));
    traced.headers_mut().insert("traceparent", traceparent.parse().unwrap());
    let started = Instant::now();
    let id = relay.send(traced).await.ids().remove(0);
    let received = receiver.wait_for(1).await.remove(0);
    assert_eq!((received.method.as_str(), received.id()), ("POST", &*id));
    assert_eq!(received.header("traceparent"), traceparent);
    assert_eq!(received.header("content-type"), "application/json");
    assert_eq!(received.header("relay-attempt"), "1");
    assert!(received.header("webhook-timestamp").parse::<u64>().is_ok());
    assert!(received.header("relay-received-at").ends_with('Z'));
    assert!(received.headers.get(TOKEN.0).is_none(), "the token is the relay's alone");
    assert!(received.at >= started);
    relay.post(event(2, "sent")).await.ids();
    let untraced = receiver.wait_for(2).await.remove(1);
    assert!(untraced.header("traceparent").starts_with("00-"), "{untraced:?}");
}

#[tokio::test]
async fn a_failing_sink_is_tried_again() {
    let failures = std::sync::atomic::AtomicU32::new(0);
    let receiver = Receiver::start(move |_| match failures.fetch_add(1, Ordering::SeqCst) {
        0 => Reply::Status(503),
        1 => Reply::Close,
        2 => Reply::Never,
        3 => Reply::After(Duration::from_millis(10), 429),
        _ => Reply::Status(200),
    })
    .await;
    let delivery = "timeout = \"300ms\"\ndelivery = { backoff = { initial = \"10ms\", max = \"50ms\" } }";
    let relay = Setup::new(&receiver.routes().replace("timeout = \"2s\"", delivery)).start().await;
    relay.post(event(1, "sent")).await.ids();
    let attempts: Vec<_> =
        receiver.wait_for(5).await.iter().map(|received| received.header("relay-attempt").to_owned()).collect();
    assert_eq!(attempts, ["1", "2", "3", "4", "5"]);
}

#[tokio::test]
async fn a_full_journal_refuses_until_the_sink_catches_up() {
    let open = Arc::new(AtomicBool::new(false));
    let gate = Arc::clone(&open);
    let receiver = Receiver::start(move |_| Reply::Status(if gate.load(Ordering::SeqCst) { 200 } else { 503 })).await;
    let delivery = "delivery = { backoff = { initial = \"20ms\", max = \"100ms\" }, breaker = { failures = 3, probe = \"100ms\" } }";
    let routes = receiver.routes().replace("timeout = \"2s\"", delivery);
    let setup = Setup::new(&routes)
        .env("RELAY_JOURNAL__SEGMENT", "64KiB")
        .env("RELAY_JOURNAL__MAX_DISK", "192KiB")
        .env("RELAY_JOURNAL__MIN_FREE_DISK", "1MiB");
    let relay = setup.start().await;
    let client = Client::http1(relay.address()).await;
    let (mut accepted, mut refused) = (BTreeSet::new(), None);
    for number in 0..400 {
        let padded = event(number, "sent").replacen('{', &format!("{{\"pad\":\"{}\",", "x".repeat(2000)), 1);
        let answer = client.send(webhook(padded)).await;
        if answer.status != 200 {
            refused = Some(answer);
            break;
        }
        accepted.extend(answer.ids());
    }
    let refused = refused.expect("more was accepted than max_disk");
    check_problem(&refused, 503);
    assert!(refused.header("retry-after").parse::<u32>().is_ok_and(|seconds| seconds > 0), "{refused:?}");
    assert!(accepted.len() > 20, "only {} were accepted", accepted.len());
    open.store(true, Ordering::SeqCst);
    let mut number = 1000;
    let recovered = async {
        loop {
            number += 1;
            let answer = client.send(webhook(event(number, "sent"))).await;
            if answer.status == 200 {
                return answer.ids();
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    accepted.extend(within("the journal to take events again", recovered).await);
    let arrived =
        || -> BTreeSet<String> { receiver.received().iter().map(|received| received.id().to_owned()).collect() };
    eventually("all that was accepted", async || arrived().is_superset(&accepted)).await;
    assert_eq!(arrived(), accepted, "what was refused was not stored");
    relay.stop().await;
}

#[tokio::test]
async fn a_graceful_stop_answers_what_is_under_way() {
    let receiver = Receiver::accepting().await;
    let setup = Setup::new(&receiver.routes());
    let mut relay = setup.start().await;
    let mut idle = Raw::connect(relay.address()).await;
    idle.write(whole("{}")).await;
    idle.answer().await.ids();
    let body = event(1, "sent");
    let mut busy = Raw::connect(relay.address()).await;
    // That it says to go on shows that the request is under way.
    busy.write(head(&format!("content-length: {}\r\nexpect: 100-continue\r\n", body.len()))).await;
    assert_eq!(busy.answer().await.status, 100);
    relay.signal(Signal::TERM);
    assert!(idle.closed().await.is_empty());
    busy.write(body).await;
    let id = busy.answer().await.ids().remove(0);
    assert!(busy.closed().await.is_empty());
    assert_eq!(relay.ended().await.code(), Some(0), "{:#?}", relay.log());
    if !receiver.received().iter().any(|received| received.id() == id) {
        let again = setup.start().await;
        eventually("the last event", async || receiver.received().iter().any(|received| received.id() == id)).await;
        again.stop().await;
    }
}

#[tokio::test]
async fn a_second_signal_ends_at_once() {
    let setup = Setup::new(SCREEN).env("RELAY_SHUTDOWN__GRACE", "10m").env("RELAY_INGRESS__BODY_TIMEOUT", "10m");
    let mut relay = setup.start().await;
    let mut idle = Raw::connect(relay.address()).await;
    idle.write(whole("{}")).await;
    idle.answer().await.ids();
    let mut busy = Raw::connect(relay.address()).await;
    busy.write(head("content-length: 2\r\nexpect: 100-continue\r\n")).await;
    assert_eq!(busy.answer().await.status, 100);
    relay.signal(Signal::TERM);
    idle.closed().await;
    relay.signal(Signal::TERM);
    relay.ended().await;
    assert!(!relay.logged("second signal; stopping at once").is_empty(), "{:#?}", relay.log());
    busy.closed().await;
}

#[tokio::test]
async fn after_sigterm_it_accepts_a_little_longer() {
    let mut relay = Setup::new(SCREEN).env("RELAY_SHUTDOWN__DELAY", "2s").start().await;
    let started = Instant::now();
    relay.signal(Signal::TERM);
    eventually("the signal to be noticed", async || {
        !relay.logged("asked to stop; accepting a little longer").is_empty()
    })
    .await;
    relay.post(event(1, "sent")).await.ids();
    assert_eq!(relay.ended().await.code(), Some(0));
    assert!(started.elapsed() >= Duration::from_secs(2));
}
