//! The routes, and what they match.

use std::collections::BTreeMap;

use axum::extract::State;
use serde::Serialize;
use utoipa::ToSchema;

use super::Shared;
use super::problem::{Failed, Json};

/// All routes.
#[derive(Serialize, ToSchema)]
pub(super) struct Routes {
    /// From the top.
    routes: Vec<Route>,
    /// How many events no route matched, since the start.
    unrouted: u64,
}

/// A route.
#[derive(Serialize, ToSchema)]
struct Route {
    name: String,
    /// How many events it has brought to each of its sinks, since the start. An event that several routes bring to a sink
    /// counts for the topmost of them.
    events: BTreeMap<String, u64>,
    /// Whether the routes below it are not tried for an event that it matches.
    #[serde(rename = "final")]
    is_final: bool,
}

/// The routes in force, and how many events they have brought to their sinks.
#[utoipa::path(
    get,
    path = "/api/v1/routes",
    responses((status = 200, body = Routes), Failed)
)]
pub(super) async fn list(State(operated): State<Shared>) -> Json<Routes> {
    let live = operated.live.load_full();
    let counts = &operated.lanes;
    let routes = live.rules.table.routes().map(|route| Route {
        name: route.name.to_owned(),
        events: route.to.iter().map(|sink| ((*sink).to_owned(), counts.routed_events(sink, route.name))).collect(),
        is_final: route.is_final,
    });
    Json(Routes { routes: routes.collect(), unrouted: counts.unrouted_events() })
}
