//! `engage-relay explain`: where an event would go, and what each sink would be sent.

use std::fmt::Write as _;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context as _;
use serde_json::json;

use super::{Global, plain, print};
use crate::event;
use crate::routing::{Mismatch, Outcome};
use crate::rules::{Destination, Explained};

#[derive(clap::Args)]
pub(super) struct Arguments {
    /// The event, or an array of them; `-` is standard input [default: -]
    file: Option<PathBuf>,
    /// The name of the token that the sender used, for rules on `token` [default: the first of the settings; `generated`
    /// or `none` without]
    #[arg(long)]
    token: Option<String>,
}

pub(super) fn run(global: &Global, arguments: &Arguments) -> anyhow::Result<ExitCode> {
    let (config, _) = global.settings()?;
    let (rules, _) = global.rules(&config)?;
    let body = match arguments.file.as_deref().filter(|path| *path != Path::new("-")) {
        Some(path) => std::fs::read(path).with_context(|| format!("can't read {}", path.display()))?,
        None => {
            let mut body = Vec::new();
            std::io::stdin().read_to_end(&mut body).context("can't read standard input")?;
            body
        }
    };
    let token = arguments.token.as_deref().unwrap_or(config.ingress.auth.first_name());
    let events = event::sample(&body, token)?;
    let explained: Vec<_> = events.iter().map(|event| rules.explain(event)).collect();
    let text = match global.json {
        true => format!("{}\n", json!(explained)),
        false => explained.iter().map(text).collect::<Result<Vec<_>, _>>()?.join("\n"),
    };
    print(&text)?;
    Ok(ExitCode::SUCCESS)
}

/// For people.
fn text(explained: &Explained) -> Result<String, std::fmt::Error> {
    let mut text = format!("event {}\n\nroutes\n", explained.event_id);
    for route in &explained.routes {
        match &route.outcome {
            Outcome::Matched { to, is_final } => {
                let last = if *is_final { "; final, so that no route below is tried" } else { "" };
                writeln!(text, "  + {}: matches, to {}{last}", route.route, to.join(", "))?;
            }
            Outcome::NotMatched { because } => {
                writeln!(text, "  - {}: does not match", route.route)?;
                for Mismatch { field, wanted, found } in because {
                    let found = found.as_ref().map_or_else(|| "nothing".to_owned(), |found| format!("{found:?}"));
                    writeln!(text, "      {field} should be {wanted}, the event has {found}")?;
                }
            }
            Outcome::NotTried { after } => writeln!(text, "  . {}: not tried, since {after} is final", route.route)?,
        }
    }
    if explained.sinks.is_empty() {
        writeln!(text, "\nno sink; the event would be unrouted")?;
    }
    for Destination { sink, route, sent, error } in &explained.sinks {
        writeln!(text, "\nsink {sink} (by route {route})")?;
        if let Some(preview) = sent {
            for (label, value) in &preview.target {
                writeln!(text, "  {label}: {}", plain(value))?;
            }
            writeln!(text, "  headers:")?;
            for (name, value) in &preview.headers {
                writeln!(text, "    {name}: {}", plain(value))?;
            }
        }
        if let Some(error) = error {
            writeln!(text, "  can't be sent: {}", plain(error))?;
        }
    }
    Ok(text)
}
