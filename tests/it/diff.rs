//! `engage-relay diff`: what other rules would change.

use serde_json::{Value, json};

use crate::harness::{Done, Receiver, Relay, Reply, Setup, event};

/// One sink for errors, one for all that is read; the token is a secret that only the relay has.
fn rules(url: &str) -> String {
    let sink = |name: &str| {
        format!("[sinks.{name}]\ntype = \"http\"\nurl = \"{url}\"\nheaders = {{ authorization = \"${{TOKEN}}\" }}\n")
    };
    sink("errors")
        + &sink("crm")
        + "[[routes]]\nname = \"errors\"\nwhen = { status = \"error\" }\nto = [\"errors\"]\n\
           [[routes]]\nname = \"read\"\nwhen = { status = \"read\", sender_id = \"${SENDER}\" }\nto = [\"crm\"]\n"
}

/// What the tests change them to: `crm` gets what is sent too, `audit` is new, `errors` is gone.
fn changed(rules: &str) -> String {
    rules
        .replace("[sinks.errors]", "[sinks.audit]")
        .replace("to = [\"errors\"]", "to = [\"audit\"]")
        .replace("[[routes]]\nname = \"read\"", "[[routes]]\nname = \"sent\"\nwhen = { status = \"sent\" }\nto = [\"crm\"]\n[[routes]]\nname = \"never\"\nwhen = { status = \"never\" }\nto = [\"crm\"]\n[[routes]]\nname = \"read\"")
}

struct Running {
    relay: Relay,
    setup: Setup,
    rules: String,
    _server: Receiver,
}

/// A relay that keeps 10 events that were sent, 20 that were read, 5 errors.
async fn running() -> Running {
    let server = Receiver::start_without_memory(|_| Reply::Status(200)).await;
    let rules = rules(&server.url("/"));
    let setup = Setup::new(&rules).env("TOKEN", "a secret").env("SENDER", "5491122223333");
    let relay = setup.start().await;
    let statuses = [("sent", 10), ("read", 20), ("error", 5)];
    let all = statuses.into_iter().flat_map(|(status, count)| (0..count).map(move |number| event(number, status)));
    relay.post(format!("[{}]", all.collect::<Vec<_>>().join(","))).await.ids();
    Running { relay, setup, rules, _server: server }
}

fn sink<'v>(answer: &'v Value, name: &str) -> &'v Value {
    let mut sinks = answer["diff"]["sinks"].as_array().expect("sinks").iter();
    sinks.find(|sink| sink["sink"] == name).unwrap_or_else(|| panic!("no sink {name}: {answer:#}"))
}

fn counts(tally: &Value) -> Value {
    json!([tally["before"], tally["after"], tally["gains"], tally["loses"], tally["unchanged"]])
}

fn route(answer: &Value, name: &str) -> Value {
    let mut routes = answer["diff"]["routes"].as_array().expect("routes").iter();
    let route = routes.find(|route| route["route"] == name).unwrap_or_else(|| panic!("no route {name}: {answer:#}"));
    json!([route["change"], route["before"], route["after"]])
}

fn check(answer: &Value) {
    assert_eq!(
        (&answer["ok"], &answer["diff"]["events"], &answer["diff"]["changed"]),
        (&json!(true), &json!(35), &json!(15))
    );
    assert_eq!(counts(sink(answer, "crm")), json!([20, 30, 10, 0, 20]));
    assert_eq!(
        (&sink(answer, "audit")["change"], counts(sink(answer, "audit"))),
        (&json!("added"), json!([0, 5, 5, 0, 0]))
    );
    assert_eq!(
        (&sink(answer, "errors")["change"], counts(sink(answer, "errors"))),
        (&json!("removed"), json!([5, 0, 0, 5, 0]))
    );
    assert_eq!(counts(&answer["diff"]["unrouted"]), json!([10, 0, 0, 10, 0]));
    assert_eq!(route(answer, "read"), json!(["kept", 20, 20]), "{answer:#}");
    assert_eq!(route(answer, "never"), json!(["added", 0, 0]));
    let example = &sink(answer, "crm")["gained"][0];
    assert_eq!((&example["before"], &example["after"]), (&json!([]), &json!(["sent"])));
    assert_eq!((&example["status"], &example["sender"]), (&json!("sent"), &json!("…3333")));
    let text = answer.to_string();
    assert!(!text.contains("5491122223333") && !text.contains("541100000") && !text.contains("a secret"), "{text}");
}

