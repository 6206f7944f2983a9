//! `engage-relay dead-letters`: listing them, trying them again, discarding them.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::process::ExitCode;

use anyhow::{bail, ensure};
use clap::Subcommand;
use indicatif::ProgressBar;
use serde_json::value::RawValue;
use serde_json::{Map, Value, json};

use super::api::{Api, check_period, elements, number, table, text, time};
use super::{Global, Usage, bar, examples, plain, print};

/// How many one request takes when no rate is asked for.
const CHUNK: u64 = 1000;

/// A dead letter with its event, which may be nested deeper than a [`Value`] can be.
type Shown = BTreeMap<String, Box<RawValue>>;

#[derive(Subcommand)]
pub(super) enum Command {
    /// List dead letters, oldest number first
    #[command(after_help = examples::LIST)]
    List {
        #[command(flatten)]
        filter: Filter,
        /// How many at most
        #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u64).range(1..=10_000))]
        limit: u64,
        /// Only those with a higher number: the next page
        #[arg(long)]
        after: Option<i64>,
    },
    /// Show one, with the whole event
    #[command(after_help = examples::SHOW)]
    Show {
        /// Its number
        id: i64,
    },
    /// Try them again, from the first attempt
    #[command(after_help = examples::REPLAY_LETTERS)]
    Replay {
        #[command(flatten)]
        which: Which,
        /// Another sink than they died at. Those of `unrouted` go where the rules now say, unless this says otherwise
        #[arg(long, value_name = "SINK")]
        to: Option<String>,
        /// How many a second
        #[arg(long, conflicts_with = "ids", value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
        rate: Option<u32>,
    },
    /// Discard them, for good
    #[command(after_help = examples::DISCARD)]
    Discard {
        #[command(flatten)]
        which: Which,
    },
}

#[derive(clap::Args)]
pub(super) struct Which {
    /// Their numbers; or a filter; or --all
    #[arg(conflicts_with_all = ["all", "Filter"])]
    ids: Vec<i64>,
    /// All of them
    #[arg(long)]
    all: bool,
    #[command(flatten)]
    filter: Filter,
}

#[derive(clap::Args)]
pub(super) struct Filter {
    /// Of this sink
    #[arg(long)]
    sink: Option<String>,
    /// Of events with this status
    #[arg(long)]
    status: Option<String>,
    /// Dead for this reason: rejected, exhausted, expired, unrouted, sink_removed, unreadable
    #[arg(long)]
    reason: Option<String>,
    /// Whose last attempt failed with this, such as http_400
    #[arg(long)]
    error_kind: Option<String>,
    /// Dead since: RFC 3339, or how long ago (2h)
    #[arg(long, value_parser = time)]
    since: Option<String>,
    /// Dead before: RFC 3339, or how long ago (2h)
    #[arg(long, value_parser = time)]
    until: Option<String>,
    /// With this value of what their order was kept by
    #[arg(long)]
    key: Option<String>,
    /// Of this event
    #[arg(long)]
    event_id: Option<String>,
}

