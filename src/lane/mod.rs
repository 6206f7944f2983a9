//! A lane: what carries one sink's deliveries. It reads on from its cursor, keeps what its routes match, and delivers up
//! to `concurrency` at once, each key's in order. What fails is parked in the ledger until it is due again.
//!
//! # What it guarantees
//!
//! - Every event that the routes name the sink for is delivered at least once, or becomes a dead letter.
//! - Deliveries with one key are made one after the other, in the order of the journal, also across retries. What a
//!   dead letter's key has later does not wait for it.
//! - Progress and what it passes (parked deliveries, dead letters) are written together, every second or more often and at the
//!   end. A crash repeats at most what was settled since the last write; a clean stop repeats nothing.
//! - Memory does not depend on the backlog: what was read and is not settled is bounded in number and bytes, and so is
//!   what was fetched from the parked. Of a parked delivery only its key is kept in memory, `max_parked` of them at most
//!   and what was replayed.
//! - A delivery that succeeds at once costs the ledger nothing: only the cursor is written, for many at a time.
//!
//! `order`, `window` and `parking` keep the books; `retry`, `breaker` and `rate` decide; `attempts` and `outcome` carry that
//! out; `storage` speaks to the ledger, `control` to operators. `unrouted` is the lane of events that no route matches, where
//! that is not settled when they are accepted. A lane does not know what kind of sink it has, nor any other lane.

mod attempts;
mod breaker;
mod config;
mod control;
mod controls;
mod course;
mod delivery;
mod metrics;
mod order;
mod outcome;
mod parking;
mod rate;
mod retry;
mod source;
mod storage;
mod unrouted;
mod unwritten;
mod window;

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::future::BoxFuture;
use futures_util::stream::{FuturesUnordered, StreamExt as _};
use tokio::sync::watch;
use tokio::time::{MissedTickBehavior, interval, sleep_until};
use tracing::{error, warn};

pub use breaker::BreakerConfig;
pub use config::{Config, OrderBy, Rate, StartAt};
pub use control::{Control, Failure, Kept, Status, Stopped, Whereabouts};
pub use controls::Controls;
pub use course::{Course, TooManyChanges};
pub use delivery::{unreadable as unreadable_letter, unrouted as unrouted_letter};
pub use metrics::Metrics;
pub use retry::{Retry, Waits};
pub use unrouted::Unrouted;

use crate::event::Event;
use crate::journal::{Position, ReadError, Reader};
use crate::ledger::{self, Account, Change, DeadLetter, Millis, ParkedRow};
use crate::sink::{DeliveryError, Sink};
use crate::telemetry::Throttle;
use breaker::Breaker;
use control::{Hold, Taken};
use course::Route;
use delivery::{Delivery, Place};
use order::Order;
use parking::Parking;
use rate::Limit;
use source::{Batch, Filter, Found, Source};
use storage::Storing;
use unwritten::Unwritten;
use window::Window;

/// The most events between the cursor and what was read last.
const MAX_WINDOW: usize = 20_000;
/// When so many deliveries were parked since a sink began to fail, the lane reads on for others to probe with only now and
/// then: each that fails is one more. But those that are parked may be the only ones that the sink refuses.
const MANY_PARKED: usize = 64;
/// Then each so many-th probe is made with one that has not failed yet.
const FRESH_PROBES: u32 = 4;
/// How many parked deliveries are fetched at once, about.
const FETCH: usize = 512;
/// How many dead letters are logged one by one, in the time of a [`Throttle`].
const BURIALS_LOGGED: u32 = 10;
/// How often progress is written, at most.
const SETTLE_INTERVAL: Duration = Duration::from_millis(200);
/// How long to wait after the journal could not be read or the ledger not written.
const STORAGE_PAUSE: Duration = Duration::from_secs(1);
/// The shortest wait for the rate.
const SHORTEST_WAIT: Duration = Duration::from_millis(1);
/// For how long a lane goes on that can't write how far it has come: after a crash all of it would be repeated.
const UNWRITTEN: Duration = Duration::from_secs(5);
/// A delivery that is due later than the longest wait and this much more was parked before the clock was set back.
const CLOCK_MARGIN: Duration = Duration::from_secs(60);

