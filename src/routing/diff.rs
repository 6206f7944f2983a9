//! What another table would change: where events would go by one and by the other.

use std::collections::HashMap;
use std::time::SystemTime;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::condition::Values;
use super::{RouteId, Table};
use crate::event::{Event, Field, rfc3339};

/// How many examples are kept of each kind of change.
const EXAMPLES: usize = 3;
/// How many routes an example names.
const MAX_ROUTES: usize = 8;
/// How many characters of a sender's text an example shows.
const MAX_TEXT: usize = 64;

/// Two tables, and what events have shown of them so far. Its memory does not grow with the events.
pub struct Comparison<'t> {
    before: Side<'t>,
    after: Side<'t>,
    /// Those of `before`, then those that only `after` has.
    sinks: Vec<(String, Change, Tally)>,
    unrouted: Tally,
    events: u64,
    changed: u64,
    received: Option<(SystemTime, SystemTime)>,
}

/// One of the tables.
struct Side<'t> {
    table: &'t Table,
    /// The place of each of its sinks among those of both.
    places: Vec<usize>,
    /// How many events each of its routes matched.
    counts: Vec<u64>,
    candidates: Vec<RouteId>,
    /// The routes that the last event matched.
    matched: Vec<RouteId>,
    /// Which of all sinks it goes to.
    goes: Vec<bool>,
}

/// What another table would change.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Diff {
    /// How many events were looked at.
    pub events: u64,
    /// When the first of them was received.
    #[schema(format = "date-time")]
    pub since: Option<String>,
    /// When the last of them was received.
    #[schema(format = "date-time")]
    pub until: Option<String>,
    /// How many would go elsewhere.
    pub changed: u64,
    /// What each sink would gain and lose.
    pub sinks: Vec<SinkDiff>,
    /// Events that no route matches.
    pub unrouted: Tally,
    /// What each route matches, in the order of the new rules; then those that are gone.
    pub routes: Vec<RouteDiff>,
}

/// What would change for a sink.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct SinkDiff {
    /// The sink.
    pub sink: String,
    /// Whether it is in both rules.
    pub change: Change,
    /// Its events.
    #[serde(flatten)]
    pub tally: Tally,
}

/// What would change for a route. Routes are told by name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct RouteDiff {
    /// The route.
    pub route: String,
    /// Whether it is in both rules.
    pub change: Change,
    /// How many events it matches by the old rules.
    pub before: u64,
    /// How many by the new ones.
    pub after: u64,
}

/// In which rules something is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Change {
    /// In both.
    Kept,
    /// In the new ones.
    Added,
    /// In the old ones.
    Removed,
}

/// Events by the old rules and by the new ones.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Tally {
    /// How many by the old rules.
    pub before: u64,
    /// How many by the new ones.
    pub after: u64,
    /// How many only by the new ones.
    pub gains: u64,
    /// How many only by the old ones.
    pub loses: u64,
    /// How many by both.
    pub unchanged: u64,
    /// The first of those gained.
    pub gained: Vec<Example>,
    /// The first of those lost.
    pub lost: Vec<Example>,
}

/// An event for which something would change, without anybody's number.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Example {
    /// The event's id.
    pub event_id: String,
    /// When it was received.
    #[schema(format = "date-time")]
    pub received_at: String,
    /// Its status.
    pub status: Option<String>,
    /// The end of the sender's number.
    pub sender: Option<String>,
    /// The campaign's name, or else its id.
    pub campaign: Option<String>,
    /// Routes that match it by the old rules, from the top; eight at most.
    pub before: Vec<String>,
    /// The same by the new ones.
    pub after: Vec<String>,
}

