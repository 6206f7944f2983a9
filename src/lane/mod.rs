//! A lane: what carries one sink's deliveries. It reads on from its cursor, keeps what its routes match, and delivers up
//! to `concurrency` at once, each key's in order.
//!
//! # What it guarantees
//!
//! - Every event that the routes name the sink for is delivered at least once, or becomes a dead letter.
//! - Deliveries with one key are made one after the other, in the order of the journal, also across retries.
//! - The cursor never passes an event that is not settled. It is written a few times a second and at the end, so that a
//!   crash repeats at most what was settled since. A clean stop repeats nothing, unless a failed delivery waits for its
//!   next attempt: then what was delivered after it.
//! - Memory does not depend on the backlog: what was read and is not settled is bounded in number and bytes.
//!
//! `order` and `window` keep the books, `retry` and `breaker` decide; all four are pure. A lane does not know what kind of
//! sink it has, nor any other lane.

mod breaker;
mod config;
mod order;
mod retry;
mod source;
mod window;

use std::cmp::{Ordering, Reverse};
use std::collections::{BinaryHeap, VecDeque};
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::future::BoxFuture;
use futures_util::stream::{FuturesUnordered, StreamExt as _};
use tokio::sync::watch;
use tokio::time::{MissedTickBehavior, interval, sleep_until};
use tracing::{error, info, warn};

pub use breaker::BreakerConfig;
pub use config::{Config, OrderBy, StartAt};
pub use retry::Backoff;

use crate::event::Event;
use crate::journal::{Position, ReadError, Reader};
use crate::ledger::{Changes, DeadLetter, Ledger, LedgerError};
use crate::routing::{SinkId, Table};
use crate::sink::{Attempt, DeliveryError, Sink, Verdict};
use breaker::{Breaker, Change};
use order::{Key, Order};
use source::{Batch, Filter, Found, Route, Source};
use window::{Ticket, Window};

/// The most events between the cursor and what was read last, and the most bytes of them that are not settled.
const MAX_WINDOW: usize = 20_000;
const MAX_WINDOW_BYTES: usize = 32 << 20;
/// With more deliveries that have failed than this, the lane of a failing sink does not read on for others to probe with.
const MAX_FAILED_PROBES: usize = 64;
/// How often the cursor is written.
const SETTLE_INTERVAL: Duration = Duration::from_millis(200);
/// How long to wait after the journal could not be read or the ledger not written.
const STORAGE_PAUSE: Duration = Duration::from_secs(1);
/// Failed attempts are logged this often, with a count of those in between.
const WARN_INTERVAL: Duration = Duration::from_secs(5);

/// What a lane is told while it runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    /// Go on.
    Running,
    /// Begin nothing that could as well be left to the next process, and end when what is under way has finished.
    Finishing,
    /// End now; what is under way is dropped, and will be repeated.
    Ending,
}

/// What a lane leaves when it ends.
#[derive(Clone, Copy, Debug)]
pub struct Remains {
    /// Events after the cursor; not all of them are this sink's.
    pub lag_events: u64,
}

/// One sink's lane.
pub struct Lane {
    name: Arc<str>,
    sink: Sink,
    source: Source,
    ledger: Ledger,
    config: Config,
    order: Order<Delivery>,
    window: Window,
    /// May go as soon as there is a place.
    ready: VecDeque<Delivery>,
    /// Failed, and wait for their next attempt. Their keys wait with them.
    waiting: BinaryHeap<Reverse<Waiting>>,
    under_way: FuturesUnordered<BoxFuture<'static, Ended>>,
    /// Higher than the ticket of any delivery that was attempted.
    attempted_to: Ticket,
    breaker: Breaker,
    dead: Vec<DeadLetter>,
    settled: Position,
    warnings: Throttle,
}

/// A delivery that is not settled.
struct Delivery {
    event: Event,
    route: Route,
    position: Position,
    ticket: Ticket,
    key: Option<Key>,
    failures: u32,
}

