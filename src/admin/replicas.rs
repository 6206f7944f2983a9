//! Relays that share a journal: what each of them has and does, and pausing a sink on all of them.

use std::collections::HashSet;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::time::{sleep, timeout};
use tracing::{debug, warn};
use utoipa::ToSchema;

use super::problem::Problem;
use super::sinks::SinkStatus;
use super::{Operated, Shared, sinks};
use crate::event::rfc3339;
use crate::journal::kafka::Board;

/// How often a replica says what it does.
const PERIOD: Duration = Duration::from_secs(2);
/// Who has said nothing for so long is gone.
const GONE: Duration = Duration::from_secs(10);
/// What was said so long ago is removed.
const FORGOTTEN: Duration = Duration::from_secs(600);
/// How long what was told may take to come back.
const ROUND_TRIP: Duration = Duration::from_secs(10);
/// How long the end may take to be told: others notice it by themselves.
const WITHDRAWAL: Duration = Duration::from_secs(2);
const REPLICA: &str = "replica/";
const PAUSED: &str = "paused/";

/// A relay among those that share a journal.
#[derive(Clone, Serialize, Deserialize, ToSchema)]
pub(super) struct Replica {
    /// The host's name, and what tells this process from others there.
    id: String,
    /// The program's version.
    version: String,
    /// When it started.
    #[schema(format = "date-time")]
    started_at: String,
    /// What it has of each sink.
    sinks: Vec<Share>,
}

/// What a replica has of a sink.
#[derive(Clone, Serialize, Deserialize, ToSchema)]
pub(super) struct Share {
    /// Which partitions of the journal it delivers from.
    partitions: Vec<i32>,
    #[serde(flatten)]
    pub(super) status: SinkStatus,
}

/// This replica among the others.
pub struct Cluster {
    /// What they tell each other.
    pub board: Board,
    /// What this one is called.
    pub id: String,
}

impl Cluster {
    /// With a name for this process.
    pub fn new(board: Board) -> Self {
        let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
        Self { board, id: format!("{host}-{:08x}", rand::random::<u32>()) }
    }

    /// All that are there, as of a few seconds ago.
    pub(super) fn replicas(&self) -> Vec<Replica> {
        let notes = self.board.under(REPLICA).into_iter();
        let there = notes.filter(|(_, note)| note.age < GONE);
        there.filter_map(|(_, note)| serde_json::from_slice(&note.value).ok()).collect()
    }

    /// What the others have of a sink.
    pub(super) fn elsewhere(&self, sink: &str) -> Vec<SinkStatus> {
        let others = self.replicas().into_iter().filter(|replica| replica.id != self.id);
        let shares = others.flat_map(|replica| replica.sinks).map(|share| share.status);
        shares.filter(|status| status.name == sink).collect()
    }

    /// How many of so many partitions no replica says that it delivers a sink's events from.
    pub(super) fn unheld(&self, sink: &str, partitions: usize) -> usize {
        let shares = self.replicas().into_iter().flat_map(|replica| replica.sinks);
        let of_sink = shares.filter(|share| share.status.name == sink);
        let held = of_sink.flat_map(|share| share.partitions).collect::<HashSet<_>>().len();
        partitions.saturating_sub(held)
    }

    /// Whether what is the same for all is told by this replica: by the first of those that are there.
    pub(super) fn tells(&self) -> bool {
        self.replicas().first().is_some_and(|first| first.id == self.id)
    }

    /// Says that this replica is no longer there. What it had is another's by then.
    pub(super) async fn withdraw(&self) {
        let withdrawn = timeout(WITHDRAWAL, self.board.tell(&format!("{REPLICA}{}", self.id), None)).await;
        if !matches!(withdrawn, Ok(Ok(()))) {
            debug!("the other replicas could not be told that this one ends");
        }
    }

    /// Whether a sink is paused.
    pub fn is_paused(board: &Board, sink: &str) -> bool {
        board.has(&format!("{PAUSED}{sink}"))
    }

    /// Pauses a sink on all replicas, or lets it go on; all that are there will do so soon.
    pub(super) async fn pause(&self, sink: &str, pause: bool) -> Result<(), Problem> {
        let name = format!("{PAUSED}{sink}");
        let told = self.board.tell(&name, pause.then_some(b"true")).await;
        told.map_err(|error| Problem::unavailable(format!("the other replicas can't be told: {error}")))?;
        let mut changed = self.board.watch();
        let noted = changed.wait_for(|_| self.board.has(&name) == pause);
        // It is told; a copy that lags behind is late, not wrong.
        drop(timeout(ROUND_TRIP, noted).await);
        Ok(())
    }
}

/// Says what this replica does, and does what all are told to; for ever.
pub(super) async fn take_part(operated: Shared) {
    let Some(cluster) = &operated.cluster else { return };
    let mut changed = cluster.board.watch();
    loop {
        follow(&operated, cluster).await;
        if let Err(error) = tell(&operated, cluster).await {
            debug!(%error, "the other replicas can't be told what this one does");
        }
        // What others tell comes all the time: only what is to be paused matters at once.
        let deadline = sleep(PERIOD);
        tokio::pin!(deadline);
        loop {
            tokio::select! {
                () = &mut deadline => break,
                told = changed.changed() => match told {
                    Ok(()) => follow(&operated, cluster).await,
                    Err(_) => return,
                },
            }
        }
    }
}

/// Pauses what is to be paused, and lets the rest go on.
async fn follow(operated: &Operated, cluster: &Cluster) {
    for (sink, controls) in &operated.live.load_full().lanes {
        let paused = Cluster::is_paused(&cluster.board, sink);
        // A sink that has changed meanwhile is asked again soon.
        if controls.is_paused() != paused && controls.pause(paused).await.is_err() {
            warn!(sink, paused, "a sink could not be paused, or let go on, yet");
        }
    }
}

async fn tell(operated: &Operated, cluster: &Cluster) -> Result<(), String> {
    let own = sinks::own(operated).await.map_err(|_| "a lane has just ended".to_owned())?;
    let live = operated.live.load_full();
    let partitions = |sink: &SinkStatus| {
        let found = live.lanes.iter().find(|(name, _)| sink.name == *name);
        found.map(|(_, controls)| controls.partitions()).unwrap_or_default()
    };
    let replica = Replica {
        id: cluster.id.clone(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        started_at: rfc3339(operated.started),
        sinks: own.into_iter().map(|status| Share { partitions: partitions(&status), status }).collect(),
    };
    let value = serde_json::to_vec(&replica).map_err(|error| error.to_string())?;
    let told = cluster.board.tell(&format!("{REPLICA}{}", cluster.id), Some(&value)).await;
    told.map_err(|error| error.to_string())?;
    for (id, _) in cluster.board.under(REPLICA).into_iter().filter(|(_, note)| note.age > FORGOTTEN) {
        cluster.board.tell(&format!("{REPLICA}{id}"), None).await.map_err(|error| error.to_string())?;
    }
    Ok(())
}
