//! A sink's post on this replica: a lane for each partition of the shared journal that the sink's group gives it.
//!
//! A partition that comes is taken over from whoever had it: what that has settled and parked is read, and a lane begins. One
//! that goes is given up: its lane ends, and only then may others have it.

use std::collections::{BTreeMap, HashMap};
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::{BoxFuture, join_all};
use futures_util::stream::{FuturesUnordered, StreamExt as _};
use tokio::sync::{mpsc, watch};
use tokio::task::{AbortHandle, JoinError, JoinHandle};
use tokio::time::{interval, sleep, timeout};
use tracing::{debug, error, info, warn};

use super::in_force::Built;
use crate::journal::Reader;
use crate::journal::kafka::{Group, Journal, Moved, Readers};
use crate::lane::{Beginning, Control, Controls, Course, Kept, Lane, Metrics, Phase, Remains};
use crate::ledger::shared::{Loaded, Shared};
use crate::ledger::{Account, LedgerError, Millis};

/// How long deliveries under way may take when a partition goes elsewhere: others wait for it.
const GIVE_UP: Duration = Duration::from_secs(10);
/// How long lanes may take that are to end at once, and how long leaving a group may take.
const END: Duration = Duration::from_secs(3);
/// How often to try to make dead letters of what a removed sink has parked in a partition.
const BURY_TRIES: usize = 10;
/// How often to look whether all lanes still run, and the group could be joined.
const LOOK: Duration = Duration::from_secs(1);
/// How long taking a partition over may take.
const TAKE_OVER: Duration = Duration::from_secs(90);
/// How long to wait after a partition could not be taken over.
const TAKE_OVER_PAUSE: Duration = Duration::from_secs(1);
/// How much earlier the sink may have failed on another replica, in milliseconds: that has other events, and another clock.
const EARLIER: Millis = 60_000;

/// What a sink has on this replica.
pub(super) struct Post {
    name: String,
    built: Arc<Built>,
    course: Arc<Course>,
    metrics: Metrics,
    partitions: usize,
    readers: Arc<Readers>,
    group: Group,
    moves: mpsc::Receiver<Moved>,
    ledger: Arc<Shared>,
    /// The partitions that are ours.
    lanes: BTreeMap<i32, State>,
    taking_over: FuturesUnordered<BoxFuture<'static, TakenOver>>,
    /// Tells one time that a partition comes from others.
    arrivals: u64,
    legacy: Legacy,
    controls: Controls,
}

/// What a sink's lanes that ended here have left for those that come after them, also for those of the next post, which
/// begins before this one has ended. Clones share it.
#[derive(Clone, Default)]
pub(super) struct Legacy(Arc<Mutex<Left>>);

#[derive(Default)]
struct Left {
    /// For the next lane of each partition.
    kept: HashMap<i32, Kept>,
    /// Since when the sink fails, as far as those know that ended last: for partitions that another replica had then.
    failing_since: Option<Millis>,
}

/// A partition, the arrival that it was taken over for, and what came of it.
type TakenOver = (i32, u64, Result<Loaded, LedgerError>);

/// A partition that is ours.
enum State {
    /// What was left of it is being read, since it came for the how-manieth time.
    TakingOver(u64, Account),
    Running(Running),
}

struct Running {
    account: Account,
    control: Control,
    phase: watch::Sender<Phase>,
    task: JoinHandle<Remains>,
}

impl Post {
    /// Joins the sink's group.
    pub(super) fn open(
        built: Arc<Built>,
        journal: &Journal,
        course: Arc<Course>,
        metrics: Metrics,
        legacy: Legacy,
        controls: Controls,
    ) -> Result<Self, LedgerError> {
        let failed = |error: rdkafka::error::KafkaError| LedgerError::Failed(error.to_string());
        let (name, config, ends) = (built.name(), journal.config(), journal.ends());
        let readers = Arc::new(Readers::new(config, name, ends).map_err(failed)?);
        let (group, moves) = Group::join(config, name, Arc::clone(&readers)).map_err(failed)?;
        let ledger = Arc::new(Shared::open(config, name, group.member())?);
        Ok(Self {
            name: name.to_owned(),
            built,
            course,
            metrics,
            partitions: ends.partitions(),
            readers,
            group,
            moves,
            ledger,
            lanes: BTreeMap::new(),
            taking_over: FuturesUnordered::new(),
            arrivals: 0,
            legacy,
            controls,
        })
    }