/// What a lane is told while it runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    /// Go on.
    Running,
    /// Begin nothing, and end when what is under way has finished.
    Finishing,
    /// End now; what is under way is dropped, and will be repeated.
    Ending,
}

/// What a lane leaves when it ends.
pub struct Remains {
    /// The cursor, of each partition, and the journal's end, which may move on.
    pub unread: Vec<(Position, watch::Receiver<Position>)>,
    /// Deliveries that wait for their next attempt.
    pub parked: usize,
    /// For the lane that goes on where this one has ended.
    pub kept: Option<Kept>,
}

impl Remains {
    /// Events after the cursor; not all of them are this sink's.
    pub fn lag_events(&self) -> u64 {
        self.unread.iter().map(|(cursor, end)| end.borrow().since(*cursor)).sum()
    }
}

/// Where a lane begins.
pub struct Beginning {
    /// A reader at the cursor.
    pub reader: Reader,
    /// Events after the cursor that are settled, in order.
    pub ahead: Vec<Position>,
    /// How many parked deliveries there are of each key.
    pub parked: Vec<(Option<String>, usize)>,
}

/// One sink's lane.
pub struct Lane {
    name: Arc<str>,
    sink: Sink,
    source: Source,
    account: Account,
    config: Config,
    order: Order<Delivery>,
    window: Window,
    /// Read, and waiting for room.
    unadmitted: VecDeque<(Position, Found)>,
    /// Everything before this has been read.
    read_to: Position,
    parking: Parking,
    /// May go as soon as there is a place.
    ready: VecDeque<Delivery>,
    under_way: FuturesUnordered<BoxFuture<'static, Ended>>,
    breaker: Breaker,
    /// When the first of the failures was that no success has followed.
    failing_since: Option<Millis>,
    /// How many were parked since then.
    failing_parked: usize,
    /// How many probes have begun.
    probes: u32,
    limit: Option<Limit>,
    /// The rate allows the next attempt then.
    limited_until: Option<Instant>,
    /// What outlives the lane when its sink's settings change.
    kept: Kept,
    hold: Hold,
    /// What is to be written with the progress, and who waits for that.
    changes: Unwritten,
    taken: Vec<Taken>,
    settle_due: bool,
    unwritten: bool,
    /// The cursor that was written last, and when all was written.
    released: Position,
    released_at: Instant,
    /// Of attempts that failed, and of dead letters.
    warnings: Throttle,
    burials: Throttle,
}

/// An attempt's end.
struct Ended {
    delivery: Delivery,
    is_probe: bool,
    result: Result<(), DeliveryError>,
    took: Duration,
}

impl Lane {
    /// A lane that goes on where it once ended, and how to reach it; `kept` is what the lane before it has kept for it.
    pub fn new(
        name: &str,
        sink: Sink,
        course: Arc<Course>,
        beginning: Beginning,
        account: Account,
        config: Config,
        kept: Kept,
    ) -> (Self, Control) {
        let Beginning { reader, ahead, parked } = beginning;
        let mut kept = kept;
        // What has failed with the sink as it was is tried with what it is now.
        let hasten = kept.failing_since.take().map(|since| Change::Hasten { since, due_at: ledger::now() });
        let (name, at): (Arc<str>, _) = (name.into(), reader.position());
        let control = kept.control(&config);
        let order = Order::new(Delivery::is_fresh);
        let mut parking = Parking::new(Instant::now());
        for (key, count) in parked {
            parking.add(key.map(|value| order.key(&value)), count);
        }
        let mut changes = Unwritten::new(config.window_bytes);
        changes.extend(hasten);
        let lane = Self {
            source: Source::new(reader, Filter::new(course, Arc::clone(&name))),
            name,
            sink,
            account,
            order,
            window: Window::resume(at, ahead),
            unadmitted: VecDeque::new(),
            read_to: at,
            parking,
            ready: VecDeque::new(),
            under_way: FuturesUnordered::new(),
            breaker: Breaker::new(config.breaker),
            failing_since: None,
            failing_parked: 0,
            probes: 0,
            limit: config.rate.map(Limit::new),
            limited_until: None,
            kept,
            hold: Hold::No,
            unwritten: !changes.is_empty(),
            changes,
            taken: Vec::new(),
            settle_due: false,
            released: at,
            released_at: Instant::now(),
            warnings: Throttle::default(),
            burials: Throttle::of(BURIALS_LOGGED),
            config,
        };
        (lane, control)
    }

