//! The running relay: opens its journal, starts the parts, and ends them in the right order.
//!
//! `storage` opens a journal and a ledger of this relay's own, or ones that it shares with others. `lanes` are those of a
//! journal on disk; `cluster` has a `post` for each sink where the journal is shared.

mod addressing;
mod cluster;
mod in_force;
mod lanes;
mod metrics;
mod post;
mod reloads;
mod storage;

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio::net::TcpSocket;
use tokio::sync::{Mutex, mpsc, watch};
use tokio::time::{Instant, sleep, timeout_at};
use tracing::{error, info, warn};

use crate::admin::{self, Operated};
use crate::config::{Config, ShutdownConfig};
use crate::ingress::{Access, AccessError, BACKLOG, Ingress};
use crate::journal::{Health, View, disk, kafka};
use crate::lane::TooManyChanges;
use crate::ledger::LedgerError;
use crate::reload::{Loaded, Seen, Sources};
use crate::routing::UNROUTED;
use crate::rules::Rules;
use crate::sink::{BuildError, install_crypto_provider};
use crate::telemetry::{Logs, Traces, TracesError};
use metrics::Metrics;
use reloads::{Gates, Reloads};
use storage::{Carriers, Opened, Storage};

pub(crate) use storage::{lock_data_dir, share_data_dir};

/// How long answers may take that tell senders of a failed journal.
const FAILED_GRACE: Duration = Duration::from_secs(1);

/// What the caller asks of a running relay.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Shutdown {
    /// Go on.
    No,
    /// Accept for `shutdown.delay` more, then finish what is under way.
    AfterDelay,
    /// Finish what is under way.
    Graceful,
    /// End at once; deliveries under way will be repeated.
    Now,
}

/// The sockets that a relay listens on, bound by the caller.
pub struct Listeners {
    /// For webhooks; listened to when the relay is ready, so that senders are not kept waiting.
    pub ingress: TcpSocket,
    /// For operators.
    pub admin: TcpListener,
}

/// What a relay runs by, and where to look for changes of it.
pub struct Origin {
    /// Where it is written.
    pub sources: Sources,
    /// The files that were read.
    pub seen: Seen,
    /// Asks for a reload.
    pub hangup: mpsc::Receiver<()>,
    /// What is logged.
    pub logs: Logs,
}

impl Origin {
    /// Says in which file the token is that was made up, if one was.
    fn note_token(&mut self, file: Option<PathBuf>) {
        let Some(file) = file else { return };
        // It may have been written only now.
        self.seen.note(&file);
        info!(file = %file.display(), "no token is configured; senders need the one in this file");
    }
}

/// Runs until `shutdown` says to end.
///
/// # Errors
///
/// [`RunError`]: it could not start, or the journal failed, or a part ended that should not have.
pub async fn run(
    loaded: Loaded,
    origin: Origin,
    listeners: Listeners,
    shutdown: watch::Receiver<Shutdown>,
) -> Result<(), RunError> {
    let Loaded { config, rules, .. } = loaded;
    let sinks = rules.sinks.len();
    let operators = admin::Gate::new(admin::Access::new(&config.admin)?);
    let admin = listeners.admin.local_addr()?;
    let mut operating = admin::Server::start(operators.clone(), listeners.admin)?;
    let mut asked = shutdown.clone();
    let (started, operated) = tokio::select! {
        started = Relay::start(&config, rules, origin, operators, &shutdown) => started?,
        _ = asked.wait_for(|shutdown| *shutdown != Shutdown::No) => return Ok(()),
    };
    let listen = listeners.ingress.local_addr()?;
    let listener = listeners.ingress.listen(BACKLOG).map_err(|source| RunError::Listen { listen, source })?;
    operating.operate(operated);
    info!(%listen, path = %config.ingress.path, sinks, %admin, "accepting webhooks");
    let result = started.serve(listener, shutdown, config.shutdown).await;
    operating.end().await;
    result
}

/// The parts of a running relay.
struct Relay {
    storage: Storage,
    ingress: Ingress,
    carriers: Carriers,
    reloads: Reloads,
    traces: Option<Traces>,
}

impl Relay {
    async fn start(
        config: &Config,
        rules: Rules,
        mut origin: Origin,
        operators: admin::Gate,
        shutdown: &watch::Receiver<Shutdown>,
    ) -> Result<(Self, Operated), RunError> {
        install_crypto_provider();
        let traces = config.telemetry.traces()?;
        let metrics = Metrics::new()?;
        let opened = Opened::open(config, rules, &metrics, traces.as_ref()).await?;
        let Opened { storage, mut carriers, journal, letters, cluster } = opened;
        let (access, generated) = Access::new(&config.ingress, &config.data_dir)?;
        origin.note_token(generated);
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let counts = metrics.ingress.clone();
        let ingress = Ingress::start(&config.ingress, access, &journal, cores, counts, traces.as_ref())?;
        let logs = origin.logs.clone();
        let gates = Gates { ingress: ingress.gate(), admin: operators };
        let certificates = certificates(&gates);
        let (reloads, reload) = Reloads::new(origin, config.clone(), gates, metrics.reloads);
        let operated = Operated {
            live: carriers.in_force().live(),
            lanes: metrics.lanes,
            unready: unready(&journal, shutdown.clone()),
            journal,
            letters,
            cluster,
            max_body: usize::try_from(config.ingress.max_body.as_u64()).unwrap_or(usize::MAX),
            gate: ingress.gate(),
            ingress: metrics.ingress,
            replaying: Mutex::default(),
            comparing: Arc::default(),
            reload,
            logs,
            registry: metrics.registry,
            certificates,
            streams: admin::Streams::default(),
            started: SystemTime::now(),
        };
        Ok((Self { storage, ingress, carriers, reloads, traces }, operated))
    }

