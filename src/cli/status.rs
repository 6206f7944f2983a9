//! `engage-relay status`, `pause` and `resume`: what a running relay and its sinks are doing.

use std::io::IsTerminal as _;
use std::process::ExitCode;
use std::time::Duration;

use bytesize::ByteSize;
use serde_json::Value;

use super::api::{Api, elements, number, table, text};
use super::{Global, plain, print, said};

/// How often `--watch` looks.
const WATCH: Duration = Duration::from_secs(2);

#[derive(clap::Args)]
pub(super) struct Arguments {
    /// Show it again every two seconds, until interrupted; also while the relay is away
    #[arg(long)]
    watch: bool,
}

#[derive(clap::Args)]
pub(super) struct Sink {
    /// The sink's name
    sink: String,
}

pub(super) fn run(global: &Global, arguments: &Arguments) -> anyhow::Result<ExitCode> {
    let api = Api::new(global)?;
    let look = || {
        let status: Value = api.get(&["status"], &[])?;
        Ok(if global.json { format!("{status}\n") } else { show(&status) })
    };
    if !arguments.watch {
        print(&look()?)?;
        return Ok(ExitCode::SUCCESS);
    }
    // On a terminal each takes the place of the one before.
    let clear = if !global.json && std::io::stdout().is_terminal() { "\x1b[H\x1b[2J" } else { "" };
    // A relay that is away comes back.
    while print(&format!("{clear}{}", look().unwrap_or_else(|error| said(&error, global.json))))? {
        std::thread::sleep(WATCH);
    }
    Ok(ExitCode::SUCCESS)
}

/// `action` is `pause` or `resume`.
pub(super) fn switch(global: &Global, action: &str, Sink { sink }: &Sink) -> anyhow::Result<ExitCode> {
    let status = Api::new(global)?.post(&["sinks", sink, action], &Value::Null)?;
    print(&match global.json {
        true => format!("{status}\n"),
        false => sinks(std::slice::from_ref(&status)),
    })?;
    Ok(ExitCode::SUCCESS)
}

fn show(status: &Value) -> String {
    let ready = match text(status, "unready_because") {
        "" => "accepting".to_owned(),
        reason => format!("NOT accepting: {}", plain(reason)),
    };
    let journal = status.get("journal").unwrap_or(&Value::Null);
    let files = journal.get("disk_bytes").and_then(Value::as_u64);
    let mut shown = format!(
        "engage-relay {}, up since {}, {ready}; {} events so far{}\n\n",
        text(status, "version"),
        text(status, "started_at"),
        number(journal, "end"),
        files.map(|bytes| format!(", journal of {}", ByteSize(bytes))).unwrap_or_default(),
    );
    let known = elements(status, "sinks");
    shown += &sinks(known);
    let others = status.get("dead_letters").and_then(Value::as_object).into_iter().flatten();
    for (sink, count) in others.filter(|(sink, _)| !known.iter().any(|known| text(known, "name") == *sink)) {
        shown += &format!("\n{count} dead letters of {sink}\n");
    }
    shown += &refused(status.get("rules").unwrap_or(&Value::Null));
    if let Some(relays) = status.get("replicas").and_then(Value::as_array) {
        shown += &format!("\n{}", replicas(relays));
    }
    shown
}

/// What is wrong with changed files, if they are not in force.
fn refused(rules: &Value) -> String {
    let reload = rules.get("last_reload").filter(|reload| text(reload, "outcome") == "refused");
    let Some(reload) = reload else { return String::new() };
    let (at, since) = (text(reload, "at"), text(rules, "loaded_at"));
    let mut shown = format!("\nreload refused at {at}; in force is what was loaded at {since}\n");
    for problem in elements(reload, "problems").iter().filter_map(Value::as_str).flat_map(str::lines) {
        shown += &format!("  {}\n", plain(problem));
    }
    shown
}

/// The relays that share a journal, and which partitions of it each has for which sink.
fn replicas(relays: &[Value]) -> String {
    let share = |share: &Value| {
        let partitions: Vec<_> = elements(share, "partitions").iter().map(Value::to_string).collect();
        format!("{} {}", text(share, "name"), if partitions.is_empty() { "-".to_owned() } else { partitions.join(",") })
    };
    let row = |relay: &Value| {
        let [id, version, started_at] = ["id", "version", "started_at"].map(|field| text(relay, field).to_owned());
        let shares: Vec<_> = elements(relay, "sinks").iter().map(share).collect();
        vec![id, version, started_at, shares.join("; ")]
    };
    table(&["RELAY", "VERSION", "UP SINCE", "PARTITIONS"], &relays.iter().map(row).collect::<Vec<_>>())
}

fn sinks(sinks: &[Value]) -> String {
    let row = |sink: &Value| {
        let state = match (sink.get("paused"), text(sink, "breaker")) {
            (Some(Value::Bool(true)), _) => "paused",
            _ if number(sink, "unheld_partitions") > 0 => "unheld",
            (_, "open") => "failing",
            _ => "ok",
        };
        let last_error = match sink.get("last_error") {
            None | Some(Value::Null) => String::new(),
            Some(error) => format!("{} {}: {}", text(error, "at"), text(error, "kind"), text(error, "text")),
        };
        let count = |field: &str| number(sink, field).to_string();
        let decimal = |field: &str| format!("{:.1}", sink.get(field).and_then(Value::as_f64).unwrap_or(0.0));
        vec![
            text(sink, "name").to_owned(),
            text(sink, "type").to_owned(),
            state.to_owned(),
            count("lag_events"),
            decimal("lag_seconds"),
            count("in_flight"),
            count("parked"),
            count("dead_letters"),
            count("delivered"),
            decimal("rate"),
            last_error,
        ]
    };
    let headings =
        ["SINK", "TYPE", "STATE", "LAG", "LAG s", "IN FLIGHT", "PARKED", "DEAD", "DELIVERED", "PER s", "LAST ERROR"];
    table(&headings, &sinks.iter().map(row).collect::<Vec<_>>())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_was_refused_and_other_relays_are_shown() {
        let relay = |id: &str, partitions: Value| {
            let sinks = json!([{ "name": "crm", "partitions": partitions }, { "name": "ops", "partitions": [7] }]);
            json!({ "id": id, "version": "1.2.3", "started_at": "2026-01-31T12:00:00Z", "sinks": sinks })
        };
        let reload =
            json!({ "outcome": "refused", "at": "B", "problems": ["routes.toml:1:2: one", "two\nlines\u{1b}"] });
        let mut status = json!({
            "rules": { "loaded_at": "A", "last_reload": reload },
            "replicas": [relay("host-1", json!([0, 2])), relay("b", json!([]))],
        });
        let refused =
            "\nreload refused at B; in force is what was loaded at A\n  routes.toml:1:2: one\n  two\n  lines\\u{1b}\n";
        let relays = "\nRELAY   VERSION  UP SINCE              PARTITIONS\n\
                      host-1  1.2.3    2026-01-31T12:00:00Z  crm 0,2; ops 7\n\
                      b       1.2.3    2026-01-31T12:00:00Z  crm -; ops 7\n";
        assert!(show(&status).ends_with(&format!("{refused}{relays}")), "{}", show(&status));
        status["rules"]["last_reload"]["outcome"] = json!("applied");
        assert!(!show(&status).contains("refused"), "{}", show(&status));
    }
}
