//! `engage-relay diff`: what other rules would change.

use std::fmt::Write as _;
use std::fs::File;
use std::io::BufReader;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, bail};
use indicatif::{HumanCount, ProgressBar};
use serde::Deserialize;
use serde_json::value::RawValue;
use serde_json::{Map, Value, json};

use super::api::{Api, check_period, table, time};
use super::{Global, plain, print};
use crate::document::{Environment, Lookup, Problem, Unresolved};
use crate::event;
use crate::routing::{Change, Comparison, Diff, Example, RouteDiff, Table, Tally};
use crate::rules::{RulesError, routes_of};

/// How long a relay may take to read all that it keeps.
const TIMEOUT: Duration = Duration::from_secs(3600);

#[derive(clap::Args)]
pub(super) struct Arguments {
    /// The file with the new rules
    new: PathBuf,
    /// Only the newest events, so many
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(i64).range(1..))]
    last: Option<i64>,
    /// Only events received since: RFC 3339, or how long ago (2h) [default: all that are kept]
    #[arg(long, value_parser = time)]
    since: Option<String>,
    /// Only events received before: RFC 3339, or how long ago (2h) [default: now]
    #[arg(long, value_parser = time)]
    until: Option<String>,
    /// Compare with the rules of the settings, by the events of this file: needs no relay
    #[arg(long, value_name = "EVENTS", conflicts_with_all = ["last", "since", "until"])]
    file: Option<PathBuf>,
    /// With --file, the name of the token that the sender used, for rules on `token` [default: the first of the settings;
    /// `generated` or `none` without]
    #[arg(long)]
    token: Option<String>,
}

/// What came of it.
#[derive(Deserialize)]
struct Compared {
    problems: Vec<Problem>,
    diff: Option<Diff>,
}

pub(super) fn run(global: &Global, arguments: &Arguments) -> anyhow::Result<ExitCode> {
    let answer = match &arguments.file {
        Some(file) => compare_here(global, arguments, file)?,
        None => ask(global, arguments)?,
    };
    if global.json {
        print(&format!("{answer}\n"))?;
        return Ok(ExitCode::SUCCESS);
    }
    let Compared { problems, diff } = Compared::deserialize(&answer).context("not the answer of a relay")?;
    let warnings = problems.iter().map(|problem| format!("warning: {problem}\n")).collect::<String>();
    let diff = diff.context("the relay has compared nothing")?;
    print(&(warnings + &text(&diff)?))?;
    Ok(ExitCode::SUCCESS)
}

/// Lets a running relay compare.
fn ask(global: &Global, arguments: &Arguments) -> anyhow::Result<Value> {
    let (source, _, _) = read(&arguments.new, &Unresolved)?;
    let mut body = Map::new();
    body.insert("rules".to_owned(), json!(source));
    body.extend(arguments.last.map(|last| ("last".to_owned(), json!(last))));
    check_period(arguments.since.as_deref(), arguments.until.as_deref())?;
    let times = [("since", &arguments.since), ("until", &arguments.until)];
    body.extend(times.into_iter().filter_map(|(name, time)| Some((name.to_owned(), json!(time.as_ref()?)))));
    let progress = if global.json { ProgressBar::hidden() } else { ProgressBar::new_spinner() };
    progress.set_message("the relay reads its journal");
    progress.enable_steady_tick(Duration::from_millis(100));
    let mut answer = Api::new(global)?.within(TIMEOUT).post(&["diff"], &Value::Object(body))?;
    progress.finish_and_clear();
    for problem in answer.get_mut("problems").and_then(Value::as_array_mut).into_iter().flatten() {
        if let Some(file) = problem.get_mut("file") {
            *file = json!(arguments.new);
        }
    }
    let Compared { problems, diff } = Compared::deserialize(&answer).context("not the answer of a relay")?;
    if diff.is_none() {
        return Err(RulesError::Problems { problems }.into());
    }
    Ok(answer)
}

/// Compares with the configured rules.
fn compare_here(global: &Global, arguments: &Arguments, file: &Path) -> anyhow::Result<Value> {
    let (config, _) = global.settings()?;
    let (_, before, _) = read(&config.routes, &Environment)?;
    let (_, after, problems) = read(&arguments.new, &Environment)?;
    let token = arguments.token.as_deref().unwrap_or(config.ingress.auth.first_name());
    let mut comparison = Comparison::new(&before, &after);
    let events = File::open(file).with_context(|| format!("can't read {}", file.display()))?;
    let bodies = serde_json::Deserializer::from_reader(BufReader::new(events)).into_iter::<Box<RawValue>>();
    for (number, body) in (1..).zip(bodies) {
        let body = body.with_context(|| format!("{}: not JSON", file.display()))?;
        let events = event::sample(body.get().as_bytes(), token);
        let events = events.with_context(|| format!("{}: number {number}", file.display()))?;
        events.iter().for_each(|event| comparison.add(event));
    }
    let diff = comparison.finish();
    if diff.events == 0 {
        bail!("{} has no events", file.display());
    }
    Ok(json!({ "ok": true, "problems": problems, "diff": diff }))
}

