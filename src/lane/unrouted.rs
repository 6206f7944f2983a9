//! The lane of events that no route matches: each becomes a dead letter of the reserved sink `unrouted`, so that someone
//! who finds out about the gap in the rules can still replay them.

use std::sync::Arc;
use std::time::Instant;

use tokio::sync::watch;
use tracing::{error, warn};

use super::source::{Batch, Filter, Found, Source};
use super::warnings::Throttle;
use super::{Beginning, Phase, Remains, SETTLE_INTERVAL, STORAGE_PAUSE, delivery};
use crate::journal::{Position, ReadError};
use crate::ledger::{Change, Ledger, Progress};
use crate::routing::{Table, UNROUTED};

/// The lane of the reserved sink.
pub struct Unrouted {
    source: Source,
    ledger: Ledger,
    read_to: Position,
    written: Position,
    written_at: Instant,
    warnings: Throttle,
}

impl Unrouted {
    /// A lane that goes on where it once ended.
    pub fn new(table: Arc<Table>, beginning: Beginning, ledger: Ledger) -> Self {
        let at = beginning.reader.position();
        Self {
            source: Source::new(beginning.reader, Filter::Unrouted { table }),
            ledger,
            read_to: at,
            written: at,
            written_at: Instant::now(),
            warnings: Throttle::default(),
        }
    }

    /// Keeps what no route matches, until `phase` says to end.
    pub async fn run(mut self, mut phase: watch::Receiver<Phase>) -> Remains {
        while *phase.borrow() == Phase::Running {
            let has_to_write = self.read_to != self.written;
            tokio::select! {
                changed = phase.changed() => if changed.is_err() { break },
                batch = self.source.next() => self.take(batch).await,
                () = tokio::time::sleep(SETTLE_INTERVAL), if has_to_write => self.write(Vec::new()).await,
            }
        }
        if self.read_to != self.written {
            self.write(Vec::new()).await;
        }
        Remains { lag_events: self.source.end().since(self.written), parked: 0 }
    }

    async fn take(&mut self, batch: Result<Batch, ReadError>) {
        let batch = match batch {
            Ok(batch) => batch,
            Err(error) => {
                let error = &error as &dyn std::error::Error;
                error!(sink = UNROUTED, error, "the journal can't be read; trying again");
                return;
            }
        };
        let letters = batch.found.into_iter().map(|(position, found)| match found {
            Found::Event { event, .. } => delivery::unrouted(position, &event),
            Found::Unreadable { record, error } => delivery::unreadable(position, record, error),
        });
        let letters: Vec<_> = letters.collect();
        self.read_to = batch.read_to;
        let found = !letters.is_empty();
        if found && let Some(suppressed) = self.warnings.admit(Instant::now()) {
            warn!(
                events = letters.len(),
                suppressed, "no route matches; the events are dead letters of the sink unrouted"
            );
        }
        if found || self.written_at.elapsed() > SETTLE_INTERVAL {
            self.write(letters).await;
        }
    }

    /// Writes how far the lane has come, with what it has found; tries until it is written.
    async fn write(&mut self, letters: Vec<Change>) {
        let progress = Progress { cursor: self.read_to, ahead: Vec::new() };
        while let Err(error) = self.ledger.settle(UNROUTED, Some(progress.clone()), letters.clone()).await {
            warn!(sink = UNROUTED, %error, "what no route matches can't be written; trying again");
            tokio::time::sleep(STORAGE_PAUSE).await;
        }
        self.written = self.read_to;
        self.written_at = Instant::now();
        self.source.release(self.written);
    }
}
