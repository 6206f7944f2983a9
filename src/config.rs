//! The settings: built-in defaults, then `relay.toml`, then `RELAY_…` variables. Each part owns its own table; this
//! module only puts them together and says what is wrong with all of them.

mod given;
mod read;

use std::error::Error as _;
use std::fmt;
use std::io::ErrorKind;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};

use crate::document::{self, Lookup, Severity};
use crate::{admin, ingress, journal, telemetry, tls};

pub use read::Read;

/// The file that is read if it is there.
pub const DEFAULT_FILE: &str = "relay.toml";
/// The longest time that may be given for either part of a stop.
const MAX_SHUTDOWN: Duration = Duration::from_hours(24);
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
#[derive(Clone, Copy, Debug, PartialEq, Deserialize)]
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

impl ShutdownConfig {
    fn problems(&self) -> Vec<String> {
        let times = [("delay", self.delay), ("grace", self.grace)].into_iter();
        let too_long = times.filter(|(_, time)| *time > MAX_SHUTDOWN);
        let problem = |(name, _)| format!("shutdown.{name} is longer than a day, which is the most");
        too_long.map(problem).collect()
    }
}

/// Something wrong with settings or rules, or worth a warning.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub enum Problem {
    /// In `relay.toml` or the file of rules.
    InFile(document::Problem),
    /// In a variable, or in another file.
    Elsewhere {
        /// Whether the settings can be used in spite of it.
        severity: Severity,
        /// What is wrong, and where. Never holds a secret.
        message: String,
    },
}

impl Problem {
    /// Whether nothing can be applied because of it.
    pub fn is_error(&self) -> bool {
        let (Self::InFile(document::Problem { severity, .. }) | Self::Elsewhere { severity, .. }) = self;
        *severity == Severity::Error
    }
}

impl From<String> for Problem {
    fn from(message: String) -> Self {
        Self::Elsewhere { severity: Severity::Error, message }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::InFile(problem) => problem.fmt(f),
            Self::Elsewhere { message, .. } => f.write_str(message),
        }
    }
}

/// All that is wrong with the settings.
#[derive(Debug, thiserror::Error)]
#[error("{}", .0.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n"))]
pub struct ConfigError(pub Vec<Problem>);

impl Config {
    /// Reads the settings; `file` must exist, [`DEFAULT_FILE`] need not.
    pub fn read(file: Option<&Path>, lookup: &dyn Lookup) -> Read {
        let path = file.unwrap_or(Path::new(DEFAULT_FILE));
        let (variables, garbled) = variables();
        let (source, unreadable) = match std::fs::read_to_string(path) {
            Ok(source) => (source, None),
            Err(error) if error.kind() == ErrorKind::NotFound && file.is_none() => (String::new(), None),
            Err(error) => (String::new(), Some(format!("{}: {error}", path.display()))),
        };
        let mut read = Read::new(&path.display().to_string(), &source, variables.into_iter(), lookup);
        if let Some(problem) = unreadable {
            // What the variables seem to lack may be in the file.
            (read.problems, read.knows_routes) = (vec![problem.into()], false);
        }
        read.problems.extend(garbled);
        read
    }

    /// The files that the settings name, beside those of `${file:…}`, and that of the token where one is made up.
    pub fn files(&self) -> impl Iterator<Item = PathBuf> {
        let token = self.ingress.auth.is_generated().then(|| ingress::generated_token_path(&self.data_dir));
        self.ingress.files().chain(self.admin.files()).map(Path::to_owned).chain(token)
    }

