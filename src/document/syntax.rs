//! Parsing with recovery: each statement with a syntax error is reported once and left out, and the rest is read as if
//! it were not there.

use std::ops::Range;

use toml::Spanned;
use toml::de::{DeString, DeTable, DeValue};

/// Syntax errors after which reading stops; each costs a parse.
const MAX_ERRORS: usize = 50;

/// What is left of a document without the statements that have a syntax error.
pub(super) struct Recovered<'s> {
    pub(super) root: DeTable<'s>,
    /// Offset and message.
    pub(super) errors: Vec<(usize, String)>,
    pub(super) lost: Vec<Range<usize>>,
}

/// Parses; at an error blanks the statement and parses again, so that the parser's own consequences never show and
/// all offsets stay what they are.
pub(super) fn parse(source: &str) -> Recovered<'_> {
    let (root, found) = DeTable::parse_recoverable(source);
    if found.is_empty() {
        return Recovered { root: root.into_inner(), errors: Vec::new(), lost: Vec::new() };
    }
    let mut text = source.to_owned();
    let mut errors = Vec::new();
    let mut lost = Vec::new();
    loop {
        let (root, found) = DeTable::parse_recoverable(&text);
        let Some(first) = found.iter().min_by_key(|error| error.span().map_or(0, |span| span.start)) else {
            return Recovered { root: rebased(root.get_ref(), source), errors, lost };
        };
        let span = first.span().unwrap_or_default();
        let mistake = Mistake::find(root.get_ref(), &text, span.start);
        errors.push(match mistake.opened {
            Some(start) => (start, "this value is not closed".to_owned()),
            None if first.message() == "duplicate key" => {
                (span.start, format!("duplicate key `{}`", text.get(span.clone()).unwrap_or_default()))
            }
            None => (span.start, first.message().to_owned()),
        });
        let range = mistake.range;
        let readable = text.get(range.clone()).is_some_and(|statement| !statement.trim().is_empty());
        if errors.len() == MAX_ERRORS || !readable {
            errors.push((span.start, "too many syntax errors: the rest was not read".to_owned()));
            lost.push(0..source.len());
            return Recovered { root: DeTable::new(), errors, lost };
        }
        text = blanked(&text, &range);
        lost.push(range);
    }
}

/// The table with its numbers read from `source`, which has the same text there, so that it can outlive the text it was
/// parsed from.
fn rebased<'s>(table: &DeTable<'_>, source: &'s str) -> DeTable<'s> {
    let entry = |(key, value): (&Spanned<DeString<'_>>, _)| {
        (Spanned::new(key.span(), DeString::Owned(key.get_ref().to_string())), rebased_value(value, source))
    };
    table.iter().map(entry).collect()
}

fn rebased_value<'s>(value: &Spanned<DeValue<'_>>, source: &'s str) -> Spanned<DeValue<'s>> {
    let rebased = match value.get_ref() {
        DeValue::String(text) => DeValue::String(DeString::Owned(text.to_string())),
        DeValue::Integer(_) | DeValue::Float(_) => {
            let (number, _) = DeValue::parse_recoverable(source.get(value.span()).unwrap_or_default());
            number.into_inner()
        }
        DeValue::Boolean(boolean) => DeValue::Boolean(*boolean),
        DeValue::Datetime(time) => DeValue::Datetime(*time),
        DeValue::Array(array) => DeValue::Array(array.iter().map(|value| rebased_value(value, source)).collect()),
        DeValue::Table(table) => DeValue::Table(rebased(table, source)),
    };
    Spanned::new(value.span(), rebased)
}

/// A statement with a syntax error.
struct Mistake {
    /// Its lines.
    range: Range<usize>,
    /// Where a value begins that is not closed.
    opened: Option<usize>,
}

impl Mistake {
    fn find(root: &DeTable<'_>, text: &str, at: usize) -> Self {
        let line = line_start(text, at);
        let value = enclosing(root, at).filter(|value| value.key < line);
        let opened = value.filter(|_| {
            let reached = text.get(line..).unwrap_or_default();
            starts_statement(reached) || text.get(at..).unwrap_or_default().trim().is_empty()
        });
        let (start, reached) = match (&opened, &value) {
            (Some(value), _) => (line_start(text, value.key), value.start),
            (None, Some(value)) => (line_start(text, value.key), at),
            (None, None) => (line, at),
        };
        // Without a header, the statements below it would be taken for another table's.
        let header = text.get(start..).unwrap_or_default().trim_start().starts_with('[');
        let ends = if header { starts_table } else { starts_statement };
        let mut end = line_end(text, reached);
        while end < text.len() && !ends(text.get(end..).unwrap_or_default()) {
            end = line_end(text, end);
        }
        Self { range: start..end, opened: opened.map(|value| value.start) }
    }
}

/// An assignment: where its key and its value begin.
#[derive(Clone, Copy)]
struct Assignment {
    key: usize,
    start: usize,
}

/// The outermost assignment whose value reaches over the offset.
fn enclosing(table: &DeTable<'_>, at: usize) -> Option<Assignment> {
    table.iter().find_map(|(key, value)| {
        let span = value.span();
        if span.start >= key.span().end {
            return (span.start..=span.end)
                .contains(&at)
                .then_some(Assignment { key: key.span().start, start: span.start });
        }
        match value.get_ref() {
            DeValue::Table(table) => enclosing(table, at),
            DeValue::Array(tables) => {
                tables.iter().map(Spanned::get_ref).filter_map(DeValue::as_table).find_map(|table| enclosing(table, at))
            }
            DeValue::String(_)
            | DeValue::Integer(_)
            | DeValue::Float(_)
            | DeValue::Boolean(_)
            | DeValue::Datetime(_) => None,
        }
    })
}

/// Whether the first line of `text` begins a statement. A guess: inside a broken value it may be wrong, and then there
/// is one problem more.
fn starts_statement(text: &str) -> bool {
    let line = text.lines().next().unwrap_or_default();
    let is_key = |key: &str| {
        let plain = |c: char| c.is_alphanumeric() || "_-./~\"' \t".contains(c);
        !key.trim().is_empty() && key.chars().all(plain) && key.matches(['"', '\'']).count().is_multiple_of(2)
    };
    starts_table(text) || line.split_once('=').is_some_and(|(key, _)| is_key(key))
}

fn starts_table(text: &str) -> bool {
    let name =
        text.trim_start_matches([' ', '\t']).strip_prefix('[').map(|rest| rest.trim_start_matches(['[', ' ', '\t']));
    name.is_some_and(|name| name.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_'))
}

fn line_start(text: &str, at: usize) -> usize {
    text.get(..at).and_then(|before| before.rfind('\n')).map_or(0, |end| end + 1)
}

/// Where the next line begins.
fn line_end(text: &str, at: usize) -> usize {
    text.get(at..).and_then(|rest| rest.find('\n')).map_or(text.len(), |end| at + end + 1)
}

/// The text with spaces in the range, byte for byte, and the same lines.
fn blanked(text: &str, range: &Range<usize>) -> String {
    let blank = |byte: u8| if byte == b'\n' { '\n' } else { ' ' };
    let (before, rest) = text.split_at_checked(range.start).unwrap_or((text, ""));
    let (statement, after) = rest.split_at_checked(range.len()).unwrap_or((rest, ""));
    before.chars().chain(statement.bytes().map(blank)).chain(after.chars()).collect()
}
