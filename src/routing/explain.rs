//! Why an event goes where it goes, for people.

use serde::Serialize;
use utoipa::ToSchema;

use super::Table;
use super::condition::Values;
use crate::event::Event;

/// What became of one route.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub struct Explanation {
    /// The route's name.
    pub route: String,
    /// What became of it.
    #[serde(flatten)]
    pub outcome: Outcome,
}

/// What became of a route.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[serde(tag = "outcome", rename_all = "snake_case")]
pub enum Outcome {
    /// All its conditions hold.
    Matched {
        /// The sinks that it leads to.
        to: Vec<String>,
        /// Whether the routes below it are not tried.
        #[serde(rename = "final")]
        is_final: bool,
    },
    /// Some of its conditions don't hold: all of those.
    NotMatched {
        /// The conditions that don't hold, in the file's order.
        because: Vec<Mismatch>,
    },
    /// A `final` route above it matched.
    NotTried {
        /// The name of that route.
        after: String,
    },
}

/// A condition that does not hold.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub struct Mismatch {
    /// The field or JSON pointer.
    pub field: String,
    /// The condition as it stands in the file.
    pub wanted: String,
    /// What the event has there, if anything.
    pub found: Option<String>,
}

impl Table {
    /// What becomes of each route for an event, from the top. Tries them one by one.
    pub fn explain(&self, event: &Event) -> Vec<Explanation> {
        let values = Values::new(event, &self.subjects);
        let mut ended_by: Option<&str> = None;
        let mut explanations = Vec::with_capacity(self.routes.len());
        for route in &self.routes {
            let outcome = if let Some(after) = ended_by {
                Outcome::NotTried { after: after.to_owned() }
            } else if route.matches(&values) {
                ended_by = route.is_final.then_some(&route.name);
                let to = route.to.iter().filter_map(|sink| self.sinks.get(sink.0).cloned()).collect();
                Outcome::Matched { to, is_final: route.is_final }
            } else {
                let failed = route.when.iter().filter(|condition| !condition.holds(&values));
                let because = failed.map(|condition| Mismatch {
                    field: self.subjects.get(condition.subject.0).map_or("", |subject| subject.name()).to_owned(),
                    wanted: condition.written.clone(),
                    found: values.get(condition.subject).map(str::to_owned),
                });
                Outcome::NotMatched { because: because.collect() }
            };
            explanations.push(Explanation { route: route.name.clone(), outcome });
        }
        explanations
    }
}