    /// Delivers until `phase` says to end.
    pub async fn run(mut self, mut phase: watch::Receiver<Phase>) -> Remains {
        let mut ticks = interval(SETTLE_INTERVAL);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut storing: Option<Storing> = None;
        loop {
            let now = Instant::now();
            let running = match *phase.borrow() {
                Phase::Running => true,
                Phase::Finishing => false,
                Phase::Ending => break,
            };
            if running {
                self.admit();
                self.begin_attempts(now, &mut storing);
            } else if self.under_way.is_empty() {
                break;
            }
            self.begin_storing(now, running, &mut storing);
            self.answer_hold();
            let wake = self.next_wake(now).filter(|_| running);
            tokio::select! {
                // What comes first may hold up what comes after it. There is always something under way while a backlog is
                // worked off, and progress has to be written then too.
                biased;
                changed = phase.changed() => if changed.is_err() { break },
                Some(command) = self.kept.commands.recv() => self.obey(command),
                stored = pending_or(storing.as_mut()) => {
                    storing = None;
                    self.stored(stored);
                }
                _ = ticks.tick(), if storing.is_none() && self.has_to_settle() => self.settle_due |= self.is_time_to_settle(),
                batch = self.source.next(), if self.hold.may_read(running && self.wants_more()) => self.take(batch),
                Some(ended) = self.under_way.next() => self.finish(ended),
                () = sleep_until(wake.unwrap_or(now).into()), if wake.is_some() => {}
            }
        }
        self.end(storing).await
    }

    /// Writes progress a last time.
    async fn end(mut self, storing: Option<Storing>) -> Remains {
        if let Some(storing) = storing {
            let stored = storing.await;
            self.stored(stored);
        }
        if self.has_to_settle() {
            let stored = self.settle().await;
            self.stored(stored);
        }
        self.kept.failing_since = self.failing_since.filter(|_| !self.breaker.is_closed());
        Remains {
            unread: vec![(self.released, self.source.watch_end())],
            parked: self.parking.total(),
            kept: Some(self.kept),
        }
    }

    /// When there is something to do without anything happening.
    fn next_wake(&self, now: Instant) -> Option<Instant> {
        if self.kept.paused {
            return None;
        }
        let wake = match self.breaker.is_closed() {
            true => self.look_at(),
            false => self.breaker.probe_at(),
        };
        // What is due by now was begun, or waits for something that wakes the lane.
        [wake, self.limited_until].into_iter().flatten().filter(|at| *at > now).min()
    }

    /// Whether to read on: there is room, and soon nothing left to begin. While the breaker is open, only for a probe that
    /// has not failed yet.
    fn wants_more(&self) -> bool {
        let wanted = match self.breaker.is_closed() {
            true => self.ready.len() < self.config.concurrency,
            false => {
                self.under_way.is_empty() && self.may_probe_with_fresh() && self.ready.iter().all(Delivery::is_parked)
            }
        };
        wanted
            && self.unadmitted.is_empty()
            && self.window.len() < MAX_WINDOW
            && self.window.bytes() < self.config.window_bytes
            && !self.changes.are_too_many()
            && !self.is_unwritten_for_long()
    }

    /// Whether one more could be parked.
    fn has_room(&self) -> bool {
        self.parking.total() + self.window.unsettled() < self.config.max_parked
    }

