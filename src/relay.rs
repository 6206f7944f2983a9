//! The running relay: opens what is on disk, starts the parts, and ends them in the right order.

use std::collections::HashMap;
use std::fs::{self, File, TryLockError};
use std::io;
use std::net::TcpListener;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime};

use tokio::sync::watch;
use tokio::task::{JoinError, JoinSet};
use tokio::time::{Instant, sleep, timeout_at};
use tracing::{error, info, warn};

use crate::admin::{self, Operated};
use crate::config::{Config, ShutdownConfig};
use crate::ingress::{Auth, AuthError, Ingress};
use crate::journal::recovery::{Finding, Kind};
use crate::journal::{Health, Journal, OpenError, Position, Start};
use crate::lane::{Beginning, Lane, Phase, Remains, StartAt, Unrouted};
use crate::ledger::{Ledger, LedgerError, Opened, Progress};
use crate::routing::UNROUTED;
use crate::rules::Rules;
use crate::sink::{BuildError, Sink};

/// How long sinks may take to close their connections.
const SINK_CLOSE: Duration = Duration::from_secs(3);
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
    /// For webhooks.
    pub ingress: TcpListener,
    /// For operators.
    pub admin: TcpListener,
}

/// Runs until `shutdown` says to end.
///
/// # Errors
///
/// [`RunError`]: it could not start, or the journal failed, or a part ended that should not have.
pub async fn run(
    config: Config,
    rules: Rules,
    listeners: Listeners,
    shutdown: watch::Receiver<Shutdown>,
) -> Result<(), RunError> {
    let sinks = rules.sinks.len();
    let (started, operated) = Relay::start(&config, rules, &shutdown).await?;
    let (ingress, admin) = (listeners.ingress.local_addr()?, listeners.admin.local_addr()?);
    let operating = tokio::spawn(async move {
        if let Err(error) = admin::serve(config.admin, listeners.admin, operated).await {
            error!(%error, "the admin side has ended; events are delivered nevertheless");
        }
    });
    info!(listen = %ingress, path = %config.ingress.path, sinks, %admin, "accepting webhooks");
    let result = started.serve(listeners.ingress, shutdown, config.shutdown).await;
    operating.abort();
    result
}

/// The parts of a running relay.
struct Relay {
    _lock: File,
    journal: Journal,
    ingress: Ingress,
    lanes: JoinSet<(String, Remains)>,
    sinks: Vec<Sink>,
    phase: watch::Sender<Phase>,
    ledger: Ledger,
    ledger_thread: JoinHandle<()>,
}

impl Relay {
    async fn start(
        config: &Config,
        rules: Rules,
        shutdown: &watch::Receiver<Shutdown>,
    ) -> Result<(Self, Operated), RunError> {
        let dir = &config.data_dir;
        let lock = lock_data_dir(dir)?;
        let (auth, generated) = Auth::new(&config.ingress.auth, dir)?;
        if let Some(path) = generated {
            info!(file = %path.display(), "no token is configured; senders need the one in this file");
        }
        let ledger_file = dir.join("ledger.sqlite");
        let Opened { ledger, progress, thread: ledger_thread } = Ledger::open(&ledger_file)?;
        let is_lane = |name: &str| match name {
            UNROUTED => rules.table.keeps_unrouted(),
            name => rules.sinks.iter().any(|sink| sink.name == name),
        };
        let of_lanes = progress.iter().filter(|(name, _)| is_lane(name)).map(|(_, progress)| progress.cursor);
        let floor = progress.values().map(|progress| progress.cursor).max().unwrap_or(Position::ZERO);
        let needed = of_lanes.min().unwrap_or(floor);
        let (mut journal, findings) =
            Journal::open(&dir.join("journal"), &dir.join("quarantine"), &config.journal, needed, floor)?;
        findings.iter().for_each(report);
        let phase = watch::Sender::new(Phase::Running);
        let knew_none = progress.is_empty();
        if knew_none && journal.end() > journal.reader(Start::Earliest).position() {
            error!(
                "the ledger knows no sink, and the journal has events: every sink begins with the oldest that is kept"
            );
        }
        let mut beginnings = Beginnings { journal: &journal, ledger: &ledger, progress, knew_none };
        let (mut lanes, mut controls, mut sinks) = (JoinSet::new(), Vec::new(), Vec::new());
        for sink_rules in &rules.sinks {
            let Some(id) = rules.table.sink(&sink_rules.name) else { continue };
            let (name, lane_config) = (sink_rules.name.clone(), sink_rules.lane.clone());
            let beginning = beginnings.of(&name, lane_config.start).await?;
            let sink = Sink::build(&name, &sink_rules.sink)?;
            sinks.push(sink.clone());
            let table = Arc::clone(&rules.table);
            let (lane, control) = Lane::new(&name, sink, id, table, beginning, ledger.clone(), lane_config);
            controls.push((name.clone(), control));
            let phase = phase.subscribe();
            lanes.spawn(async move { (name, lane.run(phase).await) });
        }
        if rules.table.keeps_unrouted() {
            let beginning = beginnings.of(UNROUTED, StartAt::End).await?;
            let (lane, phase) = (Unrouted::new(Arc::clone(&rules.table), beginning, ledger.clone()), phase.subscribe());
            lanes.spawn(async move { (UNROUTED.to_owned(), lane.run(phase).await) });
        }
        beginnings.close_others(is_lane).await?;
        journal.start()?;
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let ingress = Ingress::start(&config.ingress, auth, &journal, cores)?;
        let operated = Operated {
            rules,
            lanes: controls,
            journal: journal.view(),
            ledger: ledger.clone(),
            ledger_file,
            ingress: ingress.counts(),
            unready: unready(&journal, shutdown.clone()),
            started: SystemTime::now(),
        };
        Ok((Self { _lock: lock, journal, ingress, lanes, sinks, phase, ledger, ledger_thread }, operated))
    }