/// A file of rules: its text, its routes, and warnings.
fn read(path: &Path, lookup: &dyn Lookup) -> Result<(String, Table, Vec<Problem>), RulesError> {
    let file = path.display().to_string();
    let source = std::fs::read_to_string(path).map_err(|source| RulesError::Read { file: file.clone(), source })?;
    let (table, warnings) = routes_of(&file, &source, lookup)?;
    Ok((source, table, warnings))
}

/// For people.
fn text(diff: &Diff) -> Result<String, std::fmt::Error> {
    let mut text = format!("{} events", HumanCount(diff.events));
    if let (Some(since), Some(until)) = (&diff.since, &diff.until) {
        write!(text, ", received from {since} to {until}")?;
    }
    match diff.changed {
        0 => writeln!(text, "; none would go elsewhere\n")?,
        changed => writeln!(text, "; {} would go elsewhere\n", HumanCount(changed))?,
    }
    let mut rows: Vec<_> = diff.sinks.iter().map(|sink| row(&sink.sink, sink.change, &sink.tally)).collect();
    rows.push(row("(unrouted)", Change::Kept, &diff.unrouted));
    text += &aligned(&["SINK", "BEFORE", "AFTER", "GAINS", "LOSES", "UNCHANGED", ""], rows);
    text.push('\n');
    text += &aligned(&["ROUTE", "BEFORE", "AFTER", ""], diff.routes.iter().map(route).collect());
    for sink in &diff.sinks {
        examples(&mut text, &format!("{} would gain", sink.sink), &sink.tally.gained)?;
        examples(&mut text, &format!("{} would lose", sink.sink), &sink.tally.lost)?;
    }
    examples(&mut text, "no route would match any more", &diff.unrouted.gained)?;
    examples(&mut text, "a route would match now", &diff.unrouted.lost)?;
    Ok(text)
}

fn row(name: &str, change: Change, tally: &Tally) -> Vec<String> {
    let signed = |sign: &str, count: u64| match count {
        0 => String::new(),
        count => format!("{sign}{}", HumanCount(count)),
    };
    vec![
        name.to_owned(),
        HumanCount(tally.before).to_string(),
        HumanCount(tally.after).to_string(),
        signed("+", tally.gains),
        signed("-", tally.loses),
        HumanCount(tally.unchanged).to_string(),
        word(change).to_owned(),
    ]
}

fn route(RouteDiff { route, change, before, after }: &RouteDiff) -> Vec<String> {
    let note = match (change, before, after) {
        (Change::Removed, ..) => word(*change),
        (Change::Added, _, 0) => "new; matches nothing",
        (Change::Added, ..) => word(*change),
        (Change::Kept, 0, 0) => "matches nothing",
        (Change::Kept, _, 0) => "matches nothing any more",
        (Change::Kept, ..) => "",
    };
    let count = |count: &u64, is_there: bool| if is_there { HumanCount(*count).to_string() } else { String::new() };
    let before = count(before, *change != Change::Added);
    vec![route.clone(), before, count(after, *change != Change::Removed), note.to_owned()]
}

fn word(change: Change) -> &'static str {
    match change {
        Change::Kept => "",
        Change::Added => "new",
        Change::Removed => "gone",
    }
}

/// A table with names at the left, notes at the right, and numbers between, of which the last digits stand below each other.
fn aligned(headings: &[&str], rows: Vec<Vec<String>>) -> String {
    let mut all = vec![headings.iter().map(|&heading| heading.to_owned()).collect::<Vec<_>>()];
    all.extend(rows);
    for column in 1..headings.len().saturating_sub(1) {
        let cells = all.iter().filter_map(|row| row.get(column)).map(String::len);
        let width = cells.max().unwrap_or(0);
        for cell in all.iter_mut().filter_map(|row| row.get_mut(column)) {
            *cell = format!("{cell:>width$}");
        }
    }
    let headings: Vec<_> = all.first().into_iter().flatten().map(String::as_str).collect();
    table(&headings, all.get(1..).unwrap_or_default())
}

fn examples(text: &mut String, what: &str, examples: &[Example]) -> std::fmt::Result {
    if !examples.is_empty() {
        writeln!(text, "\n{what}, for example")?;
    }
    for Example { event_id, received_at, status, sender, campaign, before, after } in examples {
        let shown = |text: &Option<String>| plain(text.as_deref().unwrap_or("-"));
        let routes = |routes: &[String]| if routes.is_empty() { "no route".to_owned() } else { routes.join(", ") };
        let (status, sender, campaign) = (shown(status), shown(sender), shown(campaign));
        writeln!(text, "  {event_id}  {received_at}  {status}  sender {sender}  campaign {campaign}")?;
        writeln!(text, "    matches {}; would match {}", routes(before), routes(after))?;
    }
    Ok(())
}
