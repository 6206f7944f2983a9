//! The admin side: a server of its own, on its own port, for probes, operators and their tools.
//!
//! `/healthz`, `/readyz` and `/metrics` answer anyone: they show nothing of events. Everything below `/api/v1` wants the
//! bearer token, if there is one, and is described by `/api/v1/openapi.json`, which is made from the code. Errors are
//! `application/problem+json` (RFC 9457).
//! `/` is a page for people that uses nothing but the API.
//!
//! Each file has the operations on one thing. None of them is on the way of an event: what they need of a lane they ask
//! its [`Controls`] for, and dead letters are read by a connection of their own.

mod dashboard;
mod diff;
mod drain;
mod explain;
mod failures;
mod guard;
mod health;
mod letters;
mod logs;
mod metrics;
mod problem;
mod reload;
mod replay;
mod replicas;
mod routes;
mod server;
mod sinks;
mod store;
mod stream;
mod time;
mod up_to;

use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::SystemTime;

use arc_swap::ArcSwap;
use axum::Router;
use axum::extract::DefaultBodyLimit;
use axum::http::StatusCode;
use axum::middleware::from_fn_with_state;
use axum::routing::get;
use prometheus::Registry;
use serde::Deserialize;
use tokio::sync::{Mutex, mpsc};
use tokio::task::JoinSet;
use utoipa::OpenApi;
use utoipa_axum::router::{OpenApiRouter, UtoipaMethodRouterExt as _};
use utoipa_axum::routes;

use crate::ingress;
use crate::journal::{self, Position};
use crate::lane::{self, Controls};
use crate::routing::Table;
use crate::rules::Rules;
use crate::telemetry::Logs;
use crate::tls;
use guard::Bearer;
use problem::Problem;

pub use guard::{Access, AccessError, Gate};
pub use reload::{Outcome, Reload, ReloadRequest};
pub use replicas::Cluster;
pub use store::Letters;
pub use stream::Streams;

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
    /// TLS for the listener.
    pub tls: Option<tls::Config>,
}

impl Default for Config {
    fn default() -> Self {
        Self { listen: SocketAddr::from(([127, 0, 0, 1], 9090)), token: None, tls: None }
    }
}

impl std::fmt::Debug for Config {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Config").field("listen", &self.listen).finish_non_exhaustive()
    }
}

impl Config {
    /// The files that [`Access`] is made of besides the settings.
    pub fn files(&self) -> impl Iterator<Item = &Path> {
        self.tls.iter().flat_map(tls::Config::files)
    }

    /// What is wrong with the settings. Each problem names its setting first.
    pub fn problems(&self) -> Vec<String> {
        let token = self.token.as_deref().and_then(ingress::problem_of_token);
        let token = token.map(|problem| format!("admin.token {problem}"));
        let open = (self.token.is_none() && !self.listen.ip().is_loopback()).then(|| {
            format!("admin.listen is {}, which others can reach: set admin.token, or listen on 127.0.0.1", self.listen)
        });
        token.into_iter().chain(open).collect()
    }
}

/// What is in force until the rules change.
#[derive(Clone)]
pub struct Live {
    /// The rules.
    pub rules: Rules,
    /// The lanes of each sink, in the rules' order.
    pub lanes: Vec<(String, Controls)>,
    /// Since when.
    pub loaded_at: SystemTime,
    /// How the last attempt to change them went.
    pub last_reload: Option<Reload>,
}

/// What the admin side knows of the relay.
pub struct Operated {
    /// What it runs by at present.
    pub live: Arc<ArcSwap<Live>>,
    /// The longest body that the ingress takes, in bytes.
    pub max_body: usize,
    /// Who may send to the ingress.
    pub gate: ingress::Gate,
    /// What the ingress counts.
    pub ingress: ingress::Metrics,
    /// What the lanes count.
    pub lanes: lane::Metrics,
    /// The journal, to be read.
    pub journal: journal::View,
    /// Where dead letters are.
    pub letters: Letters,
    /// Held while dead letters go back to their sinks: one may go to several, and is gone when the last of them has it.
    pub replaying: Mutex<()>,
    /// Held while rules are compared: that reads the whole journal, and has to wait its turn.
    pub comparing: Arc<Mutex<()>>,
    /// Why events would not be accepted, if so.
    pub unready: Box<dyn Fn() -> Option<String> + Send + Sync>,
    /// Reloads settings and rules.
    pub reload: mpsc::Sender<ReloadRequest>,
    /// What is logged.
    pub logs: Logs,
    /// What the parts count.
    pub registry: Registry,
    /// When the certificates of the listeners expire.
    pub certificates: Box<dyn Fn() -> Vec<(&'static str, SystemTime)> + Send + Sync>,
    /// The relays that it shares its journal with, if it does.
    pub cluster: Option<Cluster>,
    /// Who is told what it is doing.
    pub streams: Streams,
    /// When the relay started.
    pub started: SystemTime,
}

type Shared = Arc<Operated>;

impl Operated {
    fn lane(&self, name: &str) -> Result<Controls, Problem> {
        let live = self.live.load();
        let lane = live.lanes.iter().find(|(lane, _)| lane == name).map(|(_, control)| control.clone());
        lane.ok_or_else(|| Problem::not_found(format!("no sink is called {name:?}; see /api/v1/sinks")))
    }

