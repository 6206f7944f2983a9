//! What the rules do with an event, for people.

use serde::Serialize;
use utoipa::ToSchema;

use super::Rules;
use crate::event::Event;
use crate::routing::{Explanation, Scratch};
use crate::sink::{Attempt, Preview};

/// What would become of one event.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct Explained {
    /// The event's id.
    pub event_id: String,
    /// What becomes of each route, from the top.
    pub routes: Vec<Explanation>,
    /// The sinks that it goes to. None: it is unrouted.
    pub sinks: Vec<Destination>,
}

/// A sink that an event goes to.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct Destination {
    /// The sink.
    pub sink: String,
    /// The first route that leads there.
    pub route: String,
    /// What it would be sent, with secrets as their `${…}` references.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sent: Option<Preview>,
    /// Why it can't be sent there.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

impl Rules {
    /// What would become of an event.
    pub fn explain(&self, event: &Event) -> Explained {
        let mut scratch = Scratch::default();
        let sinks = self.table.matches(event, &mut scratch).iter().filter_map(|found| {
            let route = self.table.route_name(found.route);
            let name = self.table.sinks().get(found.sink.0)?;
            let sink = self.sinks.iter().find(|sink| sink.name == *name)?;
            let (sent, error) = match sink.sink.preview(name, event, &Attempt { number: 1, route, traceparent: None }) {
                Ok(preview) => (Some(preview), None),
                Err(error) => (None, Some(error.text)),
            };
            Some(Destination { sink: name.clone(), route: route.to_owned(), sent, error })
        });
        let sinks = sinks.collect();
        Explained { event_id: event.id().to_string(), routes: self.table.explain(event), sinks }
    }
}