    /// Carries on until `phase` says to end, or a lane has ended that should not have; what remains of the partitions that were
    /// ours then. With `bury`, what is parked becomes dead letters.
    pub(super) async fn run(mut self, mut phase: watch::Receiver<Phase>, bury: watch::Receiver<bool>) -> Remains {
        let mut looks = interval(LOOK);
        loop {
            tokio::select! {
                biased;
                () = reached(&mut phase, Phase::Finishing) => break,
                Some(moved) = self.moves.recv() => self.moved(moved).await,
                Some((partition, arrival, loaded)) = self.taking_over.next() => {
                    self.taken_over(partition, arrival, loaded);
                }
                _ = looks.tick() => {
                    self.controls.set_not_joined(self.group.not_joined());
                    if self.has_failed() {
                        break;
                    }
                }
            }
        }
        let how = (*phase.borrow()).max(Phase::Finishing);
        let ours: Vec<_> = self.lanes.keys().copied().collect();
        // Of the others what is parked is not known here, or not any more.
        let runs = |partition: &i32| matches!(self.lanes.get(partition), Some(State::Running(_)));
        let (running, coming): (Vec<_>, Vec<_>) = ours.iter().partition(|partition| runs(partition));
        let ended = self.end_lanes(&ours, false, how, None, &mut phase).await;
        if *bury.borrow() {
            let dead_letters = bury_parked(&self.name, &self.ledger, &running).await;
            self.metrics.buried(&self.name, dead_letters);
            if !coming.is_empty() {
                warn!(sink = self.name, partitions = ?coming, "a sink is no longer in the rules: what it has parked in partitions that were just coming stays parked");
            }
        }
        let Self { name, group, ledger, readers, mut moves, .. } = self;
        let leaving = tokio::task::spawn_blocking(move || {
            group.leave();
            if let Some(ledger) = Arc::into_inner(ledger) {
                ledger.close();
            }
            drop(readers);
        });
        // Whatever moves now, nothing of it is here any more.
        let ignore = async {
            while moves.recv().await.is_some() {}
            std::future::pending::<()>().await;
        };
        tokio::select! {
            () = ignore => {}
            left = timeout(END, leaving) => {
                if left.is_err() {
                    warn!(sink = name, "the group could not be left in time; others take over after a while");
                }
            }
        }
        ended
    }

    async fn moved(&mut self, moved: Moved) {
        match moved {
            Moved::Assigned(partitions) if partitions.is_empty() => {}
            Moved::Assigned(partitions) => {
                info!(sink = self.name, ?partitions, "partitions have come");
                for partition in partitions {
                    self.arrivals += 1;
                    let account = self.ledger.account(partition);
                    self.lanes.insert(partition, State::TakingOver(self.arrivals, account.clone()));
                    self.take_over(partition, self.arrivals, account, Duration::ZERO);
                }
            }
            Moved::Revoked { partitions, lost, done } => {
                info!(sink = self.name, ?partitions, lost, "partitions go");
                let how = if lost { Phase::Ending } else { Phase::Finishing };
                // Nobody changes this one: it has its own time.
                let (_told, mut phase) = watch::channel(how);
                self.end_lanes(&partitions, lost, how, Some(GIVE_UP), &mut phase).await;
                // Who waits for it stays until it is done.
                done.send(()).unwrap_or(());
            }
        }
    }

