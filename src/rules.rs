//! `routes.toml`, compiled: the sinks, how their lanes deliver, and the routing table. All of it or nothing.

mod explain;

use std::path::Path;
use std::sync::Arc;

use crate::document::{Document, Lookup, Problem, Severity};
use crate::lane;
use crate::routing::{Table, check_sink_name};
use crate::sink;

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
#[derive(Clone)]
pub struct SinkRules {
    /// Its name.
    pub name: String,
    /// Where it is, and what is sent.
    pub sink: sink::Config,
    /// How its lane delivers.
    pub lane: lane::Config,
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
    #[error("{}", problems.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n"))]
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
        let (mut sinks, mut names) = (Vec::new(), Vec::new());
        for (key, mut section) in root.tables("sinks") {
            if let Err(message) = check_sink_name(key.name) {
                root.problem_at(&key.place, message);
            }
            let sink = sink::Config::read(&mut section);
            let concurrency = sink.as_ref().map_or(1, sink::Config::default_concurrency);
            let lane = lane::Config::read(&mut section, concurrency);
            section.finish();
            if let Some(sink) = sink {
                sinks.push(SinkRules { name: key.name.to_owned(), sink, lane });
            }
            names.push(key);
        }
        let table = Table::read(&mut root, &names);
        root.finish();
        let problems = document.into_problems();
        if problems.iter().any(|problem| problem.severity == Severity::Error) {
            return Err(RulesError::Problems { problems });
        }
        Ok((Self { sinks, table: Arc::new(table) }, problems))
    }
}

#[cfg(test)]
mod tests;
