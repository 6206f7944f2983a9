//! `engage-relay drain`: waits until a running relay has nothing left to deliver.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use serde_json::Value;

use super::api::{Api, elements, number, table, text};
use super::{Global, print};

/// How long one request waits.
const WAIT: Duration = Duration::from_secs(1);

#[derive(clap::Args)]
pub(super) struct Arguments {
    /// How long to wait at most (10m); exit status 1 if something is left then [default: for ever]
    #[arg(long, value_name = "DURATION", value_parser = humantime::parse_duration)]
    timeout: Option<Duration>,
}

pub(super) fn run(global: &Global, arguments: &Arguments) -> anyhow::Result<ExitCode> {
    let (api, begun) = (Api::new(global)?, Instant::now());
    let progress = ProgressBar::new_spinner().with_style(ProgressStyle::with_template("{spinner} {elapsed} {msg}")?);
    let mut up_to: Option<i64> = None;
    let answer = loop {
        let left = arguments.timeout.map(|timeout| timeout.saturating_sub(begun.elapsed()));
        let wait = left.unwrap_or(WAIT).min(WAIT).as_secs_f64().to_string();
        let query: Vec<_> = [("wait", wait)].into_iter().chain(up_to.map(|at| ("up_to", at.to_string()))).collect();
        let answer = api.ask(&["drain"], &query)?;
        up_to = answer.get("up_to").and_then(Value::as_i64);
        let timed_out = left.is_some_and(|left| left.is_zero());
        if is_drained(&answer) || timed_out {
            break answer;
        }
        progress.set_message(waiting(&answer));
        progress.tick();
    };
    progress.finish_and_clear();
    print(&match (global.json, is_drained(&answer)) {
        (true, _) => format!("{answer}\n"),
        (false, true) => drained(&answer),
        (false, false) => remaining(&answer),
    })?;
    Ok(if is_drained(&answer) { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn is_drained(answer: &Value) -> bool {
    answer.get("drained") == Some(&Value::Bool(true))
}

fn drained(answer: &Value) -> String {
    let dead = match number(answer, "dead_letters") {
        0 => String::new(),
        dead => format!("; it keeps {dead} dead letters: replay or discard them before its disk is taken away"),
    };
    format!("drained: nothing is left to deliver{dead}\n")
}

/// The sinks that have something left.
fn left(answer: &Value) -> impl Iterator<Item = &Value> {
    elements(answer, "sinks").iter().filter(|sink| number(sink, "lag_events") + number(sink, "parked") > 0)
}

fn waiting(answer: &Value) -> String {
    let sink = |sink| {
        format!("{}: {} to read, {} parked", text(sink, "name"), number(sink, "lag_events"), number(sink, "parked"))
    };
    left(answer).map(sink).collect::<Vec<_>>().join("; ")
}

fn remaining(answer: &Value) -> String {
    let row = |sink: &Value| {
        let paused = if sink.get("paused") == Some(&Value::Bool(true)) { "paused" } else { "" };
        let (lag, parked) = (number(sink, "lag_events").to_string(), number(sink, "parked").to_string());
        vec![text(sink, "name").to_owned(), lag, parked, paused.to_owned()]
    };
    format!("not drained:\n{}", table(&["SINK", "LAG", "PARKED", ""], &left(answer).map(row).collect::<Vec<_>>()))
}