    /// Looks into the certificate files that the settings name; returns warnings, and problems. Commands that don't serve
    /// need not be able to read them.
    pub fn check_certificates(&self) -> (Vec<String>, Vec<Problem>) {
        let (mut warnings, mut problems) = (Vec::new(), Vec::new());
        for (setting, tls) in [("ingress.tls", &self.ingress.tls), ("admin.tls", &self.admin.tls)] {
            match tls.as_ref().map(tls::Server::load) {
                Some(Ok(server)) if server.expires() <= SystemTime::now() => {
                    let expires = humantime::format_rfc3339(server.expires());
                    warnings.push(format!("{setting}: the certificate has expired at {expires}"));
                }
                Some(Err(error)) => {
                    let cause = error.source().map(|cause| format!(": {cause}")).unwrap_or_default();
                    problems.push(format!("{setting}: {error}{cause}").into());
                }
                Some(Ok(_)) | None => {}
            }
        }
        (warnings, problems)
    }

    /// The settings that differ and have no effect in a running relay.
    pub fn needs_restart(&self, new: &Self) -> Vec<&'static str> {
        let settings = [
            ("data_dir", self.data_dir == new.data_dir),
            ("ingress", self.ingress.unchangeable() == new.ingress.unchangeable()),
            ("journal", self.journal == new.journal),
            ("admin.listen", self.admin.listen == new.admin.listen),
            ("shutdown", self.shutdown == new.shutdown),
            ("telemetry", self.telemetry.unchangeable() == new.telemetry.unchangeable()),
        ];
        settings.into_iter().filter(|(_, is_same)| !is_same).map(|(name, _)| name).collect()
    }

    /// What is wrong with the settings, each with the name of the one that it is about.
    fn problems(&self) -> Vec<String> {
        let parts =
            [self.ingress.problems(), self.journal.problems(), self.admin.problems(), self.telemetry.problems()];
        let mut problems = parts.concat();
        if self.data_dir.as_os_str().is_empty() {
            problems.push("data_dir is empty; name a folder".to_owned());
        }
        if self.routes.as_os_str().is_empty() {
            problems.push("routes is empty; name the file with the rules".to_owned());
        }
        problems.extend(self.shutdown.problems());
        if share(self.ingress.listen, self.admin.listen) {
            problems.push(format!(
                "admin.listen is {}, and ingress.listen is {}: each needs a port of its own",
                self.admin.listen, self.ingress.listen
            ));
        }
        if self.journal.kind == journal::Kind::Kafka {
            if self.ingress.dedup.is_some() {
                problems.push("ingress.dedup has no meaning with journal.kind = \"kafka\": an event that is sent again may come to another replica, which does not know of the first".to_owned());
            }
            if self.ingress.auth.is_generated() {
                problems.push("no token is configured, and with journal.kind = \"kafka\" each replica would make up its own: set ingress.auth".to_owned());
            }
        }
        problems
    }

    fn warnings(&self) -> Vec<String> {
        let mut warnings = ingress::Access::warnings(&self.ingress);
        let (body, segment) = (self.ingress.max_body, self.journal.disk().segment);
        if self.journal.kind == journal::Kind::Disk && body >= segment {
            warnings.push(format!(
                "ingress.max_body is {body}, and journal.segment {segment}: a body that no journal file has room for is refused"
            ));
        }
        warnings
    }
}

/// The variables of this process, and what is wrong with those that can't be read.
fn variables() -> (Vec<(String, String)>, Vec<Problem>) {
    let (mut variables, mut garbled) = (Vec::new(), Vec::new());
    for (name, value) in std::env::vars_os() {
        match (name.into_string(), value.into_string()) {
            (Ok(name), Ok(value)) => variables.push((name, value)),
            (Ok(name), Err(_)) if name.starts_with(read::PREFIX) => {
                garbled.push(format!("{name}: the value is not UTF-8").into());
            }
            // None of ours.
            (Ok(_) | Err(_), _) => {}
        }
    }
    (variables, garbled)
}

/// Whether two listeners would be in each other's way. Port 0 is any that is free.
fn share(one: SocketAddr, other: SocketAddr) -> bool {
    let all = |address: SocketAddr| address.ip().is_unspecified();
    let same = one.ip() == other.ip() || one.is_ipv4() == other.is_ipv4() && (all(one) || all(other));
    same && one.port() == other.port() && one.port() != 0
}

#[cfg(test)]
mod tests;
