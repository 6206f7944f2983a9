//! `engage-relay explain`: where an event would go, and what each sink would be sent.

use std::fmt::Write as _;
use std::io::Read as _;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::SystemTime;

use anyhow::Context as _;
use serde_json::json;

use super::{Global, print};
use crate::event::{self, Event};
use crate::routing::{Explanation, Mismatch, Outcome, Scratch};
use crate::rules::Rules;
use crate::sink::{Attempt, DeliveryError, Preview};

#[derive(clap::Args)]
pub(super) struct Arguments {
    /// The event, or an array of them [default: standard input]
    file: Option<PathBuf>,
    /// The name of the token that the sender used, for rules on `token`
    #[arg(long, default_value = "aivo")]
    token: String,
}

/// What would become of one event.
struct Explained {
    event: Event,
    routes: Vec<Explanation>,
    sinks: Vec<(String, String, Result<Preview, DeliveryError>)>,
}

pub(super) fn run(global: &Global, arguments: &Arguments) -> anyhow::Result<ExitCode> {
    let (config, _) = global.settings()?;
    let (rules, _) = global.rules(&config)?;
    let body = match &arguments.file {
        Some(path) => std::fs::read(path).with_context(|| format!("can't read {}", path.display()))?,
        None => {
            let mut body = Vec::new();
            std::io::stdin().read_to_end(&mut body).context("can't read standard input")?;
            body
        }
    };
    let explained = event::parse(&body)?
        .iter()
        .map(|parsed| {
            let mut record = Vec::new();
            parsed.encode(parsed.id(), SystemTime::now(), &arguments.token, None, &mut record);
            Ok(Explained::new(Event::decode(record.into())?, &rules))
        })
        .collect::<anyhow::Result<Vec<_>>>()?;
    let text = if global.json {
        format!("{}\n", json!(explained.iter().map(Explained::json).collect::<Vec<_>>()))
    } else {
        explained.iter().map(Explained::text).collect::<Result<Vec<_>, _>>()?.join("\n")
    };
    print(&text)?;
    Ok(ExitCode::SUCCESS)
}

impl Explained {
    fn new(event: Event, rules: &Rules) -> Self {
        let mut scratch = Scratch::default();
        let sinks = rules.table.matches(&event, &mut scratch).iter().filter_map(|found| {
            let route = rules.table.route_name(found.route);
            let name = rules.table.sinks().get(found.sink.0)?;
            let sink = rules.sinks.iter().find(|sink| sink.name == *name)?;
            let preview = sink.sink.preview(name, &event, &Attempt { number: 1, route });
            Some((name.clone(), route.to_owned(), preview))
        });
        let sinks = sinks.collect();
        Self { routes: rules.table.explain(&event), event, sinks }
    }

    fn json(&self) -> serde_json::Value {
        let sinks = self.sinks.iter().map(|(sink, route, preview)| match preview {
            Ok(preview) => json!({ "sink": sink, "route": route, "sent": preview }),
            Err(error) => json!({ "sink": sink, "route": route, "error": error.text }),
        });
        json!({
            "event_id": self.event.id().to_string(),
            "routes": self.routes,
            "sinks": sinks.collect::<Vec<_>>(),
        })
    }

    fn text(&self) -> Result<String, std::fmt::Error> {
        let mut text = format!("event {}\n\nroutes\n", self.event.id());
        for route in &self.routes {
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
                Outcome::NotTried { after } => {
                    writeln!(text, "  . {}: not tried, since {after} is final", route.route)?
                }
            }
        }
        if self.sinks.is_empty() {
            writeln!(text, "\nno sink; the event would be unrouted")?;
        }
        for (sink, route, preview) in &self.sinks {
            writeln!(text, "\nsink {sink} (by route {route})")?;
            match preview {
                Ok(preview) => {
                    for (label, value) in &preview.target {
                        writeln!(text, "  {label}: {value}")?;
                    }
                    writeln!(text, "  headers:")?;
                    for (name, value) in &preview.headers {
                        writeln!(text, "    {name}: {value}")?;
                    }
                }
                Err(error) => writeln!(text, "  can't be sent: {}", error.text)?,
            }
        }
        Ok(text)
    }
}
