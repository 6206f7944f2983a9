//! Which events go to which sinks: the `[[routes]]` of `routes.toml`, compiled.
//!
//! [`Table::read`] compiles the routes of a document whose sinks the caller has read, and reports every problem to the
//! document. [`Table::matches`] then says for an event which sinks it goes to, and [`Table::explain`] why.
//!
//! Routes are tried from the top; an event goes to the union of the sinks of all routes that match, and a matching
//! `final` route ends it. The cost per event does not grow with the number of routes that want an exact value of some
//! field: each of them is found by a look-up of the event's own value. The result is always the same as that of trying all
//! routes one by one.
//!
//! A condition names a field or a JSON pointer and holds if all of its tests do. A value that the event lacks, or that is
//! null, passes no test but `exists = false`: neither `not` nor `not_in` hold for it. In `is`, `in`, `not` and `not_in`,
//! as in a plain string or array, `*` stands for any text, also none; in `prefix` it is a character like any other. A
//! `regex` may match anywhere in the value unless it says `^` and `$`. Numbers and booleans, in the rules and in the
//! event, count as the text that they were written as.
//!
//! [`Comparison`] says what another table would change.
//!
//! This part decides and does nothing else: it does not know what a sink is, only what it is called.

mod condition;
mod diff;
mod explain;
mod index;
mod read;
mod stored;
mod when;

use crate::event::Event;

use condition::{Condition, Subject, Values};
use index::Index;

pub use diff::{Change, Comparison, Diff, Example, RouteDiff, SinkDiff, Tally};
pub use explain::{Explanation, Mismatch, Outcome};
pub use read::check_sink_name;
pub use when::When;

/// The reserved name under which events that no route matched are kept.
pub const UNROUTED: &str = "unrouted";

/// The compiled routes.
#[derive(Clone, Debug)]
pub struct Table {
    sinks: Vec<String>,
    routes: Vec<Route>,
    subjects: Vec<Subject>,
    index: Index,
    keep_unrouted: bool,
}

#[derive(Clone, Debug)]
struct Route {
    name: String,
    when: Vec<Condition>,
    to: Vec<SinkId>,
    is_final: bool,
}

/// A sink of a [`Table`]: its place in [`Table::sinks`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SinkId(pub usize);

/// A route of a [`Table`]: its place from the top.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RouteId(usize);

/// A sink that an event goes to, and the first route that named it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Match {
    /// The sink.
    pub sink: SinkId,
    /// The topmost matching route that names the sink.
    pub route: RouteId,
}

/// A route, to be shown.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RouteView<'t> {
    /// Its name.
    pub name: &'t str,
    /// The sinks that it leads to.
    pub to: Vec<&'t str>,
    /// Whether the routes below it are not tried for an event that matched it.
    pub is_final: bool,
}

/// Memory for [`Table::matches`], to be used again for the next event, also with another table.
#[derive(Debug, Default)]
pub struct Scratch {
    candidates: Vec<RouteId>,
    matches: Vec<Match>,
}

impl Table {
    /// The sinks that an event goes to, each once, in the order in which the routes name them. None: unrouted.
    pub fn matches<'s>(&self, event: &Event, scratch: &'s mut Scratch) -> &'s [Match] {
        let Scratch { candidates, matches } = scratch;
        matches.clear();
        let values = Values::new(event, &self.subjects);
        for (route_id, route) in self.candidates(&values, candidates) {
            if !route.matches(&values) {
                continue;
            }
            for &sink in &route.to {
                if !matches.iter().any(|found| found.sink == sink) {
                    matches.push(Match { sink, route: route_id });
                }
            }
            if route.is_final {
                break;
            }
        }
        matches
    }

    /// Whether an event goes to that sink, and by which route. Cheaper than [`Table::matches`].
    pub fn route_to(&self, event: &Event, sink: SinkId, scratch: &mut Scratch) -> Option<RouteId> {
        let values = Values::new(event, &self.subjects);
        for (route_id, route) in self.candidates(&values, &mut scratch.candidates) {
            let leads_there = route.to.contains(&sink);
            if (leads_there || route.is_final) && route.matches(&values) {
                return leads_there.then_some(route_id);
            }
        }
        None
    }

    /// The names of the sinks, in the order in which they were given to [`Table::read`].
    pub fn sinks(&self) -> &[String] {
        &self.sinks
    }

    /// The sink of that name.
    pub fn sink(&self, name: &str) -> Option<SinkId> {
        self.sinks.iter().position(|sink| sink == name).map(SinkId)
    }

    /// The routes, from the top.
    pub fn routes(&self) -> impl ExactSizeIterator<Item = RouteView<'_>> {
        self.routes.iter().map(|route| {
            let to = route.to.iter().filter_map(|sink| self.sinks.get(sink.0)).map(String::as_str);
            RouteView { name: &route.name, to: to.collect(), is_final: route.is_final }
        })
    }

    /// The name of a route of this table. A route of another table has none.
    pub fn route_name(&self, route: RouteId) -> &str {
        self.routes.get(route.0).map_or("", |route| &route.name)
    }

    /// The routes' conditions that name tokens: the route, what it says, the names.
    pub fn tokens(&self) -> impl Iterator<Item = (&str, &str, impl Iterator<Item = &str>)> {
        let conditions =
            self.routes.iter().flat_map(|route| route.when.iter().map(move |condition| (route, condition)));
        conditions.filter_map(|(route, condition)| {
            let is_token = self.subjects.get(condition.subject.0) == Some(&Subject::Token);
            let names = condition.exact().filter(|_| is_token)?;
            Some((route.name.as_str(), condition.written.as_str(), names))
        })
    }

    /// Whether events that no route matches are kept as dead letters of [`UNROUTED`].
    pub fn keeps_unrouted(&self) -> bool {
        self.keep_unrouted
    }

    /// The routes that can match, from the top.
    fn candidates<'t>(
        &'t self,
        values: &Values<'_>,
        candidates: &'t mut Vec<RouteId>,
    ) -> impl Iterator<Item = (RouteId, &'t Route)> {
        self.index.candidates(values, candidates);
        candidates.iter().filter_map(|&id| Some((id, self.routes.get(id.0)?)))
    }
}

impl Route {
    fn matches(&self, values: &Values<'_>) -> bool {
        self.when.iter().all(|condition| condition.holds(values))
    }
}

#[cfg(test)]
mod tests;
