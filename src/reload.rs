//! What the user has written, settings and rules: loading both together, and noticing that they have changed.
//!
//! Every file counts that was read for them: `relay.toml`, `routes.toml`, secrets given as `${file:…}`, certificates.
//! They are looked at once a second. That sees an editor's rename, a ConfigMap's swapped link and a network file system
//! alike, which notifications of the kernel do not. Content counts: a file that was only touched has not changed, and one
//! that has become empty is being written.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::time::sleep;

use crate::config::{self, Config, ConfigError, DEFAULT_FILE, Read};
use crate::document::{Environment, Lookup, Problem};
use crate::event::Field;
use crate::journal;
use crate::journal::kafka::KeyBy;
use crate::lane::{OrderBy, StartAt};
use crate::rules::{Rules, RulesError};

/// How often files are looked at.
const LOOK: Duration = Duration::from_secs(1);
/// For how long nothing may change before what has changed is read, and how often to wait for that.
const QUIET: Duration = Duration::from_millis(200);
const MAX_WAITS: usize = 20;

/// Where settings and rules are written, as the command line says.
#[derive(Clone, Debug, Default)]
pub struct Sources {
    /// The file with the settings; without it the default one, if it is there.
    pub config: Option<PathBuf>,
    /// The file with the rules, in place of the one that the settings name.
    pub routes: Option<PathBuf>,
}

/// Settings and rules that work.
pub struct Loaded {
    /// The settings.
    pub config: Config,
    /// The rules.
    pub rules: Rules,
    /// What is odd about the settings.
    pub warnings: Vec<String>,
    /// What is odd about the rules.
    pub problems: Vec<Problem>,
}

/// Settings or rules that don't work.
#[derive(Debug, thiserror::Error)]
#[error("{}", self.errors().join("\n"))]
pub struct LoadError {
    /// All that is wrong with either, and what is odd about the rules.
    pub problems: Vec<config::Problem>,
    /// What is odd about the settings.
    pub warnings: Vec<String>,
}

impl LoadError {
    /// What keeps them from being used. The rest can wait until they are.
    pub fn errors(&self) -> Vec<String> {
        self.problems.iter().filter(|problem| problem.is_error()).map(ToString::to_string).collect()
    }
}

impl Sources {
    /// Reads and compiles everything; also returns what was read, whether it works or not. Blocks.
    pub fn load(&self) -> (Result<Loaded, LoadError>, Seen) {
        let recorder = Recorder::default();
        let loaded = self.load_with(&recorder);
        (loaded, Seen(recorder.0.into_inner()))
    }

    /// The settings alone, with warnings.
    ///
    /// # Errors
    ///
    /// [`ConfigError`] with what is wrong.
    pub fn settings(&self, lookup: &dyn Lookup) -> Result<(Config, Vec<String>), ConfigError> {
        let Read { config, problems, warnings, .. } = self.read(lookup);
        if problems.is_empty() { Ok((config, warnings)) } else { Err(ConfigError(problems)) }
    }

    fn read(&self, lookup: &dyn Lookup) -> Read {
        let mut read = Config::read(self.config.as_deref(), lookup);
        if let Some(routes) = &self.routes {
            read.config.routes.clone_from(routes);
            read.knows_routes = true;
        }
        read
    }

    /// Settings that don't work are no reason not to look at the rest.
    fn load_with(&self, recorder: &Recorder) -> Result<Loaded, LoadError> {
        recorder.note(self.config.as_deref().unwrap_or(Path::new(DEFAULT_FILE)));
        let Read { config, mut problems, mut warnings, knows_routes } = self.read(recorder);
        config.files().for_each(|file| recorder.note(&file));
        let (expired, unusable) = config.check_certificates();
        warnings.extend(expired);
        problems.extend(unusable);
        recorder.note(&config.routes);
        let rules = knows_routes.then(|| Rules::load(&config.routes, recorder));
        match rules {
            Some(Ok((rules, odd))) if problems.is_empty() => {
                warnings.extend(disagreements(&config, &rules));
                return Ok(Loaded { config, rules, warnings, problems: odd });
            }
            Some(Ok((_, found)) | Err(RulesError::Problems { problems: found })) => {
                problems.extend(found.into_iter().map(config::Problem::InFile));
            }
            Some(Err(error @ RulesError::Read { .. })) => problems.push(error.to_string().into()),
            None => {}
        }
        Err(LoadError { problems, warnings })
    }
}

