//! The journal: a durable log of opaque entries, which the ingress appends to and lanes read on from a position.
//!
//! [`disk`] keeps it in files of its own; [`kafka`] in a topic, for relays that share it. What is here is what the others
//! see, whichever it is: an entry that was appended stays readable, in its order, at its [`Position`].

mod config;
pub mod disk;
pub mod kafka;

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::SystemTime;

use bytes::Bytes;
use tokio::sync::watch;

pub use config::{Config, Kind};
pub use disk::Durability;

/// Where an entry stands in the journal. Only the journal knows what is in it; others compare, store and pass it on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Position(u64);

impl Position {
    /// Before the first entry that ever was.
    pub const ZERO: Self = Self(0);

    /// A form that a database can keep.
    pub fn to_stored(self) -> i64 {
        i64::try_from(self.0).unwrap_or(i64::MAX)
    }

    /// The position that [`Position::to_stored`] gave.
    pub fn from_stored(stored: i64) -> Self {
        Self(u64::try_from(stored).unwrap_or(0))
    }

    /// How many entries there are from `earlier` up to here.
    pub fn since(self, earlier: Self) -> u64 {
        self.0.saturating_sub(earlier.0)
    }
}

/// Where a reader begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    /// At a position, or at the oldest entry if that one is gone.
    At(Position),
    /// At the oldest entry that is kept.
    Earliest,
    /// Before the first entry that was written since then.
    WrittenSince(SystemTime),
    /// After the last entry.
    End,
}

/// An entry as it is read.
pub struct Entry {
    /// What was appended.
    pub record: Bytes,
    /// The route that it was addressed by when it was appended, where entries are: it is for whom reads it then.
    pub route: Option<Arc<str>>,
    /// When an operator sent it again, if it was appended for that.
    pub again_at: Option<SystemTime>,
}

/// Whether appends can succeed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Health {
    /// They can.
    Serving,
    /// Not until space is free again.
    Full(String),
    /// Not until brokers take it again.
    Away(String),
    /// Never again in this process: a write or sync failed.
    Failed(String),
}

/// Why nothing of a journal that replicas share comes to this one.
#[derive(Clone, Debug)]
pub struct NotJoined {
    /// When it was last tried.
    pub at: SystemTime,
    /// For people.
    pub reason: String,
}

/// One core's way into the journal. Clones share what gathers there.
#[derive(Clone)]
#[expect(missing_docs, reason = "named like the kinds")]
pub enum Appender {
    Disk(disk::Appender),
    Kafka(kafka::Appender),
}

/// Where an append's entries are written to.
#[expect(missing_docs, reason = "named like the kinds")]
pub enum Entries<'a, 'b> {
    Disk(&'a mut disk::Entries<'b>),
    Kafka(&'a mut Vec<Vec<u8>>),
}

/// An append on its way.
#[must_use = "nothing is durable before this is"]
#[expect(missing_docs, reason = "named like the kinds")]
pub enum Append {
    Disk(disk::Append),
    Kafka(kafka::Append),
}

impl Entries<'_, '_> {
    /// Adds an entry: whatever `write` appends to the buffer.
    pub fn entry(&mut self, write: impl FnOnce(&mut Vec<u8>)) {
        match self {
            Self::Disk(entries) => entries.entry(write),
            Self::Kafka(entries) => {
                let mut entry = Vec::new();
                write(&mut entry);
                entries.push(entry);
            }
        }
    }
}

impl Appender {
    /// Appends the entries that `fill` writes. The result is ready when they are durable; dropping it does not take them
    /// back.
    ///
    /// # Errors
    ///
    /// [`AppendError`]: nothing was added.
    pub fn append(&self, fill: impl FnOnce(&mut Entries<'_, '_>)) -> Result<Append, AppendError> {
        match self {
            Self::Disk(appender) => appender.append(|entries| fill(&mut Entries::Disk(entries))).map(Append::Disk),
            Self::Kafka(appender) => {
                let mut entries = Vec::new();
                fill(&mut Entries::Kafka(&mut entries));
                appender.append(entries).map(Append::Kafka)
            }
        }
    }

    /// Asks for what has gathered to be made durable. To be called when the core is about to park.
    pub fn submit(&self) {
        match self {
            Self::Disk(appender) => appender.submit(),
            Self::Kafka(_) => {}
        }
    }

    /// Wakes this core's requests when they are durable; runs for ever. One per core, on that core.
    pub async fn courier(self) {
        match self {
            Self::Disk(appender) => appender.courier().await,
            Self::Kafka(appender) => appender.courier().await,
        }
    }
}

impl Future for Append {
    type Output = Result<(), AppendError>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        match self.get_mut() {
            Self::Disk(append) => Pin::new(append).poll(cx),
            Self::Kafka(append) => Pin::new(append).poll(cx),
        }
    }
}

/// Why entries were not appended.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AppendError {
    /// There is no room until lanes catch up or the disk has space again.
    #[error("the journal is full: {0}")]
    Full(Arc<str>),
    /// More is waiting to be durable than may.
    #[error("too much is waiting to be stored")]
    Busy,
    /// The entries are longer than the journal can take at once.
    #[error("the entries take {bytes} bytes; there is room for {max}")]
    TooLarge {
        /// What they take.
        bytes: u64,
        /// What there is room for.
        max: u64,
    },
    /// Whether they are durable is not known, and they count as not appended.
    #[error("the journal did not confirm the entries: {0}")]
    Unconfirmed(Arc<str>),
    /// A write or sync failed.
    #[error("the journal has failed")]
    Failed,
    /// The journal is being closed.
    #[error("the journal is closed")]
    Closed,
}