    /// Takes what was read from the journal, to be admitted next.
    fn take(&mut self, batch: Result<Batch, ReadError>) {
        let batch = match batch {
            Ok(batch) => batch,
            Err(error) => {
                let error = &error as &dyn std::error::Error;
                error!(sink = %self.name, error, "the journal can't be read; trying again");
                return;
            }
        };
        self.unadmitted.extend(batch.found);
        self.read_to = batch.read_to;
    }

    /// Begins to deliver what was read, as far as all of it could be parked.
    fn admit(&mut self) {
        while self.has_room()
            && let Some((position, found)) = self.unadmitted.pop_front()
        {
            if self.window.was_taken(position) {
                continue;
            }
            match found {
                Found::Event { event, route, since } => self.admit_event(position, event, route, since),
                Found::Unrouted(letter) => self.admit_unrouted(position, letter),
                Found::Unreadable { record, error } => {
                    error!(sink = %self.name, position = position.to_stored(), %error, "an event can't be read; it is a dead letter now");
                    self.bury_unreadable(delivery::unreadable(position, record, error));
                    self.pass_at_once(position);
                }
            }
        }
        self.window.read_to(self.unadmitted.front().map_or(self.read_to, |(next, _)| *next));
    }

    /// Takes an event of the backlog that the rules name no sink for any more.
    fn admit_unrouted(&mut self, position: Position, letter: Option<Box<DeadLetter>>) {
        self.kept.meters.unrouted.inc();
        if letter.is_some()
            && let Some(suppressed) = self.burials.admit(Instant::now())
        {
            warn!(sink = %self.name, position = position.to_stored(), suppressed, "no route matches an event any more that waited here; it is a dead letter of the sink unrouted");
        }
        self.changes.extend(letter.map(Change::Bury));
        self.pass_at_once(position);
    }

    /// Nothing is to be delivered of what was read from there, nor if it is read again.
    fn pass_at_once(&mut self, position: Position) {
        self.window.push(position, 0, 0);
        self.window.settle(position);
        self.unwritten = true;
    }

    fn admit_event(&mut self, position: Position, event: Event, route: Route, since: Millis) {
        self.window.push(position, event.size(), since);
        let key = self.config.order_by.value(&event).map(|value| self.order.key(value));
        let delivery = Delivery {
            event,
            route,
            position,
            place: Place::Window,
            key,
            failures: 0,
            first_failed_at: None,
            since,
            due_at: None,
            last_error: None,
        };
        // Where earlier ones are under way or in line, what is parked was sent again by an operator: those come first.
        if self.parking.holds(key) && !self.order.has_fresh(key) {
            self.put_behind(&delivery);
        } else {
            self.ready.extend(self.order.admit(key, delivery));
        }
    }

    /// Takes a parked delivery that was fetched to be tried.
    fn admit_parked(&mut self, row: ParkedRow) {
        if !self.parking.load(row.id) {
            return;
        }
        let key = row.key.as_deref().map(|value| self.order.key(value));
        let position = Position::from_stored(row.position);
        let event = match Event::decode(row.record.clone()) {
            Ok(event) => event,
            Err(error) => {
                error!(sink = %self.name, row = row.id, %error, "a parked event can't be read; it is a dead letter now");
                let letter = delivery::unreadable(position, row.record, error.to_string());
                self.bury_unreadable(letter);
                self.changes.push(Change::Unpark { id: row.id });
                return self.parking.remove(key);
            }
        };
        let delivery = Delivery {
            event,
            route: Route::Named(row.route.into()),
            position,
            place: Place::Parked(row.id),
            key,
            failures: row.attempts,
            first_failed_at: row.first_failed_at,
            since: row.since,
            due_at: row.due_at,
            last_error: Some(Box::new((row.error_kind, row.error))),
        };
        self.ready.extend(self.order.admit(key, delivery));
    }
}

/// The future's output, or nothing ever.
async fn pending_or<F: Future + Unpin>(future: Option<F>) -> F::Output {
    match future {
        Some(future) => future.await,
        None => std::future::pending().await,
    }
}