#[tokio::test]
async fn a_running_relay_compares_by_what_it_keeps() {
    let Running { relay, setup, rules, _server } = running().await;
    setup.file("new.toml", &changed(&rules));
    // The command has no secrets, and needs none.
    let without = setup.clone().without("TOKEN").without("SENDER");
    let admin = format!("http://{}", relay.admin());
    let run = async |arguments: &[&str]| -> Done {
        without.run(&[&["diff", "new.toml", "--admin", &admin], arguments].concat(), "").await
    };
    let done = run(&["--json"]).await;
    assert_eq!(done.code, Some(0), "{done:?}");
    check(&serde_json::from_str(&done.stdout).expect("JSON"));

    let done = run(&[]).await;
    assert_eq!((done.code, &*done.stderr), (Some(0), ""), "{done:?}");
    let lines: Vec<_> = done.stdout.lines().map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ")).collect();
    for line in [
        "crm 20 30 +10 20",
        "audit 0 5 +5 0 new",
        "errors 5 0 -5 0 gone",
        "(unrouted) 10 0 -10 0",
        "never 0 new; matches nothing",
        "crm would gain, for example",
        "matches no route; would match sent",
    ] {
        assert!(lines.iter().any(|found| found == line), "{line:?}: {}", done.stdout);
    }
    assert!(lines[0].starts_with("35 events, received from 20") && lines[0].ends_with("15 would go elsewhere"));

    let last: Value = serde_json::from_str(&run(&["--last", "7", "--json"]).await.stdout).expect("JSON");
    assert_eq!((&last["diff"]["events"], counts(sink(&last, "errors"))), (&json!(7), json!([5, 0, 0, 5, 0])));
    for (times, expected) in [(["--since", "1h"], 35), (["--until", "1h"], 0)] {
        let some: Value = serde_json::from_str(&run(&[&times[..], &["--json"]].concat()).await.stdout).expect("JSON");
        assert_eq!(some["diff"]["events"], expected);
    }
    relay.stop().await;
    let done = run(&[]).await;
    assert!(done.code == Some(1) && done.stderr.contains("is it running?"), "{done:?}");
}

#[tokio::test]
async fn broken_rules_are_reported_with_their_places() {
    let Running { relay, setup, rules, _server } = running().await;
    let broken = changed(&rules)
        .replace("to = [\"audit\"]", "to = [\"adit\"]")
        .replace("status = \"never\"", "staus = \"never\"");
    setup.file("new.toml", &broken);
    let line = |text: &str| broken.lines().position(|line| line.contains(text)).expect("it is there") + 1;
    let places = [
        format!("new.toml:{}:7: unknown sink `adit`; did you mean `audit`?", line("adit")),
        format!("new.toml:{}:10: unknown field `staus`; did you mean `status`?", line("staus")),
    ];
    for arguments in [&["diff", "new.toml"][..], &["diff", "new.toml", "--file", "routes.toml"]] {
        let done = relay.command(arguments).await;
        assert_eq!((done.code, &*done.stdout), (Some(64), ""), "{done:?}");
        assert!(places.iter().all(|place| done.stderr.contains(place)), "{done:?}");
    }
    let answer = relay.operate("/api/v1/diff", &json!({ "rules": broken })).await;
    assert_eq!((&answer["ok"], &answer["diff"]), (&json!(false), &Value::Null));
    let errors = answer["problems"].as_array().expect("a list").iter().filter(|problem| problem["severity"] == "error");
    let found: Vec<_> = errors.map(|problem| (problem["line"].as_u64(), problem["column"].as_u64())).collect();
    let expected = [(line("adit"), 7), (line("staus"), 10)].map(|(line, column)| (Some(line as u64), Some(column)));
    assert_eq!(found, expected);
    let done = relay.command(&["diff", "nowhere.toml"]).await;
    assert!(done.code == Some(64) && done.stderr.contains("nowhere.toml"), "{done:?}");
    relay.stop().await;
}

/// Whoever may ask must not learn what the relay's variables and files hold.
#[tokio::test]
async fn what_references_stand_for_can_not_be_asked_for() {
    let Running { relay, setup, rules, _server } = running().await;
    let secret = setup.file("secret", "5491122223333\n");
    let references = ["${TOKEN}", "${SENDER}", "^[${SENDER}]+$", &format!("${{file:{}}}", secret.display())];
    for reference in references {
        for when in [format!("sender_id = '{reference}'"), format!("sender_id = {{ regex = '{reference}' }}")] {
            let asking = rules.clone() + &format!("[[routes]]\nwhen = {{ {when} }}\nto = ['crm']\n");
            let answer = relay.operate("/api/v1/diff", &json!({ "rules": asking })).await;
            assert_eq!((&answer["ok"], &answer["diff"]), (&json!(false), &Value::Null), "{when}: {answer:#}");
            let text = answer.to_string();
            assert!(!text.contains("5491122223333") && !text.contains("a secret"), "{text}");
        }
    }
    relay.stop().await;
}

/// Without a relay: one body a line, an array, or any mixture.
#[tokio::test]
async fn a_file_of_events_needs_no_relay() {
    let rules = rules("http://127.0.0.1:1/");
    let setup = Setup::new(&rules).env("SENDER", "5491122223333");
    setup.file("new.toml", &changed(&rules));
    let some = |status: &str, count| (0..count).map(|number| event(number, status)).collect::<Vec<_>>();
    let events =
        some("sent", 10).join("\n") + &format!("\n[{}]\n", some("read", 20).join(",\n")) + &some("error", 5).join(" ");
    setup.file("events", &events);
    let done = setup.run(&["diff", "new.toml", "--file", "events", "--json"], "").await;
    assert_eq!(done.code, Some(0), "{done:?}");
    check(&serde_json::from_str(&done.stdout).expect("JSON"));
    for (content, expected) in [("", "has no events"), ("{}\n7", "number 2"), ("{}\n{", "not JSON")] {
        setup.file("events", content);
        let done = setup.run(&["diff", "new.toml", "--file", "events"], "").await;
        assert!(done.code == Some(1) && done.stderr.contains(expected), "{done:?}");
    }
    let done = setup.clone().without("SENDER").run(&["diff", "new.toml", "--file", "events"], "").await;
    assert!(done.code == Some(64) && done.stderr.contains("`SENDER` is not set"), "a condition needs it: {done:?}");
}
