//! What other rules would change: where the events that the journal still keeps would go by them.

use std::sync::Arc;

use axum::extract::State;
use serde::{Deserialize, Serialize};
use tokio::sync::oneshot;
use tracing::debug;
use utoipa::ToSchema;

use super::problem::{Failed, Json, Problem};
use super::time::Period;
use super::{Shared, time};
use crate::document;
use crate::event::Event;
use crate::journal::{Position, ReadError, Start, View};
use crate::ledger::Millis;
use crate::routing::{Comparison, Diff, Table};
use crate::rules::{RulesError, routes_beside};

/// How much is read at once, in bytes.
const READ: u64 = 1 << 20;
/// Others go first: this takes what processor time they leave.
const NICENESS: i32 = 19;

/// Rules, and the events to compare them by.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Compare {
    /// The text of a `routes.toml`. What its `${…}` stand for is not looked up.
    rules: String,
    /// How many events at most: the newest.
    #[schema(minimum = 1)]
    last: Option<i64>,
    /// Received at or after this time.
    #[serde(default, deserialize_with = "time::optional")]
    #[schema(value_type = Option<String>, format = "date-time")]
    since: Option<Millis>,
    /// Received before this time.
    #[serde(default, deserialize_with = "time::optional")]
    #[schema(value_type = Option<String>, format = "date-time")]
    until: Option<Millis>,
}

/// What came of it.
#[derive(Serialize, ToSchema)]
pub(super) struct Compared {
    /// Whether the rules can be used.
    ok: bool,
    /// What is wrong with them, or worth a warning.
    problems: Vec<document::Problem>,
    /// What they would change; null where they can't be used.
    diff: Option<Diff>,
}

/// Says what other rules would change: by the running rules and by those given, where do the events go that the journal
/// still keeps? Nothing is sent, stored or applied. Of sinks only the names count. Comparisons are made one after the
/// other.
#[utoipa::path(
    post,
    path = "/api/v1/diff",
    request_body(content = Compare, content_type = "application/json"),
    responses((status = 200, body = Compared, description = "The change, or what is wrong with the rules"), Failed)
)]
pub(super) async fn compare(
    State(operated): State<Shared>,
    Json(Compare { rules, last, since, until }): Json<Compare>,
) -> Result<Json<Compared>, Problem> {
    if last.is_some_and(|last| last < 1) {
        return Err(Problem::bad_request("`last` must be at least 1"));
    }
    if last.is_some() && operated.cluster.is_some() {
        return Err(Problem::bad_request("`last` has no meaning with a journal of several partitions; use `since`"));
    }
    let turn = Arc::clone(&operated.comparing).lock_owned().await;
    let (events, before) =
        (Events { journal: operated.journal.clone(), last, period: Period { since, until } }, operated.table());
    let (answer, answered) = oneshot::channel();
    let compare = move || {
        let _turn = turn;
        if let Err(error) = rustix::process::nice(NICENESS) {
            debug!(%error, "the comparison runs like everything else");
        }
        let compared = match routes_beside("rules", &rules, &before) {
            Ok((after, problems)) => {
                let diff = events.compare(&before, &after, || answer.is_closed());
                diff.map(|diff| Compared { ok: true, problems, diff: Some(diff) }).map_err(Problem::internal)
            }
            Err(RulesError::Problems { problems }) => Ok(Compared { ok: false, problems, diff: None }),
            Err(error @ RulesError::Read { .. }) => Err(Problem::internal(error)),
        };
        // Whoever asked may have gone.
        drop(answer.send(compared));
    };
    std::thread::Builder::new().name("diff".to_owned()).spawn(compare).map_err(Problem::internal)?;
    answered.await.map_err(Problem::internal)?.map(Json)
}

/// The events to compare by.
struct Events {
    journal: View,
    last: Option<i64>,
    period: Period,
}

impl Events {
    /// Reads them all, unless it is told to stop. Blocks.
    fn compare(&self, before: &Table, after: &Table, stop: impl Fn() -> bool) -> Result<Diff, ReadError> {
        let mut comparison = Comparison::new(before, after);
        let end = self.journal.end();
        let mut reader = self.journal.reader(self.start(end)?)?;
        while reader.position() < end && !stop() {
            let at = reader.position();
            reader.read(READ, |position, entry| {
                let is_before_end = position < end;
                // What can't be read is a dead letter already.
                if is_before_end
                    && let Ok(event) = Event::decode(entry.record)
                    && self.period.has(&event)
                {
                    comparison.add(&event);
                }
                is_before_end
            })?;
            reader.release(reader.position());
            if reader.position() == at {
                break;
            }
        }
        Ok(comparison.finish())
    }

    fn start(&self, end: Position) -> Result<Start, ReadError> {
        let Some(last) = self.last else { return Ok(self.period.start()) };
        let oldest = self.journal.reader(Start::Earliest)?.position();
        Ok(Start::At(Position::from_stored(end.to_stored().saturating_sub(last)).max(oldest)))
    }
}