    /// Whether a lane, or what writes for all of them, has ended by itself.
    fn has_failed(&self) -> bool {
        self.ledger.has_ended()
            || self.lanes.values().any(|state| matches!(state, State::Running(running) if running.task.is_finished()))
    }

    fn take_over(&self, partition: i32, arrival: u64, account: Account, after: Duration) {
        let (ledger, order_by) = (Arc::clone(&self.ledger), self.built.lane().order_by);
        self.taking_over.push(Box::pin(async move {
            sleep(after).await;
            let key = move |record: &Bytes| order_by.key(record);
            let loaded = timeout(TAKE_OVER, ledger.take_over(partition, &account, key)).await;
            (partition, arrival, loaded.unwrap_or_else(|_| Err(LedgerError::Failed("Kafka takes too long".to_owned()))))
        }));
    }

    fn taken_over(&mut self, partition: i32, arrival: u64, loaded: Result<Loaded, LedgerError>) {
        // It may have gone meanwhile, and even come back: then another has had it.
        let account = match self.lanes.get(&partition) {
            Some(State::TakingOver(awaited, account)) if *awaited == arrival => account.clone(),
            Some(_) | None => return,
        };
        match loaded.and_then(|loaded| self.start(partition, account.clone(), loaded)) {
            Ok(running) => {
                let (control, controls) = (running.control.clone(), self.controls.clone());
                self.lanes.insert(partition, State::Running(running));
                self.publish();
                // What was told to all in between; a lane that has ended is told nothing.
                tokio::spawn(async move { control.pause(controls.is_paused()).await.unwrap_or(()) });
            }
            Err(error) => {
                warn!(sink = self.name, partition, %error, "a partition can't be taken over yet; trying again");
                self.take_over(partition, arrival, account, TAKE_OVER_PAUSE);
            }
        }
    }

    fn start(&mut self, partition: i32, account: Account, loaded: Loaded) -> Result<Running, LedgerError> {
        let Loaded { progress, parked } = loaded;
        let own = account.clone();
        let reader = self.readers.reader(partition, progress.cursor);
        let reader = Reader::Kafka(reader.map_err(|error| LedgerError::Failed(error.to_string()))?);
        let beginning = Beginning { reader, ahead: progress.ahead, parked };
        debug!(sink = self.name, partition, cursor = progress.cursor.to_stored(), "a partition is taken over");
        let (phase, told) = watch::channel(Phase::Running);
        let course = Arc::clone(&self.course);
        let mut kept = self.legacy.take(partition, || Kept::new(&self.metrics, &self.name));
        kept.pause(self.controls.is_paused());
        let config = self.built.lane().share(self.partitions);
        let (lane, control) = Lane::new(&self.name, self.built.sink(), course, beginning, account, config, kept);
        let task = tokio::spawn(lane.run(told));
        Ok(Running { account: own, control, phase, task })
    }

