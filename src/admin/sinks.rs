//! What the relay and its sinks are doing; pausing a sink.

use std::collections::{BTreeMap, HashMap};
use std::time::SystemTime;

use axum::extract::State;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::problem::{Failed, Json, Path, Problem};
use super::reload::Reloaded;
use super::replicas::{Cluster, Replica};
use super::{Live, Operated, Shared, time};
use crate::event::rfc3339;
use crate::journal::Health;
use crate::journal::NotJoined;
use crate::lane::{self, Controls};

/// The relay.
#[derive(Serialize, ToSchema)]
pub(super) struct Status {
    /// The program's version.
    version: &'static str,
    /// When it started.
    #[schema(format = "date-time")]
    started_at: String,
    /// How long ago that was.
    uptime_seconds: f64,
    /// Whether events are accepted.
    ready: bool,
    /// Why not.
    unready_because: Option<String>,
    ingress: IngressStatus,
    journal: JournalStatus,
    rules: RulesStatus,
    sinks: Vec<SinkStatus>,
    /// The relays that share the journal, this one among them; null where it is not shared. Figures of others are a few
    /// seconds old.
    replicas: Option<Vec<Replica>>,
    /// How many dead letters each sink has, also `unrouted` and sinks that are no longer in the rules.
    dead_letters: BTreeMap<String, u64>,
}

/// The ingress.
#[derive(Serialize, ToSchema)]
struct IngressStatus {
    /// Events that were sent again within `ingress.dedup`, and not stored again.
    resent: u64,
}

/// The journal.
#[derive(Serialize, ToSchema)]
struct JournalStatus {
    /// `serving`, `full`, `away` (brokers take nothing) or `failed`.
    state: &'static str,
    /// What its files take; null where it is not on this disk.
    disk_bytes: Option<u64>,
    /// How many events there ever were; on disk, the position that the next one gets. Where relays share a journal, with
    /// those that operators have sent again: they are in it once more.
    end: i64,
}

/// The rules.
#[derive(Serialize, ToSchema)]
struct RulesStatus {
    /// Since when those in force are.
    #[schema(format = "date-time")]
    loaded_at: String,
    /// How the last attempt to change them went; null if there was none.
    last_reload: Option<Reloaded>,
}

/// A sink; where relays share a journal, on all of them.
#[derive(Clone, Serialize, Deserialize, ToSchema)]
pub(super) struct SinkStatus {
    pub(super) name: String,
    /// As it stands in `routes.toml`.
    #[serde(rename = "type")]
    kind: String,
    /// No attempts are begun, because an operator said so. Lasts until `resume` or the end of the process.
    pub(super) paused: bool,
    /// `closed`: deliveries are made. `open`: the sink has failed too often, and is only probed.
    breaker: String,
    /// Events after the cursor; not all of them are this sink's.
    pub(super) lag_events: u64,
    /// How old the oldest event is that was read and is neither delivered, parked nor dead.
    lag_seconds: f64,
    /// Attempts under way.
    in_flight: usize,
    /// Deliveries that wait for their next attempt.
    pub(super) parked: usize,
    /// Deliveries that will not be tried again.
    dead_letters: u64,
    /// Deliveries since the start.
    delivered: u64,
    /// Failed attempts since the start.
    attempts_failed: u64,
    /// Deliveries per second, over the last ten seconds.
    rate: f64,
    /// How many partitions of the journal no relay delivers from at the moment, where relays share it: their events are
    /// not in the figures here. More than for some seconds, and `last_error` says why.
    pub(super) unheld_partitions: usize,
    /// The last attempt that failed; or why a relay can't deliver at all.
    last_error: Option<LastError>,
}

/// What has failed.
#[derive(Clone, Serialize, Deserialize, ToSchema)]
struct LastError {
    /// When.
    #[schema(format = "date-time")]
    at: String,
    /// A short name; `not_joined`: brokers do not let the relay join the sink's group.
    kind: String,
    /// For people.
    text: String,
}

