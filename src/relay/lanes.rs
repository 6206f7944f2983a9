//! The lanes of a running relay: starting them where they left off, and changing them with the rules.
//!
//! A lane whose sink has not changed is only told the new rules: its connections, and what is under way, are not
//! touched. One whose sink has changed finishes what is under way with the old settings, and another goes on where it
//! ended. One whose sink is gone finishes too, and what it had parked become dead letters.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;
use tokio::sync::watch;
use tokio::task::{JoinError, JoinSet};
use tokio::time::sleep;
use tracing::{error, warn};

use super::RunError;
use super::in_force::{Built, Changes, InForce, Plan, Standing};
use crate::journal::disk::{self, View};
use crate::journal::{Position, Reader, Start};
use crate::lane::{
    Beginning, Control, Controls, Course, Kept, Lane, Metrics, OrderBy, Phase, Remains, StartAt, Unrouted, Whereabouts,
};
use crate::ledger::{Ledger, Progress};
use crate::routing::{Table, UNROUTED};
use crate::rules::Rules;
use crate::sink::BuildError;
use crate::telemetry::Traces;

/// After the ledger could not say where a lane goes on.
const LEDGER_PAUSE: Duration = Duration::from_secs(1);

/// All lanes.
pub(super) struct Lanes {
    journal: View,
    ledger: Ledger,
    in_force: InForce,
    course: Arc<Course>,
    running: BTreeMap<String, Running>,
    tasks: JoinSet<(String, Remains)>,
    metrics: Metrics,
    traces: Option<Traces>,
    /// How long a lane may take that ends because its sink has changed.
    grace: Duration,
}

/// A lane that runs.
struct Running {
    carries: Carries,
    control: Control,
    /// Where it began, or was when the rules changed last. One that takes its place may go on from the cursor.
    at: Whereabouts,
    phase: watch::Sender<Phase>,
    /// What happens when it has ended.
    then: Then,
    /// Keeps what it has not read until another goes on, or all has ended.
    unread: Unread,
}

/// Keeps what a lane has not read.
type Unread = Option<Arc<disk::Hold>>;

/// Where a lane begins.
struct Place {
    reader: disk::Reader,
    ahead: Vec<Position>,
    /// Whether the ledger has it so.
    is_known: bool,
}

/// What the ledger has to know of these. A new sink's beginning must be known before the next event comes in; what is lost
/// to another is told once.
fn noted<'p>(places: impl IntoIterator<Item = (&'p str, &'p Place)>) -> HashMap<String, Progress> {
    let unknown = places.into_iter().filter(|(_, place)| !place.is_known);
    let progress = |place: &Place| Progress { cursor: place.reader.position(), ahead: place.ahead.clone() };
    unknown.map(|(name, place)| (name.to_owned(), progress(place))).collect()
}

/// A lane that has ended.
pub(super) struct Ended(Result<(String, Remains), JoinError>);

/// What a lane is for.
enum Carries {
    Sink(Built),
    Unrouted,
}

enum Then {
    /// It is not expected to end.
    Fail,
    /// Another goes on.
    Start(Carries),
    /// Its sink is gone.
    Close,
}

impl Carries {
    fn start(&self) -> StartAt {
        match self {
            Self::Sink(built) => built.lane().start,
            Self::Unrouted => StartAt::End,
        }
    }

    /// Nothing of the reserved sink is parked.
    fn order_by(&self) -> OrderBy {
        match self {
            Self::Sink(built) => built.lane().order_by,
            Self::Unrouted => OrderBy::None,
        }
    }

    async fn close(&self) {
        if let Self::Sink(built) = self {
            built.close().await;
        }
    }
}

impl Lanes {
    /// Starts all lanes where they left off; `progress` is what the ledger knows of them.
    pub(super) async fn start(
        rules: Rules,
        (journal, ledger): (View, Ledger),
        mut progress: HashMap<String, Progress>,
        grace: Duration,
        metrics: Metrics,
        traces: Option<Traces>,
    ) -> Result<Self, RunError> {
        let knew_none = progress.is_empty();
        let table = Arc::clone(&rules.table);
        let course = Arc::new(Course::new(Arc::clone(&table)));
        let (in_force, running, tasks) = (InForce::new(rules), BTreeMap::new(), JoinSet::new());
        let mut lanes = Self { journal, ledger, in_force, course, running, tasks, metrics, traces, grace };
        if knew_none && lanes.journal.end() > lanes.journal.reader(Start::Earliest).position() {
            error!(
                "the ledger knows no sink, and the journal has events: every sink begins with the oldest that is kept"
            );
        }
        let sinks = lanes.in_force.build(lanes.traces.as_ref())?;
        let sinks = sinks.into_iter().map(|built| (built.name().to_owned(), Carries::Sink(built)));
        let all: Vec<_> = sinks.chain([(UNROUTED.to_owned(), Carries::Unrouted)]).collect();
        let mut places = Vec::new();
        for (name, carries) in &all {
            // A sink that a new ledger does not know is not a new sink, or there are no events yet.
            let start = if knew_none { StartAt::Earliest } else { carries.start() };
            places.push(lanes.place(name, progress.get(name).cloned(), start));
        }
        lanes.recall(&all, &places, table).await?;
        for ((name, carries), place) in all.into_iter().zip(places) {
            let beginning = lanes.beginning(&name, place, carries.order_by()).await?;
            lanes.spawn(name, carries, beginning, None);
        }
        for name in lanes.ledger.lanes_with_parked().await? {
            // One of a ledger that has lost its cursors.
            progress.entry(name).or_insert_with(|| Progress { cursor: lanes.journal.end(), ahead: Vec::new() });
        }
        for (name, Progress { cursor, .. }) in progress {
            if !lanes.running.contains_key(&name) {
                lanes.close_lane(&name, cursor).await?;
            }
        }
        lanes.publish();
        Ok(lanes)
    }