    /// Ends the lanes of these partitions: those that finish have so long, if there is a limit, or until the caller changes
    /// its mind.
    async fn end_lanes(
        &mut self,
        partitions: &[i32],
        lost: bool,
        how: Phase,
        limit: Option<Duration>,
        phase: &mut watch::Receiver<Phase>,
    ) -> Remains {
        let mut remains = Remains { unread: Vec::new(), parked: 0, kept: None };
        let ending = partitions.iter().filter_map(|partition| match self.lanes.remove(partition)? {
            State::Running(running) => Some((*partition, running)),
            State::TakingOver(_, account) => {
                account.close();
                None
            }
        });
        let ending: Vec<_> = ending.collect();
        self.publish();
        if lost {
            // Whatever the lanes do from now on is another's business.
            ending.iter().for_each(|(_, running)| running.account.close());
        }
        let accounts: Vec<_> = ending.iter().map(|(_, running)| running.account.clone()).collect();
        let (phases, tasks): (Vec<_>, Vec<_>) =
            ending.into_iter().map(|(partition, running)| (running.phase, (partition, running.task))).unzip();
        let tell = |how| {
            for phase in &phases {
                phase.send_replace(how);
            }
        };
        let aborts: Vec<_> = tasks.iter().map(|(_, task)| task.abort_handle()).collect();
        let mut ended = pin!(join_all(tasks.into_iter().map(ended_lane)));
        tell(how);
        let finished = tokio::select! {
            ended = &mut ended => Some(ended),
            () = sleep(limit.unwrap_or_default()), if limit.is_some() => None,
            () = reached(phase, Phase::Ending), if how != Phase::Ending => None,
        };
        let ended = match finished {
            Some(ended) => ended,
            None => {
                tell(Phase::Ending);
                match timeout(END, &mut ended).await {
                    Ok(ended) => ended,
                    Err(_) => {
                        // They wait for Kafka, and what they would write is refused or repeated.
                        aborts.iter().for_each(AbortHandle::abort);
                        ended.await
                    }
                }
            }
        };
        accounts.iter().for_each(Account::close);
        let mut kept = Vec::new();
        for (partition, ended) in ended {
            self.readers.stop(partition);
            match ended {
                Ok(left) => {
                    remains.unread.extend(left.unread);
                    remains.parked += left.parked;
                    kept.extend(left.kept.map(|kept| (partition, kept)));
                }
                Err(error) if error.is_cancelled() => {}
                Err(error) => error!(sink = self.name, partition, %error, "a lane ended unexpectedly"),
            }
        }
        self.legacy.leave(kept);
        self.publish();
        remains
    }

    fn publish(&self) {
        let running = self.lanes.iter().filter_map(|(partition, state)| match state {
            State::Running(running) => Some((*partition, running.control.clone())),
            State::TakingOver(..) => None,
        });
        self.controls.set(running);
    }
}

impl Legacy {
    fn take(&self, partition: i32, new: impl FnOnce() -> Kept) -> Kept {
        let mut left = self.lock();
        let since = left.failing_since.map(|since| since.saturating_sub(EARLIER));
        left.kept.remove(&partition).unwrap_or_else(new).failing_since(since)
    }

    fn leave(&self, kept: Vec<(i32, Kept)>) {
        if kept.is_empty() {
            return;
        }
        let mut left = self.lock();
        left.failing_since = kept.iter().filter_map(|(_, kept)| kept.was_failing_since()).min();
        left.kept.extend(kept);
    }

    fn lock(&self) -> MutexGuard<'_, Left> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Makes dead letters of what is parked; how many.
async fn bury_parked(sink: &str, ledger: &Shared, partitions: &[i32]) -> usize {
    let mut dead_letters = 0;
    for partition in partitions {
        let mut tries = 0;
        loop {
            match ledger.bury_parked(*partition).await {
                Ok(0) => break,
                Ok(buried) => dead_letters += buried,
                // Others may be leaving the group just now.
                Err(error) if tries < BURY_TRIES => {
                    debug!(sink, partition, %error, "what is parked can't be buried yet");
                    tries += 1;
                    sleep(TAKE_OVER_PAUSE).await;
                }
                Err(error) => {
                    error!(sink, partition, %error, "what is parked for a sink that is no longer in the rules stays parked");
                    break;
                }
            }
        }
    }
    warn!(
        sink,
        dead_letters,
        "a sink is no longer in the rules: its parked deliveries are dead letters, and the events that it has not read stay unread"
    );
    dead_letters
}

/// Waits for a lane's end. From then on nobody waits for its answers.
async fn ended_lane((partition, task): (i32, JoinHandle<Remains>)) -> (i32, Result<Remains, JoinError>) {
    let put_by = |left: Remains| Remains { kept: left.kept.map(Kept::put_by), ..left };
    (partition, task.await.map(put_by))
}

/// Waits until it has come so far.
async fn reached(phase: &mut watch::Receiver<Phase>, wanted: Phase) {
    // Whoever would tell is gone: nobody waits for what happens here.
    drop(phase.wait_for(|phase| *phase >= wanted).await);
}
