//! Where a lane's deliveries come from: the journal's reader, on a thread for blocking work while it may wait for a disk.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::sleep_until;

use super::course::{Course, Route};
use super::{STORAGE_PAUSE, delivery};
use crate::event::Event;
use crate::journal::{Entry, Position, ReadError, Reader};
use crate::ledger::{self, DeadLetter, Millis};
use crate::routing::{Scratch, SinkId, UNROUTED};

/// How much of the journal is read at once, in bytes.
const READ_BYTES: u64 = 256 << 10;
/// The same where it is read on a thread that others wait for.
const READ_BYTES_INLINE: u64 = 64 << 10;
/// After the journal's end was reached, how long to let events gather before reading again.
const GATHER: Duration = Duration::from_millis(4);

/// Reads on, and keeps the events that routes name the sink for.
pub(super) struct Source {
    state: State,
    filter: Filter,
    /// Whether others have had their turn since the last read.
    rested: bool,
    not_before: Instant,
    released: Position,
    /// The journal's end.
    end: watch::Receiver<Position>,
}

enum State {
    Home(Reader),
    Away(JoinHandle<(Reader, Result<Batch, ReadError>)>),
    Gone,
}

/// What was read, and up to where.
pub(super) struct Batch {
    pub(super) found: Vec<(Position, Found)>,
    pub(super) read_to: Position,
}

pub(super) enum Found {
    /// An event for the sink.
    Event {
        event: Event,
        route: Route,
        /// What its age counts from.
        since: Millis,
    },
    /// An event that no rule names a sink for, as a dead letter if such are kept.
    Unrouted(Option<Box<DeadLetter>>),
    /// An entry that this version can't read.
    Unreadable { record: Bytes, error: String },
}

/// What makes an event one for the lane.
#[derive(Clone)]
pub(super) struct Filter {
    course: Arc<Course>,
    sink: Arc<str>,
    /// The sink in the rules in force; none for the reserved one.
    id: Option<SinkId>,
}

impl Filter {
    pub(super) fn new(course: Arc<Course>, sink: Arc<str>) -> Self {
        let id = course.table().sink(&sink);
        Self { course, sink, id }
    }

    fn route(&self, position: Position, event: &Event, scratch: &mut Scratch) -> Option<Route> {
        match &*self.sink {
            UNROUTED => self.course.is_unrouted(position, event, scratch).then_some(Route::Nowhere),
            sink => self.course.route_to(position, event, sink, self.id, scratch),
        }
    }
}

impl Source {
    pub(super) fn new(reader: Reader, filter: Filter) -> Self {
        let (released, end) = (reader.position(), reader.watch_end());
        Self { state: State::Home(reader), filter, rested: true, not_before: Instant::now(), released, end }
    }

    /// The next events; waits for them. Nothing is lost if the future is dropped and called for again.
    pub(super) async fn next(&mut self) -> Result<Batch, ReadError> {
        if let State::Home(reader) = &mut self.state {
            if !std::mem::replace(&mut self.rested, true) {
                tokio::task::yield_now().await;
            }
            sleep_until(self.not_before.into()).await;
            reader.readable().await;
        }
        let (reader, batch) = match std::mem::replace(&mut self.state, State::Gone) {
            State::Home(reader) if !reader.blocks() => {
                self.rested = false;
                read(reader, &self.filter, READ_BYTES_INLINE)
            }
            State::Home(reader) => {
                let filter = self.filter.clone();
                self.state = State::Away(tokio::task::spawn_blocking(move || read(reader, &filter, READ_BYTES)));
                self.back().await
            }
            other => {
                self.state = other;
                self.back().await
            }
        };
        reader.release(self.released);
        let pause = match &batch {
            Err(_) => STORAGE_PAUSE,
            Ok(batch) if batch.read_to >= self.end() => GATHER,
            Ok(_) => Duration::ZERO,
        };
        self.not_before = Instant::now() + pause;
        self.state = State::Home(reader);
        batch
    }

    /// Waits for a reader that is away.
    async fn back(&mut self) -> (Reader, Result<Batch, ReadError>) {
        let State::Away(reading) = &mut self.state else { return std::future::pending().await };
        match reading.await {
            Ok(done) => done,
            Err(error) => match error.try_into_panic() {
                Ok(panic) => std::panic::resume_unwind(panic),
                // The runtime is going down.
                Err(_) => std::future::pending().await,
            },
        }
    }

