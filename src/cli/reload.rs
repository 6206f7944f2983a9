//! `engage-relay reload`: a running relay reads its files again.

use std::process::ExitCode;

use serde_json::Value;

use super::api::{Api, elements, text};
use super::{Global, print};

pub(super) fn run(global: &Global) -> anyhow::Result<ExitCode> {
    let reload = Api::new(global)?.ask(&["reload"], &[])?;
    if global.json {
        print(&format!("{reload}\n"))?;
        return Ok(ExitCode::SUCCESS);
    }
    let warnings = elements(&reload, "problems").iter().filter_map(Value::as_str);
    let warnings: String = warnings.map(|warning| format!("warning: {warning}\n")).collect();
    print(&format!("{warnings}{}\n", text(&reload, "outcome")))?;
    Ok(ExitCode::SUCCESS)
}
