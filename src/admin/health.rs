//! For probes.

use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse as _, Response};
use serde_json::json;

use super::Shared;
use super::problem::{Json, Problem};

/// The process runs.
pub(super) async fn alive() -> Response {
    Json(json!({ "status": "alive" })).into_response()
}

/// The ingress would accept. A dead sink does not matter: events wait for it.
pub(super) async fn ready(State(operated): State<Shared>) -> Response {
    match (operated.unready)() {
        None => Json(json!({ "status": "ready" })).into_response(),
        Some(reason) => Problem::new(StatusCode::SERVICE_UNAVAILABLE, reason).into_response(),
    }
}
