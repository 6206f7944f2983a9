//! What has been given: the values of the file and of the variables in one tree, each with where it comes from.
//!
//! What turns out not to work is left out, so that all the rest can be looked at too. A variable's text has no type: what
//! it is depends on what its setting wants, so a value may have another reading.

use std::collections::BTreeMap;
use std::rc::Rc;

use figment::value::{Dict, Value};

use crate::document::{self, Key, Lookup, Place, Section, Shape, refers, resolved};

/// A value, or what is left of it.
pub(super) struct Given {
    pub(super) origin: Origin,
    node: Node,
    /// Whether it has references: then it must not be shown.
    referring: bool,
    left_out: bool,
    /// What a variable's text may mean as well.
    instead: Option<Box<Self>>,
}

/// Where a value comes from.
#[derive(Clone)]
pub(super) enum Origin {
    /// The file: its key and itself.
    File { key: Place, value: Place },
    /// The variable of this name.
    Variable(Rc<str>),
}

impl Origin {
    pub(super) fn of_key(&self) -> Self {
        match self {
            Self::File { key, .. } => Self::File { key: key.clone(), value: key.clone() },
            Self::Variable(name) => Self::Variable(Rc::clone(name)),
        }
    }
}

enum Node {
    Leaf(Value),
    List(Vec<Given>),
    Table(BTreeMap<String, Given>),
}

impl Given {
    /// A table of the file. What can't be read of it is reported there, and left out here.
    pub(super) fn in_file(section: &Section<'_>) -> Self {
        let place = section.place();
        let origin = Origin::File { key: place.clone(), value: place.clone() };
        Self::new(origin, Node::Table(entries(section)))
    }

    fn of_file(key: &Place, value: document::Value<'_>) -> Self {
        let origin = Origin::File { key: key.clone(), value: value.place() };
        let element = |value: document::Value<'_>| Self::of_file(&value.place(), value);
        let node = match value.shape() {
            Shape::Text(text) => {
                let leaf = value.text().map(|(text, _)| Node::Leaf(text.into()));
                return Self { referring: refers(text), ..Self::or_left_out(origin, leaf) };
            }
            Shape::Scalar(_) => value.read().map(Node::Leaf),
            Shape::Array(values) => Some(Node::List(values.into_iter().map(element).collect())),
            Shape::Table(section) => Some(Node::Table(entries(&section))),
            Shape::Datetime => {
                value.problem("is a date or a time, and no setting is; text is written in quotes");
                None
            }
        };
        Self::or_left_out(origin, node)
    }

    /// The text of a variable. An array or a table is taken for what it looks like, and all else for text; unless that is
    /// not what is wanted. What is wrong with its references is in the second value.
    pub(super) fn of_variable(name: &Rc<str>, text: &str, lookup: &dyn Lookup) -> (Self, Vec<String>) {
        let mut problems = Vec::new();
        let literal = Self::literal(name, text.into(), lookup, &mut problems);
        let Ok(parsed) = text.parse::<Value>();
        let given = match parsed {
            Value::String(..) | Value::Char(..) => literal,
            Value::Array(..) | Value::Dict(..) => {
                problems.clear();
                let parsed = Self::literal(name, parsed, lookup, &mut problems);
                Self { instead: Some(Box::new(literal)), ..parsed }
            }
            Value::Num(..) | Value::Bool(..) | Value::Empty(..) => {
                let parsed = Self::literal(name, parsed, lookup, &mut problems);
                Self { instead: Some(Box::new(parsed)), ..literal }
            }
        };
        (given, problems)
    }

    fn literal(name: &Rc<str>, value: Value, lookup: &dyn Lookup, problems: &mut Vec<String>) -> Self {
        let origin = Origin::Variable(Rc::clone(name));
        let mut given = |value| Self::literal(name, value, lookup, problems);
        match value {
            Value::String(_, text) => {
                let resolved = resolved(&text, lookup).map_err(|found| problems.extend(found)).ok();
                let leaf = resolved.map(|text| Node::Leaf(text.into()));
                Self { referring: refers(&text), ..Self::or_left_out(origin, leaf) }
            }
            Value::Array(_, values) => Self::new(origin, Node::List(values.into_iter().map(given).collect())),
            Value::Dict(_, values) => {
                Self::new(origin, Node::Table(values.into_iter().map(|(key, value)| (key, given(value))).collect()))
            }
            Value::Char(..) | Value::Bool(..) | Value::Num(..) | Value::Empty(..) => {
                Self::new(origin, Node::Leaf(value))
            }
        }
    }

    fn new(origin: Origin, node: Node) -> Self {
        Self { origin, node, referring: false, left_out: false, instead: None }
    }

    fn or_left_out(origin: Origin, node: Option<Node>) -> Self {
        let left_out = node.is_none();
        Self { left_out, ..Self::new(origin, node.unwrap_or(Node::List(Vec::new()))) }
    }

