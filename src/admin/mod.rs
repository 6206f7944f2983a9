//! The admin side: a server of its own, on its own port, for probes, operators and their tools.
//!
//! `/healthz` and `/readyz` answer anyone. Everything below `/api/v1` wants the bearer token, if there is one, and is
//! described by `/api/v1/openapi.json`, which is made from the code. Errors are `application/problem+json` (RFC 9457).
//!
//! Each file has the operations on one thing. None of them is on the way of an event: what they need of a lane they ask
//! its [`Control`] for, and dead letters are read by a connection of their own.

mod explain;
mod guard;
mod health;
mod letters;
mod problem;
mod replay;
mod sinks;
mod time;

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::SystemTime;

use axum::Router;
use axum::middleware::from_fn_with_state;
use axum::routing::get;
use serde::Deserialize;
use utoipa::OpenApi;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::ingress;
use crate::journal;
use crate::lane::Control;
use crate::ledger::{Ledger, LedgerError, Letters};
use crate::rules::Rules;
use guard::Bearer;
use problem::Problem;

/// How many a request takes that replays or discards, unless it asks for more.
const BULK_LIMIT: usize = 1000;
/// The most that a request can ask for.
const MAX_LIMIT: usize = 10_000;

/// The `[admin]` settings.
#[derive(Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Address and port.
    pub listen: SocketAddr,
    /// The bearer token; required unless `listen` is a loopback address.
    pub token: Option<String>,
}

impl Default for Config {
    fn default() -> Self {
        Self { listen: SocketAddr::from(([127, 0, 0, 1], 9090)), token: None }
    }
}

impl std::fmt::Debug for Config {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Config").field("listen", &self.listen).finish_non_exhaustive()
    }
}

impl Config {
    /// What is wrong with the settings, if anything.
    pub fn problem(&self) -> Option<String> {
        if self.token.as_ref().is_some_and(|token| token.trim().is_empty()) {
            return Some("admin.token is empty".to_owned());
        }
        (self.token.is_none() && !self.listen.ip().is_loopback()).then(|| {
            format!("admin.listen is {}, which others can reach: set admin.token, or listen on 127.0.0.1", self.listen)
        })
    }
}

/// What the admin side knows of the relay.
pub struct Operated {
    /// What it runs by.
    pub rules: Rules,
    /// The lane of each sink, in the rules' order.
    pub lanes: Vec<(String, Control)>,
    /// What the ingress counts.
    pub ingress: ingress::Counts,
    /// The journal, to be read.
    pub journal: journal::View,
    /// The ledger, and its file.
    pub ledger: Ledger,
    /// Where the ledger is.
    pub ledger_file: PathBuf,
    /// Why events would not be accepted, if so.
    pub unready: Box<dyn Fn() -> Option<String> + Send + Sync>,
    /// When the relay started.
    pub started: SystemTime,
}

type Shared = Arc<Operated>;

impl Operated {
    fn lane(&self, name: &str) -> Result<&Control, Problem> {
        let lane = self.lanes.iter().find(|(lane, _)| lane == name).map(|(_, control)| control);
        lane.ok_or_else(|| Problem::not_found(format!("no sink is called {name:?}; see /api/v1/sinks")))
    }

    /// Reads dead letters, on a thread for blocking work.
    async fn letters<T: Send + 'static>(
        &self,
        read: impl FnOnce(Letters) -> Result<T, LedgerError> + Send + 'static,
    ) -> Result<T, Problem> {
        let file = self.ledger_file.clone();
        let result = tokio::task::spawn_blocking(move || Letters::open(&file).and_then(read)).await;
        result.map_err(Problem::internal)?.map_err(Problem::from)
    }
}

/// How many a request takes: what it asks for, or `default`.
fn limit(asked: Option<usize>, default: usize) -> Result<usize, Problem> {
    let limit = asked.unwrap_or(default);
    if (1..=MAX_LIMIT).contains(&limit) {
        return Ok(limit);
    }
    Err(Problem::bad_request(format!("`limit` is {limit}; it must be from 1 to {MAX_LIMIT}")))
}

#[derive(OpenApi)]
#[openapi(
    info(
        title = "engage-relay",
        description = "Operates a running relay. Times are RFC 3339. With a token configured, send `authorization: Bearer …`.",
        license(name = "MIT OR Apache-2.0")
    ),
    components(schemas(Problem)),
    modifiers(&Bearer),
    security((), ("token" = []))
)]
struct Document;

/// Everything that is served.
fn router(operated: Shared, token: Option<&str>) -> Router {
    let (api, document) = OpenApiRouter::with_openapi(Document::openapi())
        .routes(routes!(sinks::status))
        .routes(routes!(sinks::list))
        .routes(routes!(sinks::show))
        .routes(routes!(sinks::pause))
        .routes(routes!(sinks::resume))
        .routes(routes!(letters::list))
        .routes(routes!(letters::show, letters::discard))
        .routes(routes!(letters::replay))
        .routes(routes!(letters::replay_all))
        .routes(routes!(letters::discard_all))
        .routes(routes!(replay::replay))
        .routes(routes!(explain::explain))
        .split_for_parts();
    let api = api.route(
        "/api/v1/openapi.json",
        get(|| async move { ([("content-type", "application/json")], document.to_json().unwrap_or_default()) }),
    );
    api.layer(from_fn_with_state(guard::Guard::new(token), guard::check))
        .route("/healthz", get(health::alive))
        .route("/readyz", get(health::ready))
        .fallback(|| async { Problem::not_found("there is nothing here; see /api/v1/openapi.json") })
        .method_not_allowed_fallback(|| async { Problem::method_not_allowed() })
        .with_state(operated)
}

/// Serves until it is dropped.
///
/// # Errors
///
/// The listener can't be used.
pub async fn serve(config: Config, listener: std::net::TcpListener, operated: Operated) -> io::Result<()> {
    listener.set_nonblocking(true)?;
    let listener = tokio::net::TcpListener::from_std(listener)?;
    axum::serve(listener, router(Arc::new(operated), config.token.as_deref())).await
}
