//! Finds the routes that can match an event without trying them all.
//!
//! Each route is anchored at one of its conditions that wants exact values: at the field of which the whole table names
//! the most different values, because that tells the most routes apart. An event's candidates are the routes anchored
//! at its own values, and the few without an anchor.

use std::collections::{BTreeMap, HashMap, HashSet};

use super::condition::{SubjectId, Values};
use super::{Route, RouteId};

/// Routes by the exact value that they want.
#[derive(Clone, Debug, Default)]
pub(super) struct Index {
    anchors: Vec<(SubjectId, HashMap<String, Vec<RouteId>>)>,
    /// Routes without an anchor, from the top.
    loose: Vec<RouteId>,
}

impl Index {
    pub(super) fn new(routes: &[Route]) -> Self {
        let mut distinct: BTreeMap<SubjectId, HashSet<&str>> = BTreeMap::new();
        for condition in routes.iter().flat_map(|route| &route.when) {
            distinct.entry(condition.subject).or_default().extend(condition.exact().into_iter().flatten());
        }
        let selective = |subject: SubjectId| distinct.get(&subject).map_or(0, HashSet::len);
        let mut anchors: BTreeMap<SubjectId, HashMap<String, Vec<RouteId>>> = BTreeMap::new();
        let mut loose = Vec::new();
        for (place, route) in routes.iter().enumerate() {
            let exact = route.when.iter().filter_map(|condition| Some((condition.subject, condition.exact()?)));
            let Some((subject, values)) = exact.max_by_key(|(subject, _)| selective(*subject)) else {
                loose.push(RouteId(place));
                continue;
            };
            let anchored = anchors.entry(subject).or_default();
            for value in values {
                anchored.entry(value.to_owned()).or_default().push(RouteId(place));
            }
        }
        Self { anchors: anchors.into_iter().collect(), loose }
    }

    /// Puts the routes that can match into `candidates`, from the top, each once.
    pub(super) fn candidates(&self, values: &Values<'_>, candidates: &mut Vec<RouteId>) {
        candidates.clear();
        candidates.extend_from_slice(&self.loose);
        for (subject, anchored) in &self.anchors {
            if let Some(routes) = values.get(*subject).and_then(|value| anchored.get(value)) {
                candidates.extend_from_slice(routes);
            }
        }
        candidates.sort_unstable();
    }
}
