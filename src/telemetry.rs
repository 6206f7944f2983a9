//! Logs, on standard error: text for people, JSON for machines.

use std::io::IsTerminal as _;

use serde::Deserialize;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::ParseError;

/// The `[telemetry]` settings.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// A level (`info`), or filter directives (`info,engage_relay::lane=debug`).
    pub log: String,
    /// How lines look.
    pub log_format: LogFormat,
    /// Where traces go. Has no effect yet.
    pub otlp_endpoint: Option<String>,
}

/// How log lines look.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// Text on a terminal, else JSON.
    Auto,
    /// Text.
    Text,
    /// One JSON object a line.
    Json,
}

impl Default for Config {
    fn default() -> Self {
        Self { log: "info".to_owned(), log_format: LogFormat::Auto, otlp_endpoint: None }
    }
}

impl Config {
    /// What is wrong with the settings, if anything.
    pub fn problem(&self) -> Option<String> {
        self.filter().err().map(|error| format!("telemetry.log is {:?}: {error}", self.log))
    }

    /// lapin logs returned messages with their bodies; the sink says what an operator needs of them.
    fn filter(&self) -> Result<EnvFilter, ParseError> {
        EnvFilter::try_new(format!("lapin=off,{}", self.log))
    }

    /// Sends this process's logs to standard error. Without effect where somebody has set a subscriber already.
    pub fn init(&self) {
        let filter = self.filter().unwrap_or_default();
        let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
        let terminal = std::io::stderr().is_terminal();
        let json = match self.log_format {
            LogFormat::Auto => !terminal,
            LogFormat::Text => false,
            LogFormat::Json => true,
        };
        // A test may have set one up before.
        drop(if json { builder.json().flatten_event(true).try_init() } else { builder.with_ansi(terminal).try_init() });
    }
}
