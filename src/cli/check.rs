//! `engage-relay check`: everything that is wrong with settings and rules.

use std::fmt::Write as _;
use std::process::ExitCode;
use std::time::Duration;

use serde_json::json;

use super::{BAD_CONFIGURATION, Global, print};
use crate::config::Problem;
use crate::journal::{self, kafka};
use crate::reload::{LoadError, Loaded};

#[derive(clap::Args)]
pub(super) struct Arguments {
    /// Also ask the brokers of a journal on Kafka: topics that are missing are made, the others checked
    #[arg(long)]
    connect: bool,
}

pub(super) fn run(global: &Global, arguments: &Arguments) -> anyhow::Result<ExitCode> {
    let (summary, problems, warnings) = match global.sources().load().0 {
        Ok(loaded) => {
            if arguments.connect {
                connect(&loaded)?;
            }
            let Loaded { config, rules, warnings, problems } = loaded;
            let (routes, sinks) = (rules.table.routes().len(), rules.sinks.len());
            let summary = format!("{}: ok, {routes} routes, {sinks} sinks", config.routes.display());
            (Some(summary), problems.into_iter().map(Problem::InFile).collect(), warnings)
        }
        Err(LoadError { problems, warnings }) => (None, problems, warnings),
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
        let summary = summary.unwrap_or_else(|| format!("{errors} errors; nothing would be applied"));
        print(&format!("{text}{summary}\n"))?;
    }
    Ok(if ok { ExitCode::SUCCESS } else { ExitCode::from(BAD_CONFIGURATION) })
}

fn connect(loaded: &Loaded) -> anyhow::Result<()> {
    let journal = &loaded.config.journal;
    if journal.kind == journal::Kind::Kafka {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        runtime.block_on(kafka::prepare(&journal.kafka(), Duration::ZERO))?;
    }
    Ok(())
}