/// What settings and rules say that does not go together; each a warning.
fn disagreements(config: &Config, rules: &Rules) -> Vec<String> {
    let auth = &config.ingress.auth;
    let strange = rules.table.tokens().filter_map(|(route, written, mut names)| {
        (!names.all(|name| auth.has_name(name)))
            .then(|| format!("route {route:?}: its `token` ({written}) names one that ingress.auth does not have"))
    });
    let mut warnings: Vec<_> = strange.collect();
    if config.journal.kind != journal::Kind::Kafka {
        return warnings;
    }
    let key = config.journal.kafka().key;
    let unordered = rules.sinks.iter().filter(|sink| !keeps_order(key, sink.lane.order_by));
    let unordered = unordered.map(|sink| {
        let (name, key) = (&sink.name, key.as_str());
        format!("sinks.{name}: its `order_by` is not kept across partitions: journal.key is {key:?}, by which events are spread over them")
    });
    let early = rules.sinks.iter().filter(|sink| sink.lane.start == StartAt::Earliest).map(|sink| {
        let name = &sink.name;
        format!("sinks.{name}: `start` has no meaning with journal.kind = \"kafka\": a sink gets what is accepted after the rules name it; `engage-relay replay` sends it what was before")
    });
    warnings.extend(unordered.chain(early));
    warnings
}

/// Whether events that have to stay in order are in one partition. A message has one recipient and one sender.
fn keeps_order(key: KeyBy, order_by: OrderBy) -> bool {
    match order_by {
        OrderBy::None | OrderBy::Field(Field::MessageId) => true,
        OrderBy::Field(Field::RecipientId) => key == KeyBy::RecipientId,
        OrderBy::Field(Field::SenderId) => key == KeyBy::SenderId,
        OrderBy::Field(_) => false,
    }
}

/// Looks things up as [`Environment`] does, and remembers the files.
#[derive(Default)]
struct Recorder(RefCell<BTreeMap<PathBuf, Print>>);

impl Recorder {
    fn note(&self, path: &Path) {
        self.0.borrow_mut().insert(path.to_owned(), Print::of(path));
    }
}

impl Lookup for Recorder {
    fn variable(&self, name: &str) -> Option<String> {
        Environment.variable(name)
    }

    fn file(&self, path: &str) -> io::Result<String> {
        // First, so that a change in between is seen later.
        self.note(Path::new(path));
        Environment.file(path)
    }

    fn digest(&self, path: &Path) -> Option<[u8; 32]> {
        self.note(path);
        self.0.borrow().get(path)?.digest
    }
}

/// The files that were read, as they were then.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seen(BTreeMap<PathBuf, Print>);

#[derive(Clone, Debug, PartialEq, Eq)]
struct Print {
    stat: Option<Stat>,
    digest: Option<[u8; 32]>,
}

/// Differs whenever a file may have changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stat {
    file: (u64, u64),
    size: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Stat {
    /// Of the file that links lead to.
    fn of(path: &Path) -> Option<Self> {
        let found = fs::metadata(path).ok()?;
        Some(Self {
            file: (found.dev(), found.ino()),
            size: found.size(),
            modified: (found.mtime(), found.mtime_nsec()),
            changed: (found.ctime(), found.ctime_nsec()),
        })
    }

    fn is_empty(self) -> bool {
        self.size == 0
    }
}

impl Print {
    fn of(path: &Path) -> Self {
        let stat = Stat::of(path);
        Self { stat, digest: Environment.digest(path) }
    }

    fn has_content(&self) -> bool {
        self.stat.is_some_and(|stat| !stat.is_empty())
    }
}

impl Seen {
    /// Whether the files hold the same as then.
    pub fn holds_same(&self, other: &Self) -> bool {
        let content = |seen: &Self| seen.0.iter().map(|(path, print)| (path.clone(), print.digest)).collect::<Vec<_>>();
        content(self) == content(other)
    }

    /// Notes a file as it is now.
    pub fn note(&mut self, path: &Path) {
        self.0.insert(path.to_owned(), Print::of(path));
    }

    /// The files that had something in them then, and are gone or empty now: most likely they are being written.
    pub fn emptied<'s>(&'s self, then: &'s Self) -> impl Iterator<Item = &'s Path> {
        let had_content = |path: &Path| then.0.get(path).is_some_and(Print::has_content);
        let empty = self.0.iter().filter(|(_, print)| !print.has_content());
        empty.map(|(path, _)| path.as_path()).filter(move |path| had_content(path))
    }