    async fn serve(
        mut self,
        listener: TcpListener,
        mut shutdown: watch::Receiver<Shutdown>,
        times: ShutdownConfig,
    ) -> Result<(), RunError> {
        let mut health = self.journal.health();
        let result = tokio::select! {
            result = self.ingress.accept(listener) => result.map_err(RunError::from),
            () = asked_to_end(&mut shutdown, times.delay) => Ok(()),
            reason = failed(&mut health) => Err(RunError::Journal(reason)),
            Some(ended) = self.lanes.join_next() => Err(RunError::ended(ended)),
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
        self.phase.send_replace(Phase::Finishing);
        let mut remains = Vec::new();
        let finish = async {
            let lanes = async {
                while let Some(ended) = self.lanes.join_next().await {
                    remains.extend(ended.ok());
                }
            };
            tokio::join!(self.ingress.stop(), lanes);
        };
        let now = shutdown.wait_for(|shutdown| *shutdown == Shutdown::Now);
        let finished = tokio::select! {
            finished = timeout_at(deadline, finish) => finished.is_ok(),
            _ = now => false,
        };
        if !finished {
            warn!("not everything finished in time; deliveries under way will be repeated");
            self.phase.send_replace(Phase::Ending);
            while let Some(ended) = self.lanes.join_next().await {
                remains.extend(ended.ok());
            }
        }
        let close = futures_util::future::join_all(self.sinks.iter().map(Sink::close));
        if tokio::time::timeout(SINK_CLOSE, close).await.is_err() {
            warn!("not every sink closed in time");
        }
        let (journal, ledger, ledger_thread) = (self.journal, self.ledger, self.ledger_thread);
        let closed = tokio::task::spawn_blocking(move || {
            journal.close();
            ledger.close();
            // Its panic has been reported by the thread itself.
            drop(ledger_thread.join());
        });
        drop(closed.await);
        for (sink, Remains { lag_events, parked }) in remains.into_iter().filter(|(name, _)| name != UNROUTED) {
            info!(%sink, lag_events, parked, "sink stopped");
        }
        info!("stopped");
    }
}

/// Finds where each lane goes on.
struct Beginnings<'a> {
    journal: &'a Journal,
    ledger: &'a Ledger,
    /// What the ledger knows, less the lanes that have begun.
    progress: HashMap<String, Progress>,
    /// It is a new ledger: a sink that has no cursor is then not a new sink, or there are no events yet.
    knew_none: bool,
}