impl<'t> Comparison<'t> {
    /// Nothing has been looked at yet.
    pub fn new(before: &'t Table, after: &'t Table) -> Self {
        let change = |name| if after.sink(name).is_some() { Change::Kept } else { Change::Removed };
        let mut sinks: Vec<_> =
            before.sinks.iter().map(|name| (name.clone(), change(name), Tally::default())).collect();
        let mut places = Vec::with_capacity(after.sinks.len());
        for name in &after.sinks {
            let place = before.sink(name).map_or(sinks.len(), |sink| sink.0);
            if place == sinks.len() {
                sinks.push((name.clone(), Change::Added, Tally::default()));
            }
            places.push(place);
        }
        let side = |table: &'t Table, places| Side {
            table,
            places,
            counts: vec![0; table.routes.len()],
            candidates: Vec::new(),
            matched: Vec::new(),
            goes: vec![false; sinks.len()],
        };
        Self {
            before: side(before, (0..before.sinks.len()).collect()),
            after: side(after, places),
            sinks,
            unrouted: Tally::default(),
            events: 0,
            changed: 0,
            received: None,
        }
    }

    /// Looks at an event.
    pub fn add(&mut self, event: &Event) {
        let Self { before, after, sinks, unrouted, .. } = self;
        before.look(event);
        after.look(event);
        let example = || Example::new(event, before.matched(), after.matched());
        for ((.., tally), (was, is)) in sinks.iter_mut().zip(before.goes.iter().zip(&after.goes)) {
            tally.add(*was, *is, example);
        }
        unrouted.add(before.matched.is_empty(), after.matched.is_empty(), example);
        self.events += 1;
        self.changed += u64::from(before.goes != after.goes);
        let (first, last) = self.received.unwrap_or((event.received_at(), event.received_at()));
        self.received = Some((first.min(event.received_at()), last.max(event.received_at())));
    }

    /// What all of them have shown.
    pub fn finish(self) -> Diff {
        let (before, after) = (self.before.counted(), self.after.counted());
        let mut routes = Vec::new();
        for (name, count) in self.after.table.routes().map(|route| route.name).zip(&self.after.counts) {
            let was = before.get(name).copied();
            let change = if was.is_some() { Change::Kept } else { Change::Added };
            routes.push(RouteDiff { route: name.to_owned(), change, before: was.unwrap_or(0), after: *count });
        }
        for (name, count) in self.before.table.routes().map(|route| route.name).zip(&self.before.counts) {
            if !after.contains_key(name) {
                let change = Change::Removed;
                routes.push(RouteDiff { route: name.to_owned(), change, before: *count, after: 0 });
            }
        }
        let sinks = self.sinks.into_iter().map(|(sink, change, tally)| SinkDiff { sink, change, tally });
        Diff {
            events: self.events,
            since: self.received.map(|(first, _)| rfc3339(first)),
            until: self.received.map(|(_, last)| rfc3339(last)),
            changed: self.changed,
            sinks: sinks.collect(),
            unrouted: self.unrouted,
            routes,
        }
    }
}

impl Side<'_> {
    /// Finds out where an event goes.
    fn look(&mut self, event: &Event) {
        self.matched.clear();
        self.goes.fill(false);
        let values = Values::new(event, &self.table.subjects);
        for (id, route) in self.table.candidates(&values, &mut self.candidates) {
            if !route.matches(&values) {
                continue;
            }
            self.matched.push(id);
            if let Some(count) = self.counts.get_mut(id.0) {
                *count += 1;
            }
            for sink in &route.to {
                if let Some(goes) = self.places.get(sink.0).and_then(|place| self.goes.get_mut(*place)) {
                    *goes = true;
                }
            }
            if route.is_final {
                break;
            }
        }
    }

    /// How many events each route matched, by name.
    fn counted(&self) -> HashMap<&str, u64> {
        self.table.routes().map(|route| route.name).zip(self.counts.iter().copied()).collect()
    }

    /// The names of the routes that the last event matched.
    fn matched(&self) -> Vec<String> {
        self.matched.iter().take(MAX_ROUTES).map(|route| self.table.route_name(*route).to_owned()).collect()
    }
}

impl Tally {
    fn add(&mut self, was: bool, is: bool, example: impl Fn() -> Example) {
        self.before += u64::from(was);
        self.after += u64::from(is);
        let (count, examples) = match (was, is) {
            (false, false) => return,
            (true, true) => {
                self.unchanged += 1;
                return;
            }
            (false, true) => (&mut self.gains, &mut self.gained),
            (true, false) => (&mut self.loses, &mut self.lost),
        };
        *count += 1;
        if examples.len() < EXAMPLES {
            examples.push(example());
        }
    }
}

impl Example {
    fn new(event: &Event, before: Vec<String>, after: Vec<String>) -> Self {
        let text = |field| event.field(field).map(|text| text.chars().take(MAX_TEXT).collect::<String>());
        Self {
            event_id: event.id().to_string(),
            received_at: event.received_at_rfc3339(),
            status: text(Field::Status),
            sender: event.field(Field::SenderId).map(masked),
            campaign: text(Field::CampaignName).or_else(|| text(Field::CampaignId)),
            before,
            after,
        }
    }
}

