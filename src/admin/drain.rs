//! Waiting until everything is delivered, before a relay and its disk are taken away.

#![expect(unused_qualifications, reason = "in what the macros write")]

use std::collections::HashMap;
use std::time::Duration;

use axum::extract::State;
use futures_util::future::try_join_all;
use serde::{Deserialize, Serialize};
use tokio::time::{Instant, sleep};
use utoipa::{IntoParams, ToSchema};

use super::problem::{Failed, Json, Problem, Query};
use super::sinks::{SinkStatus, dead_letters, sinks};
use super::{Operated, Shared, position};
use crate::journal::Position;

/// How long a request waits unless it says otherwise, and at most.
const WAIT: f64 = 30.0;
const MAX_WAIT: f64 = 60.0;
/// How often lanes are asked.
const POLL: Duration = Duration::from_millis(100);
/// How long it has to seem so where other replicas are asked: longer than what they say counts.
const FRESH: Duration = Duration::from_secs(12);

#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct Drain {
    /// The position to be drained to; without it the journal's end at the time of the request.
    #[param(minimum = 0)]
    up_to: Option<i64>,
    /// How many seconds to wait at most while something is left, up to 60; 30 without it. Where relays share a journal it
    /// takes up to 12 more to be sure that nothing is.
    #[param(minimum = 0, maximum = 60)]
    wait: Option<f64>,
}

/// How far the lanes have come.
#[derive(Serialize, ToSchema)]
pub(super) struct Drained {
    /// Whether no sink has anything left to deliver. Dead letters do not count: nobody tries them again by himself.
    drained: bool,
    /// For `up_to` of the next request.
    up_to: i64,
    /// How many dead letters are on the relay's disk: whoever takes that away takes them with it. Null where they are not.
    dead_letters: Option<u64>,
    sinks: Vec<Left>,
}

/// What a sink has left to deliver.
#[derive(Serialize, ToSchema)]
struct Left {
    name: String,
    /// Events before `up_to` after the cursor; not all of them are this sink's. Where relays share a journal, on all of
    /// them, whatever `up_to` is; 1 if nobody has some of its partitions at the moment.
    lag_events: u64,
    /// Deliveries that wait for their next attempt.
    parked: usize,
    /// It has to be resumed before it delivers anything.
    paused: bool,
}

/// Waits until everything that was accepted before the request is delivered or a dead letter. The relay goes on as
/// before: take it out of the balancer first. Relays that share a journal drain together: let nothing come in. Where one request is not long enough, repeat it with `up_to` of the answer.
#[utoipa::path(
    post,
    path = "/api/v1/drain",
    params(Drain),
    responses((status = 200, body = Drained), Failed)
)]
pub(super) async fn drain(
    State(operated): State<Shared>,
    Query(drain): Query<Drain>,
) -> Result<Json<Drained>, Problem> {
    let wait = drain.wait.unwrap_or(WAIT);
    if !(0.0..=MAX_WAIT).contains(&wait) {
        return Err(Problem::bad_request(format!("`wait` is {wait}; it must be from 0 to {MAX_WAIT} seconds")));
    }
    let end = operated.journal.end();
    let up_to = position("up_to", drain.up_to)?.map_or(end, |up_to| up_to.min(end));
    let deadline = Instant::now() + Duration::from_secs_f64(wait);
    let mut seems_drained = None;
    loop {
        let sinks = left(&operated, up_to).await?;
        let now = Instant::now();
        let since = match sinks.iter().all(|sink| sink.lag_events == 0 && sink.parked == 0) {
            true => Some(*seems_drained.get_or_insert(now)),
            false => None,
        };
        seems_drained = since;
        let is_sure = since.is_some_and(|since| operated.cluster.is_none() || now - since >= FRESH);
        if is_sure || since.is_none() && now >= deadline {
            let dead_letters = match operated.cluster {
                None => Some(dead_letters(&operated).await?.values().sum()),
                Some(_) => None,
            };
            return Ok(Json(Drained { drained: is_sure, up_to: up_to.to_stored(), dead_letters, sinks }));
        }
        sleep(POLL).await;
    }
}

/// What a sink has left on all replicas. What nobody has at the moment, nobody has delivered.
fn left_of(sink: &SinkStatus) -> Left {
    Left {
        name: sink.name.clone(),
        lag_events: sink.lag_events.max(u64::from(sink.unheld_partitions > 0)),
        parked: sink.parked,
        paused: sink.paused,
    }
}

async fn left(operated: &Operated, up_to: Position) -> Result<Vec<Left>, Problem> {
    if operated.cluster.is_some() {
        return Ok(sinks(operated, &HashMap::new()).await?.iter().map(left_of).collect());
    }
    let live = operated.live.load_full();
    let sinks = live.lanes.iter().map(|(name, control)| async move {
        let status = control.status().await?;
        let lag_events = up_to.since(status.cursor);
        Ok::<_, Problem>(Left { name: name.clone(), lag_events, parked: status.parked, paused: status.paused })
    });
    try_join_all(sinks).await
}
