//! The settings: built-in defaults, then `relay.toml`, then `RELAY_…` variables. Each part owns its own table; this
//! module only puts them together and says what is wrong with all of them.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use figment::error::{Actual, Kind};
use figment::providers::{Env, Format as _, Toml};
use figment::value::{Dict, Map, Value};
use figment::{Figment, Metadata, Profile, Provider};
use serde::Deserialize;

use crate::document::{Lookup, resolve};
use crate::{ingress, journal, telemetry};

/// The file that is read if it is there.
pub const DEFAULT_FILE: &str = "relay.toml";
/// Between the levels of a variable's name.
const LEVEL: &str = "__";
const PREFIX: &str = "RELAY_";
const TABLES: [&str; 7] = ["data_dir", "routes", "ingress", "journal", "admin", "shutdown", "telemetry"];

/// All settings.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
#[expect(missing_docs, reason = "named like the tables")]
pub struct Config {
    /// Where the journal, the ledger and a generated token are kept.
    pub data_dir: PathBuf,
    /// The file with the rules.
    pub routes: PathBuf,
    pub ingress: ingress::Config,
    pub journal: journal::Config,
    pub admin: AdminConfig,
    pub shutdown: ShutdownConfig,
    pub telemetry: telemetry::Config,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            data_dir: "data".into(),
            routes: "routes.toml".into(),
            ingress: ingress::Config::default(),
            journal: journal::Config::default(),
            admin: AdminConfig::default(),
            shutdown: ShutdownConfig::default(),
            telemetry: telemetry::Config::default(),
        }
    }
}

/// The `[admin]` settings. They are read, and have no effect yet.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AdminConfig {
    /// Address and port.
    pub listen: SocketAddr,
    /// The bearer token; required unless `listen` is a loopback address.
    pub token: Option<String>,
}

impl Default for AdminConfig {
    fn default() -> Self {
        Self { listen: SocketAddr::from(([127, 0, 0, 1], 9090)), token: None }
    }
}

/// The `[shutdown]` settings.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ShutdownConfig {
    /// How long requests are still accepted after SIGTERM, so that a balancer can notice.
    #[serde(with = "humantime_serde")]
    pub delay: Duration,
    /// How long after that requests and deliveries under way may take.
    #[serde(with = "humantime_serde")]
    pub grace: Duration,
}

impl Default for ShutdownConfig {
    fn default() -> Self {
        Self { delay: Duration::from_secs(5), grace: Duration::from_secs(20) }
    }
}

/// What is wrong with the settings: each problem a sentence that says where it is.
#[derive(Debug, thiserror::Error)]
#[error("{}", .0.join("\n"))]
pub struct ConfigError(pub Vec<String>);

impl Config {
    /// Loads the settings; `file` must exist, [`DEFAULT_FILE`] need not. Also returns warnings.
    ///
    /// # Errors
    ///
    /// [`ConfigError`] with what is wrong.
    pub fn load(file: Option<&Path>, lookup: &dyn Lookup) -> Result<(Self, Vec<String>), ConfigError> {
        if let Some(missing) = file.filter(|path| !path.exists()) {
            return Err(ConfigError(vec![format!("{}: there is no such file", missing.display())]));
        }
        let mut warnings = Vec::new();
        check_variables(&mut warnings)?;
        let toml = Resolved { inner: Toml::file_exact(file.unwrap_or(Path::new(DEFAULT_FILE))), lookup };
        let known = |key: &figment::value::UncasedStr| is_setting(key.as_str());
        let env = Resolved { inner: Env::prefixed(PREFIX).filter(known).split(LEVEL), lookup };
        let figment = Figment::new();
        let figment = if toml_exists(file) { figment.merge(toml) } else { figment };
        let figment = figment.merge(env);
        let config: Self = figment.extract().map_err(|errors| ConfigError(errors.into_iter().map(describe).collect()))?;
        config.check(&mut warnings)?;
        Ok((config, warnings))
    }

    fn check(&self, warnings: &mut Vec<String>) -> Result<(), ConfigError> {
        let auth = ingress::Auth::check(&self.ingress.auth).err().map(|error| error.to_string());
        let admin = (!self.admin.listen.ip().is_loopback() && self.admin.token.is_none())
            .then(|| format!("admin.listen is {}, which is not loopback; set admin.token", self.admin.listen));
        let problems: Vec<_> = [self.ingress.problem(), auth, self.journal.problem(), admin, self.telemetry.problem()]
            .into_iter()
            .flatten()
            .collect();
        if self.telemetry.otlp_endpoint.is_some() {
            warnings.push("telemetry.otlp_endpoint has no effect in this version".to_owned());
        }
        if problems.is_empty() { Ok(()) } else { Err(ConfigError(problems)) }
    }
}

