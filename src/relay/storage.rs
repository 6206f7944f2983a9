//! Where events and progress are kept, and the lanes that go with it: on this machine's disk, or shared on Kafka.

use std::fs::{self, File, TryLockError};
use std::os::unix::fs::DirBuilderExt as _;
use std::path::Path;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::interval;
use tracing::{error, warn};

use super::RunError;
use super::addressing::ByRules;
use super::cluster::Cluster;
use super::in_force::{Changes, InForce, Plan};
use super::lanes::{self, Lanes};
use super::metrics::Metrics;
use crate::admin::{self, Letters};
use crate::config::Config;
use crate::journal::disk::Journal;
use crate::journal::disk::recovery::{Finding, Kind as Found, Known};
use crate::journal::{self, Health, View, kafka};
use crate::lane::{Phase, Remains};
use crate::ledger::{self, Ledger, LedgerError};
use crate::routing::UNROUTED;
use crate::rules::Rules;
use crate::sink::BuildError;
use crate::telemetry::Traces;

/// What was opened.
pub(super) struct Opened {
    pub(super) storage: Storage,
    pub(super) carriers: Carriers,
    pub(super) journal: View,
    pub(super) letters: Letters,
    pub(super) cluster: Option<admin::Cluster>,
}

/// What has to be closed in the end.
pub(super) enum Storage {
    Disk { _lock: Vec<File>, journal: Journal, ledger: Ledger, thread: JoinHandle<()>, health: watch::Receiver<Health> },
    Kafka,
}

/// How often it is looked whether the ledger's thread is there.
const LOOK: Duration = Duration::from_secs(1);

/// The lanes of all sinks.
pub(super) enum Carriers {
    Disk(Box<Lanes>),
    Kafka(Box<Cluster>),
}

/// Something has ended.
pub(super) enum Ended {
    Lane(Box<lanes::Ended>),
    Post(String),
}

impl Opened {
    pub(super) async fn open(
        config: &Config,
        rules: Rules,
        metrics: &Metrics,
        traces: Option<&Traces>,
    ) -> Result<Self, RunError> {
        match config.journal.kind {
            journal::Kind::Disk => Self::on_disk(config, rules, metrics, traces).await,
            journal::Kind::Kafka => Self::on_kafka(config, rules, metrics, traces).await,
        }
    }

    async fn on_disk(
        config: &Config,
        rules: Rules,
        metrics: &Metrics,
        traces: Option<&Traces>,
    ) -> Result<Self, RunError> {
        let dir = &config.data_dir;
        let lock = lock_data_dir(dir)?;
        let file = dir.join("ledger.sqlite");
        let ledger::Opened { ledger, progress, floor, thread } = Ledger::open(&file)?;
        let is_lane = |name: &str| name == UNROUTED || rules.table.sink(name).is_some();
        let of_lanes = progress.iter().filter(|(name, _)| is_lane(name)).map(|(_, progress)| progress.cursor);
        let known = Known { needed: of_lanes.min(), floor };
        let (mut journal, findings) = Journal::open(
            &dir.join("journal"),
            &dir.join("quarantine"),
            &config.journal.disk(),
            known,
            metrics.journal.clone(),
        )?;
        findings.iter().for_each(report);
        let (grace, counts) = (config.shutdown.grace, metrics.lanes.clone());
        let views = (journal.view(), ledger.clone());
        let lanes = Lanes::start(rules, views, progress, grace, counts, traces.cloned()).await?;
        journal.start()?;
        Ok(Self {
            carriers: Carriers::Disk(Box::new(lanes)),
            journal: View::Disk(journal.view()),
            letters: Letters::Own { ledger: ledger.clone(), file },
            cluster: None,
            storage: Storage::Disk { _lock: lock, health: journal.health(), journal, ledger, thread },
        })
    }

    async fn on_kafka(
        config: &Config,
        rules: Rules,
        metrics: &Metrics,
        traces: Option<&Traces>,
    ) -> Result<Self, RunError> {
        let (grace, config) = (config.shutdown.grace, config.journal.kafka());
        let addressing = Box::new(ByRules::new(&rules.table, &config, &metrics.lanes));
        let journal = Arc::new(kafka::Journal::open(config.clone(), addressing).await?);
        let letters = Letters::Shared {
            letters: ledger::shared::Letters::open(&config, journal.ends().partitions())?,
            appender: journal.appender(),
        };
        let view = View::Kafka(journal.view());
        let board = kafka::Board::open(&config, journal.reception().clone()).await?;
        let counts = metrics.lanes.clone();
        let cluster = Cluster::start(rules, journal, board.clone(), counts, traces.cloned(), grace)?;
        Ok(Self {
            carriers: Carriers::Kafka(Box::new(cluster)),
            journal: view,
            letters,
            cluster: Some(admin::Cluster::new(board)),
            storage: Storage::Kafka,
        })
    }
}

impl Storage {
    /// Waits until the journal has failed, or nobody writes the ledger any more.
    pub(super) async fn failed(&mut self) -> RunError {
        let Self::Disk { health, thread, .. } = self else { return std::future::pending().await };
        let mut looks = interval(LOOK);
        loop {
            if let Health::Failed(reason) = &*health.borrow_and_update() {
                return RunError::Journal(reason.clone());
            }
            if thread.is_finished() {
                return RunError::Ledger(LedgerError::Ended);
            }
            tokio::select! {
                changed = health.changed() => if changed.is_err() {
                    return RunError::Journal("the journal is gone".to_owned());
                },
                _ = looks.tick() => {}
            }
        }
    }

