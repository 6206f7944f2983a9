//! A sink's post on this replica: a lane for each partition of the shared journal that the sink's group gives it.
//!
//! A partition that comes is taken over from whoever had it: what that has settled and parked is read, and a lane begins. One
//! that goes is given up: its lane ends, and only then may others have it.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::{BoxFuture, join_all};
use futures_util::stream::{FuturesUnordered, StreamExt as _};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};
use tracing::{debug, error, info, warn};

use super::lanes::Carries;
use crate::journal::Reader;
use crate::journal::kafka::{Group, Journal, Moved, Readers};
use crate::lane::{Beginning, Control, Controls, Course, Kept, Lane, Metrics, Phase, Remains, Unrouted};
use crate::ledger::LedgerError;
use crate::ledger::shared::{Loaded, Shared};

/// How long deliveries under way may take when a partition goes elsewhere.
const GIVE_UP: Duration = Duration::from_secs(10);
/// How long to wait after a partition could not be taken over.
const TAKE_OVER_PAUSE: Duration = Duration::from_secs(1);

/// What a sink has on this replica.
pub(super) struct Post {
    name: String,
    carries: Arc<Carries>,
    course: Arc<Course>,
    metrics: Metrics,
    partitions: usize,
    readers: Arc<Readers>,
    group: Group,
    moves: mpsc::UnboundedReceiver<Moved>,
    ledger: Arc<Shared>,
    /// The partitions that are ours, with their lanes where those have begun.
    lanes: BTreeMap<i32, Option<Running>>,
    taking_over: FuturesUnordered<BoxFuture<'static, (i32, Result<Loaded, LedgerError>)>>,
    /// What lanes that ended have left for the next of their partition.
    kept: HashMap<i32, Kept>,
    controls: Controls,
}

struct Running {
    control: Control,
    phase: watch::Sender<Phase>,
    task: JoinHandle<Remains>,
}

impl Post {
    /// Joins the sink's group.
    pub(super) fn open(
        name: &str,
        carries: Arc<Carries>,
        journal: &Journal,
        course: Arc<Course>,
        metrics: Metrics,
        controls: Controls,
    ) -> Result<Self, LedgerError> {
        let failed = |error: rdkafka::error::KafkaError| LedgerError::Failed(error.to_string());
        let (config, ends) = (journal.config(), journal.ends());
        let readers = Arc::new(Readers::new(config, name, ends).map_err(failed)?);
        let (group, moves) = Group::join(config, name, Arc::clone(&readers)).map_err(failed)?;
        let ledger = Arc::new(Shared::open(config, name, group.member())?);
        Ok(Self {
            name: name.to_owned(),
            carries,
            course,
            metrics,
            partitions: ends.partitions(),
            readers,
            group,
            moves,
            ledger,
            lanes: BTreeMap::new(),
            taking_over: FuturesUnordered::new(),
            kept: HashMap::new(),
            controls,
        })
    }

    /// Carries on until `phase` says to end; what remains of the partitions that were ours then. With `bury`, what is parked
    /// becomes dead letters.
    pub(super) async fn run(mut self, mut phase: watch::Receiver<Phase>, bury: watch::Receiver<bool>) -> Remains {
        loop {
            tokio::select! {
                biased;
                () = reached(&mut phase, Phase::Finishing) => break,
                Some(moved) = self.moves.recv() => self.moved(moved).await,
                Some((partition, loaded)) = self.taking_over.next() => self.taken_over(partition, loaded),
            }
        }
        let how = *phase.borrow();
        let ours: Vec<_> = self.lanes.keys().copied().collect();
        let ended = self.end_lanes(&ours, how, &mut phase).await;
        if *bury.borrow() {
            bury_parked(&self.name, &self.ledger, &ours).await;
        }
        let Self { group, ledger, mut moves, .. } = self;
        let leaving = tokio::task::spawn_blocking(move || {
            group.leave();
            Arc::into_inner(ledger).map(Shared::close);
        });
        // Whatever moves now, nothing of it is here any more.
        tokio::select! {
            () = async { while moves.recv().await.is_some() {} } => {}
            left = leaving => drop(left),
        }
        ended
    }

    async fn moved(&mut self, moved: Moved) {
        match moved {
            Moved::Assigned(partitions) => {
                info!(sink = self.name, ?partitions, "partitions have come");
                for partition in partitions {
                    self.lanes.insert(partition, None);
                    self.take_over(partition, Duration::ZERO);
                }
            }
            Moved::Revoked { partitions, lost, done } => {
                info!(sink = self.name, ?partitions, lost, "partitions go");
                let how = if lost { Phase::Ending } else { Phase::Finishing };
                // Nobody changes this one: it has its own time.
                let (_told, mut phase) = watch::channel(how);
                drop(timeout(GIVE_UP * 2, self.end_lanes(&partitions, how, &mut phase)).await);
                // Who waits for it stays until it is done.
                done.send(()).unwrap_or(());
            }
        }
    }

