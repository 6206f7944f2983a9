//! `engage-relay check`: everything that is wrong with settings and rules.

use std::fmt::Write as _;
use std::process::ExitCode;

use serde_json::json;

use super::{BAD_CONFIGURATION, Global, print};
use crate::document::Severity;
use crate::rules::RulesError;

pub(super) fn run(global: &Global) -> anyhow::Result<ExitCode> {
    let (config, mut warnings) = global.settings()?;
    warnings.extend(config.check_certificates()?);
    let (problems, counts) = match global.rules(&config) {
        Ok((rules, problems)) => (problems, Some((rules.table.routes().len(), rules.sinks.len()))),
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