pub(super) fn run(global: &Global, command: &Command) -> anyhow::Result<ExitCode> {
    let api = Api::new(global)?;
    match command {
        Command::List { filter, limit, after } => {
            let mut query = filter.pairs()?;
            query.push(("limit", limit.to_string()));
            query.extend(after.map(|after| ("after", after.to_string())));
            let page: Value = api.get(&["dead-letters"], &query)?;
            print(&if global.json { format!("{page}\n") } else { list(&page) })?;
        }
        Command::Show { id } => {
            let letter: Shown = api.get(&["dead-letters", &id.to_string()], &[])?;
            print(&if global.json { serde_json::to_string(&letter)? + "\n" } else { show(&letter)? })?;
        }
        Command::Replay { which, to, rate } => {
            let mut options = Map::new();
            options.extend(to.as_ref().map(|to| ("to".to_owned(), json!(to))));
            let one = |id: &str| api.post(&["dead-letters", id, "replay"], &Value::Object(options.clone()));
            let done = if which.ids.is_empty() {
                options.extend(rate.map(|rate| ("rate".to_owned(), json!(rate))));
                // With a rate, about a second's worth, so that progress shows.
                let limit = rate.map_or(CHUNK, |rate| u64::from(rate).clamp(1, CHUNK));
                which.bulk(global, &api, "replay", &options, limit)?
            } else {
                each(&which.ids, one)
            };
            done.print(global, "replayed")?;
        }
        Command::Discard { which } => {
            let done = match which.ids.is_empty() {
                true => which.bulk(global, &api, "discard", &Map::new(), CHUNK)?,
                false => each(&which.ids, |id| api.delete(&["dead-letters", id])),
            };
            done.print(global, "discarded")?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// One after the other, whatever becomes of those before.
fn each(ids: &[i64], act: impl Fn(&str) -> anyhow::Result<Value>) -> Done {
    let mut done = Done::default();
    for id in ids {
        match act(&id.to_string()) {
            Ok(answer) => done.add(&answer),
            Err(error) => done.failed.push((*id, error)),
        }
    }
    done
}

#[derive(Default)]
struct Done {
    done: u64,
    skipped: u64,
    /// The numbers of those that could not be, and why.
    failed: Vec<(i64, anyhow::Error)>,
}

impl Done {
    fn add(&mut self, answer: &Value) {
        self.done += number(answer, "done");
        self.skipped += number(answer, "skipped");
    }

    /// Says what was done. What could not be is an error.
    fn print(&self, global: &Global, what: &str) -> anyhow::Result<()> {
        let Self { done, skipped, failed } = self;
        let ids: Vec<_> = failed.iter().map(|(id, _)| id).collect();
        print(&match (global.json, skipped) {
            (true, _) => format!("{}\n", json!({ what: done, "skipped": skipped, "failed": ids })),
            (false, 0) => format!("{done} {what}\n"),
            (false, _) => format!("{done} {what}; {skipped} not, since no sink of the rules is theirs: see --to\n"),
        })?;
        let reasons: Vec<_> = failed.iter().map(|(id, error)| format!("{id} could not be {what}: {error:#}")).collect();
        ensure!(reasons.is_empty(), reasons.join("\n"));
        Ok(())
    }
}

impl Which {
    /// Does it request by request, until nothing is left.
    fn bulk(
        &self,
        global: &Global,
        api: &Api,
        action: &str,
        options: &Map<String, Value>,
        limit: u64,
    ) -> anyhow::Result<Done> {
        let filter = self.filter.pairs()?;
        if filter.is_empty() && !self.all {
            bail!(Usage("which dead letters? Give their numbers, a filter such as --sink, or --all"));
        }
        let mut body = options.clone();
        body.extend(filter.into_iter().map(|(name, value)| (name.to_owned(), json!(value))));
        body.insert("limit".to_owned(), json!(limit));
        let progress = if global.json { ProgressBar::hidden() } else { ProgressBar::new(0) };
        progress.set_style(bar()?);
        let mut done = Done::default();
        loop {
            let answer = api.post(&["dead-letters", action], &Value::Object(body.clone()))?;
            done.add(&answer);
            let remaining = number(&answer, "remaining");
            let seen = done.done + done.skipped;
            progress.set_length(seen + remaining);
            progress.set_position(seen);
            if remaining == 0 {
                progress.finish_and_clear();
                return Ok(done);
            }
            for (to, from) in [("after", "last"), ("up_to", "up_to")] {
                body.insert(to.to_owned(), answer.get(from).cloned().unwrap_or_default());
            }
        }
    }
}

impl Filter {
    fn pairs(&self) -> anyhow::Result<Vec<(&'static str, String)>> {
        check_period(self.since.as_deref(), self.until.as_deref())?;
        let fields = [
            ("sink", &self.sink),
            ("status", &self.status),
            ("reason", &self.reason),
            ("error_kind", &self.error_kind),
            ("since", &self.since),
            ("until", &self.until),
            ("key", &self.key),
            ("event_id", &self.event_id),
        ];
        Ok(fields.into_iter().filter_map(|(name, value)| Some((name, value.clone()?))).collect())
    }
}

fn list(page: &Value) -> String {
    let letters = elements(page, "dead_letters");
    let row = |letter: &Value| {
        let error = format!("{}: {}", text(letter, "error_kind"), text(letter, "error"));
        let [sink, reason, died_at, status, event_id] =
            ["sink", "reason", "died_at", "status", "event_id"].map(|field| text(letter, field).to_owned());
        vec![
            number(letter, "id").to_string(),
            sink,
            reason,
            died_at,
            status,
            number(letter, "attempts").to_string(),
            event_id,
            error,
        ]
    };
    let headings = ["ID", "SINK", "REASON", "DIED AT", "STATUS", "ATTEMPTS", "EVENT", "ERROR"];
    let mut shown = table(&headings, &letters.iter().map(row).collect::<Vec<_>>());
    if let Some(next) = page.get("next").and_then(Value::as_i64) {
        shown += &format!("\nthere are more: --after {next}\n");
    }
    shown
}

fn show(letter: &Shown) -> Result<String, std::fmt::Error> {
    let mut shown = String::new();
    for (field, value) in letter.iter().filter(|(field, _)| *field != "body") {
        let text = serde_json::from_str::<String>(value.get());
        writeln!(shown, "{field:16} {}", plain(text.as_deref().unwrap_or(value.get())))?;
    }
    let body = letter.get("body").map_or("null", |body| body.get());
    shown.push('\n');
    // As it was received: how it is written may be why it was refused.
    for line in body.lines() {
        writeln!(shown, "{}", plain(line))?;
    }
    Ok(shown)
}
