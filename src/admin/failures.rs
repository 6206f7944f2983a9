//! The attempts that failed last.

use axum::extract::State;
use futures_util::future::join_all;
use serde::Serialize;
use utoipa::ToSchema;

use super::problem::{Failed, Json};
use super::{Shared, time};

/// Attempts that failed.
#[derive(Serialize, ToSchema)]
pub(super) struct Failures {
    /// The latest first.
    failures: Vec<Failure>,
}

/// An attempt that failed.
#[derive(Serialize, ToSchema)]
struct Failure {
    /// When.
    #[schema(format = "date-time")]
    at: String,
    sink: String,
    /// A short name.
    kind: String,
    /// For people.
    text: String,
    /// What was to be delivered.
    event_id: String,
    /// Which attempt it was, from 1.
    attempt: u32,
}

/// The last attempts that failed since the start: the last 20 of each sink.
#[utoipa::path(
    get,
    path = "/api/v1/failures",
    responses((status = 200, body = Failures), Failed)
)]
pub(super) async fn list(State(operated): State<Shared>) -> Json<Failures> {
    let live = operated.live.load_full();
    // One whose sink was removed meanwhile has none.
    let lanes = live.lanes.iter().map(|(sink, lane)| async move { (sink, lane.failures().await.unwrap_or_default()) });
    let mut failures: Vec<_> = join_all(lanes)
        .await
        .into_iter()
        .flat_map(|(sink, failures)| failures.into_iter().map(move |failure| (sink, failure)))
        .collect();
    failures.sort_by_key(|(_, failure)| std::cmp::Reverse(failure.at));
    let shown = failures.into_iter().map(|(sink, failure)| Failure {
        at: time::text(failure.at),
        sink: sink.clone(),
        kind: failure.kind,
        text: failure.text,
        event_id: failure.event_id.to_string(),
        attempt: failure.attempt,
    });
    Json(Failures { failures: shown.collect() })
}
