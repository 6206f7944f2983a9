//! The lane of events that no route matches: each becomes a dead letter of the reserved sink `unrouted`, so that someone
//! who finds out about the gap in the rules can still replay them. With `keep = false` they are only counted.

use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::future::BoxFuture;
use tokio::sync::{mpsc, watch};
use tokio::time::sleep_until;
use tracing::{error, warn};

use super::control::{self, Command, Control, Hold};
use super::source::{Batch, Filter, Found, Source};
use super::{Beginning, Course, Metrics, Phase, Remains, SETTLE_INTERVAL, STORAGE_PAUSE, delivery, pending_or};
use crate::journal::{Position, ReadError};
use crate::ledger::{Account, Change, LedgerError, Progress};
use crate::routing::UNROUTED;
use crate::telemetry::Throttle;

/// The lane of the reserved sink.
pub struct Unrouted {
    source: Source,
    account: Account,
    read_to: Position,
    /// What is to be written with the progress.
    letters: Vec<Change>,
    written: Position,
    write_at: Instant,
    metrics: Metrics,
    hold: Hold,
    commands: mpsc::Receiver<Command>,
    warnings: Throttle,
}

/// What the ledger is doing for the lane.
type Writing = BoxFuture<'static, Wrote>;

/// What it has done.
struct Wrote {
    cursor: Position,
    letters: Vec<Change>,
    result: Result<(), LedgerError>,
}

impl Unrouted {
    /// A lane that goes on where it once ended, and how to tell it of new rules.
    pub fn new(course: Arc<Course>, beginning: Beginning, account: Account, metrics: Metrics) -> (Self, Control) {
        let at = beginning.reader.position();
        let (control, commands) = control::channel();
        let lane = Self {
            source: Source::new(beginning.reader, Filter::new(course, UNROUTED.into())),
            metrics,
            account,
            read_to: at,
            letters: Vec::new(),
            written: at,
            write_at: Instant::now(),
            hold: Hold::No,
            commands,
            warnings: Throttle::default(),
        };
        (lane, control)
    }

    /// Keeps what no route matches, until `phase` says to end.
    pub async fn run(mut self, mut phase: watch::Receiver<Phase>) -> Remains {
        let mut writing: Option<Writing> = None;
        loop {
            let has_to_write = self.read_to != self.written;
            let running = match *phase.borrow() {
                Phase::Running => true,
                Phase::Finishing if has_to_write => false,
                Phase::Finishing | Phase::Ending => break,
            };
            if has_to_write && writing.is_none() && self.write_at <= Instant::now() {
                writing = Some(self.write());
            }
            self.hold.answer(self.source.position(), self.written);
            let wants_more = running && self.letters.is_empty();
            tokio::select! {
                biased;
                changed = phase.changed() => if changed.is_err() { break },
                Some(command) = self.commands.recv() => self.obey(command),
                wrote = pending_or(writing.as_mut()) => {
                    writing = None;
                    self.wrote(wrote);
                }
                () = sleep_until(self.write_at.into()), if has_to_write && writing.is_none() => {}
                batch = self.source.next(), if self.hold.may_read(wants_more) => self.take(batch),
            }
        }
        if let Some(writing) = writing {
            let wrote = writing.await;
            self.wrote(wrote);
        }
        if self.read_to != self.written {
            let wrote = self.write().await;
            self.wrote(wrote);
        }
        Remains { unread: vec![(self.written, self.source.watch_end())], parked: 0, kept: None }
    }

    fn obey(&mut self, command: Command) {
        match command {
            Command::Hold(answer) => self.hold = Hold::Asked(answer),
            Command::Follow(course) => {
                self.hold = Hold::No;
                self.source.follow(course);
            }
            // It is no sink that operators reach.
            Command::Pause(_) | Command::Status(_) | Command::Failures(_) | Command::Take { .. } => {}
        }
    }

    fn take(&mut self, batch: Result<Batch, ReadError>) {
        let batch = match batch {
            Ok(batch) => batch,
            Err(error) => {
                let error = &error as &dyn std::error::Error;
                error!(sink = UNROUTED, error, "the journal can't be read; trying again");
                return;
            }
        };
        self.read_to = batch.read_to;
        let mut unrouted = 0;
        for (position, found) in batch.found {
            match found {
                Found::Unrouted(letter) => {
                    unrouted += 1;
                    self.letters.extend(letter.map(Change::Bury));
                }
                // Of those that have a sink it looks for none.
                Found::Event { .. } => {}
                Found::Unreadable { record, error } => {
                    self.letters.push(Change::Bury(Box::new(delivery::unreadable(position, record, error))));
                    self.metrics.buried(UNROUTED, 1);
                }
            }
        }
        self.metrics.unrouted().inc_by(unrouted);
        if self.letters.is_empty() {
            return;
        }
        let now = Instant::now();
        self.write_at = now;
        if let Some(suppressed) = self.warnings.admit(now) {
            let events = self.letters.len();
            warn!(events, suppressed, "no route matches; the events are dead letters of the sink unrouted");
        }
    }

    /// Writes how far the lane has come, with what it has found.
    fn write(&mut self) -> Writing {
        let (account, cursor, letters) = (self.account.clone(), self.read_to, std::mem::take(&mut self.letters));
        Box::pin(async move {
            let result = account.settle(Progress { cursor, ahead: Vec::new() }, letters.clone()).await;
            Wrote { cursor, letters, result: result.map(drop) }
        })
    }

    /// Takes what has become of it. What can't be written is tried again later.
    fn wrote(&mut self, Wrote { cursor, mut letters, result }: Wrote) {
        let pause = match result {
            Ok(()) => {
                self.written = cursor;
                self.source.release(cursor);
                // What was found meanwhile keeps the lane from reading on.
                if self.letters.is_empty() { SETTLE_INTERVAL } else { Duration::ZERO }
            }
            Err(error) => {
                letters.append(&mut self.letters);
                self.letters = letters;
                warn!(sink = UNROUTED, %error, "what no route matches can't be written; trying again");
                STORAGE_PAUSE
            }
        };
        self.write_at = Instant::now() + pause;
    }
}
