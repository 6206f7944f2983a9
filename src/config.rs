//! The settings: built-in defaults, then `relay.toml`, then `RELAY_…` variables. Each part owns its own table; this
//! module only puts them together and says what is wrong with all of them.

use std::error::Error as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use figment::error::{Actual, Kind};
use figment::providers::{Format as _, Toml};
use figment::util::nest;
use figment::value::{Dict, Map, Value};
use figment::{Figment, Metadata, Profile, Provider};
use serde::Deserialize;

use crate::document::{Lookup, resolved};
use crate::{admin, ingress, journal, telemetry, tls};

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
    pub admin: admin::Config,
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
            admin: admin::Config::default(),
            shutdown: ShutdownConfig::default(),
            telemetry: telemetry::Config::default(),
        }
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
        let path = file.unwrap_or(Path::new(DEFAULT_FILE));
        let lossy = |text: std::ffi::OsString| text.to_string_lossy().into_owned();
        let variables = std::env::vars_os().map(|(name, value)| (lossy(name), lossy(value)));
        Self::compose(path.exists().then_some(path), variables, lookup)
    }

    /// The files that the settings name, beside those of `${file:…}`.
    pub fn files(&self) -> impl Iterator<Item = &Path> {
        self.ingress.files().chain(self.admin.files())
    }

    /// Looks into the certificate files that the settings name; returns warnings. Commands that don't serve need not be
    /// able to read them.
    ///
    /// # Errors
    ///
    /// [`ConfigError`] with what is wrong.
    pub fn check_certificates(&self) -> Result<Vec<String>, ConfigError> {
        let (mut warnings, mut problems) = (Vec::new(), Vec::new());
        for (setting, tls) in [("ingress.tls", &self.ingress.tls), ("admin.tls", &self.admin.tls)] {
            match tls.as_ref().map(tls::Server::load) {
                Some(Ok(server)) if server.expires() <= SystemTime::now() => {
                    let expires = humantime::format_rfc3339(server.expires());
                    warnings.push(format!("{setting}: the certificate has expired at {expires}"));
                }
                Some(Err(error)) => {
                    let cause = error.source().map(|cause| format!(": {cause}")).unwrap_or_default();
                    problems.push(format!("{setting}: {error}{cause}"));
                }
                Some(Ok(_)) | None => {}
            }
        }
        if problems.is_empty() { Ok(warnings) } else { Err(ConfigError(problems)) }
    }

    /// The settings from a file and variables, whatever those of this process are.
    fn compose(
        file: Option<&Path>,
        variables: impl Iterator<Item = (String, String)>,
        lookup: &dyn Lookup,
    ) -> Result<(Self, Vec<String>), ConfigError> {
        let mut warnings = Vec::new();
        let variables = settings(variables, &mut warnings)?;
        let toml = file.map(|path| Resolved { inner: Toml::file_exact(path), lookup });
        let figment = toml.map_or_else(Figment::new, Figment::from);
        let figment = variables.into_iter().fold(figment, |figment, inner| figment.merge(Resolved { inner, lookup }));
        let config: Self =
            figment.extract().map_err(|errors| ConfigError(errors.into_iter().map(describe).collect()))?;
        config.check(&mut warnings)?;
        Ok((config, warnings))
    }

    /// The settings that differ and have no effect in a running relay.
    pub fn needs_restart(&self, new: &Self) -> Vec<&'static str> {
        let settings = |config: &Self| {
            [
                ("data_dir", format!("{:?}", config.data_dir)),
                ("ingress", format!("{:?}", config.ingress.unchangeable())),
                ("journal", format!("{:?}", config.journal)),
                ("admin.listen", config.admin.listen.to_string()),
                ("shutdown", format!("{:?}", config.shutdown)),
                ("telemetry", format!("{:?}", config.telemetry.unchangeable())),
            ]
        };
        let both = settings(self).into_iter().zip(settings(new));
        both.filter(|(old, new)| old != new).map(|((name, _), _)| name).collect()
    }

    fn check(&self, warnings: &mut Vec<String>) -> Result<(), ConfigError> {
        let parts =
            [self.ingress.problems(), self.journal.problems(), self.admin.problems(), self.telemetry.problems()];
        let mut problems = parts.concat();
        if self.journal.kind == journal::Kind::Kafka {
            if self.ingress.dedup.is_some() {
                problems.push("ingress.dedup has no meaning with journal.kind = \"kafka\": an event that is sent again may come to another replica, which does not know of the first".to_owned());
            }
            if self.ingress.auth.is_generated() {
                problems.push("no token is configured, and with journal.kind = \"kafka\" each replica would make up its own: set ingress.auth".to_owned());
            }
        }
        if self.ingress.allow.is_none() && !self.ingress.trusted_proxies.is_empty() {
            warnings.push("ingress.trusted_proxies has no effect without ingress.allow".to_owned());
        }
        if problems.is_empty() { Ok(()) } else { Err(ConfigError(problems)) }
    }
}