/// An attempt's end.
struct Ended {
    delivery: Delivery,
    result: Result<(), DeliveryError>,
}

struct Waiting {
    due: Instant,
    delivery: Delivery,
}

impl Ord for Waiting {
    fn cmp(&self, other: &Self) -> Ordering {
        (self.due, self.delivery.ticket).cmp(&(other.due, other.delivery.ticket))
    }
}

impl PartialOrd for Waiting {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Waiting {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Waiting {}

/// Settling under way: the cursor and how many dead letters it writes.
type Settling = Pin<Box<dyn Future<Output = (Position, usize, Result<(), LedgerError>)> + Send>>;

impl Lane {
    /// A lane that goes on where the reader stands.
    pub fn new(
        name: &str,
        sink: Sink,
        id: SinkId,
        table: Arc<Table>,
        reader: Reader,
        ledger: Ledger,
        config: Config,
    ) -> Self {
        let at = reader.position();
        Self {
            name: name.into(),
            sink,
            source: Source::new(reader, Filter { table, id }),
            ledger,
            order: Order::new(),
            window: Window::new(at),
            ready: VecDeque::new(),
            waiting: BinaryHeap::new(),
            under_way: FuturesUnordered::new(),
            attempted_to: 0,
            breaker: Breaker::new(config.breaker),
            config,
            dead: Vec::new(),
            settled: at,
            warnings: Throttle::default(),
        }
    }

    /// Delivers until `phase` says to end.
    pub async fn run(mut self, mut phase: watch::Receiver<Phase>) -> Remains {
        let mut ticks = interval(SETTLE_INTERVAL);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut settling: Option<Settling> = None;
        loop {
            let now = *phase.borrow();
            match now {
                Phase::Running => self.begin_attempts(),
                Phase::Finishing => self.begin_last_attempts(),
                Phase::Ending => break,
            }
            let running = now == Phase::Running;
            if !running && self.under_way.is_empty() {
                break;
            }
            let wake = self.next_wake();
            tokio::select! {
                // What comes first may hold up what comes after it. There is always something under way while a backlog is
                // worked off, and the cursor has to be written then too.
                biased;
                changed = phase.changed() => if changed.is_err() { break },
                outcome = pending_or(settling.as_mut()) => {
                    settling = None;
                    self.settle_ended(outcome);
                }
                _ = ticks.tick(), if settling.is_none() && self.has_to_settle() => settling = Some(self.settle()),
                batch = self.source.next(), if running && self.wants_more() => self.admit(batch),
                Some(ended) = self.under_way.next() => self.finish(ended),
                () = sleep_until(wake.unwrap_or_else(Instant::now).into()), if running && wake.is_some() => {}
            }
        }
        self.end(settling).await
    }

    /// Writes the cursor a last time.
    async fn end(mut self, settling: Option<Settling>) -> Remains {
        if let Some(settling) = settling {
            let outcome = settling.await;
            self.settle_ended(outcome);
        }
        if self.has_to_settle() {
            let outcome = self.settle().await;
            self.settle_ended(outcome);
        }
        let lag_events = self.source.end().since(self.settled);
        Remains { lag_events }
    }

    /// Starts what may go: anything while the breaker is closed, else one probe when it is due.
    fn begin_attempts(&mut self) {
        let now = Instant::now();
        while self.waiting.peek().is_some_and(|Reverse(waiting)| waiting.due <= now) {
            let Some(Reverse(Waiting { delivery, .. })) = self.waiting.pop() else { break };
            self.ready.push_back(delivery);
        }
        if self.breaker.is_closed() {
            while self.under_way.len() < self.config.concurrency
                && let Some(delivery) = self.ready.pop_front()
            {
                self.attempt(delivery);
            }
        } else if self.under_way.len() < self.config.concurrency
            && (!self.ready.is_empty() || !self.waiting.is_empty())
            && self.breaker.begin_probe(now)
            && let Some(delivery) = self.next_probe()
        {
            self.attempt(delivery);
        }
    }

