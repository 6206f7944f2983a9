//! Logs, on standard error: text for people, JSON for machines. And traces, where the settings ask for them.

mod throttle;
mod traces;

use std::io::IsTerminal as _;
use std::sync::Arc;

use arc_swap::ArcSwap;
use serde::Deserialize;
use tracing_subscriber::filter::{LevelFilter, ParseError};
use tracing_subscriber::layer::{Layer as _, SubscriberExt as _};
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{EnvFilter, Registry, fmt, reload};

pub use throttle::Throttle;
pub use traces::{Begin, Headers, OtlpProtocol, Span, Traces, TracesError};

/// What is logged where nothing is said.
const DEFAULT_LEVEL: &str = "info";

/// The `[telemetry]` settings.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// A level (`info`), or filter directives (`info,engage_relay::lane=debug`).
    pub log: String,
    /// How lines look.
    pub log_format: LogFormat,
    /// The collector that traces go to; without it there are none.
    pub otlp_endpoint: Option<String>,
    /// How they travel.
    pub otlp_protocol: OtlpProtocol,
    /// What the collector wants beside them, such as a token.
    pub otlp_headers: Headers,
    /// The part of requests that is traced, unless the sender has decided; 0 to 1.
    pub trace_sample: f64,
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
        Self {
            log: DEFAULT_LEVEL.to_owned(),
            log_format: LogFormat::Auto,
            otlp_endpoint: None,
            otlp_protocol: OtlpProtocol::Grpc,
            otlp_headers: Headers::default(),
            trace_sample: 1.0,
        }
    }
}

impl Config {
    /// What is wrong with the settings. Each problem names its setting first.
    pub fn problems(&self) -> Vec<String> {
        let log = self.filter().err().map(|error| format!("telemetry.log is {:?}: {error}", self.log));
        log.into_iter().chain(traces::problems(self)).collect()
    }

    /// The settings that have no effect in a running process, with the others left out.
    pub fn unchangeable(&self) -> Self {
        Self { log: String::new(), ..self.clone() }
    }

    /// Where spans go, if the settings ask for traces. Has to be called within a Tokio runtime.
    ///
    /// # Errors
    ///
    /// The settings can't be used.
    pub fn traces(&self) -> Result<Option<Traces>, TracesError> {
        self.otlp_endpoint.as_deref().map(|endpoint| Traces::new(self, endpoint)).transpose()
    }

    fn filter(&self) -> Result<EnvFilter, LogError> {
        filter(&self.log)
    }

    /// Sends this process's logs to standard error. Without effect where somebody has set a subscriber already.
    pub fn init(&self) -> Logs {
        let (filter, handle) = reload::Layer::new(self.filter().unwrap_or_default());
        let layer = fmt::layer().with_writer(std::io::stderr);
        let terminal = std::io::stderr().is_terminal();
        let json = match self.log_format {
            LogFormat::Auto => !terminal,
            LogFormat::Text => false,
            LogFormat::Json => true,
        };
        let layer = if json { layer.json().flatten_event(true).boxed() } else { layer.with_ansi(terminal).boxed() };
        // A test may have set one up before.
        drop(Registry::default().with(filter).with(layer).try_init());
        Logs { handle, directives: Arc::new(ArcSwap::from_pointee(self.log.clone())) }
    }
}

/// lapin logs returned messages with their bodies; the sink says what an operator needs of them. The same goes for
/// certificates that are not trusted, of which each attempt tells. h2 warns of what any client can do as often as it likes.
fn filter(directives: &str) -> Result<EnvFilter, LogError> {
    // The filter would take a level with a typo for a target, and log nothing but that.
    let given: Vec<_> = directives.split(',').map(str::trim).filter(|directive| !directive.is_empty()).collect();
    let mut levels = given.iter().filter(|directive| !directive.contains('='));
    if let Some(other) = levels.find(|level| level.parse::<LevelFilter>().is_err()) {
        return Err(LogError::Level((*other).to_owned()));
    }
    // Errors show unless it is said otherwise.
    let given = if given.is_empty() { DEFAULT_LEVEL.to_owned() } else { given.join(",") };
    Ok(EnvFilter::try_new(format!("error,lapin=off,rustls_platform_verifier=off,h2=error,{given}"))?)
}

/// Why logs can't be filtered like that.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// Not a level.
    #[error("{0:?} is none of off, error, warn, info, debug, trace; a part of the program is given as target=level")]
    Level(String),
    /// Not a directive.
    #[error(transparent)]
    Directive(#[from] ParseError),
}

/// What this process logs, to be changed while it runs. Clones change the same.
#[derive(Clone)]
pub struct Logs {
    handle: reload::Handle<EnvFilter, Registry>,
    directives: Arc<ArcSwap<String>>,
}

impl Logs {
    /// The level or directives in force.
    pub fn directives(&self) -> String {
        self.directives.load().as_ref().clone()
    }

    /// Logs by this level or these directives from now on.
    ///
    /// # Errors
    ///
    /// [`LogError`]: nothing has changed.
    pub fn set(&self, directives: &str) -> Result<(), LogError> {
        let filter = filter(directives)?;
        // It fails when the subscriber is gone: then nobody reads the logs.
        if self.handle.reload(filter).is_ok() {
            self.directives.store(Arc::new(directives.to_owned()));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_can_be_logged() {
        let check = |log: &str, expected: Option<&str>| {
            let problems = Config { log: log.to_owned(), ..Config::default() }.problems();
            assert_eq!(problems.is_empty(), expected.is_none(), "{log}: {problems:?}");
            assert!(expected.is_none_or(|expected| problems[0].contains(expected)), "{log}: {problems:?}");
        };
        for good in [
            "info",
            "INFO",
            "off",
            "",
            "info,",
            "warn, engage_relay::lane=debug",
            "engage_relay[sink]=trace,error",
            "h2=off",
        ] {
            check(good, None);
        }
        check("inof", Some("telemetry.log is \"inof\": \"inof\" is none of off, error,"));
        check("info,engage_relay", Some("\"engage_relay\" is none of"));
        check("engage_relay=inof", Some("telemetry.log is \"engage_relay=inof\": "));
    }

    #[test]
    fn all_that_is_wrong_is_said() {
        let config =
            Config { log: "x".into(), otlp_endpoint: Some("x".into()), trace_sample: -0.1, ..Config::default() };
        assert_eq!(config.problems().len(), 3, "{:?}", config.problems());
    }
}
