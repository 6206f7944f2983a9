//! How operators reach all lanes that a sink has in this process: one, or one for each partition of the journal.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use arc_swap::{ArcSwap, ArcSwapOption};
use bytes::Bytes;
use futures_util::future::join_all;

use super::control::{Control, Failure, Status, Stopped};
use crate::event::Event;
use crate::journal::NotJoined;
use crate::journal::Position;

/// A handle on a sink's lanes. Clones reach the same ones, also those that come later.
#[derive(Clone, Default)]
pub struct Controls(Arc<Shared>);

#[derive(Default)]
struct Shared {
    lanes: ArcSwap<Vec<Control>>,
    /// Of the journal, where it has some: one for each lane.
    partitions: ArcSwap<Vec<i32>>,
    /// Also for lanes that come later.
    paused: AtomicBool,
    not_joined: ArcSwapOption<NotJoined>,
}

impl Controls {
    /// A handle on one lane.
    pub fn one(control: Control) -> Self {
        let controls = Self::default();
        controls.0.lanes.store(Arc::new(vec![control]));
        controls
    }

    /// These are all lanes now, each with its partition of the journal.
    pub fn set(&self, lanes: impl IntoIterator<Item = (i32, Control)>) {
        let (partitions, lanes) = lanes.into_iter().unzip();
        self.0.partitions.store(Arc::new(partitions));
        self.0.lanes.store(Arc::new(lanes));
    }

    /// Of which partitions of the journal there are lanes; none where it has none.
    pub fn partitions(&self) -> Vec<i32> {
        self.0.partitions.load().to_vec()
    }

    /// No lanes can come, and why; or they can.
    pub fn set_not_joined(&self, not_joined: Option<Arc<NotJoined>>) {
        self.0.not_joined.store(not_joined);
    }

    /// Why no lanes can come.
    pub fn not_joined(&self) -> Option<Arc<NotJoined>> {
        self.0.not_joined.load_full()
    }

    /// Lanes that come are paused, or not.
    pub fn set_paused(&self, paused: bool) {
        self.0.paused.store(paused, Ordering::Relaxed);
    }

    /// Whether lanes that come now have to be paused.
    pub fn is_paused(&self) -> bool {
        self.0.paused.load(Ordering::Relaxed)
    }

    /// Begins no more attempts, or goes on; what is under way goes on anyhow.
    ///
    /// # Errors
    ///
    /// [`Stopped`].
    pub async fn pause(&self, pause: bool) -> Result<(), Stopped> {
        self.set_paused(pause);
        let lanes = self.0.lanes.load_full();
        let told = join_all(lanes.iter().map(|lane| lane.pause(pause))).await;
        // Where there are several, one may end just now because its partition goes elsewhere.
        match &told[..] {
            [only] => *only,
            _ => Ok(()),
        }
    }

    /// What the lanes are doing, together.
    ///
    /// # Errors
    ///
    /// [`Stopped`].
    pub async fn status(&self) -> Result<Status, Stopped> {
        let lanes = self.0.lanes.load_full();
        // A lane may end just now, because its partition goes elsewhere.
        let all = join_all(lanes.iter().map(Control::status)).await;
        match &all[..] {
            [Err(stopped)] => Err(*stopped),
            _ => {
                let idle = Status::idle(self.is_paused());
                Ok(all.into_iter().flatten().fold(None, |sum, status| Some(together(sum, status))).unwrap_or(idle))
            }
        }
    }

    /// The last attempts that failed, the latest first.
    ///
    /// # Errors
    ///
    /// [`Stopped`].
    pub async fn failures(&self) -> Result<Vec<Failure>, Stopped> {
        let lanes = self.0.lanes.load_full();
        let all = join_all(lanes.iter().map(Control::failures)).await;
        let mut failures: Vec<_> = all.into_iter().flatten().flatten().collect();
        failures.sort_by_key(|failure| std::cmp::Reverse(failure.at));
        Ok(failures)
    }

    /// Waits until half of what may be parked is free; see [`Control::has_room`].
    ///
    /// # Errors
    ///
    /// [`Stopped`].
    pub async fn has_room(&self) -> Result<(), Stopped> {
        self.only()?.has_room().await
    }

    /// Tries dead letters again; how many there were. See [`Control::exhume`].
    ///
    /// # Errors
    ///
    /// [`Stopped`]: none of them, or all.
    pub async fn exhume(&self, letters: Vec<(i64, Bytes)>) -> Result<usize, Stopped> {
        self.only()?.exhume(letters).await
    }

    /// Sends events again. Durable on return.
    ///
    /// # Errors
    ///
    /// [`Stopped`]: none of them, or all.
    pub async fn replay(&self, events: Vec<(Position, Event)>) -> Result<(), Stopped> {
        self.only()?.replay(events).await
    }

    /// The lane of a journal that is in one piece.
    fn only(&self) -> Result<Control, Stopped> {
        self.0.lanes.load().first().cloned().ok_or(Stopped)
    }
}

/// What two lanes of a sink are doing.
fn together(sum: Option<Status>, other: Status) -> Status {
    let Some(sum) = sum else { return other };
    let last = |failure: &Option<Failure>| failure.as_ref().map(|failure| failure.at);
    let last_error = if last(&sum.last_error) >= last(&other.last_error) { sum.last_error } else { other.last_error };
    Status {
        paused: sum.paused || other.paused,
        breaker_open: sum.breaker_open || other.breaker_open,
        // Of several partitions: as many entries are settled.
        cursor: Position::from_stored(sum.cursor.to_stored().saturating_add(other.cursor.to_stored())),
        lag_events: sum.lag_events + other.lag_events,
        lag: sum.lag.max(other.lag),
        in_flight: sum.in_flight + other.in_flight,
        parked: sum.parked + other.parked,
        delivered: sum.delivered + other.delivered,
        dead: sum.dead + other.dead,
        attempts_failed: sum.attempts_failed + other.attempts_failed,
        rate: sum.rate + other.rate,
        last_error,
    }
}

impl Status {
    /// Of a sink that has no lane here at the moment.
    fn idle(paused: bool) -> Self {
        Self {
            paused,
            breaker_open: false,
            cursor: Position::ZERO,
            lag_events: 0,
            lag: Duration::ZERO,
            in_flight: 0,
            parked: 0,
            delivered: 0,
            dead: 0,
            attempts_failed: 0,
            rate: 0.0,
            last_error: None,
        }
    }
}