/// All sinks.
#[derive(Serialize, ToSchema)]
pub(super) struct Sinks {
    /// In the order of `routes.toml`.
    sinks: Vec<SinkStatus>,
}

/// What the relay and all its sinks are doing.
#[utoipa::path(
    get,
    path = "/api/v1/status",
    responses((status = 200, body = Status), Failed)
)]
pub(super) async fn show_status(State(operated): State<Shared>) -> Result<Json<Status>, Problem> {
    status(&operated).await.map(Json)
}

pub(super) async fn status(operated: &Operated) -> Result<Status, Problem> {
    let dead_letters = dead_letters(operated).await?;
    let sinks = sinks(operated, &dead_letters).await?;
    let unready_because = (operated.unready)();
    let live = operated.live.load_full();
    let state = match operated.journal.health() {
        Health::Serving => "serving",
        Health::Full(_) => "full",
        Health::Away(_) => "away",
        Health::Failed(_) => "failed",
    };
    let disk_bytes = operated.journal.files().map(|files| files.disk_bytes());
    let end = i64::try_from(operated.journal.count()).unwrap_or(i64::MAX);
    let uptime = SystemTime::now().duration_since(operated.started).unwrap_or_default();
    Ok(Status {
        version: env!("CARGO_PKG_VERSION"),
        started_at: rfc3339(operated.started),
        uptime_seconds: uptime.as_secs_f64(),
        ready: unready_because.is_none(),
        unready_because,
        ingress: IngressStatus { resent: operated.ingress.resent_events() },
        journal: JournalStatus { state, disk_bytes, end },
        rules: RulesStatus {
            loaded_at: rfc3339(live.loaded_at),
            last_reload: live.last_reload.as_ref().map(Reloaded::from),
        },
        sinks,
        replicas: operated.cluster.as_ref().map(Cluster::replicas),
        dead_letters: dead_letters.into_iter().collect(),
    })
}

/// What all sinks are doing.
#[utoipa::path(
    get,
    path = "/api/v1/sinks",
    responses((status = 200, body = Sinks), Failed)
)]
pub(super) async fn list(State(operated): State<Shared>) -> Result<Json<Sinks>, Problem> {
    let dead_letters = dead_letters(&operated).await?;
    Ok(Json(Sinks { sinks: sinks(&operated, &dead_letters).await? }))
}

/// What one sink is doing.
#[utoipa::path(
    get,
    path = "/api/v1/sinks/{name}",
    params(("name" = String, Path, description = "The sink")),
    responses((status = 200, body = SinkStatus), Failed)
)]
pub(super) async fn show(
    State(operated): State<Shared>,
    Path(name): Path<String>,
) -> Result<Json<SinkStatus>, Problem> {
    one(&operated, &name).await.map(Json)
}

/// Begins no more attempts for a sink; what is under way goes on, and events wait in the journal.
#[utoipa::path(
    post,
    path = "/api/v1/sinks/{name}/pause",
    params(("name" = String, Path, description = "The sink")),
    responses((status = 200, body = SinkStatus), Failed)
)]
pub(super) async fn pause(
    State(operated): State<Shared>,
    Path(name): Path<String>,
) -> Result<Json<SinkStatus>, Problem> {
    operated.pause(&name, true).await?;
    one(&operated, &name).await.map(Json)
}

/// Goes on after a pause.
#[utoipa::path(
    post,
    path = "/api/v1/sinks/{name}/resume",
    params(("name" = String, Path, description = "The sink")),
    responses((status = 200, body = SinkStatus), Failed)
)]
pub(super) async fn resume(
    State(operated): State<Shared>,
    Path(name): Path<String>,
) -> Result<Json<SinkStatus>, Problem> {
    operated.pause(&name, false).await?;
    one(&operated, &name).await.map(Json)
}