    /// Pauses a sink, or lets it go on; where others share the journal, with them.
    async fn pause(&self, name: &str, pause: bool) -> Result<(), Problem> {
        let lane = self.lane(name)?;
        if let Some(cluster) = &self.cluster {
            cluster.pause(name, pause).await?;
        }
        Ok(lane.pause(pause).await?)
    }

    /// The routes that the relay runs by at present.
    fn table(&self) -> Arc<Table> {
        Arc::clone(&self.live.load().rules.table)
    }
}

/// A position in the journal, if one was given.
fn position(name: &str, given: Option<i64>) -> Result<Option<Position>, Problem> {
    match given {
        Some(given @ ..0) => Err(Problem::bad_request(format!("`{name}` is {given}; positions begin at 0"))),
        given => Ok(given.map(Position::from_stored)),
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
fn router(operated: Shared, gate: Gate) -> Router {
    let (api, document) = OpenApiRouter::with_openapi(Document::openapi())
        .routes(routes!(sinks::show_status))
        .routes(routes!(sinks::list))
        .routes(routes!(sinks::show))
        .routes(routes!(sinks::pause))
        .routes(routes!(sinks::resume))
        .routes(routes!(stream::watch))
        .routes(routes!(failures::list))
        .routes(routes!(routes::list))
        .routes(routes!(letters::list))
        .routes(routes!(letters::show, letters::discard))
        .routes(routes!(letters::replay))
        .routes(routes!(letters::replay_all))
        .routes(routes!(letters::discard_all))
        .routes(routes!(replay::replay))
        .routes(routes!(explain::explain).layer(DefaultBodyLimit::max(operated.max_body)))
        .routes(routes!(reload::reload))
        .routes(routes!(drain::drain))
        .routes(routes!(logs::show, logs::change))
        .routes(routes!(diff::compare))
        .split_for_parts();
    let api = api.route(
        "/api/v1/openapi.json",
        get(|| async move { ([("content-type", "application/json")], document.to_json().unwrap_or_default()) }),
    );
    api.layer(from_fn_with_state(gate, guard::check))
        .route("/healthz", get(health::alive))
        .route("/readyz", get(health::ready))
        .route("/metrics", get(metrics::metrics))
        .merge(dashboard::router())
        .fallback(|| async { Problem::not_found("there is nothing here; see /api/v1/openapi.json") })
        .method_not_allowed_fallback(|| async { Problem::method_not_allowed() })
        .with_state(operated)
}

/// What is served while the relay starts: probes have to tell that from one that hangs.
fn starting() -> Router {
    let starting = || async { Problem::new(StatusCode::SERVICE_UNAVAILABLE, "the relay is starting") };
    Router::new().route("/healthz", get(health::alive)).fallback(starting)
}

/// The admin side; it ends when this is dropped.
pub struct Server {
    gate: Gate,
    router: Arc<ArcSwap<Router>>,
    operated: Option<Shared>,
    tasks: JoinSet<()>,
}

impl Server {
    /// Takes connections, and says that the relay is starting.
    ///
    /// # Errors
    ///
    /// The listener can't be used.
    pub fn start(gate: Gate, listener: std::net::TcpListener) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        let listener = tokio::net::TcpListener::from_std(listener)?;
        let router = Arc::new(ArcSwap::from_pointee(starting()));
        let mut tasks = JoinSet::new();
        tasks.spawn(server::serve(listener, Arc::clone(&router), gate.clone()));
        Ok(Self { gate, router, operated: None, tasks })
    }

    /// Serves everything from now on.
    pub fn operate(&mut self, operated: Operated) {
        let operated = Arc::new(operated);
        self.operated = Some(Arc::clone(&operated));
        self.tasks.spawn(replicas::take_part(Arc::clone(&operated)));
        self.router.store(Arc::new(router(operated, self.gate.clone())));
    }

    /// Ends it, when all else has ended: relays that share the journal are told, so that they count nothing twice.
    pub async fn end(mut self) {
        self.tasks.shutdown().await;
        if let Some(cluster) = self.operated.as_ref().and_then(|operated| operated.cluster.as_ref()) {
            cluster.withdraw().await;
        }
    }
}