    /// Keeps other events from now on.
    pub(super) fn follow(&mut self, course: Arc<Course>) {
        self.filter = Filter::new(course, Arc::clone(&self.filter.sink));
    }

    /// Reads on from an earlier position, of what is not released; whether it does.
    pub(super) fn go_back(&mut self, position: Position) -> bool {
        match &mut self.state {
            State::Home(reader) => reader.go_back(position),
            State::Away(_) | State::Gone => false,
        }
    }

    /// How far has been read; unknown while a read is under way, which dropping [`Source::next`] does not stop.
    pub(super) fn position(&self) -> Option<Position> {
        match &self.state {
            State::Home(reader) => Some(reader.position()),
            State::Away(_) | State::Gone => None,
        }
    }

    /// Nothing before `position` is needed any more.
    pub(super) fn release(&mut self, position: Position) {
        self.released = position;
        if let State::Home(reader) = &self.state {
            reader.release(position);
        }
    }

    /// What tells where the journal ends.
    pub(super) fn watch_end(&self) -> watch::Receiver<Position> {
        self.end.clone()
    }

    /// The journal's end, also while the reader is away.
    pub(super) fn end(&self) -> Position {
        *self.end.borrow()
    }
}

/// Reads about so much. May block.
fn read(mut reader: Reader, filter: &Filter, bytes: u64) -> (Reader, Result<Batch, ReadError>) {
    let mut found = Vec::new();
    let mut scratch = Scratch::default();
    let result = reader.read(bytes, |position, Entry { record, route, again_at }| {
        match Event::decode(record.clone()) {
            Ok(event) => {
                let route = match route {
                    Some(route) => Some(Route::Named(route)),
                    None => filter.route(position, &event, &mut scratch),
                };
                let found_event = match route {
                    Some(Route::Nowhere) => {
                        let is_kept = filter.course.table().keeps_unrouted();
                        Found::Unrouted(is_kept.then(|| Box::new(delivery::unrouted(position, &event))))
                    }
                    Some(route) => {
                        let since = ledger::millis(again_at.unwrap_or(event.received_at()));
                        Found::Event { event: event.detached(), route, since }
                    }
                    None => return true,
                };
                found.push((position, found_event));
            }
            Err(error) => found.push((position, Found::Unreadable { record, error: error.to_string() })),
        }
        true
    });
    let read_to = reader.position();
    // What was read before an error counts; the error comes again.
    let batch = match result {
        Err(error) if found.is_empty() => Err(error),
        Ok(()) | Err(_) => Ok(Batch { found, read_to }),
    };
    (reader, batch)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::document::{Document, Environment};
    use crate::journal::Start;
    use crate::journal::disk::recovery::Known;
    use crate::journal::disk::{Journal, Metrics};
    use crate::routing::Table;

    /// Or else a lane would say that it has caught up when it has only delivered what it has read.
    #[tokio::test]
    async fn the_end_is_known_while_the_reader_is_away() {
        let dir = tempfile::tempdir().unwrap();
        let (path, quarantine) = (dir.path().join("journal"), dir.path().join("quarantine"));
        let metrics = Metrics::new(&prometheus::Registry::new()).unwrap();
        let opened = Journal::open(&path, &quarantine, &Default::default(), Known::default(), metrics);
        let (mut journal, _) = opened.unwrap();
        journal.start().unwrap();
        let document = Document::parse("routes.toml", "", &Environment);
        let table = Arc::new(Table::read(&mut document.root(), &[]));
        let mut source = Source::new(
            Reader::Disk(journal.view().reader(Start::Earliest)),
            Filter::new(Arc::new(Course::new(table)), UNROUTED.into()),
        );
        let reader = std::mem::replace(&mut source.state, State::Gone);
        let appender = journal.view().appender();
        let appended = appender.append(|entries| entries.entry(|out| out.push(b'x'))).unwrap();
        appender.submit();
        tokio::select! {
            result = appended => result.unwrap(),
            () = appender.clone().courier() => unreachable!("a courier does not end"),
        }
        assert_eq!(source.end().since(Position::ZERO), 1);
        drop(reader);
        journal.close();
    }
}