    /// A delivery that has not failed yet, if there is one: those that have may be the only ones that the sink refuses.
    fn next_probe(&mut self) -> Option<Delivery> {
        let untried = self.ready.iter().position(|delivery| delivery.failures == 0);
        let ready = self.ready.remove(untried.unwrap_or(0));
        ready.or_else(|| self.waiting.pop().map(|Reverse(waiting)| waiting.delivery))
    }

    /// Starts only what was read before something that was attempted already: the cursor can't pass it, and what comes
    /// after it would be repeated. The rest is read again by the next process.
    fn begin_last_attempts(&mut self) {
        self.ready.retain(|delivery| delivery.ticket < self.attempted_to);
        while self.breaker.is_closed()
            && self.under_way.len() < self.config.concurrency
            && let Some(delivery) = self.ready.pop_front()
        {
            self.attempt(delivery);
        }
    }

    fn attempt(&mut self, delivery: Delivery) {
        self.attempted_to = self.attempted_to.max(delivery.ticket + 1);
        let sink = self.sink.clone();
        self.under_way.push(Box::pin(async move {
            let attempt = Attempt { number: delivery.failures + 1, route: delivery.route.name() };
            let result = sink.deliver(&delivery.event, &attempt).await;
            Ended { delivery, result }
        }));
    }

    /// When there is something to do without anything happening.
    fn next_wake(&self) -> Option<Instant> {
        if self.breaker.is_closed() {
            return self.waiting.peek().map(|Reverse(waiting)| waiting.due);
        }
        let has_candidate = !self.ready.is_empty() || !self.waiting.is_empty();
        self.breaker.probe_at().filter(|_| has_candidate)
    }

    /// Whether to read on: there is room, and soon nothing left to begin. While the breaker is open, only for a probe that
    /// has not failed yet.
    fn wants_more(&self) -> bool {
        let wanted = match self.breaker.is_closed() {
            true => self.ready.len() < self.config.concurrency,
            false => {
                self.under_way.is_empty()
                    && self.ready.len() + self.waiting.len() < MAX_FAILED_PROBES
                    && self.ready.iter().all(|delivery| delivery.failures > 0)
            }
        };
        wanted && self.window.len() < MAX_WINDOW && self.window.bytes() < MAX_WINDOW_BYTES
    }

    /// Takes what was read from the journal.
    fn admit(&mut self, batch: Result<Batch, ReadError>) {
        let batch = match batch {
            Ok(batch) => batch,
            Err(error) => {
                let error = &error as &dyn std::error::Error;
                error!(sink = %self.name, error, "the journal can't be read; trying again");
                return;
            }
        };
        for (position, found) in batch.found {
            match found {
                Found::Event { event, route } => {
                    let ticket = self.window.push(position, event.size());
                    let key = self.config.order_by.value(&event).map(|value| self.order.key(value));
                    let delivery = Delivery { event, route, position, ticket, key, failures: 0 };
                    self.ready.extend(self.order.admit(key, delivery));
                }
                Found::Unreadable { record, error } => {
                    error!(sink = %self.name, position = position.to_stored(), %error, "an event can't be read; it is a dead letter now");
                    self.dead.push(DeadLetter {
                        position,
                        event_id: "-".to_owned(),
                        route: "-".to_owned(),
                        reason: "unreadable",
                        error_kind: "decode".to_owned(),
                        error,
                        attempts: 0,
                        record,
                    });
                }
            }
        }
        self.window.read_to(batch.read_to);
    }