    /// Puts a value where the path leads to, over what is there. Tables are merged, unless there is nothing in one. Returns
    /// the variable, if one did, that gave another value to a whole which this one is a part of, and that is gone now.
    pub(super) fn put<'k>(&mut self, mut path: impl Iterator<Item = &'k str>, given: Self) -> Option<Rc<str>> {
        let Some(key) = path.next() else {
            self.merge(given);
            return None;
        };
        let mut replaced = None;
        if !matches!(self.node, Node::Table(_)) {
            if let Origin::Variable(name) = &self.origin {
                replaced = Some(Rc::clone(name));
            }
            *self = Self::new(given.origin.clone(), Node::Table(BTreeMap::new()));
        }
        if let Node::Table(entries) = &mut self.node {
            let table = || Self::new(given.origin.clone(), Node::Table(BTreeMap::new()));
            return entries.entry(key.to_owned()).or_insert_with(table).put(path, given).or(replaced);
        }
        replaced
    }

    fn merge(&mut self, given: Self) {
        match (&mut self.node, given.node) {
            (Node::Table(entries), Node::Table(others)) if !entries.is_empty() => {
                for (key, other) in others {
                    match entries.get_mut(&key) {
                        Some(entry) => entry.merge(other),
                        None => drop(entries.insert(key, other)),
                    }
                }
            }
            (_, node) => *self = Self { node, ..given },
        }
    }

    /// What is left, without its origins.
    pub(super) fn value(&self) -> Value {
        match &self.node {
            Node::Leaf(value) => value.clone(),
            Node::List(list) => list.iter().filter(|given| !given.left_out).map(Self::value).collect::<Vec<_>>().into(),
            Node::Table(entries) => {
                let left = entries.iter().filter(|(_, given)| !given.left_out);
                left.map(|(key, given)| (key.clone(), given.value())).collect::<Dict>().into()
            }
        }
    }

    /// The way to what is at the path in [`Given::value`], or nearest to it, by names and numbers as they were given.
    pub(super) fn way<S: AsRef<str>>(&self, path: &[S]) -> Vec<String> {
        let (mut found, mut way) = (self, Vec::new());
        for key in path.iter().map(AsRef::as_ref) {
            let next = match &found.node {
                Node::Leaf(_) => None,
                Node::Table(entries) => entries.get(key).map(|entry| (key.to_owned(), entry)),
                Node::List(list) => {
                    let mut left = list.iter().enumerate().filter(|(_, given)| !given.left_out);
                    let nth = key.parse().ok().and_then(|index| left.nth(index));
                    nth.map(|(index, given)| (index.to_string(), given))
                }
            };
            let Some((name, given)) = next else { break };
            way.push(name);
            found = given;
        }
        way
    }

    pub(super) fn at(&self, way: &[String]) -> Option<&Self> {
        way.iter().try_fold(self, |given, key| given.child(key))
    }

    pub(super) fn at_mut(&mut self, way: &[String]) -> Option<&mut Self> {
        way.iter().try_fold(self, |given, key| match &mut given.node {
            Node::Leaf(_) => None,
            Node::List(list) => list.get_mut(key.parse::<usize>().ok()?),
            Node::Table(entries) => entries.get_mut(key),
        })
    }

    /// Takes the value's other reading, if it has one.
    pub(super) fn reread(&mut self) -> bool {
        let other = self.instead.take().filter(|other| !other.left_out);
        let is_other = other.is_some();
        if let Some(other) = other {
            *self = *other;
        }
        is_other
    }

    pub(super) fn leave_out(&mut self) {
        self.left_out = true;
    }

    /// Whether nothing was left out that the way leads to or through.
    pub(super) fn is_whole(&self, way: &[String]) -> bool {
        !self.left_out
            && match way.split_first() {
                None => self.children().into_iter().all(|child| child.is_whole(&[])),
                Some((key, rest)) => self.child(key).is_none_or(|child| child.is_whole(rest)),
            }
    }

    /// Whether the message has a text in it that references have made up.
    pub(super) fn is_shown_by(&self, message: &str) -> bool {
        let own = match &self.node {
            Node::Leaf(Value::String(_, text)) if self.referring => Some(text),
            Node::Leaf(_) | Node::List(_) | Node::Table(_) => None,
        };
        // As it is, or as it is quoted.
        let shown = |text: &String| message.contains(text) || message.contains(&format!("{text:?}"));
        own.is_some_and(|text| !text.is_empty() && shown(text))
            || self.children().into_iter().any(|child| child.is_shown_by(message))
    }

    fn child(&self, key: &str) -> Option<&Self> {
        match &self.node {
            Node::Leaf(_) => None,
            Node::List(list) => list.get(key.parse::<usize>().ok()?),
            Node::Table(entries) => entries.get(key),
        }
    }

    fn children(&self) -> Vec<&Self> {
        match &self.node {
            Node::Leaf(_) => Vec::new(),
            Node::List(list) => list.iter().collect(),
            Node::Table(entries) => entries.values().collect(),
        }
    }
}

fn entries(section: &Section<'_>) -> BTreeMap<String, Given> {
    let entry = |(key, value): (Key<'_>, _)| (key.name.to_owned(), Given::of_file(&key.place, value));
    section.entries().into_iter().map(entry).collect()
}
