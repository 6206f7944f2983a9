//! The dashboard: what it is made from, and all of it in a browser.

use std::collections::HashSet;
use std::path::Path;
use std::sync::Mutex;

use serde_json::{Value, json};

use crate::harness::{Client, Raw, Receiver, Relay, Reply, Setup, TOKEN, event, http_routes, within};
use crate::python::{python, run};

const ADMIN_TOKEN: &str = "a-token-for-operators";

/// Where the browser's pictures go.
fn screenshots() -> std::path::PathBuf {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/dashboard");
    std::fs::create_dir_all(&folder).expect("a folder");
    folder
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn operators_see_and_do_all_of_it_in_a_browser() {
    let refused = Mutex::new(HashSet::new());
    let server = Receiver::start(move |request| {
        let is_new = || refused.lock().expect("no panic").insert(request.id().to_owned());
        Reply::Status(match request.uri.path() {
            "/rejects" if is_new() => 400,
            "/down" => 503,
            _ => 200,
        })
    })
    .await;
    let sink = |name: &str, path: &str| format!("[sinks.{name}]\ntype = \"http\"\nurl = \"{}\"\n", server.url(path));
    let rules = sink("crm", "/good")
        + &sink("ops", "/rejects")
        + &sink("audit", "/down")
        + "delivery = { breaker = { failures = 1, probe = \"2s\" } }\n\
           [[routes]]\nname = \"everything\"\nwhen = { status = [\"read\", \"error\"] }\nto = [\"crm\"]\n\
           [[routes]]\nname = \"errors\"\nwhen = { status = \"error\" }\nto = [\"ops\", \"audit\"]\n";
    let setup = Setup::new(&rules);
    let open = setup.start().await;
    let mut locked =
        Setup::new(&http_routes("http://127.0.0.1:1/")).env("RELAY_ADMIN__TOKEN", ADMIN_TOKEN).start().await;
    let folder = screenshots();
    let given = json!({
        "open": {
            "admin": format!("http://{}", open.admin()),
            "ingress": open.url(),
            "header": [TOKEN.0, TOKEN.1],
            "rules": setup.dir().join("routes.toml"),
            "screenshots": folder,
        },
        "locked": {
            "admin": format!("http://{}", locked.admin()),
            "token": ADMIN_TOKEN,
            "pid": locked.pid().as_raw_nonzero(),
            "screenshots": folder,
        },
    });
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/python/dashboard.py");
    run(&python(), &[script.to_str().expect("UTF-8")], given.to_string()).await;
    assert_eq!(locked.ended().await.code(), Some(0), "it did not wait for those who watch");
    let ops = server.received().iter().filter(|request| request.uri.path() == "/rejects").count();
    assert_eq!(ops, 9, "five events, of which four were sent again");
    open.stop().await;
}

/// The page gives nothing away, runs no script but its own, and can't be put into another site's page.
#[tokio::test]
async fn the_page_is_served_to_anyone_and_shut_off_from_other_sites() {
    let setup = Setup::new(&http_routes("http://127.0.0.1:1/")).env("RELAY_ADMIN__TOKEN", ADMIN_TOKEN);
    let relay = setup.start().await;
    let client = Client::http1(relay.admin()).await;
    for (path, content_type) in
        [("/", "text/html"), ("/dashboard.css", "text/css"), ("/dashboard.js", "text/javascript")]
    {
        let request = http::Request::get(path).header("host", "relay.example").body(Default::default());
        let answer = client.send(request.expect("a request")).await;
        assert_eq!(answer.status, 200, "{answer:?}");
        assert!(answer.header("content-type").starts_with(content_type), "{answer:?}");
        let policy = answer.header("content-security-policy");
        for rule in ["default-src 'none'", "script-src 'self'", "frame-ancestors 'none'"] {
            assert!(policy.contains(rule), "{policy}");
        }
        assert_eq!(
            (answer.header("x-content-type-options"), answer.header("referrer-policy")),
            ("nosniff", "no-referrer")
        );
    }
    relay.stop().await;
}

#[tokio::test]
async fn the_api_knows_what_routes_matched_and_which_attempts_failed() {
    let server = Receiver::start(|_| Reply::Status(400)).await;
    let relay =
        Setup::new(&server.routes().replace("[[routes]]", "[[routes]]\nwhen = { status = \"sent\" }")).start().await;
    assert_eq!(relay.get("/api/v1/failures").await, json!({ "failures": [] }));
    let route = |events: u32| json!({ "name": "all", "events": { "http": events }, "final": false });
    assert_eq!(relay.get("/api/v1/routes").await, json!({ "routes": [route(0)], "unrouted": 0 }));
    let mut ids = Vec::new();
    for number in 0..25 {
        ids.extend(relay.post(event(number, "sent")).await.ids());
        relay.sink_is("http", "has tried it", |sink| sink["attempts_failed"] == number + 1).await;
    }
    relay.post(event(0, "read")).await.ids();
    relay.sink_is("http", "has passed it", |sink| sink["lag_events"] == 0).await;
    within("it is counted", async {
        while relay.get("/api/v1/routes").await != json!({ "routes": [route(25)], "unrouted": 1 }) {
            tokio::task::yield_now().await;
        }
    })
    .await;
    let failures = relay.get("/api/v1/failures").await["failures"].as_array().expect("a list").clone();
    let of: Vec<_> = failures.iter().map(|failure| failure["event_id"].as_str().expect("an id")).collect();
    assert_eq!(of, ids.iter().rev().take(20).collect::<Vec<_>>(), "the latest first, and not all of them");
    let same = |failure: &Value| failure["kind"] == "http_400" && failure["sink"] == "http" && failure["attempt"] == 1;
    assert!(failures.iter().all(same), "{failures:#?}");
    relay.stop().await;
}

/// A stream, and what it was answered.
async fn watch(relay: &Relay) -> (Raw, u16) {
    let mut stream = Raw::connect(relay.admin()).await;
    stream.write("GET /api/v1/stream HTTP/1.1\r\nhost: localhost\r\n\r\n").await;
    let status = stream.answer().await.status;
    (stream, status)
}

#[tokio::test]
async fn so_many_may_watch_until_the_relay_ends() {
    let relay = Setup::new(&http_routes("http://127.0.0.1:1/")).start().await;
    let mut streams = Vec::new();
    for _ in 0..64 {
        let (stream, status) = watch(&relay).await;
        assert_eq!(status, 200);
        streams.push(stream);
    }
    assert_eq!(watch(&relay).await.1, 503);
    drop(streams.pop());
    within("there is room when one has left", async { while watch(&relay).await.1 != 200 {} }).await;
    relay.stop().await;
    for mut stream in streams {
        let said = String::from_utf8(stream.closed().await).expect("UTF-8");
        let data = said.lines().filter_map(|line| line.strip_prefix("data: ")).next().expect("an event");
        let status: Value = serde_json::from_str(data).expect("JSON");
        assert_eq!(status["sinks"][0]["name"], "http", "{status}");
    }
}