async fn one(operated: &Operated, name: &str) -> Result<SinkStatus, Problem> {
    let control = operated.lane(name)?;
    let dead_letters = dead_letters(operated).await?;
    let status = SinkStatus::of(&operated.live.load_full(), name, &control, &dead_letters).await?;
    Ok(status.everywhere(operated))
}

/// What all sinks are doing, on all replicas.
pub(super) async fn sinks(
    operated: &Operated,
    dead_letters: &HashMap<String, u64>,
) -> Result<Vec<SinkStatus>, Problem> {
    let here = here(operated, dead_letters).await?;
    Ok(here.into_iter().map(|status| status.everywhere(operated)).collect())
}

/// What all sinks are doing on this replica.
pub(super) async fn own(operated: &Operated) -> Result<Vec<SinkStatus>, Problem> {
    here(operated, &HashMap::new()).await
}

async fn here(operated: &Operated, dead_letters: &HashMap<String, u64>) -> Result<Vec<SinkStatus>, Problem> {
    let live = operated.live.load_full();
    let sinks = live.lanes.iter().map(|(name, control)| SinkStatus::of(&live, name, control, dead_letters));
    futures_util::future::join_all(sinks).await.into_iter().collect()
}

pub(super) async fn dead_letters(operated: &Operated) -> Result<HashMap<String, u64>, Problem> {
    operated.letters.read_so_far(|letters| letters.counts()).await
}

impl SinkStatus {
    /// With what other replicas do, and none of them.
    fn everywhere(self, operated: &Operated) -> Self {
        let Some(cluster) = &operated.cluster else { return self };
        let unheld_partitions = cluster.unheld(&self.name, operated.journal.partitions());
        let others = cluster.elsewhere(&self.name).into_iter();
        others.fold(Self { unheld_partitions, ..self }, |sum, other| Self {
            breaker: if other.breaker == "open" { other.breaker } else { sum.breaker },
            lag_events: sum.lag_events + other.lag_events,
            lag_seconds: sum.lag_seconds.max(other.lag_seconds),
            in_flight: sum.in_flight + other.in_flight,
            parked: sum.parked + other.parked,
            delivered: sum.delivered + other.delivered,
            attempts_failed: sum.attempts_failed + other.attempts_failed,
            rate: sum.rate + other.rate,
            last_error: LastError::later(sum.last_error, other.last_error),
            ..sum
        })
    }

    async fn of(
        live: &Live,
        name: &str,
        control: &Controls,
        dead_letters: &HashMap<String, u64>,
    ) -> Result<Self, Problem> {
        let lane = control.status().await?;
        let not_joined = control.not_joined().map(|not_joined| LastError::from(&*not_joined));
        let kind = live.rules.sinks.iter().find(|sink| sink.name == name).map(|sink| sink.sink.type_name());
        Ok(Self {
            name: name.to_owned(),
            kind: kind.unwrap_or_default().to_owned(),
            paused: lane.paused,
            breaker: if lane.breaker_open { "open" } else { "closed" }.to_owned(),
            lag_events: lane.lag_events,
            lag_seconds: lane.lag.as_secs_f64(),
            in_flight: lane.in_flight,
            parked: lane.parked,
            dead_letters: dead_letters.get(name).copied().unwrap_or(0),
            delivered: lane.delivered,
            attempts_failed: lane.attempts_failed,
            rate: lane.rate,
            unheld_partitions: 0,
            last_error: not_joined.or(lane.last_error.map(LastError::from)),
        })
    }
}

impl LastError {
    fn later(one: Option<Self>, other: Option<Self>) -> Option<Self> {
        [one, other].into_iter().flatten().max_by(|one, other| one.at.cmp(&other.at))
    }
}

impl From<&NotJoined> for LastError {
    fn from(error: &NotJoined) -> Self {
        Self { at: rfc3339(error.at), kind: "not_joined".to_owned(), text: error.reason.clone() }
    }
}

impl From<lane::Failure> for LastError {
    fn from(error: lane::Failure) -> Self {
        Self { at: time::text(error.at), kind: error.kind, text: error.text }
    }
}
