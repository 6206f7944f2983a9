//! Sending events again that the journal still keeps.

use std::sync::Arc;

use axum::extract::State;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use utoipa::ToSchema;

use super::problem::{Failed, Json, Problem};
use super::time::Period;
use super::{BULK_LIMIT, Operated, Shared, limit, position, time};
use crate::event::Event;
use crate::journal::{Position, ReadError, Start};
use crate::ledger::{self, Millis};
use crate::routing::{Scratch, SinkId, Table, When};

/// How much of the journal one request reads, in bytes.
const MAX_READ: u64 = 64 << 20;
/// How much is read at once.
const READ: u64 = 1 << 20;

/// What to send again.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Replay {
    /// To which sink. Only what the rules send there is sent again.
    sink: String,
    /// Received at or after this time.
    #[serde(default, deserialize_with = "time::optional")]
    #[schema(value_type = Option<String>, format = "date-time")]
    since: Option<Millis>,
    /// Received before this time; without it, the time of the request.
    #[serde(default, deserialize_with = "time::optional")]
    #[schema(value_type = Option<String>, format = "date-time")]
    until: Option<Millis>,
    /// Only events for which this holds: conditions as in a route's `when`.
    #[serde(default)]
    #[schema(value_type = Option<Object>)]
    when: Option<Map<String, Value>>,
    /// The position to begin at; without it the oldest event that is kept.
    #[schema(minimum = 0)]
    from: Option<i64>,
    /// The position to end before; without it the journal's end.
    #[schema(minimum = 0)]
    up_to: Option<i64>,
    /// How many events at most, up to 10,000; 1,000 without it.
    #[schema(minimum = 1, maximum = 10_000)]
    limit: Option<usize>,
}

/// What was sent again.
#[derive(Serialize, ToSchema)]
pub(super) struct Replayed {
    /// How many events were given to the sink.
    replayed: usize,
    /// How many were looked at.
    scanned: u64,
    /// For `from` of the next request; null when all is done.
    next: Option<i64>,
    /// For `up_to` of the next request.
    up_to: i64,
    /// For `until` of the next request, so that it does not meet what was received meanwhile.
    #[schema(format = "date-time")]
    until: String,
}

/// Sends retained events to a sink again, whether they were delivered or not. One request takes up to `limit` of them, and
/// reads a part of the journal; to take all, repeat it with `next` of the answer as `from`, and its `up_to` and `until`, until
/// `next` is null.
#[utoipa::path(
    post,
    path = "/api/v1/replay",
    request_body(content = Replay, content_type = "application/json"),
    responses((status = 200, body = Replayed), Failed)
)]
pub(super) async fn replay(
    State(operated): State<Shared>,
    Json(replay): Json<Replay>,
) -> Result<Json<Replayed>, Problem> {
    let lane = operated.lane(&replay.sink)?;
    let limit = limit(replay.limit, BULK_LIMIT)?;
    let when = replay.when.as_ref().map(When::from_json).transpose().map_err(Problem::bad_request)?;
    let end = operated.journal.end();
    let up_to = position("up_to", replay.up_to)?.map_or(end, |up_to| up_to.min(end));
    let table = operated.table();
    let sink = table.sink(&replay.sink).ok_or_else(|| Problem::internal("the sink is not in the rules"))?;
    // Where relays share a journal, its partitions are read one after the other, each up to where it ends by then.
    let until = replay.until.unwrap_or_else(|| ledger::now() + 1);
    let period = Period { since: replay.since, until: Some(until) };
    let start = position("from", replay.from)?.map_or_else(|| period.start(), Start::At);
    let search = Search { table, sink, period, when, up_to, limit };
    operated.letters.has_room(&lane).await?;
    let shared = Arc::clone(&operated);
    let found = tokio::task::spawn_blocking(move || search.run(&shared, start)).await.map_err(Problem::internal)?;
    let Found { events, scanned, next } = found.map_err(Problem::internal)?;
    let replayed = events.len();
    if replayed > 0 {
        operated.letters.resend(&replay.sink, &lane, events).await?;
    }
    let next = (next < up_to).then(|| next.to_stored());
    Ok(Json(Replayed { replayed, scanned, next, up_to: up_to.to_stored(), until: time::text(until) }))
}

struct Search {
    table: Arc<Table>,
    sink: SinkId,
    period: Period,
    when: Option<When>,
    up_to: Position,
    limit: usize,
}

struct Found {
    events: Vec<(Position, Event)>,
    scanned: u64,
    next: Position,
}

impl Search {
    /// Reads until there are enough. Blocks.
    fn run(&self, operated: &Operated, start: Start) -> Result<Found, ReadError> {
        let mut reader = operated.journal.reader(start)?;
        let (mut scanned, mut scratch, mut events) = (0, Scratch::default(), Vec::new());
        let mut left = MAX_READ;
        while left > 0 && events.len() < self.limit && reader.position() < self.up_to {
            left = left.saturating_sub(READ);
            reader.read(READ, |position, entry| {
                if position >= self.up_to {
                    return false;
                }
                scanned += 1;
                // What can't be read is a dead letter already.
                if let Ok(event) = Event::decode(entry.record)
                    && self.wants(&event, &mut scratch)
                {
                    events.push((position, event.detached()));
                }
                events.len() < self.limit
            })?;
        }
        Ok(Found { events, scanned, next: reader.position() })
    }

    fn wants(&self, event: &Event, scratch: &mut Scratch) -> bool {
        self.period.has(event)
            && self.table.route_to(event, self.sink, scratch).is_some()
            && self.when.as_ref().is_none_or(|when| when.holds(event))
    }
}