    /// Goes on with the rules as they were followed before, and those that the file has now. What lanes have not read follows
    /// them as if they had changed just now. Written with the places where lanes begin, all or nothing: once some are
    /// known, others are taken for new.
    async fn recall(&mut self, all: &[(String, Carries)], places: &[Place], table: Arc<Table>) -> Result<(), RunError> {
        let kept = self.ledger.rules().await?;
        let at = all.iter().zip(places).map(|((name, _), place)| (name.clone(), place.reader.position()));
        let passed: HashMap<_, _> = at.collect();
        let needed = passed.values().min().copied().unwrap_or(Position::ZERO);
        let (course, problem) = Course::recalled(&kept, table, passed, needed);
        if let Some(problem) = problem {
            error!(
                problem,
                "the rules before the last start can't be followed any more: what sinks have not read follows those of the file alone"
            );
        }
        let noted = noted(all.iter().map(|(name, _)| name.as_str()).zip(places));
        let rules = course.kept();
        // A start has to work on a full disk too, where nobody's beginning depends on it.
        let (has_new, is_kept) = (!noted.is_empty(), kept.last() == Some(&(rules.number, rules.stage.clone())));
        if has_new || !is_kept {
            match self.ledger.begin(noted, Some(rules)).await {
                Err(error) if !has_new => {
                    error!(%error, "the rules can't be kept: if they change again, events that sinks have not read may be passed over after the next start");
                }
                result => result?,
            }
        }
        self.course = Arc::new(course);
        Ok(())
    }

    /// What is in force.
    pub(super) fn in_force(&mut self) -> &mut InForce {
        &mut self.in_force
    }

    /// Waits until a lane has ended. Nothing is lost if the future is dropped.
    pub(super) async fn ended(&mut self) -> Ended {
        match self.tasks.join_next().await {
            Some(ended) => Ended(ended),
            None => std::future::pending().await,
        }
    }

    /// Does what is due when a lane has ended.
    ///
    /// # Errors
    ///
    /// It was not expected to end.
    pub(super) async fn go_on(&mut self, Ended(ended): Ended) -> Result<(), RunError> {
        let (name, remains) = ended.map_err(|error| RunError::Lane(error.to_string()))?;
        // The lane stays noted until another keeps what it has not read: this may be dropped while it waits.
        let next = match self.running.get(&name).map(|running| &running.then) {
            None | Some(Then::Fail) => return Err(RunError::Lane(name)),
            Some(Then::Start(next)) => Some((next.start(), next.order_by())),
            Some(Then::Close) => None,
        };
        let begins = match next {
            Some((start, order_by)) => Some(self.beginning_again(&name, start, order_by, remains.kept).await),
            None => {
                self.close_ended(&name).await;
                None
            }
        };
        if let Some(Running { carries, then, unread, .. }) = self.running.remove(&name) {
            tokio::spawn(async move { carries.close().await });
            if let (Then::Start(next), Some((beginning, kept))) = (then, begins) {
                self.spawn(name, next, beginning, kept);
            }
            drop(unread);
        }
        self.publish();
        Ok(())
    }

    /// Where a lane begins that takes another's place, and what it takes over. What the ledger can't do now it may do soon;
    /// meanwhile nobody waits for answers of the lane.
    async fn beginning_again(
        &self,
        name: &str,
        start: StartAt,
        order_by: OrderBy,
        mut kept: Option<Kept>,
    ) -> (Beginning, Option<Kept>) {
        loop {
            let begun = async {
                let place = self.place(name, self.ledger.progress(name).await?, start);
                self.ledger.begin(noted([(name, &place)]), None).await?;
                self.beginning(name, place, order_by).await
            };
            match begun.await {
                Ok(beginning) => return (beginning, kept),
                Err(error) => {
                    kept = kept.map(Kept::put_by);
                    warn!(sink = name, %error, "a changed sink can't go on yet; trying again");
                    sleep(LEDGER_PAUSE).await;
                }
            }
        }
    }

