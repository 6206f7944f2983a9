//! `engage-relay check`: everything that is wrong with settings and rules.

use std::fmt::Write as _;
use std::process::ExitCode;

use serde_json::json;

use super::{BAD_CONFIGURATION, Global, print};
use crate::document::{Problem, Severity};
use crate::rules::RulesError;

pub(super) fn run(global: &Global) -> anyhow::Result<ExitCode> {
    let (config, warnings) = global.settings()?;
    let (problems, counts) = match global.rules(&config) {
        Ok((rules, problems)) => (problems, Some((rules.table.route_names().len(), rules.sinks.len()))),
        Err(RulesError::Problems { problems }) => (problems, None),
        Err(error) => return Err(error.into()),
    };
    let errors = problems.iter().filter(|problem| problem.severity == Severity::Error).count();
    if global.json {
        let problems: Vec<_> = problems.iter().map(as_json).collect();
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

fn as_json(problem: &Problem) -> serde_json::Value {
    json!({
        "file": problem.file,
        "line": problem.line,
        "column": problem.column,
        "severity": if problem.severity == Severity::Error { "error" } else { "warning" },
        "message": problem.message,
    })
}