/// The end of a number: enough to tell a company's own numbers apart.
fn masked(number: &str) -> String {
    let start = number.char_indices().rev().nth(3).map_or(0, |(start, _)| start);
    let end = number.get(start..).filter(|_| start > 0);
    format!("…{}", end.unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::super::tests::{event, table};
    use super::*;

    fn body(number: u32, status: &str, sender: &str) -> String {
        format!(
            "{{\"message_id\":\"m-{number}\",\"message_status\":\"{status}\",\"channel\":{{\"sender_id\":\"{sender}\"}}}}"
        )
    }

    /// Both tables have the sinks a, b and c.
    fn diff(before: &str, after: &str, events: &[(&str, &str)]) -> Diff {
        let (before, after) = (table(before), table(after));
        let mut comparison = Comparison::new(&before, &after);
        for (number, (status, sender)) in (0..).zip(events) {
            comparison.add(&event(&body(number, status, sender)));
        }
        comparison.finish()
    }

    fn counts(tally: &Tally) -> [u64; 5] {
        [tally.before, tally.after, tally.gains, tally.loses, tally.unchanged]
    }

    #[test]
    fn counts_what_sinks_gain_and_lose() {
        let before = "[[routes]]\nname='errors'\nwhen={status='error'}\nto=['a']\n[[routes]]\nname='read'\nwhen={status='read'}\nto=['a','b']";
        let after = "[[routes]]\nname='read'\nwhen={status='read'}\nto=['b','c']\nfinal=true\n\
            [[routes]]\nname='late'\nwhen={status='read'}\nto=['a']\n[[routes]]\nname='sent'\nwhen={status='sent'}\nto=['a']";
        let events = [("error", "5491"), ("read", "5491"), ("sent", "5491"), ("read", "5492"), ("odd", "5492")];
        let diff = diff(before, after, &events);
        assert_eq!((diff.events, diff.changed), (5, 4));
        let [a, b, c] = [0, 1, 2].map(|place| counts(&diff.sinks[place].tally));
        assert_eq!((a, b, c), ([3, 1, 1, 3, 0], [2, 2, 0, 0, 2], [0, 2, 2, 0, 0]));
        assert_eq!(counts(&diff.unrouted), [2, 2, 1, 1, 1]);
        let routes: Vec<_> =
            diff.routes.iter().map(|route| (&*route.route, route.change, route.before, route.after)).collect();
        assert_eq!(
            routes,
            [
                ("read", Change::Kept, 2, 2),
                ("late", Change::Added, 0, 0),
                ("sent", Change::Added, 0, 1),
                ("errors", Change::Removed, 1, 0)
            ]
        );
        let gained = &diff.sinks[0].tally.gained[0];
        assert_eq!((&*gained.before, &*gained.after), ([].as_slice(), ["sent".to_owned()].as_slice()));
        assert_eq!(diff.since.as_deref(), Some("1970-01-01T00:00:01.000Z"));
    }

    #[test]
    fn the_same_rules_change_nothing() {
        let rules = "[[routes]]\nname='all'\nto=['c','a']";
        let diff = diff(rules, rules, &[("read", "1"), ("sent", "2")]);
        assert_eq!((diff.changed, &diff.unrouted), (0, &Tally::default()));
        assert!(diff.sinks.iter().all(|sink| sink.change == Change::Kept && sink.tally.before == sink.tally.after));
    }

    #[test]
    fn examples_are_few_and_name_nobody() {
        let (before, after) =
            ("[[routes]]\nname='none'\nwhen={status='x'}\nto=['a']", "[[routes]]\nname='all'\nto=['a']");
        let diff = diff(before, after, &[("read", "5491122223333"); 9]);
        assert_eq!((diff.sinks[0].tally.gains, diff.sinks[0].tally.gained.len()), (9, EXAMPLES));
        assert_eq!((diff.unrouted.loses, diff.unrouted.lost.len()), (9, EXAMPLES));
        assert!(diff.sinks[0].tally.gained.iter().all(|example| example.sender.as_deref() == Some("…3333")));
        for (number, expected) in [("", "…"), ("1234", "…"), ("12345", "…2345"), ("é1234", "…1234")] {
            assert_eq!(masked(number), expected);
        }
    }
}