    /// Closes the lane of a sink that is gone.
    async fn close_ended(&self, name: &str) {
        let closed = async {
            let cursor = self.ledger.progress(name).await?.map_or(self.journal.end(), |progress| progress.cursor);
            self.close_lane(name, cursor).await
        };
        if let Err(error) = closed.await {
            error!(sink = %name, %error, "a sink that is no longer in the rules could not be closed; that is tried again at the next start");
        }
    }

    /// What other rules mean for the lanes. Nothing has changed yet.
    pub(super) fn plan(&self, rules: &Rules) -> Result<Plan, BuildError> {
        InForce::plan(rules, self.traces.as_ref(), |name| match self.running.get(name) {
            Some(Running { carries: Carries::Sink(built), then: Then::Fail, .. }) => Standing::Stays(built),
            Some(_) => Standing::Ends,
            None => Standing::None,
        })
    }

    /// Lets all lanes follow other rules, as planned; or nothing has changed.
    pub(super) async fn follow(&mut self, rules: Rules, plan: Plan) -> Result<Changes, RunError> {
        let Plan { added, replaced } = plan;
        let mut changes = Changes::default();
        self.hold().await;
        let (begun, course) = match self.begin(added, &rules).await {
            Ok(begun) => begun,
            Err(error) => {
                self.release().await;
                return Err(error);
            }
        };
        self.course = Arc::new(course);
        // Before others are released: what a lane that ends has not taken in would reach the next one late.
        for built in replaced {
            let name = built.name().to_owned();
            self.end(&name, Then::Start(Carries::Sink(built)));
            changes.changed.push(name);
        }
        let is_wanted = |name: &String| name == UNROUTED || rules.table.sink(name).is_some();
        for name in self.running.keys().filter(|name| !is_wanted(name)).cloned().collect::<Vec<_>>() {
            self.end(&name, Then::Close);
            changes.removed.push(name);
        }
        self.release().await;
        for (built, beginning) in begun {
            let name = built.name().to_owned();
            changes.added.push(name.clone());
            self.spawn(name, Carries::Sink(built), beginning, None);
        }
        self.in_force.change(rules);
        self.publish();
        Ok(changes)
    }

    /// Tells all lanes to finish, and waits for them.
    pub(super) async fn finish(&mut self, remains: &mut Vec<(String, Remains)>) {
        self.tell(Phase::Finishing);
        while let Some(ended) = self.tasks.join_next().await {
            remains.extend(ended.ok());
        }
    }

    /// Tells all lanes to end now, and waits for them.
    pub(super) async fn abandon(&mut self, remains: &mut Vec<(String, Remains)>) {
        self.tell(Phase::Ending);
        while let Some(ended) = self.tasks.join_next().await {
            remains.extend(ended.ok());
        }
    }

    /// Closes the connections of all sinks.
    pub(super) async fn close(&self) {
        join_all(self.running.values().map(|running| running.carries.close())).await;
    }

    fn tell(&self, phase: Phase) {
        for running in self.running.values() {
            running.phase.send_replace(phase);
        }
    }

    /// The lanes that go on. One that ends reads nothing any more, and may not hear what it is told: it has ended, and the
    /// next one listens in its place, which knows the rules.
    fn going_on(&self) -> impl Iterator<Item = (&String, &Control)> {
        let going_on = self.running.iter().filter(|(_, running)| matches!(running.then, Then::Fail));
        going_on.map(|(name, running)| (name, &running.control))
    }

    /// Lets no lane read on, and notes where each is.
    async fn hold(&mut self) {
        // One that has failed is noticed soon.
        let hold = async |(name, control): (&String, &Control)| Some((name.clone(), control.hold().await.ok()?));
        for (name, at) in join_all(self.going_on().map(hold)).await.into_iter().flatten() {
            if let Some(running) = self.running.get_mut(&name) {
                running.at = at;
            }
        }
    }

    /// Lets all lanes read on, by the rules in force.
    async fn release(&self) {
        for (_, control) in self.going_on() {
            // One that has failed is noticed soon.
            control.follow(Arc::clone(&self.course)).await.unwrap_or(());
        }
    }

