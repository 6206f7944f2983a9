//! Where a lane's deliveries come from: the journal's reader, on a thread for blocking work while it reads.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::task::JoinHandle;
use tokio::time::sleep_until;

use super::STORAGE_PAUSE;
use crate::event::Event;
use crate::journal::{Position, ReadError, Reader};
use crate::routing::{RouteId, Scratch, SinkId, Table};

/// How much of the journal is read at once, in bytes.
const READ_BYTES: u64 = 256 << 10;
/// After the journal's end was reached, how long to let events gather before reading again.
const GATHER: Duration = Duration::from_millis(4);

/// Reads on, and keeps the events that routes name the sink for.
pub(super) struct Source {
    state: State,
    filter: Filter,
    not_before: Instant,
    released: Position,
    end: Position,
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
    Event { event: Event, route: Route },
    /// An entry that this version can't read.
    Unreadable { record: Bytes, error: String },
}

/// The route that named the sink for an event.
#[derive(Clone)]
pub(super) enum Route {
    /// One of the rules.
    Of { table: Arc<Table>, id: RouteId },
    /// One whose name was kept, or none.
    Named(Arc<str>),
}

impl Route {
    pub(super) fn name(&self) -> &str {
        match self {
            Self::Of { table, id } => table.route_name(*id),
            Self::Named(name) => name,
        }
    }
}

/// What makes an event one for the lane.
#[derive(Clone)]
pub(super) enum Filter {
    /// A route names the sink.
    Sink { table: Arc<Table>, id: SinkId },
    /// No route matches.
    Unrouted { table: Arc<Table> },
}

impl Filter {
    fn route(&self, event: &Event, scratch: &mut Scratch) -> Option<Route> {
        match self {
            Self::Sink { table, id } => {
                let id = table.route_to(event, *id, scratch)?;
                Some(Route::Of { table: Arc::clone(table), id })
            }
            Self::Unrouted { table } => table.matches(event, scratch).is_empty().then(|| Route::Named("-".into())),
        }
    }
}

impl Source {
    pub(super) fn new(reader: Reader, filter: Filter) -> Self {
        let (released, end) = (reader.position(), reader.end());
        Self { state: State::Home(reader), filter, not_before: Instant::now(), released, end }
    }

    /// The next events; waits for them. Nothing is lost if the future is dropped and called for again.
    pub(super) async fn next(&mut self) -> Result<Batch, ReadError> {
        if let State::Home(reader) = &mut self.state {
            sleep_until(self.not_before.into()).await;
            reader.readable().await;
        }
        self.state = match std::mem::replace(&mut self.state, State::Gone) {
            State::Home(reader) => {
                let filter = self.filter.clone();
                State::Away(tokio::task::spawn_blocking(move || read(reader, &filter)))
            }
            other => other,
        };
        let State::Away(reading) = &mut self.state else { return std::future::pending().await };
        let (reader, batch) = match reading.await {
            Ok(done) => done,
            Err(error) => match error.try_into_panic() {
                Ok(panic) => std::panic::resume_unwind(panic),
                // The runtime is going down.
                Err(_) => return std::future::pending().await,
            },
        };
        reader.release(self.released);
        self.end = reader.end();
        let pause = match &batch {
            Err(_) => STORAGE_PAUSE,
            Ok(batch) if batch.read_to >= self.end => GATHER,
            Ok(_) => Duration::ZERO,
        };
        self.not_before = Instant::now() + pause;
        self.state = State::Home(reader);
        batch
    }

    /// Nothing before `position` is needed any more.
    pub(super) fn release(&mut self, position: Position) {
        self.released = position;
        if let State::Home(reader) = &self.state {
            reader.release(position);
        }
    }

    /// The journal's end, as far as the reader has seen it.
    pub(super) fn end(&self) -> Position {
        match &self.state {
            State::Home(reader) => reader.end(),
            State::Away(_) | State::Gone => self.end,
        }
    }
}

/// Reads about [`READ_BYTES`]. Blocks.
fn read(mut reader: Reader, filter: &Filter) -> (Reader, Result<Batch, ReadError>) {
    let mut found = Vec::new();
    let mut scratch = Scratch::default();
    let result = reader.read(READ_BYTES, |position, record| {
        match Event::decode(record.clone()) {
            Ok(event) => {
                if let Some(route) = filter.route(&event, &mut scratch) {
                    found.push((position, Found::Event { event: event.detached(), route }));
                }
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