impl Beginnings<'_> {
    async fn of(&mut self, name: &str, start: StartAt) -> Result<Beginning, RunError> {
        let Some(Progress { cursor, ahead }) = self.progress.remove(name) else {
            let start = match start {
                StartAt::End if !self.knew_none => Start::End,
                StartAt::End | StartAt::Earliest => Start::Earliest,
            };
            let reader = self.journal.reader(start);
            // A new sink's beginning must be known before the first event comes in.
            let progress = Progress { cursor: reader.position(), ahead: Vec::new() };
            self.ledger.settle(name, Some(progress), Vec::new()).await?;
            return Ok(Beginning { reader, ahead: Vec::new(), parked: self.ledger.parked_keys(name).await? });
        };
        let reader = self.journal.reader(Start::At(cursor));
        Ok(Beginning { reader, ahead, parked: self.ledger.parked_keys(name).await? })
    }

    /// Closes the lanes that are no more.
    async fn close_others(self, is_lane: impl Fn(&str) -> bool) -> Result<(), RunError> {
        for (name, Progress { cursor, .. }) in self.progress.into_iter().filter(|(name, _)| !is_lane(name)) {
            let dead_letters = self.ledger.close_lane(&name).await?;
            if name != UNROUTED {
                let unread = self.journal.end().since(cursor);
                warn!(sink = %name, unread, dead_letters, "a sink is no longer in the rules: its parked deliveries are dead letters, and the events that it has not read stay unread");
            }
        }
        Ok(())
    }
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
fn unready(journal: &Journal, shutdown: watch::Receiver<Shutdown>) -> Box<dyn Fn() -> Option<String> + Send + Sync> {
    let journal = journal.view();
    Box::new(move || match journal.health() {
        Health::Full(reason) => Some(format!("the journal is full: {reason}")),
        Health::Failed(reason) => Some(format!("the journal has failed: {reason}")),
        Health::Serving => (*shutdown.borrow() != Shutdown::No).then(|| "the relay is stopping".to_owned()),
    })
}

/// Waits until the journal has failed; why.
async fn failed(health: &mut watch::Receiver<Health>) -> String {
    loop {
        if let Health::Failed(reason) = &*health.borrow_and_update() {
            return reason.clone();
        }
        if health.changed().await.is_err() {
            return "the journal is gone".to_owned();
        }
    }
}

/// Makes the data directory and keeps other processes out of it for as long as the file is open.
pub(crate) fn lock_data_dir(dir: &Path) -> Result<File, RunError> {
    let error = |source| RunError::DataDir { dir: dir.to_owned(), source };
    fs::DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(error)?;
    let lock = File::options().create(true).write(true).truncate(false).open(dir.join("lock")).map_err(error)?;
    match lock.try_lock() {
        Ok(()) => Ok(lock),
        Err(TryLockError::WouldBlock) => Err(RunError::Locked { dir: dir.to_owned() }),
        Err(TryLockError::Error(source)) => Err(error(source)),
    }
}

fn report(finding: &Finding) {
    let Finding { kind, file, offset, bytes, lost } = finding;
    let (kind_name, file) = (kind.as_str(), file.display());
    match (kind, lost) {
        (Kind::Foreign, _) => warn!(%file, "a file in the journal's directory is not the journal's; it is left alone"),
        (_, Some((from, to))) => {
            let (first, lost) = (from.to_stored(), to.since(*from));
            error!(kind = kind_name, %file, offset, bytes, first, lost, "events are lost from the journal; what was left of them is in quarantine");
        }
        (Kind::Segment, None) => {
            error!(kind = kind_name, %file, bytes, "a journal file was not readable; it is in quarantine")
        }
        (Kind::TornTail | Kind::Header | Kind::Damaged | Kind::Missing, None) => {
            warn!(kind = kind_name, %file, offset, bytes, "the journal was repaired; nothing that was acknowledged is lost");
        }
    }
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
    /// The token file.
    #[error(transparent)]
    Auth(#[from] AuthError),
    /// The ledger.
    #[error(transparent)]
    Ledger(#[from] LedgerError),
    /// The journal, at opening.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// A sink.
    #[error(transparent)]
    Sink(#[from] BuildError),
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

impl RunError {
    fn ended(ended: Result<(String, Remains), JoinError>) -> Self {
        Self::Lane(ended.map_or_else(|error| error.to_string(), |(name, _)| name))
    }
}
