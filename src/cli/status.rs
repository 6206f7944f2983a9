//! `engage-relay status`, `pause` and `resume`: what a running relay and its sinks are doing.

use std::io::IsTerminal as _;
use std::process::ExitCode;
use std::time::Duration;

use bytesize::ByteSize;
use serde_json::Value;

use super::api::{Api, elements, number, table, text};
use super::{Global, print};

/// How often `--watch` looks.
const WATCH: Duration = Duration::from_secs(2);

#[derive(clap::Args)]
pub(super) struct Arguments {
    /// Show it again every two seconds, until interrupted
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
    loop {
        let status: Value = api.get(&["status"], &[])?;
        let text = if global.json { format!("{status}\n") } else { show(&status) };
        // On a terminal each takes the place of the one before.
        let clear = arguments.watch && !global.json && std::io::stdout().is_terminal();
        print(&format!("{}{text}", if clear { "\x1b[H\x1b[2J" } else { "" }))?;
        if !arguments.watch {
            return Ok(ExitCode::SUCCESS);
        }
        std::thread::sleep(WATCH);
    }
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
        reason => format!("NOT accepting: {reason}"),
    };
    let journal = status.get("journal").unwrap_or(&Value::Null);
    let mut shown = format!(
        "engage-relay {}, up since {}, {ready}; {} events so far, journal of {}\n\n",
        text(status, "version"),
        text(status, "started_at"),
        number(journal, "end"),
        ByteSize(number(journal, "disk_bytes")),
    );
    let known = elements(status, "sinks");
    shown += &sinks(known);
    let others = status.get("dead_letters").and_then(Value::as_object).into_iter().flatten();
    for (sink, count) in others.filter(|(sink, _)| !known.iter().any(|known| text(known, "name") == *sink)) {
        shown += &format!("\n{count} dead letters of {sink}\n");
    }
    shown
}

fn sinks(sinks: &[Value]) -> String {
    let row = |sink: &Value| {
        let state = match (sink.get("paused"), text(sink, "breaker")) {
            (Some(Value::Bool(true)), _) => "paused",
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