    pub(super) async fn close(self) {
        let Self::Disk { journal, ledger, thread, .. } = self else { return };
        let closed = tokio::task::spawn_blocking(move || {
            journal.close();
            ledger.close();
            // Its panic has been reported by the thread itself.
            drop(thread.join());
        });
        drop(closed.await);
    }
}

impl Carriers {
    /// What is in force.
    pub(super) fn in_force(&mut self) -> &mut InForce {
        match self {
            Self::Disk(lanes) => lanes.in_force(),
            Self::Kafka(cluster) => cluster.in_force(),
        }
    }

    /// Waits until something has ended. Nothing is lost if the future is dropped.
    pub(super) async fn ended(&mut self) -> Ended {
        match self {
            Self::Disk(lanes) => Ended::Lane(Box::new(lanes.ended().await)),
            Self::Kafka(cluster) => Ended::Post(cluster.ended().await),
        }
    }

    /// Does what is due then.
    ///
    /// # Errors
    ///
    /// It was not expected to end.
    pub(super) async fn go_on(&mut self, ended: Ended) -> Result<(), RunError> {
        match (self, ended) {
            (Self::Disk(lanes), Ended::Lane(ended)) => lanes.go_on(*ended).await,
            (Self::Kafka(_), Ended::Post(name)) => Err(RunError::Lane(name)),
            (Self::Disk(_), Ended::Post(_)) | (Self::Kafka(_), Ended::Lane(_)) => Ok(()),
        }
    }

    /// What other rules mean. Nothing has changed yet.
    pub(super) fn plan(&self, rules: &Rules) -> Result<Plan, BuildError> {
        match self {
            Self::Disk(lanes) => lanes.plan(rules),
            Self::Kafka(cluster) => cluster.plan(rules),
        }
    }

    /// Follows other rules, as planned.
    pub(super) async fn follow(&mut self, rules: Rules, plan: Plan) -> Result<Changes, RunError> {
        match self {
            Self::Disk(lanes) => lanes.follow(rules, plan).await,
            Self::Kafka(cluster) => cluster.follow(rules, plan),
        }
    }

    /// Lets what is under way finish.
    pub(super) async fn finish(&mut self, remains: &mut Vec<(String, Remains)>) {
        match self {
            Self::Disk(lanes) => lanes.finish(remains).await,
            Self::Kafka(cluster) => cluster.finish(Phase::Finishing, remains).await,
        }
    }

    /// Ends now.
    pub(super) async fn abandon(&mut self, remains: &mut Vec<(String, Remains)>) {
        match self {
            Self::Disk(lanes) => lanes.abandon(remains).await,
            Self::Kafka(cluster) => cluster.finish(Phase::Ending, remains).await,
        }
    }

    /// Closes the connections of all sinks.
    pub(super) async fn close(&self) {
        match self {
            Self::Disk(lanes) => lanes.close().await,
            Self::Kafka(cluster) => cluster.close().await,
        }
    }
}

/// Makes the data directory and keeps other processes out of it for as long as the files are open.
pub(crate) fn lock_data_dir(dir: &Path) -> Result<Vec<File>, RunError> {
    let error = |source| RunError::DataDir { dir: dir.to_owned(), source };
    fs::DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(error)?;
    let lock = File::options().create(true).write(true).truncate(false).open(dir.join("lock")).map_err(error)?;
    // The directory as well, since somebody may delete the file. Not every file system can lock directories.
    let folder = File::open(dir).map_err(error)?;
    match (lock.try_lock(), folder.try_lock()) {
        (Err(TryLockError::WouldBlock), _) | (_, Err(TryLockError::WouldBlock)) => {
            Err(RunError::Locked { dir: dir.to_owned() })
        }
        (Err(TryLockError::Error(source)), _) => Err(error(source)),
        (Ok(()), Ok(()) | Err(TryLockError::Error(_))) => Ok(vec![lock, folder]),
    }
}

/// Keeps relays out of a data directory for as long as the files are open, and changes nothing in it. Where nothing can be
/// locked, as on some that can only be read, no relay can run either.
pub(crate) fn share_data_dir(dir: &Path) -> Result<Vec<File>, RunError> {
    let files: Vec<_> = [dir.join("lock"), dir.to_owned()].iter().filter_map(|path| File::open(path).ok()).collect();
    match files.iter().any(|file| matches!(file.try_lock_shared(), Err(TryLockError::WouldBlock))) {
        true => Err(RunError::Locked { dir: dir.to_owned() }),
        false => Ok(files),
    }
}

fn report(finding: &Finding) {
    let Finding { kind, file, offset, bytes, lost, kept } = finding;
    let (kind_name, file) = (kind.as_str(), file.display());
    let quarantine = kept.as_ref().map(|path| tracing::field::display(path.display()));
    match (kind, lost) {
        (Found::Foreign, _) => warn!(%file, "a file in the journal's directory is not the journal's; it is left alone"),
        (_, Some((from, to))) => {
            let (first, lost) = (from.to_stored(), to.since(*from));
            error!(kind = kind_name, %file, offset, bytes, first, lost, quarantine, "events are lost from the journal");
        }
        (Found::Segment, None) => {
            error!(kind = kind_name, %file, bytes, quarantine, "a journal file was not readable; it is in quarantine")
        }
        (Found::TornTail, None) => {
            warn!(kind = kind_name, %file, offset, bytes, quarantine, "the journal's end was cut off: what was being written when the relay was stopped had not been acknowledged, unless the disk has lost what it had synced");
        }
        (Found::Header | Found::Damaged | Found::Missing, None) => {
            warn!(kind = kind_name, %file, offset, bytes, quarantine, "the journal was repaired; nothing that was acknowledged is lost");
        }
    }
}
