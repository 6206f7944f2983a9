//! Documents that are only looked at: their references are not looked up, and what depends on one can't be judged.

use std::io;

use super::{Document, Lookup, Piece, pieces};

/// Looks nothing up: every reference stands for its own name.
#[derive(Clone, Copy, Debug, Default)]
pub struct Unresolved;

impl Lookup for Unresolved {
    fn variable(&self, name: &str) -> Option<String> {
        Some(name.to_owned())
    }

    fn file(&self, path: &str) -> io::Result<String> {
        Ok(path.replace(|c: char| !c.is_ascii_alphanumeric(), "_"))
    }
}

/// Whether there is a `${…}` in the text.
pub fn refers(text: &str) -> bool {
    pieces(text, &Unresolved).0.iter().any(|piece| matches!(piece, Piece::Reference { .. }))
}

impl Document<'_> {
    /// Takes back what has been said so far of values with references in them.
    pub fn forgive_references(&self) {
        let at_reference = |at: &std::ops::Range<usize>| self.source.get(at.clone()).is_some_and(refers);
        self.problems.borrow_mut().retain(|(at, ..)| !at_reference(at));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_depends_on_a_reference_is_not_judged() {
        let source = "a = '${A}'\nb = 'b'\nc = ['${file:/C}', 'c']\nd = '$${D}'\n";
        let document = Document::parse("f", source, &Unresolved);
        let mut root = document.root();
        for key in ["a", "b", "c", "d"] {
            assert_eq!(root.get::<u8>(key), None);
        }
        document.forgive_references();
        root.finish();
        let lines: Vec<_> = document.into_problems().iter().map(|problem| problem.line).collect();
        assert_eq!(lines, [2, 4]);
    }
}