/// The journal as others see it. Clones share it.
#[derive(Clone)]
#[expect(missing_docs, reason = "named like the kinds")]
pub enum View {
    Disk(disk::View),
    Kafka(kafka::View),
}

impl View {
    /// A handle for those who append on one core.
    pub fn appender(&self) -> Appender {
        match self {
            Self::Disk(view) => Appender::Disk(view.appender()),
            Self::Kafka(view) => Appender::Kafka(view.appender()),
        }
    }

    /// A reader of all entries, which keeps those from its position on until it releases them, or is dropped. May block.
    ///
    /// # Errors
    ///
    /// [`ReadError`].
    pub fn reader(&self, start: Start) -> Result<Reader, ReadError> {
        match self {
            Self::Disk(view) => Ok(Reader::Disk(view.reader(start))),
            Self::Kafka(view) => Ok(Reader::Scan(Box::new(view.scan(start)?))),
        }
    }

    /// The position after the last entry, for [`View::reader`].
    pub fn end(&self) -> Position {
        match self {
            Self::Disk(view) => view.end(),
            Self::Kafka(view) => view.end(),
        }
    }

    /// How many entries there have ever been.
    pub fn count(&self) -> u64 {
        match self {
            Self::Disk(view) => view.end().0,
            Self::Kafka(view) => view.ends().total(),
        }
    }

    /// Whether appends can succeed.
    pub fn health(&self) -> Health {
        match self {
            Self::Disk(view) => view.health(),
            Self::Kafka(view) => view.reception().problem().map_or(Health::Serving, Health::Away),
        }
    }

    /// How many partitions it has.
    pub fn partitions(&self) -> usize {
        match self {
            Self::Disk(_) => 1,
            Self::Kafka(view) => view.ends().partitions(),
        }
    }

    /// The files, where it has some.
    pub fn files(&self) -> Option<&disk::View> {
        match self {
            Self::Disk(view) => Some(view),
            Self::Kafka(_) => None,
        }
    }
}

/// Reads entries in order.
#[expect(missing_docs, reason = "named like the kinds")]
pub enum Reader {
    Disk(disk::Reader),
    Kafka(kafka::Reader),
    Scan(Box<kafka::Scan>),
}

impl Reader {
    /// The position that is read next.
    pub fn position(&self) -> Position {
        match self {
            Self::Disk(reader) => reader.position(),
            Self::Kafka(reader) => reader.position(),
            Self::Scan(scan) => scan.position(),
        }
    }

    /// Reads on from an earlier position, of what is not released. Whether it does: where entries are addressed when they are
    /// appended, there is no use in reading them twice.
    pub fn go_back(&mut self, position: Position) -> bool {
        match self {
            Self::Disk(reader) => reader.go_back(position),
            Self::Kafka(_) | Self::Scan(_) => return false,
        }
        true
    }

    /// The position after the last durable entry.
    pub fn end(&self) -> Position {
        *self.watch_end().borrow()
    }

    /// [`Reader::end`], for whoever has to know it without the reader.
    pub fn watch_end(&self) -> watch::Receiver<Position> {
        match self {
            Self::Disk(reader) => reader.watch_end(),
            Self::Kafka(reader) => reader.watch_end(),
            Self::Scan(scan) => scan.watch_end(),
        }
    }

    /// What keeps the entries that are not released, also when the reader is gone; none where retention alone decides.
    pub fn hold(&self) -> Option<Arc<disk::Hold>> {
        match self {
            Self::Disk(reader) => Some(reader.hold()),
            Self::Kafka(_) | Self::Scan(_) => None,
        }
    }

    /// Says that entries before `position` are not needed any more, not even after a restart.
    pub fn release(&self, position: Position) {
        match self {
            Self::Disk(reader) => reader.release(position),
            // The topic's retention decides.
            Self::Kafka(_) | Self::Scan(_) => {}
        }
    }

    /// Waits until there is something to read.
    pub async fn readable(&mut self) {
        match self {
            Self::Disk(reader) => reader.readable().await,
            Self::Kafka(reader) => reader.readable().await,
            // What there is.
            Self::Scan(_) => {}
        }
    }

    /// Whether [`Reader::read`] may wait for something.
    pub fn blocks(&self) -> bool {
        match self {
            Self::Disk(_) | Self::Scan(_) => true,
            Self::Kafka(_) => false,
        }
    }

    /// Reads entries, and hands each with its position to `visit`, until there are no more or `visit` says stop
    /// (`false`; that entry counts as read), or about `max_bytes` were read. May block.
    ///
    /// Entries that are lost are passed over and logged.
    ///
    /// # Errors
    ///
    /// [`ReadError`]; nothing is passed over, so that reading can be tried again.
    pub fn read(&mut self, max_bytes: u64, mut visit: impl FnMut(Position, Entry) -> bool) -> Result<(), ReadError> {
        match self {
            Self::Disk(reader) => {
                reader.read(max_bytes, |position, record| {
                    visit(position, Entry { record, route: None, again_at: None })
                })?;
            }
            Self::Kafka(reader) => reader.read(max_bytes, visit)?,
            Self::Scan(scan) => scan.read(max_bytes, visit)?,
        }
        Ok(())
    }
}

/// The journal could not be read.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "named like the kinds")]
pub enum ReadError {
    #[error(transparent)]
    Disk(#[from] disk::ReadError),
    #[error(transparent)]
    Kafka(#[from] kafka::ReadError),
}