    async fn serve(
        mut self,
        listener: tokio::net::TcpListener,
        mut shutdown: watch::Receiver<Shutdown>,
        times: ShutdownConfig,
    ) -> Result<(), RunError> {
        let result = tokio::select! {
            () = self.ingress.accept(listener) => Ok(()),
            () = asked_to_end(&mut shutdown, times.delay) => Ok(()),
            error = self.storage.failed() => Err(error),
            error = self.reloads.run(&mut self.carriers) => Err(error),
        };
        let grace = if result.is_ok() { times.grace } else { FAILED_GRACE };
        if let Err(error) = &result {
            error!(%error, "stopping");
        }
        self.stop(Instant::now() + grace, shutdown).await;
        result
    }

    /// Ends the parts in the order in which data moves, within the time that is left.
    async fn stop(mut self, deadline: Instant, mut shutdown: watch::Receiver<Shutdown>) {
        let mut remains = Vec::new();
        let finish = async { tokio::join!(self.ingress.stop(), self.carriers.finish(&mut remains)) };
        let now = shutdown.wait_for(|shutdown| *shutdown == Shutdown::Now);
        let finished = tokio::select! {
            finished = timeout_at(deadline, finish) => finished.is_ok(),
            _ = now => false,
        };
        if !finished {
            warn!("not everything finished in time; deliveries under way will be repeated");
            self.carriers.abandon(&mut remains).await;
        }
        self.carriers.close().await;
        self.storage.close().await;
        if let Some(traces) = self.traces {
            traces.close().await;
        }
        for (sink, remains) in remains.into_iter().filter(|(name, _)| name != UNROUTED) {
            info!(%sink, lag_events = remains.lag_events(), parked = remains.parked, "sink stopped");
        }
        info!("stopped");
    }
}

/// Says when the listeners' certificates expire.
fn certificates(gates: &Gates) -> Box<dyn Fn() -> Vec<(&'static str, SystemTime)> + Send + Sync> {
    let gates = gates.clone();
    Box::new(move || {
        let listeners =
            [("ingress", gates.ingress.certificate_expires()), ("admin", gates.admin.certificate_expires())];
        listeners.into_iter().filter_map(|(listener, expires)| Some((listener, expires?))).collect()
    })
}

/// Waits until the caller asks for the end, and for the delay that is due then.
async fn asked_to_end(shutdown: &mut watch::Receiver<Shutdown>, delay: Duration) {
    let asked = shutdown.wait_for(|shutdown| *shutdown != Shutdown::No).await.map(|asked| *asked);
    if let Ok(Shutdown::AfterDelay) = asked {
        info!(?delay, "asked to stop; accepting a little longer");
        tokio::select! {
            () = sleep(delay) => {}
            _ = shutdown.wait_for(|shutdown| *shutdown > Shutdown::AfterDelay) => {}
        }
    }
}

/// Says why the ingress would not accept, if so.
fn unready(journal: &View, shutdown: watch::Receiver<Shutdown>) -> Box<dyn Fn() -> Option<String> + Send + Sync> {
    let journal = journal.clone();
    Box::new(move || match journal.health() {
        Health::Full(reason) => Some(format!("the journal is full: {reason}")),
        Health::Away(reason) => Some(format!("Kafka takes nothing: {reason}")),
        Health::Failed(reason) => Some(format!("the journal has failed: {reason}")),
        Health::Serving => (*shutdown.borrow() != Shutdown::No).then(|| "the relay is stopping".to_owned()),
    })
}

/// Why the relay did not run, or stopped.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The data directory.
    #[error("the data directory {} can't be used", dir.display())]
    DataDir {
        /// The directory.
        dir: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Two relays must not share one.
    #[error("another process uses the data directory {}; give each relay its own", dir.display())]
    Locked {
        /// The directory.
        dir: PathBuf,
    },
    /// Who may send.
    #[error(transparent)]
    Access(#[from] AccessError),
    /// Who may operate.
    #[error(transparent)]
    Admin(#[from] admin::AccessError),
    /// The ledger.
    #[error(transparent)]
    Ledger(#[from] LedgerError),
    /// The journal, at opening.
    #[error(transparent)]
    Open(#[from] disk::OpenError),
    /// The journal that it shares, at opening.
    #[error(transparent)]
    OpenShared(#[from] kafka::OpenError),
    /// A sink.
    #[error(transparent)]
    Sink(#[from] BuildError),
    /// New rules.
    #[error(transparent)]
    Changes(#[from] TooManyChanges),
    /// Metrics.
    #[error("metrics can't be set up")]
    Metrics(#[from] prometheus::Error),
    /// Traces.
    #[error(transparent)]
    Traces(#[from] TracesError),
    /// Another process took the address first.
    #[error("can't listen on {listen} (ingress.listen)")]
    Listen {
        /// The address.
        listen: SocketAddr,
        /// Why.
        source: io::Error,
    },
    /// Sockets and threads.
    #[error("the ingress can't be started")]
    Io(#[from] io::Error),
    /// The journal, while running.
    #[error("the journal failed: {0}")]
    Journal(String),
    /// A lane.
    #[error("the lane of sink {0} ended unexpectedly")]
    Lane(String),
}