    /// Where new lanes begin, and what all of them are to follow.
    async fn begin(&self, added: Vec<Built>, rules: &Rules) -> Result<(Vec<(Built, Beginning)>, Course), RunError> {
        let mut lanes: HashMap<_, _> = self.running.iter().map(|(name, running)| (name.clone(), running.at)).collect();
        let mut places = Vec::new();
        for built in added {
            let place = self.place(built.name(), self.ledger.progress(built.name()).await?, built.lane().start);
            lanes.insert(built.name().to_owned(), Whereabouts::beginning(place.reader.position()));
            places.push((built, place));
        }
        let needed = lanes.values().map(|at| at.cursor).min().unwrap_or(Position::ZERO);
        let passed = lanes.into_iter().map(|(name, at)| (name, at.read_to)).collect();
        let course = self.course.then(Arc::clone(&rules.table), passed, needed)?;
        let mut begun = Vec::new();
        for (built, place) in places {
            let (lane, noted) = (built.lane(), noted([(built.name(), &place)]));
            let beginning = self.beginning(built.name(), place, lane.order_by).await?;
            begun.push((built, beginning, noted));
        }
        // Nothing can fail any more once this is written.
        let noted = begun.iter_mut().flat_map(|(.., noted)| std::mem::take(noted)).collect();
        self.ledger.begin(noted, Some(course.kept())).await?;
        Ok((begun.into_iter().map(|(built, beginning, _)| (built, beginning)).collect(), course))
    }

    /// Where a lane goes on, or begins. Nothing is written.
    fn place(&self, name: &str, progress: Option<Progress>, start: StartAt) -> Place {
        let (cursor, mut ahead) = match progress {
            Some(Progress { cursor, ahead }) => (Some(cursor), ahead),
            None => (None, Vec::new()),
        };
        let reader = self.journal.reader(match (cursor, start) {
            (Some(cursor), _) => Start::At(cursor),
            (None, StartAt::End) => Start::End,
            (None, StartAt::Earliest) => Start::Earliest,
        });
        let at = reader.position();
        if let Some(cursor) = cursor.filter(|cursor| *cursor != at) {
            let (first, lost) = (cursor.to_stored(), at.since(cursor));
            error!(sink = name, first, lost, "events that the sink had not read are gone from the journal");
            ahead.retain(|settled| *settled >= at);
        }
        Place { reader, ahead, is_known: cursor == Some(at) }
    }

    /// What a lane begins with.
    async fn beginning(&self, name: &str, place: Place, order_by: OrderBy) -> Result<Beginning, RunError> {
        let Place { reader, ahead, .. } = place;
        // What comes later must find what it has to wait for.
        self.ledger.order_parked(name, order_by.name(), move |record| order_by.key(record)).await?;
        let parked = self.ledger.parked_keys(name).await?;
        Ok(Beginning { reader: Reader::Disk(reader), ahead, parked })
    }

    fn spawn(&mut self, name: String, carries: Carries, beginning: Beginning, kept: Option<Kept>) {
        let (course, account) = (Arc::clone(&self.course), self.ledger.account(&name));
        let phase = watch::Sender::new(Phase::Running);
        let at = Whereabouts::beginning(beginning.reader.position());
        let unread = beginning.reader.hold();
        let (told, task_name) = (phase.subscribe(), name.clone());
        let control = match &carries {
            Carries::Sink(built) => {
                let (sink, config) = (built.sink(), built.lane().clone());
                let kept = kept.unwrap_or_else(|| Kept::new(&self.metrics, &name));
                let (lane, control) = Lane::new(&name, sink, course, beginning, account, config, kept);
                self.tasks.spawn(async move { (task_name, lane.run(told).await) });
                control
            }
            Carries::Unrouted => {
                let (lane, control) = Unrouted::new(course, beginning, account, self.metrics.clone());
                self.tasks.spawn(async move { (task_name, lane.run(told).await) });
                control
            }
        };
        self.running.insert(name, Running { carries, control, at, phase, then: Then::Fail, unread });
    }

    /// Lets a lane finish what is under way, for a time.
    fn end(&mut self, name: &str, then: Then) {
        let Some(running) = self.running.get_mut(name) else { return };
        if let Then::Start(never) = std::mem::replace(&mut running.then, then) {
            tokio::spawn(async move { never.close().await });
        }
        if *running.phase.borrow() != Phase::Running {
            return;
        }
        running.phase.send_replace(Phase::Finishing);
        let (phase, grace) = (running.phase.clone(), self.grace);
        tokio::spawn(async move {
            tokio::select! {
                () = sleep(grace) => drop(phase.send_replace(Phase::Ending)),
                () = phase.closed() => {}
            }
        });
    }

    async fn close_lane(&self, name: &str, cursor: Position) -> Result<(), RunError> {
        let dead_letters = self.ledger.close_lane(name).await?;
        let unread = self.journal.end().since(cursor);
        warn!(sink = %name, unread, dead_letters, "a sink is no longer in the rules: its parked deliveries are dead letters, and the events that it has not read stay unread");
        self.metrics.buried(name, dead_letters);
        self.metrics.forget(name);
        Ok(())
    }

    fn publish(&mut self) {
        self.in_force.publish(|name| Some(Controls::one(self.running.get(name)?.control.clone())));
    }
}
