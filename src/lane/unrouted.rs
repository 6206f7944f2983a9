//! The lane of events that no route matches: each becomes a dead letter of the reserved sink `unrouted`, so that someone
//! who finds out about the gap in the rules can still replay them. With `keep = false` they are only counted.

use std::sync::Arc;
use std::time::Instant;

use tokio::sync::{mpsc, watch};
use tokio::time::sleep_until;
use tracing::{error, warn};

use super::control::{self, Command, Control, Hold};
use super::source::{Batch, Filter, Found, Source};
use super::{Beginning, Course, Metrics, Phase, Remains, SETTLE_INTERVAL, STORAGE_PAUSE, delivery};
use crate::journal::{Position, ReadError};
use crate::ledger::{Account, Change, Progress};
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
    /// Whether they are kept, or only counted.
    keep: bool,
    metrics: Metrics,
    hold: Hold,
    commands: mpsc::Receiver<Command>,
    warnings: Throttle,
}

impl Unrouted {
    /// A lane that goes on where it once ended, and how to tell it of new rules.
    pub fn new(course: Arc<Course>, beginning: Beginning, account: Account, metrics: Metrics) -> (Self, Control) {
        let at = beginning.reader.position();
        let (control, commands) = control::channel();
        let lane = Self {
            keep: course.table().keeps_unrouted(),
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
        loop {
            let has_to_write = self.read_to != self.written;
            let running = match *phase.borrow() {
                Phase::Running => true,
                Phase::Finishing if has_to_write => false,
                Phase::Finishing | Phase::Ending => break,
            };
            self.hold.answer(self.source.position(), self.written);
            let wants_more = running && self.letters.is_empty();
            tokio::select! {
                biased;
                changed = phase.changed() => if changed.is_err() { break },
                Some(command) = self.commands.recv() => self.obey(command),
                () = sleep_until(self.write_at.into()), if has_to_write => self.write().await,
                batch = self.source.next(), if self.hold.may_read(wants_more) => self.take(batch),
            }
        }
        if self.read_to != self.written {
            self.write().await;
        }
        Remains { unread: vec![(self.written, self.source.watch_end())], parked: 0, kept: None }
    }

    fn obey(&mut self, command: Command) {
        match command {
            Command::Hold(answer) => self.hold = Hold::Asked(answer),
            Command::Follow(course) => {
                self.hold = Hold::No;
                self.keep = course.table().keeps_unrouted();
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
                Found::Event { event, .. } => {
                    unrouted += 1;
                    if self.keep {
                        self.letters.push(Change::Bury(Box::new(delivery::unrouted(position, &event))));
                    }
                }
                Found::Unreadable { record, error } => {
                    self.letters.push(Change::Bury(Box::new(delivery::unreadable(position, record, error))));
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

    /// Writes how far the lane has come, with what it has found. What can't be written is tried again later.
    async fn write(&mut self) {
        let progress = Progress { cursor: self.read_to, ahead: Vec::new() };
        let pause = match self.account.settle(progress, self.letters.clone()).await {
            Ok(_) => {
                self.letters.clear();
                self.written = self.read_to;
                self.source.release(self.written);
                SETTLE_INTERVAL
            }
            Err(error) => {
                warn!(sink = UNROUTED, %error, "what no route matches can't be written; trying again");
                STORAGE_PAUSE
            }
        };
        self.write_at = Instant::now() + pause;
    }
}
