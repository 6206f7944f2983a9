//! `routes.toml`, compiled: the sinks, how their lanes deliver, and the routing table. All of it or nothing.

mod explain;

use std::error::Error;
use std::iter::successors;
use std::path::Path;
use std::sync::Arc;

use crate::document::{Document, Key, Lookup, Problem, Section, Severity, Unresolved};
use crate::lane;
use crate::routing::{Table, check_sink_name};
use crate::sink::{self, BuildError};

pub use explain::{Destination, Explained};

/// The rules that a relay runs by.
#[derive(Clone)]
pub struct Rules {
    /// The sinks, in the table's order.
    pub sinks: Vec<SinkRules>,
    /// Which events go to which of them.
    pub table: Arc<Table>,
}

/// What `routes.toml` says about one sink.
#[derive(Clone, PartialEq)]
pub struct SinkRules {
    /// Its name.
    pub name: String,
    /// Where it is, and what is sent.
    pub sink: sink::Config,
    /// How its lane delivers.
    pub lane: lane::Config,
    /// What the files hold that the sink is built from, as digests.
    pub files: Vec<Option<[u8; 32]>>,
}

/// Rules that can't be used.
#[derive(Debug, thiserror::Error)]
pub enum RulesError {
    /// The file can't be read.
    #[error("{file}: {source}")]
    Read {
        /// The file.
        file: String,
        /// Why.
        source: std::io::Error,
    },
    /// All that is wrong with it, and warnings.
    #[error("{}", errors(problems).join("\n"))]
    Problems {
        /// Each with its place.
        problems: Vec<Problem>,
    },
}

impl Rules {
    /// Reads and compiles the file; warnings come with the result.
    ///
    /// # Errors
    ///
    /// [`RulesError`] with everything that is wrong.
    pub fn load(path: &Path, lookup: &dyn Lookup) -> Result<(Self, Vec<Problem>), RulesError> {
        let file = path.display().to_string();
        let source = std::fs::read_to_string(path).map_err(|source| RulesError::Read { file: file.clone(), source })?;
        Self::compile(&file, &source, lookup)
    }

    /// Compiles the text of a file.
    ///
    /// # Errors
    ///
    /// [`RulesError::Problems`] with everything that is wrong.
    pub fn compile(file: &str, source: &str, lookup: &dyn Lookup) -> Result<(Self, Vec<Problem>), RulesError> {
        let document = Document::parse(file, source, lookup);
        let mut root = document.root();
        let (sinks, names) = read_sinks(&mut root, lookup, sink::Config::check);
        let table = Table::read(&mut root, &names);
        root.finish();
        let problems = finished(document)?;
        Ok((Self { sinks, table: Arc::new(table) }, problems))
    }
}

/// Those that keep a file from being used, as text. Warnings can wait until it works.
fn errors(problems: &[Problem]) -> Vec<String> {
    problems.iter().filter(|problem| problem.severity == Severity::Error).map(ToString::to_string).collect()
}

/// Compiles the routes of rules that will not run here. What is wrong with a sink is said too, except for what depends on
/// its references: those need not be known.
///
/// # Errors
///
/// [`RulesError::Problems`] with everything that is wrong.
pub fn routes_of(file: &str, source: &str, lookup: &dyn Lookup) -> Result<(Table, Vec<Problem>), RulesError> {
    let document = Document::parse(file, source, lookup);
    let mut root = document.root();
    let (_, names) = read_sinks(&mut root, lookup, |_| Ok(()));
    document.forgive_references();
    let table = Table::read(&mut root, &names);
    root.finish();
    let problems = finished(document)?;
    Ok((table, problems))
}

/// Compiles the routes of rules that somebody else has sent. Looks no reference up, and takes the conditions that have
/// some from `running`. Of sinks only the names are looked at.
///
/// # Errors
///
/// [`RulesError::Problems`] with everything that is wrong.
pub fn routes_beside(file: &str, source: &str, running: &Table) -> Result<(Table, Vec<Problem>), RulesError> {
    let document = Document::parse(file, source, &Unresolved);
    let mut root = document.root();
    let mut names = Vec::new();
    for (key, _) in root.tables("sinks") {
        check_name(&root, &key);
        names.push(key);
    }
    let table = Table::read_beside(&mut root, &names, running);
    root.finish();
    let problems = finished(document)?;
    Ok((table, problems))
}

/// The sinks that can be used, and the names of all.
fn read_sinks<'d>(
    root: &mut Section<'d>,
    lookup: &dyn Lookup,
    check: impl Fn(&sink::Config) -> Result<(), (&'static str, BuildError)>,
) -> (Vec<SinkRules>, Vec<Key<'d>>) {
    let (mut sinks, mut names) = (Vec::new(), Vec::new());
    for (key, mut section) in root.tables("sinks") {
        check_name(root, &key);
        let sink = sink::Config::read(&mut section);
        let concurrency = sink.as_ref().map_or(1, sink::Config::default_concurrency);
        let lane = lane::Config::read(&mut section, concurrency);
        if let Some(Err((key, error))) = sink.as_ref().map(&check) {
            section.problem(key, with_causes(&error));
        }
        section.finish();
        if let Some(sink) = sink {
            let files = sink.files().iter().map(|path| lookup.digest(path)).collect();
            sinks.push(SinkRules { name: key.name.to_owned(), sink, lane, files });
        }
        names.push(key);
    }
    (sinks, names)
}

fn check_name(root: &Section<'_>, key: &Key<'_>) {
    if let Err(message) = check_sink_name(key.name) {
        root.problem_at(&key.place, message);
    }
}

/// The warnings, if there is nothing worse.
fn finished(document: Document<'_>) -> Result<Vec<Problem>, RulesError> {
    let problems = document.into_problems();
    match problems.iter().any(|problem| problem.severity == Severity::Error) {
        true => Err(RulesError::Problems { problems }),
        false => Ok(problems),
    }
}

/// What an error says, and what all those say that it comes from.
pub(crate) fn with_causes(error: &dyn Error) -> String {
    let causes = successors(error.source(), |&cause| cause.source());
    causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}

#[cfg(test)]
mod tests;
