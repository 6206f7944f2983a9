//! `engage-relay check`: everything that is wrong with settings and rules.

use std::fmt::Write as _;
use std::process::ExitCode;
use std::time::Duration;

use serde_json::json;

use super::{BAD_CONFIGURATION, Global, counted, print};
use crate::config::Problem;
use crate::journal;
use crate::journal::kafka::{self, OpenError};
use crate::reload::{LoadError, Loaded};

#[derive(clap::Args)]
pub(super) struct Arguments {
    /// Also ask the brokers of a journal on Kafka: topics that are missing are made, the others checked, and a group is joined
    #[arg(long)]
    connect: bool,
}

pub(super) fn run(global: &Global, arguments: &Arguments) -> anyhow::Result<ExitCode> {
    let (summary, problems, warnings, code) = match global.sources().load().0 {
        Ok(loaded) => {
            let refused = if arguments.connect { connect(&loaded)? } else { Ok(()) };
            let Loaded { config, rules, warnings, problems } = loaded;
            let routes = counted(rules.table.routes().len(), "route");
            let sinks = counted(rules.sinks.len(), "sink");
            let summary = format!("{}: ok, {routes}, {sinks}", config.routes.display());
            let mut problems: Vec<_> = problems.into_iter().map(Problem::InFile).collect();
            match refused {
                Ok(()) => (Some(summary), problems, warnings, ExitCode::SUCCESS),
                Err((refused, code)) => {
                    problems.extend(refused.into_iter().map(Problem::from));
                    (None, problems, warnings, code)
                }
            }
        }
        Err(LoadError { problems, warnings }) => (None, problems, warnings, BAD_CONFIGURATION.into()),
    };
    let ok = summary.is_some();
    if global.json {
        print(&format!("{}\n", json!({ "ok": ok, "problems": problems, "warnings": warnings })))?;
    } else {
        let mut text = String::new();
        for warning in &warnings {
            writeln!(text, "warning: {warning}")?;
        }
        for problem in &problems {
            writeln!(text, "{}: {problem}", if problem.is_error() { "error" } else { "warning" })?;
        }
        let errors = problems.iter().filter(|problem| problem.is_error()).count();
        let summary = summary.unwrap_or_else(|| format!("{}; nothing would be applied", counted(errors, "error")));
        print(&format!("{text}{summary}\n"))?;
    }
    Ok(code)
}

/// Whether brokers are as the settings need them, or else all that is wrong and the exit status that says so.
fn connect(loaded: &Loaded) -> anyhow::Result<Result<(), (Vec<String>, ExitCode)>> {
    let journal = &loaded.config.journal;
    if journal.kind != journal::Kind::Kafka {
        return Ok(Ok(()));
    }
    let (config, refused) = (journal.kafka(), ExitCode::from(BAD_CONFIGURATION));
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    Ok(match runtime.block_on(kafka::prepare(&config, Duration::ZERO)) {
        Ok(_) => kafka::try_to_join(&config).map_err(|problem| (vec![problem], refused)),
        Err(OpenError::Topics(problems)) => Err((problems, refused)),
        // The settings may be right.
        Err(error @ (OpenError::Unreachable { .. } | OpenError::Client(_))) => {
            Err((vec![error.to_string()], ExitCode::FAILURE))
        }
    })
}
