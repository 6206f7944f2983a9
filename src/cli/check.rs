//! `engage-relay check`: everything that is wrong with settings and rules.

use std::fmt::Write as _;
use std::process::ExitCode;
use std::time::Duration;

use serde_json::json;

use super::{BAD_CONFIGURATION, Global, print};
use crate::document::Severity;
use crate::journal::{self, kafka};
use crate::reload::disagreements;
use crate::rules::RulesError;

#[derive(clap::Args)]
pub(super) struct Arguments {
    /// Also ask the brokers of a journal on Kafka: topics that are missing are made, the others checked
    #[arg(long)]
    connect: bool,
}

pub(super) fn run(global: &Global, arguments: &Arguments) -> anyhow::Result<ExitCode> {
    let (config, mut warnings) = global.settings()?;
    warnings.extend(config.check_certificates()?);
    if arguments.connect && config.journal.kind == journal::Kind::Kafka {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        runtime.block_on(kafka::prepare(&config.journal.kafka(), Duration::ZERO))?;
    }
    let (problems, counts) = match global.rules(&config) {
        Ok((rules, problems)) => {
            warnings.extend(disagreements(&config, &rules));
            (problems, Some((rules.table.routes().len(), rules.sinks.len())))
        }
        Err(RulesError::Problems { problems }) => (problems, None),
        Err(error) => return Err(error.into()),
    };
    let errors = problems.iter().filter(|problem| problem.severity == Severity::Error).count();
    if global.json {
        print(&format!("{}\n", json!({ "ok": errors == 0, "problems": problems, "warnings": warnings })))?;
    } else {
        let mut text = String::new();
        for warning in &warnings {
            writeln!(text, "warning: {warning}")?;
        }
        for problem in &problems {
            writeln!(text, "{}: {problem}", if problem.severity == Severity::Error { "error" } else { "warning" })?;
        }
        match counts {
            Some((routes, sinks)) => writeln!(text, "{}: ok, {routes} routes, {sinks} sinks", config.routes.display())?,
            None => writeln!(text, "{}: {errors} errors; nothing would be applied", config.routes.display())?,
        }
        print(&text)?;
    }
    Ok(if errors == 0 { ExitCode::SUCCESS } else { ExitCode::from(BAD_CONFIGURATION) })
}
