//! `engage-relay replay`: sends events again that the journal still keeps.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, bail};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Map, Value, json};

use super::api::{Api, check_period, number, time};
use super::{Global, Usage, print};

/// How many one request takes when no rate is asked for.
const CHUNK: u64 = 1000;

#[derive(clap::Args)]
pub(super) struct Arguments {
    /// To which sink; only what the rules send there is sent again
    #[arg(long)]
    sink: String,
    /// Received since: RFC 3339, or how long ago (2h) [default: all that is kept]
    #[arg(long, value_parser = time)]
    since: Option<String>,
    /// Received before: RFC 3339, or how long ago (2h) [default: now]
    #[arg(long, value_parser = time)]
    until: Option<String>,
    /// Only events for which this holds, written as in a route: 'status = "error"'
    #[arg(long, value_name = "CONDITIONS")]
    when: Option<String>,
    /// How many a second
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    rate: Option<u32>,
}

pub(super) fn run(global: &Global, arguments: &Arguments) -> anyhow::Result<ExitCode> {
    let api = Api::new(global)?;
    let limit = arguments.rate.map_or(CHUNK, |rate| u64::from(rate).clamp(1, CHUNK));
    let mut body = Map::new();
    let mut say = |name: &str, value: Value| drop(body.insert(name.to_owned(), value));
    say("sink", json!(arguments.sink));
    say("limit", json!(limit));
    check_period(arguments.since.as_deref(), arguments.until.as_deref())?;
    let times = [("since", &arguments.since), ("until", &arguments.until)];
    times.into_iter().filter(|(_, time)| time.is_some()).for_each(|(name, time)| say(name, json!(time)));
    if let Some(when) = &arguments.when {
        say("when", Value::Object(conditions(when)?));
    }
    let progress = if global.json { ProgressBar::hidden() } else { ProgressBar::new(0) };
    progress.set_style(ProgressStyle::with_template("{bar:40} {pos}/{len} events looked at, {msg} sent again {eta}")?);
    let (mut replayed, mut scanned) = (0, 0);
    loop {
        let answer = api.post(&["replay"], &Value::Object(body.clone()))?;
        let (count, up_to) = (number(&answer, "replayed"), number(&answer, "up_to"));
        replayed += count;
        scanned += number(&answer, "scanned");
        let next = answer.get("next").and_then(Value::as_u64);
        progress.set_length(scanned + next.map_or(0, |next| up_to.saturating_sub(next)));
        progress.set_position(scanned);
        progress.set_message(replayed.to_string());
        let Some(next) = next else { break };
        body.insert("from".to_owned(), json!(next));
        body.insert("up_to".to_owned(), json!(up_to));
        body.insert("until".to_owned(), answer.get("until").cloned().unwrap_or_default());
        if let Some(rate) = arguments.rate {
            std::thread::sleep(Duration::from_secs(count) / rate);
        }
    }
    progress.finish_and_clear();
    print(&match global.json {
        true => format!("{}\n", json!({ "replayed": replayed, "scanned": scanned })),
        false => format!("{replayed} events sent again to {}, of {scanned} looked at\n", arguments.sink),
    })?;
    Ok(ExitCode::SUCCESS)
}

/// Conditions as a route has them, with or without the braces of an inline table.
fn conditions(when: &str) -> anyhow::Result<Map<String, Value>> {
    let when = when.trim();
    let source = if when.starts_with('{') { format!("when = {when}") } else { format!("when = {{ {when} }}") };
    let mut parsed: Map<String, Value> =
        toml::from_str(&source).context(Usage("--when is not written as in a route"))?;
    match parsed.remove("when") {
        Some(Value::Object(conditions)) => Ok(conditions),
        Some(_) | None => bail!(Usage("--when has no conditions")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn conditions_are_written_as_in_a_route() {
        let expected = json!({ "status": "error", "sender_id": { "prefix": "54" } });
        for when in ["status = 'error', sender_id = { prefix = '54' }", "{ status = 'error', sender_id.prefix = '54' }"]
        {
            assert_eq!(Value::Object(conditions(when).unwrap()), expected);
        }
        assert!(conditions("status").is_err());
    }
}