    /// Takes an attempt's end.
    fn finish(&mut self, Ended { mut delivery, result }: Ended) {
        let now = Instant::now();
        let change = match result {
            Ok(()) => {
                self.settle_delivery(&delivery);
                self.breaker.succeeded()
            }
            Err(error) => match error.verdict {
                Verdict::Retry { after } => {
                    delivery.failures = delivery.failures.saturating_add(1);
                    if let Some(suppressed) = self.warnings.admit(now) {
                        warn!(sink = %self.name, event_id = %delivery.event.id(), attempt = delivery.failures, kind = %error.kind, error = %error.text, suppressed, "attempt failed");
                    }
                    let due = now + self.config.backoff.wait(delivery.failures, rand::random(), after);
                    self.waiting.push(Reverse(Waiting { due, delivery }));
                    if error.is_of_event() { self.breaker.succeeded() } else { self.breaker.failed(now) }
                }
                Verdict::Reject => {
                    self.bury(&delivery, &error);
                    self.settle_delivery(&delivery);
                    self.breaker.succeeded()
                }
            },
        };
        match change {
            Change::None => {}
            Change::Opened => warn!(sink = %self.name, "sink is failing; it is only probed until it is back"),
            Change::Closed => {
                info!(sink = %self.name, "sink is back");
                // What failed meanwhile need not wait any longer.
                let mut waiting: Vec<_> = self.waiting.drain().map(|Reverse(waiting)| waiting.delivery).collect();
                waiting.sort_by_key(|delivery| delivery.ticket);
                self.ready.extend(waiting);
            }
        }
    }

    fn settle_delivery(&mut self, delivery: &Delivery) {
        self.window.settle(delivery.ticket);
        self.ready.extend(self.order.settle(delivery.key));
    }

    fn bury(&mut self, delivery: &Delivery, error: &DeliveryError) {
        let event_id = delivery.event.id().to_string();
        error!(sink = %self.name, %event_id, kind = %error.kind, error = %error.text, "delivery rejected; it is a dead letter now");
        self.dead.push(DeadLetter {
            position: delivery.position,
            event_id,
            route: delivery.route.name().to_owned(),
            reason: "rejected",
            error_kind: error.kind.to_string(),
            error: error.text.clone(),
            attempts: delivery.failures + 1,
            record: delivery.event.record(),
        });
    }

    fn has_to_settle(&self) -> bool {
        self.window.cursor() != self.settled || !self.dead.is_empty()
    }

    fn settle(&self) -> Settling {
        let (ledger, name, cursor) = (self.ledger.clone(), Arc::clone(&self.name), self.window.cursor());
        let changes = Changes { dead: self.dead.clone() };
        Box::pin(async move {
            let dead = changes.dead.len();
            let result = ledger.settle(&name, cursor, changes).await;
            if result.is_err() {
                tokio::time::sleep(STORAGE_PAUSE).await;
            }
            (cursor, dead, result)
        })
    }

    fn settle_ended(&mut self, (cursor, dead, result): (Position, usize, Result<(), LedgerError>)) {
        match result {
            Ok(()) => {
                self.dead.drain(..dead);
                self.settled = cursor;
                self.source.release(cursor);
            }
            Err(error) => {
                warn!(sink = %self.name, %error, "the cursor can't be written; after a crash deliveries would be repeated");
            }
        }
    }
}

/// The future's output, or nothing ever.
async fn pending_or<F: Future + Unpin>(future: Option<F>) -> F::Output {
    match future {
        Some(future) => future.await,
        None => std::future::pending().await,
    }
}

/// Lets one warning through per interval, with a count of those that were held back.
#[derive(Default)]
struct Throttle {
    last: Option<Instant>,
    suppressed: u64,
}

impl Throttle {
    /// How many were held back since the last, if this one may be written.
    fn admit(&mut self, now: Instant) -> Option<u64> {
        if self.last.is_some_and(|last| now < last + WARN_INTERVAL) {
            self.suppressed += 1;
            return None;
        }
        self.last = Some(now);
        Some(std::mem::take(&mut self.suppressed))
    }
}