    fn take_over(&self, partition: i32, after: Duration) {
        let ledger = Arc::clone(&self.ledger);
        self.taking_over.push(Box::pin(async move {
            sleep(after).await;
            (partition, ledger.take_over(partition).await)
        }));
    }

    fn taken_over(&mut self, partition: i32, loaded: Result<Loaded, LedgerError>) {
        // It may have gone meanwhile, and even come back.
        if !matches!(self.lanes.get(&partition), Some(None)) {
            return;
        }
        match loaded.and_then(|loaded| self.start(partition, loaded)) {
            Ok(running) => {
                self.lanes.insert(partition, Some(running));
                self.publish();
            }
            Err(error) => {
                warn!(sink = self.name, partition, %error, "a partition can't be taken over yet; trying again");
                self.take_over(partition, TAKE_OVER_PAUSE);
            }
        }
    }

    fn start(&mut self, partition: i32, loaded: Loaded) -> Result<Running, LedgerError> {
        let Loaded { account, progress, parked } = loaded;
        let reader = self.readers.reader(partition, progress.cursor);
        let reader = Reader::Kafka(reader.map_err(|error| LedgerError::Failed(error.to_string()))?);
        let beginning = Beginning { reader, ahead: progress.ahead, parked };
        debug!(sink = self.name, partition, cursor = progress.cursor.to_stored(), "a partition is taken over");
        let (phase, told) = watch::channel(Phase::Running);
        let course = Arc::clone(&self.course);
        let (control, task) = match &*self.carries {
            Carries::Sink(rules, sink) => {
                let mut kept = self.kept.remove(&partition).unwrap_or_else(|| Kept::new(&self.metrics, &self.name));
                kept.pause(self.controls.is_paused());
                let config = rules.lane.share(self.partitions);
                let (lane, control) = Lane::new(&self.name, sink.clone(), course, beginning, account, config, kept);
                (control, tokio::spawn(lane.run(told)))
            }
            Carries::Unrouted => {
                let (lane, control) = Unrouted::new(course, beginning, account, self.metrics.clone());
                (control, tokio::spawn(lane.run(told)))
            }
        };
        Ok(Running { control, phase, task })
    }

    /// Ends the lanes of these partitions: those that finish have [`GIVE_UP`], and the caller may change its mind.
    async fn end_lanes(&mut self, partitions: &[i32], how: Phase, phase: &mut watch::Receiver<Phase>) -> Remains {
        let mut remains = Remains { lag_events: 0, parked: 0, kept: None };
        let ending = partitions.iter().filter_map(|partition| Some((*partition, self.lanes.remove(partition)??)));
        let ending: Vec<_> = ending.collect();
        let (phases, tasks): (Vec<_>, Vec<_>) =
            ending.into_iter().map(|(partition, running)| (running.phase, (partition, running.task))).unzip();
        for phase in &phases {
            phase.send_replace(how);
        }
        let ended = join_all(tasks.into_iter().map(async |(partition, task)| (partition, task.await)));
        tokio::pin!(ended);
        let ended = tokio::select! {
            ended = &mut ended => ended,
            () = async {
                tokio::select! {
                    () = sleep(GIVE_UP) => {}
                    () = reached(phase, Phase::Ending) => {}
                }
            } => {
                for phase in &phases {
                    phase.send_replace(Phase::Ending);
                }
                ended.await
            }
        };
        for (partition, ended) in ended {
            self.readers.stop(partition);
            match ended {
                Ok(left) => {
                    remains.lag_events += left.lag_events;
                    remains.parked += left.parked;
                    self.kept.extend(left.kept.map(|kept| (partition, kept)));
                }
                Err(error) => error!(sink = self.name, partition, %error, "a lane ended unexpectedly"),
            }
        }
        self.publish();
        remains
    }

    fn publish(&self) {
        self.controls.set(self.lanes.values().flatten().map(|running| running.control.clone()).collect());
    }
}

/// Makes dead letters of what is parked.
async fn bury_parked(sink: &str, ledger: &Shared, partitions: &[i32]) {
    let mut dead_letters = 0;
    for partition in partitions {
        match ledger.bury_parked(*partition).await {
            Ok(buried) => dead_letters += buried,
            Err(error) => {
                error!(sink, partition, %error, "what is parked for a sink that is no longer in the rules stays parked");
            }
        }
    }
    warn!(
        sink,
        dead_letters,
        "a sink is no longer in the rules: its parked deliveries are dead letters, and the events that it has not read stay unread"
    );
}

/// Waits until it has come so far.
async fn reached(phase: &mut watch::Receiver<Phase>, wanted: Phase) {
    // Whoever would tell is gone: nobody waits for what happens here.
    drop(phase.wait_for(|phase| *phase >= wanted).await);
}