    /// Waits until a file has another content, and no more changes follow. Nothing is lost if the future is dropped.
    pub async fn changed(&mut self) {
        loop {
            sleep(LOOK).await;
            if !self.look().await {
                continue;
            }
            for _ in 0..MAX_WAITS {
                let stats = self.stats();
                sleep(QUIET).await;
                if self.stats() == stats {
                    break;
                }
            }
            return;
        }
    }

    /// Whether a file has another content. Reads only those that may.
    async fn look(&mut self) -> bool {
        let touched = self.0.iter().filter(|(path, print)| {
            let now = Stat::of(path);
            now != print.stat && !(now.is_some_and(Stat::is_empty) && print.stat.is_some_and(|stat| !stat.is_empty()))
        });
        let touched: Vec<_> = touched.map(|(path, _)| path.clone()).collect();
        if touched.is_empty() {
            return false;
        }
        let read = move || touched.into_iter().map(|path| (Print::of(&path), path)).collect::<Vec<_>>();
        let Ok(prints) = tokio::task::spawn_blocking(read).await else { return false };
        let changed = prints.iter().any(|(new, path)| self.0.get(path).is_none_or(|old| old.digest != new.digest));
        if !changed {
            self.0.extend(prints.into_iter().map(|(print, path)| (path, print)));
        }
        changed
    }

    fn stats(&self) -> Vec<Option<Stat>> {
        self.0.keys().map(|path| Stat::of(path)).collect()
    }
}

#[cfg(test)]
mod tests {
    use tempfile::TempDir;
    use tokio::time::timeout;

    use super::*;

    const RULES: &str = "[sinks.out]\ntype = \"http\"\nurl = \"http://127.0.0.1:1/\"\nheaders = { authorization = \"${file:FILE}\" }\n[[routes]]\nto = [\"out\"]\n";

    fn setup() -> (TempDir, PathBuf, Sources) {
        let dir = tempfile::tempdir().unwrap();
        let (routes, secret) = (dir.path().join("routes.toml"), dir.path().join("secret"));
        fs::write(&secret, "one").unwrap();
        fs::write(&routes, RULES.replace("FILE", secret.to_str().unwrap())).unwrap();
        (dir, secret, Sources { config: None, routes: Some(routes) })
    }

    /// Whether a change is noticed in time.
    async fn notices(seen: &mut Seen) -> bool {
        timeout(LOOK * 3, seen.changed()).await.is_ok()
    }

    #[tokio::test]
    async fn a_secret_that_rotates_is_a_change_and_a_touched_file_is_none() {
        let (_dir, secret, sources) = setup();
        let (loaded, mut seen) = sources.load();
        assert!(loaded.is_ok());
        fs::write(&secret, "one").unwrap();
        assert!(!notices(&mut seen).await);
        fs::write(&secret, "two").unwrap();
        assert!(notices(&mut seen).await);
        let (_, now) = sources.load();
        assert!(!now.holds_same(&seen));
    }

    #[tokio::test]
    async fn a_file_that_was_emptied_is_waited_for() {
        let (_dir, secret, sources) = setup();
        let (_, mut seen) = sources.load();
        fs::write(&secret, "").unwrap();
        assert!(!notices(&mut seen).await);
        fs::write(&secret, "two").unwrap();
        assert!(notices(&mut seen).await);
    }

    #[tokio::test]
    async fn a_swapped_link_is_a_change_and_so_is_a_file_that_appears() {
        let (dir, secret, sources) = setup();
        let path = |name| dir.path().join(name);
        // As Kubernetes does it: the file is a link through `..data`, which is a link to a directory.
        for (name, value) in [("v1", "one"), ("v2", "two")] {
            fs::create_dir(path(name)).unwrap();
            fs::write(path(name).join("secret"), value).unwrap();
        }
        fs::remove_file(&secret).unwrap();
        std::os::unix::fs::symlink("v1", path("..data")).unwrap();
        std::os::unix::fs::symlink("..data/secret", &secret).unwrap();
        let (_, mut seen) = sources.load();
        std::os::unix::fs::symlink("v2", path("..tmp")).unwrap();
        fs::rename(path("..tmp"), path("..data")).unwrap();
        assert!(notices(&mut seen).await);
        fs::remove_file(&secret).unwrap();
        let (broken, mut seen) = sources.load();
        assert!(broken.err().unwrap().to_string().contains("secret"));
        fs::write(&secret, "back").unwrap();
        assert!(notices(&mut seen).await);
    }
}
