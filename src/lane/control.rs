//! How operators reach a running lane: what it is doing, pausing it, and giving it deliveries again.

use std::collections::{HashSet, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::sync::{mpsc, oneshot};

use super::config::{Config, OrderBy};
use super::delivery::{self, Delivery};
use super::metrics::{Meters, Metrics};
use super::order::Key;
use super::source::Found;
use super::{Course, Lane};
use crate::event::{Event, EventId};
use crate::journal::Position;
use crate::ledger::{self, Change, Millis};
use crate::sink::DeliveryError;

/// How many commands may wait for the lane.
const COMMANDS: usize = 16;
/// What the rate of deliveries is counted over.
const RATE_SECONDS: usize = 10;
/// How many failed attempts are remembered.
const FAILURES: usize = 20;

/// How long giving deliveries to a lane waits for others to go, and how often it looks.
const ROOM_WAIT: Duration = Duration::from_secs(5);
const ROOM_POLL: Duration = Duration::from_millis(50);

/// A handle on a running lane. Clones reach the same one.
#[derive(Clone)]
pub struct Control {
    commands: mpsc::Sender<Command>,
    order_by: OrderBy,
    max_parked: usize,
}

/// The lane has ended: the relay is stopping, or the sink is no longer in the rules.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the sink's lane has ended: the relay is stopping, or the sink is no longer in the rules")]
pub struct Stopped;

/// What a lane keeps for the one that takes its place when its sink's settings change. Whoever reaches one reaches the
/// other.
pub struct Kept {
    pub(super) paused: bool,
    /// Since when the sink has failed, if its breaker was open at the end.
    pub(super) failing_since: Option<Millis>,
    pub(super) counts: Counts,
    pub(super) meters: Meters,
    pub(super) commands: mpsc::Receiver<Command>,
    sender: mpsc::Sender<Command>,
}

impl Kept {
    /// For the first lane of a sink.
    pub fn new(metrics: &Metrics, sink: &str) -> Self {
        let (sender, commands) = mpsc::channel(COMMANDS);
        let (counts, meters) = (Counts::default(), Meters::new(metrics, sink));
        Self { paused: false, failing_since: None, counts, meters, commands, sender }
    }

    /// For a lane that may come later, or never: whoever waits for this one's answers has them from nobody.
    #[must_use]
    pub fn put_by(self) -> Self {
        let (sender, commands) = mpsc::channel(COMMANDS);
        Self { commands, sender, ..self }
    }

    /// Since when the sink has failed, if it was failing at the end.
    pub fn was_failing_since(&self) -> Option<Millis> {
        self.failing_since
    }

    /// Unless this knows better: what has failed since then is tried at once.
    #[must_use]
    pub fn failing_since(self, since: Option<Millis>) -> Self {
        Self { failing_since: self.failing_since.or(since), ..self }
    }

    /// Begins no attempts, if so.
    pub fn pause(&mut self, pause: bool) {
        self.paused = pause;
    }

    pub(super) fn control(&self, config: &Config) -> Control {
        Control { commands: self.sender.clone(), order_by: config.order_by, max_parked: config.max_parked }
    }
}

/// What a lane is doing.
#[derive(Clone, Debug)]
pub struct Status {
    /// It begins no attempts, because it was told to.
    pub paused: bool,
    /// It only probes, because the sink has failed too often.
    pub breaker_open: bool,
    /// The lowest event that is not settled.
    pub cursor: Position,
    /// Events after the cursor; not all of them are this sink's.
    pub lag_events: u64,
    /// How old the oldest event is that was read and is not settled.
    pub lag: Duration,
    /// Attempts under way.
    pub in_flight: usize,
    /// Deliveries that wait for their next attempt.
    pub parked: usize,
    /// Delivered since the start.
    pub delivered: u64,
    /// Dead letters since the start.
    pub dead: u64,
    /// Failed attempts since the start.
    pub attempts_failed: u64,
    /// Deliveries per second, over the last ten seconds.
    pub rate: f64,
    /// The last attempt that failed.
    pub last_error: Option<Failure>,
}

/// A failed attempt.
#[derive(Clone, Debug)]
pub struct Failure {
    /// When.
    pub at: Millis,
    /// Its short name.
    pub kind: String,
    /// For people.
    pub text: String,
    /// What was to be delivered.
    pub event_id: EventId,
    /// How many attempts had been made with it by then.
    pub attempt: u32,
}

/// Where a lane is.
#[derive(Clone, Copy, Debug)]
pub struct Whereabouts {
    /// How far it has read.
    pub read_to: Position,
    /// The cursor that was written last: where another goes on, should this one end.
    pub cursor: Position,
}

impl Whereabouts {
    /// Of a lane that begins there.
    pub fn beginning(at: Position) -> Self {
        Self { read_to: at, cursor: at }
    }
}

/// Whether a lane may read on while rules change.
pub(super) enum Hold {
    No,
    /// It may not, and somebody waits for the read that is under way.
    Asked(oneshot::Sender<Whereabouts>),
    Held,
}

impl Hold {
    /// Says where the lane is, as soon as no read is under way.
    pub(super) fn answer(&mut self, read_to: Option<Position>, cursor: Position) {
        if let (Self::Asked(_), Some(read_to)) = (&*self, read_to)
            && let Self::Asked(answer) = std::mem::replace(self, Self::Held)
        {
            // Whoever asked may have gone away; it will say what to follow nevertheless, or end the lane.
            answer.send(Whereabouts { read_to, cursor }).unwrap_or(());
        }
    }

    /// Whether to read on, if more is wanted; or to wait for the read that is under way.
    pub(super) fn may_read(&self, wanted: bool) -> bool {
        match self {
            Self::No => wanted,
            Self::Asked(_) => true,
            Self::Held => false,
        }
    }
}

/// What an operator has given to the lane, and waits for to be written.
pub(super) struct Taken {
    /// Dead letters that are to be exhumed. They are counted as parked when they are: they may be gone by then.
    letters: Vec<(i64, Option<Key>)>,
    written: oneshot::Sender<usize>,
}

pub(super) enum Command {
    Pause(bool),
    Status(oneshot::Sender<Status>),
    Failures(oneshot::Sender<Vec<Failure>>),
    /// Reads nothing more, and says where it is.
    Hold(oneshot::Sender<Whereabouts>),
    /// Reads on, by these rules.
    Follow(Arc<Course>),
    /// Puts deliveries back to where they are tried.
    Take {
        changes: Vec<Change>,
        /// How many dead letters there were among them.
        written: oneshot::Sender<usize>,
    },
}

/// The way to a lane that is no sink's.
pub(super) fn channel() -> (Control, mpsc::Receiver<Command>) {
    let (commands, receiver) = mpsc::channel(COMMANDS);
    (Control { commands, order_by: OrderBy::None, max_parked: usize::MAX }, receiver)
}

impl Control {
    /// Begins no more attempts, or goes on; what is under way goes on anyhow.
    ///
    /// # Errors
    ///
    /// [`Stopped`].
    pub async fn pause(&self, pause: bool) -> Result<(), Stopped> {
        self.send(Command::Pause(pause)).await
    }

    /// What the lane is doing.
    ///
    /// # Errors
    ///
    /// [`Stopped`].
    pub async fn status(&self) -> Result<Status, Stopped> {
        let (answer, status) = oneshot::channel();
        self.send(Command::Status(answer)).await?;
        status.await.map_err(|_| Stopped)
    }

    /// The last attempts that failed, the latest first.
    ///
    /// # Errors
    ///
    /// [`Stopped`].
    pub async fn failures(&self) -> Result<Vec<Failure>, Stopped> {
        let (answer, failures) = oneshot::channel();
        self.send(Command::Failures(answer)).await?;
        failures.await.map_err(|_| Stopped)
    }

    /// Lets the lane read nothing more until it is told what to follow; where it is.
    ///
    /// # Errors
    ///
    /// [`Stopped`].
    pub async fn hold(&self) -> Result<Whereabouts, Stopped> {
        let (answer, place) = oneshot::channel();
        self.send(Command::Hold(answer)).await?;
        place.await.map_err(|_| Stopped)
    }

    /// Lets the lane read on, by these rules.
    ///
    /// # Errors
    ///
    /// [`Stopped`].
    pub async fn follow(&self, course: Arc<Course>) -> Result<(), Stopped> {
        self.send(Command::Follow(course)).await
    }

    /// Waits until half of what may be parked is free, so that what is given to the lane does not keep it from reading on;
    /// for a few seconds at most.
    ///
    /// # Errors
    ///
    /// [`Stopped`].
    pub async fn has_room(&self) -> Result<(), Stopped> {
        let deadline = Instant::now() + ROOM_WAIT;
        while self.status().await?.parked > self.max_parked / 2 && Instant::now() < deadline {
            tokio::time::sleep(ROOM_POLL).await;
        }
        Ok(())
    }

    /// Tries dead letters again, of whichever sink; each is given by its number and its event as it was stored. How many
    /// there were: one that is gone by then is left out. Durable on return.
    ///
    /// # Errors
    ///
    /// [`Stopped`]: none of them, or all.
    pub async fn exhume(&self, letters: Vec<(i64, Bytes)>) -> Result<usize, Stopped> {
        let due_at = ledger::now();
        let exhume = |(id, record)| Change::Exhume { id, key: self.order_by.key(&record), due_at };
        self.take(letters.into_iter().map(exhume).collect()).await
    }

    /// Sends events again. Durable on return.
    ///
    /// # Errors
    ///
    /// [`Stopped`]: none of them, or all.
    pub async fn replay(&self, events: Vec<(Position, Event)>) -> Result<(), Stopped> {
        let now = ledger::now();
        let park = |(position, event): (_, Event)| delivery::replayed(self.order_by, position, &event, now);
        self.take(events.into_iter().map(park).collect()).await.map(drop)
    }

    /// Gives changes to the lane; how many dead letters were exhumed by them.
    async fn take(&self, changes: Vec<Change>) -> Result<usize, Stopped> {
        let (answer, written) = oneshot::channel();
        self.send(Command::Take { changes, written: answer }).await?;
        written.await.map_err(|_| Stopped)
    }

    async fn send(&self, command: Command) -> Result<(), Stopped> {
        self.commands.send(command).await.map_err(|_| Stopped)
    }
}

impl Lane {
    /// Says where the lane is, if somebody asks. Other rules will be about what it has not begun with.
    pub(super) fn answer_hold(&mut self) {
        if matches!(self.hold, Hold::Asked(_)) {
            self.go_back();
        }
        self.hold.answer(self.source.position(), self.released);
    }

    /// Puts down what was read and not begun with, and reads it again. Not more than that: what other rules would bring to the
    /// sink from before it would come after later ones of its key.
    fn go_back(&mut self) {
        let not_begun = self.ready.iter().filter(|delivery| delivery.is_fresh()).chain(self.order.fresh());
        let unadmitted = self.unadmitted.front().map(|(position, _)| *position);
        let Some(first) = not_begun.map(|delivery| delivery.position).chain(unadmitted).min() else { return };
        if !self.source.go_back(first) {
            return;
        }
        let mut dropped: HashSet<_> = self.order.take_fresh().iter().map(|delivery| delivery.position).collect();
        let (fresh, parked): (Vec<_>, Vec<_>) =
            std::mem::take(&mut self.ready).into_iter().partition(Delivery::is_fresh);
        self.ready = parked.into();
        for delivery in fresh {
            dropped.insert(delivery.position);
            // What waits behind it is parked, and goes first now.
            self.ready.extend(self.order.settle(delivery.key));
        }
        self.unadmitted.clear();
        self.read_to = first;
        self.window.go_back(first, &dropped);
    }

    pub(super) fn obey(&mut self, command: Command) {
        match command {
            Command::Pause(paused) => self.kept.paused = paused,
            // Whoever asked and has gone away does not need the answer.
            Command::Status(answer) => drop(answer.send(self.status())),
            Command::Failures(answer) => {
                drop(answer.send(self.kept.counts.failures.iter().rev().cloned().collect()));
            }
            Command::Hold(answer) => self.hold = Hold::Asked(answer),
            Command::Follow(course) => {
                self.hold = Hold::No;
                self.source.follow(course);
            }
            Command::Take { changes, written } => {
                let mut letters = Vec::new();
                let key = |key: &Option<String>| key.as_deref().map(|value| self.order.key(value));
                for change in &changes {
                    match change {
                        Change::Exhume { id, key: value, .. } => letters.push((*id, key(value))),
                        Change::Park(parked) => self.parking.add(key(&parked.key), 1),
                        Change::Postpone { .. } | Change::Unpark { .. } | Change::Bury(_) | Change::Hasten { .. } => {}
                    }
                }
                self.changes.extend(changes);
                self.taken.push(Taken { letters, written });
                self.unwritten = true;
                self.settle_due = true;
            }
        }
    }

    /// What operators had given is written, and these dead letters were still there.
    pub(super) fn answer_taken(&mut self, taken: Vec<Taken>, mut exhumed: HashSet<i64>) {
        for Taken { letters, written } in taken {
            let mut count = 0;
            // Whoever came first has them.
            for (_, key) in letters.into_iter().filter(|(id, _)| exhumed.remove(id)) {
                self.parking.add(key, 1);
                count += 1;
            }
            // Whoever asked and has gone away does not need the answer.
            written.send(count).unwrap_or(());
        }
    }

    fn status(&mut self) -> Status {
        let waiting = self.unadmitted.front().and_then(|(_, found)| match found {
            Found::Event { since, .. } => Some(*since),
            Found::Unrouted(_) | Found::Unreadable { .. } => None,
        });
        let oldest = self.window.oldest().or(waiting);
        let lag = oldest.map_or(0, |since| ledger::now().saturating_sub(since));
        Status {
            paused: self.kept.paused,
            breaker_open: !self.breaker.is_closed(),
            cursor: self.window.cursor(),
            lag_events: self.source.end().since(self.window.cursor()),
            lag: Duration::from_millis(u64::try_from(lag).unwrap_or(0)),
            in_flight: self.under_way.len(),
            parked: self.parking.total(),
            delivered: self.kept.counts.delivered,
            dead: self.kept.counts.dead,
            attempts_failed: self.kept.counts.failed,
            rate: self.kept.counts.rate(Instant::now()),
            last_error: self.kept.counts.failures.back().cloned(),
        }
    }
}

/// What a lane counts.
#[derive(Default)]
pub(super) struct Counts {
    delivered: u64,
    pub(super) dead: u64,
    failed: u64,
    /// The last of them, the latest last.
    failures: VecDeque<Failure>,
    /// Deliveries in each of the last seconds, by the second's number.
    seconds: [(u64, u64); RATE_SECONDS + 1],
    began: Option<Instant>,
}

impl Counts {
    pub(super) fn delivered(&mut self, now: Instant) {
        self.delivered += 1;
        let second = now.duration_since(*self.began.get_or_insert(now)).as_secs();
        let slot = usize::try_from(second).unwrap_or(0) % self.seconds.len();
        if let Some((of, count)) = self.seconds.get_mut(slot) {
            *count = if *of == second { *count + 1 } else { 1 };
            *of = second;
        }
    }

    pub(super) fn failed(&mut self, at: Millis, delivery: &Delivery, error: &DeliveryError) {
        self.failed += 1;
        if self.failures.len() == FAILURES {
            self.failures.pop_front();
        }
        self.failures.push_back(Failure {
            at,
            kind: error.kind.to_string(),
            text: error.text.clone(),
            event_id: delivery.event.id(),
            attempt: delivery.failures,
        });
    }

    /// Deliveries per second, over the last whole seconds.
    fn rate(&self, now: Instant) -> f64 {
        let Some(began) = self.began else { return 0.0 };
        let second = now.duration_since(began).as_secs();
        let window = second.saturating_sub(RATE_SECONDS as u64)..second;
        let count: u64 = self.seconds.iter().filter(|(of, _)| window.contains(of)).map(|(_, count)| count).sum();
        match window.end - window.start {
            // Not a whole second yet.
            0 => self.delivered as f64,
            seconds => count as f64 / seconds as f64,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_is_that_of_the_last_seconds() {
        let (start, mut counts) = (Instant::now(), Counts::default());
        let at = |millis| start + Duration::from_millis(millis);
        assert_eq!(counts.rate(start), 0.0);
        (0..40).for_each(|number| counts.delivered(at(number * 100)));
        assert_eq!(counts.rate(at(4_050)), 10.0);
        assert_eq!(counts.rate(at(10_050)), 4.0);
        assert_eq!(counts.rate(at(12_050)), 2.0);
        assert_eq!(counts.rate(at(60_000)), 0.0);
        (600..640).for_each(|number| counts.delivered(at(number * 100)));
        assert_eq!((counts.rate(at(64_050)), counts.delivered), (4.0, 80));
    }
}
