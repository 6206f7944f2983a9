//! References in text: `${NAME}`, `${NAME:-default}` and `${file:PATH}`.

use std::fs::{File, metadata};
use std::io::{BufRead as _, BufReader, Error, ErrorKind, Read as _, Result as IoResult};
use std::path::Path;

use sha2::{Digest as _, Sha256};

/// What `${NAME}` and `${file:PATH}` are looked up in; tests pass their own.
pub trait Lookup {
    /// The variable's value, if it is set.
    fn variable(&self, name: &str) -> Option<String>;
    /// The file's content, with a final newline if it has one.
    ///
    /// # Errors
    ///
    /// When it cannot be read or is not UTF-8.
    fn file(&self, path: &str) -> IoResult<String>;
    /// A digest of a file's content, whatever that is; none where it can't be read, or nobody looks.
    fn digest(&self, _path: &Path) -> Option<[u8; 32]> {
        None
    }
}

/// The environment variables of this process, and files up to 1 MiB, relative to its working directory.
#[derive(Clone, Copy, Debug, Default)]
pub struct Environment;

/// Secrets are small; more is a mistake, such as a log file.
const MAX_FILE: u64 = 1024 * 1024;

impl Lookup for Environment {
    fn variable(&self, name: &str) -> Option<String> {
        std::env::var(name).ok()
    }

    fn file(&self, path: &str) -> IoResult<String> {
        let mut content = String::new();
        let length = open(path.as_ref())?.take(MAX_FILE + 1).read_to_string(&mut content)?;
        if length as u64 > MAX_FILE {
            return Err(Error::new(ErrorKind::FileTooLarge, "it is larger than 1 MiB"));
        }
        Ok(content)
    }

    fn digest(&self, path: &Path) -> Option<[u8; 32]> {
        let (mut file, mut digest) = (BufReader::new(open(path).ok()?), Sha256::new());
        while let part = file.fill_buf().ok()?
            && !part.is_empty()
        {
            digest.update(part);
            let len = part.len();
            file.consume(len);
        }
        Some(digest.finalize().into())
    }
}

/// Opens what has an end, and gives it at once: a pipe may do neither.
fn open(path: &Path) -> IoResult<File> {
    if !metadata(path)?.is_file() {
        return Err(Error::new(ErrorKind::InvalidInput, "it is not a regular file"));
    }
    File::open(path)
}

/// A part of a text with references.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Piece<'t> {
    /// As it was written; templates look for `{fields}` in it.
    Text(&'t str),
    /// An escaped reference, without its second dollar sign. Holds no fields.
    Escaped(&'t str),
    /// A reference as it was written, and what it stands for.
    Reference { written: &'t str, value: String },
}

impl Piece<'_> {
    /// What stands in the resolved text.
    pub(crate) fn value(&self) -> &str {
        match self {
            Self::Text(text) | Self::Escaped(text) => text,
            Self::Reference { value, .. } => value,
        }
    }
}

/// A text with its `${…}` resolved.
///
/// # Errors
///
/// A message for each reference that is malformed or missing.
pub fn resolved(text: &str, lookup: &dyn Lookup) -> Result<String, Vec<String>> {
    let (pieces, problems) = pieces(text, lookup);
    if problems.is_empty() { Ok(pieces.iter().map(Piece::value).collect()) } else { Err(problems) }
}

/// Splits a text at its references and resolves them. `$${` is a literal `${`, up to the brace that would close it.
///
/// The second value has a message for each reference that is malformed or missing, which then counts as empty.
pub(crate) fn pieces<'t>(text: &'t str, lookup: &dyn Lookup) -> (Vec<Piece<'t>>, Vec<String>) {
    let mut pieces = Vec::new();
    let mut problems = Vec::new();
    let mut rest = text;
    while let Some(start) = rest.find("${") {
        let (before, reference) = rest.split_at(start);
        let (plain, escaped) = before.strip_suffix('$').map_or((before, false), |plain| (plain, true));
        if !plain.is_empty() {
            pieces.push(Piece::Text(plain));
        }
        let closed = reference.find('}').map(|end| reference.split_at(end + 1));
        let (written, after) = closed.unwrap_or((reference, ""));
        rest = after;
        if escaped {
            pieces.push(Piece::Escaped(written));
        } else if closed.is_none() {
            problems.push("`${` is not closed by `}`; for a literal `${` write `$${`".to_owned());
        } else {
            let name = written.strip_prefix("${").and_then(|name| name.strip_suffix('}')).unwrap_or_default();
            match resolve(name, lookup) {
                Ok(value) => pieces.push(Piece::Reference { written, value }),
                Err(problem) => {
                    pieces.push(Piece::Reference { written, value: String::new() });
                    problems.push(problem);
                }
            }
        }
    }
    if !rest.is_empty() {
        pieces.push(Piece::Text(rest));
    }
    (pieces, problems)
}

fn resolve(reference: &str, lookup: &dyn Lookup) -> Result<String, String> {
    if let Some(path) = reference.strip_prefix("file:") {
        let mut content = lookup.file(path).map_err(|error| format!("cannot read the file `{path}`: {error}"))?;
        if content.ends_with('\n') {
            content.pop();
            if content.ends_with('\r') {
                content.pop();
            }
        }
        return Ok(content);
    }
    let (name, default) = match reference.split_once(":-") {
        Some((name, default)) => (name, Some(default)),
        None => (reference, None),
    };
    if name.is_empty() || name.contains(|c: char| !c.is_ascii_alphanumeric() && c != '_') {
        return Err(format!("`${{{reference}}}` is neither `${{NAME}}`, `${{NAME:-default}}` nor `${{file:PATH}}`"));
    }
    match (lookup.variable(name), default) {
        // As in a shell, a default also stands in for an empty value.
        (Some(value), Some(default)) if value.is_empty() => Ok(default.to_owned()),
        (Some(value), _) => Ok(value),
        (None, Some(default)) => Ok(default.to_owned()),
        (None, None) => Err(format!("the environment variable `{name}` is not set")),
    }
}