fn toml_exists(file: Option<&Path>) -> bool {
    file.unwrap_or(Path::new(DEFAULT_FILE)).exists()
}

fn is_setting(key: &str) -> bool {
    let top = key.split(LEVEL).next().unwrap_or_default();
    TABLES.iter().any(|table| table.eq_ignore_ascii_case(top))
}

/// A misspelt setting is an error. Other `RELAY_…` variables are not ours: Kubernetes sets `RELAY_PORT` and the like for
/// a service that is called relay.
fn check_variables(warnings: &mut Vec<String>) -> Result<(), ConfigError> {
    let mut problems = Vec::new();
    for (name, _) in std::env::vars_os() {
        let Some(key) = name.to_str().and_then(|name| name.strip_prefix(PREFIX)) else { continue };
        if is_setting(key) {
            continue;
        }
        let message = format!("{PREFIX}{key}: there is no such setting; known are {}", TABLES.join(", "));
        if key.contains(LEVEL) { problems.push(message) } else { warnings.push(format!("{message} (ignored)")) }
    }
    if problems.is_empty() { Ok(()) } else { Err(ConfigError(problems)) }
}

/// An error without the value that it found, which may be a secret.
fn describe(error: figment::Error) -> String {
    let what = match &error.kind {
        Kind::InvalidType(actual, expected) => format!("is {}, should be {expected}", type_of(actual)),
        Kind::InvalidValue(actual, expected) => format!("is a {} that does not work, should be {expected}", type_of(actual)),
        Kind::UnknownField(field, expected) => {
            let known: Vec<_> = expected.iter().map(|name| format!("`{name}`")).collect();
            format!("there is no setting `{field}` here; known are {}", known.join(", "))
        }
        Kind::UnknownVariant(_, expected) => {
            let known: Vec<_> = expected.iter().map(|name| format!("`{name}`")).collect();
            format!("is none of {}", known.join(", "))
        }
        Kind::MissingField(field) => format!("`{field}` is missing"),
        other => other.to_string(),
    };
    let path = error.path.join(".");
    let source = error.metadata.as_ref().map(|metadata| match &metadata.source {
        Some(source) => source.to_string(),
        None => metadata.name.to_string(),
    });
    let place = [source, (!path.is_empty()).then_some(path)].into_iter().flatten().collect::<Vec<_>>().join(": ");
    if place.is_empty() { what } else { format!("{place}: {what}") }
}

fn type_of(actual: &Actual) -> &'static str {
    match actual {
        Actual::Bool(_) => "a boolean",
        Actual::Unsigned(_) | Actual::Signed(_) => "an integer",
        Actual::Float(_) => "a float",
        Actual::Char(_) | Actual::Str(_) => "text",
        Actual::Seq => "an array",
        Actual::Map => "a table",
        _ => "another type",
    }
}

/// A provider whose `${…}` are resolved.
struct Resolved<'l, P> {
    inner: P,
    lookup: &'l dyn Lookup,
}

impl<P: Provider> Provider for Resolved<'_, P> {
    fn metadata(&self) -> Metadata {
        self.inner.metadata()
    }

    fn data(&self) -> Result<Map<Profile, Dict>, figment::Error> {
        let mut data = self.inner.data()?;
        for dict in data.values_mut() {
            resolve_dict(dict, self.lookup, &mut Vec::new())?;
        }
        Ok(data)
    }
}

fn resolve_dict(dict: &mut Dict, lookup: &dyn Lookup, path: &mut Vec<String>) -> Result<(), figment::Error> {
    dict.iter_mut().try_for_each(|(key, value)| {
        path.push(key.clone());
        resolve_value(value, lookup, path)?;
        path.pop();
        Ok(())
    })
}

fn resolve_value(value: &mut Value, lookup: &dyn Lookup, path: &mut Vec<String>) -> Result<(), figment::Error> {
    match value {
        Value::String(_, text) => match resolve(text, lookup) {
            Ok(resolved) => *text = resolved,
            Err(problems) => {
                let mut error = figment::Error::from(problems.join("; "));
                error.path.clone_from(path);
                return Err(error);
            }
        },
        Value::Dict(_, dict) => resolve_dict(dict, lookup, path)?,
        Value::Array(_, values) => values.iter_mut().try_for_each(|value| resolve_value(value, lookup, path))?,
        Value::Char(..) | Value::Bool(..) | Value::Num(..) | Value::Empty(..) => {}
    }
    Ok(())
}