/// A variable that is a setting: the key with its levels, and the value.
struct Variable {
    key: String,
    value: String,
}

impl Provider for Variable {
    fn metadata(&self) -> Metadata {
        Metadata::named(format!("the variable {PREFIX}{}", self.key))
    }

    fn data(&self) -> Result<Map<Profile, Dict>, figment::Error> {
        let Ok(value) = self.value.parse::<Value>();
        let path = self.key.to_ascii_lowercase().replace(LEVEL, ".");
        let dict = nest(&path, value).into_dict().unwrap_or_default();
        Ok(Profile::Default.collect(dict))
    }
}

/// The variables that are settings. A misspelt setting is an error. Other `RELAY_…` variables are not ours: Kubernetes
/// sets `RELAY_PORT` and the like for a service that is called relay.
fn settings(
    variables: impl Iterator<Item = (String, String)>,
    warnings: &mut Vec<String>,
) -> Result<Vec<Variable>, ConfigError> {
    let (mut found, mut problems) = (Vec::new(), Vec::new());
    for (name, value) in variables {
        let Some(key) = name.strip_prefix(PREFIX) else { continue };
        let top = key.split(LEVEL).next().unwrap_or_default();
        let message = || format!("{name}: there is no such setting; known are {}", TABLES.join(", "));
        if TABLES.iter().any(|table| table.eq_ignore_ascii_case(top)) {
            found.push(Variable { key: key.to_owned(), value });
        } else if key.contains(LEVEL) {
            problems.push(message());
        } else {
            warnings.push(format!("{} (ignored)", message()));
        }
    }
    // Their order in the environment means nothing.
    found.sort_by(|one, other| one.key.cmp(&other.key));
    if problems.is_empty() { Ok(found) } else { Err(ConfigError(problems)) }
}

/// An error without the value that it found, which may be a secret.
fn describe(error: figment::Error) -> String {
    let what = match &error.kind {
        Kind::InvalidType(actual, expected) => format!("is {}, should be {expected}", type_of(actual)),
        Kind::InvalidValue(actual, expected) => {
            format!("is {} that does not work, should be {expected}", type_of(actual))
        }
        Kind::UnknownField(field, expected) => {
            format!("there is no setting `{field}` here; known are {}", quoted(expected))
        }
        Kind::UnknownVariant(_, expected) => format!("is none of {}", quoted(expected)),
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

fn quoted(names: &[&str]) -> String {
    names.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ")
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
            resolve_dict(dict, self.lookup, &mut Vec::new()).map_err(|error| *error)?;
        }
        Ok(data)
    }
}

fn resolve_dict(dict: &mut Dict, lookup: &dyn Lookup, path: &mut Vec<String>) -> Result<(), Box<figment::Error>> {
    dict.iter_mut().try_for_each(|(key, value)| {
        path.push(key.clone());
        resolve_value(value, lookup, path)?;
        path.pop();
        Ok(())
    })
}

fn resolve_value(value: &mut Value, lookup: &dyn Lookup, path: &mut Vec<String>) -> Result<(), Box<figment::Error>> {
    match value {
        Value::String(_, text) => match resolved(text, lookup) {
            Ok(resolved) => *text = resolved,
            Err(problems) => {
                let mut error = figment::Error::from(problems.join("; "));
                error.path.clone_from(path);
                return Err(Box::new(error));
            }
        },
        Value::Dict(_, dict) => resolve_dict(dict, lookup, path)?,
        Value::Array(_, values) => values.iter_mut().try_for_each(|value| resolve_value(value, lookup, path))?,
        Value::Char(..) | Value::Bool(..) | Value::Num(..) | Value::Empty(..) => {}
    }
    Ok(())
}

#[cfg(test)]
mod tests;
