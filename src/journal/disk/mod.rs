//! The journal on local disk: a durable, append-only log of opaque entries.
//!
//! # What it guarantees
//!
//! - An append that returned `Ok` survives a crash of the process; with [`Durability::Fsync`] also one of the machine.
//! - An append of several entries is kept whole or not at all: it is one record with one checksum.
//! - Entries keep their order and their [`Position`]; a position is never given twice.
//! - A failed write or sync poisons the journal: nothing is acknowledged from then on. Nobody syncs again and hopes,
//!   since the kernel may have dropped the pages that it could not write.
//! - Readers see only what is durable. Reading never changes a file; only opening repairs.
//! - Segments that a reader still needs are never given up.
//!
//! # How it is built
//!
//! `record` is the layout of one append, `segment` that of a file, `scan` walks the records of one, [`recovery`] is
//! the decision table for opening. `writer` has the one thread that writes (group commit) and the handles of those who
//! append; `space` the thread that keeps segments ready and gives old ones up; `reader` reads on from a position.
//!
//! The journal does not know what an entry is, nor who reads it.

mod metrics;
mod reader;
mod record;
pub mod recovery;
mod scan;
mod segment;
mod space;
#[cfg(test)]
#[expect(clippy::cast_possible_truncation, reason = "numbers and offsets in these tests are small")]
mod tests;
mod writer;

use std::collections::{BTreeMap, VecDeque};
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime};

use bytesize::ByteSize;
use serde::Deserialize;
use tokio::sync::watch;

pub use metrics::Metrics;
pub use reader::{Hold, ReadError, Reader};
pub use writer::{Append, Appender, Entries};

use super::{AppendError, Health, Position, Start};

use recovery::{Finding, Inspection, Known};

/// The settings.
#[derive(Clone, Debug)]
pub struct Config {
    /// What an append waits for.
    pub durability: Durability,
    /// Length of a segment file; from 64 KiB to 1 GiB.
    pub segment: ByteSize,
    /// The most that segment files may take; at least two segments.
    pub max_disk: ByteSize,
    /// With less than this free on the file system nothing is accepted.
    pub min_free_disk: ByteSize,
    /// How long entries are kept that every reader has passed.
    pub retention: Duration,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            durability: Durability::Fsync,
            segment: ByteSize::mib(64),
            max_disk: ByteSize::gib(10),
            min_free_disk: ByteSize::mib(256),
            retention: Duration::from_secs(24 * 3600),
        }
    }
}

impl Config {
    /// What is wrong with the settings. Each problem names its setting first.
    pub fn problems(&self) -> Vec<String> {
        let Self { segment, max_disk, .. } = self;
        let range = ByteSize::kib(64)..=ByteSize::gib(1);
        let length = (!range.contains(segment))
            .then(|| format!("journal.segment is {segment}; it must be from 64 KiB to 1 GiB"));
        let most = (max_disk.as_u64() < segment.as_u64().saturating_mul(2)).then(|| {
            format!(
                "journal.max_disk is {max_disk}; it must hold at least two segments, and journal.segment is {segment}"
            )
        });
        length.into_iter().chain(most).collect()
    }
}

/// What an append waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Durability {
    /// The disk: acknowledged entries survive a crash of the machine.
    Fsync,
    /// The kernel: they survive a crash of the process, not of the machine.
    Os,
}

/// An open journal. Dropping it does not stop its threads; [`Journal::close`] does.
pub struct Journal {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

/// What the writer, the readers and the space keeper share.
struct Shared {
    dir: PathBuf,
    /// The same, open: making renames in it durable must not depend on there being a descriptor left.
    folder: File,
    config: Config,
    segments: Mutex<Segments>,
    durable: watch::Sender<Position>,
    health: watch::Sender<Health>,
    /// Whether `health` is [`Health::Serving`]: cheap to read for every append.
    is_serving: AtomicBool,
    queue: writer::Queue,
    spare: space::Slot,
    metrics: Metrics,
}

/// The segments in order, and what readers still need of them.
struct Segments {
    list: VecDeque<Segment>,
    holds: BTreeMap<u64, Position>,
    next_hold: u64,
}

#[derive(Clone)]
struct Segment {
    first: u64,
    identity: u64,
    path: Arc<Path>,
    size: u64,
    /// Where durable records end, in bytes, and the sequence number that follows them.
    end: u64,
    next_seq: u64,
    /// When the last record was written, once no more follow.
    sealed: Option<SystemTime>,
}

impl Journal {
    /// Opens the journal in `dir`, repairs what a crash left, and returns what was found. Nothing is written or given
    /// up before [`Journal::start`]. The caller sees to it that no other process has `dir` open.
    ///
    /// Entries that are still needed are checked; all of them where nobody is known to have begun to read.
    ///
    /// # Errors
    ///
    /// [`OpenError`]: the directory can't be read or written, or has a newer format.
    pub fn open(
        dir: &Path,
        quarantine: &Path,
        config: &Config,
        mut known: Known,
        metrics: Metrics,
    ) -> Result<(Self, Vec<Finding>), OpenError> {
        std::fs::create_dir_all(dir)?;
        segment::sync_dir(dir.parent().unwrap_or(dir))?;
        let from = known.needed.unwrap_or(Position::ZERO);
        let mut inspection = Inspection::new(dir, from, known)?;
        let mut findings = inspection.findings().to_vec();
        metrics.found(&findings);
        if inspection.needs_repair() {
            inspection.repair(quarantine)?;
            findings = inspection.findings().to_vec();
            // What is no longer there counts as well.
            known.floor = inspection.end();
            inspection = Inspection::new(dir, from, known)?;
        }
        let spare = inspection.take_spare(config.segment.as_u64())?;
        let (end, continuable) = (inspection.end(), inspection.is_continuable());
        let mut list: VecDeque<_> = inspection.segments.into_iter().map(Segment::from).collect();
        if let Some(last) = list.back_mut().filter(|_| continuable) {
            last.sealed = None;
        }
        let active = list.back().filter(|last| last.sealed.is_none());
        let active = active.map(|last| Ok::<_, io::Error>((segment::open(&last.path)?, last.clone()))).transpose()?;
        let shared = Arc::new(Shared {
            dir: dir.to_owned(),
            folder: File::open(dir)?,
            config: config.clone(),
            segments: Mutex::new(Segments { list, holds: BTreeMap::new(), next_hold: 0 }),
            durable: watch::Sender::new(end),
            health: watch::Sender::new(Health::Serving),
            is_serving: AtomicBool::new(true),
            queue: writer::Queue::default(),
            spare: space::Slot::new(spare),
            metrics,
        });
        let writer = writer::Writer::new(Arc::clone(&shared), active, end);
        let threads = vec![spawn("journal-writer", move || writer.run())?];
        Ok((Self { shared, threads }, findings))
    }

    /// Begins to make new segments ready and to give up old ones. Until then whoever reads on from an old position has
    /// the time to open a [`Reader`], which keeps what it needs.
    ///
    /// # Errors
    ///
    /// Any error of starting a thread.
    pub fn start(&mut self) -> io::Result<()> {
        let keeper = space::Keeper::new(Arc::clone(&self.shared));
        self.threads.push(spawn("journal-space", move || keeper.run())?);
        Ok(())
    }

    /// A handle for those who look at it.
    pub fn view(&self) -> View {
        View(Arc::clone(&self.shared))
    }

    /// Whether appends can succeed, and every change of it.
    pub fn health(&self) -> watch::Receiver<Health> {
        self.shared.health.subscribe()
    }

    /// Writes what is queued, then stops. Later appends fail.
    pub fn close(self) {
        self.shared.queue.close();
        self.shared.spare.close();
        for thread in self.threads {
            // A panic there has been reported by the thread itself.
            drop(thread.join());
        }
    }
}

/// The journal as those see it who do not write. Clones share it.
#[derive(Clone)]
pub struct View(Arc<Shared>);

impl View {
    /// A handle for those who append on one core.
    pub fn appender(&self) -> Appender {
        Appender::new(Arc::clone(&self.0))
    }

    /// A reader, which keeps all entries from its position on until it releases them, or it and its [`Hold`] are dropped.
    pub fn reader(&self, start: Start) -> Reader {
        Reader::new(Arc::clone(&self.0), start)
    }

    /// The position after the last durable entry.
    pub fn end(&self) -> Position {
        *self.0.durable.borrow()
    }

    /// Whether appends can succeed.
    pub fn health(&self) -> Health {
        self.0.health.borrow().clone()
    }

    /// How many bytes the segment files take.
    pub fn disk_bytes(&self) -> u64 {
        self.0.disk_bytes()
    }

    /// How many of those bytes are in files that a reader still needs, or that is written to.
    pub fn needed_bytes(&self) -> u64 {
        self.0.segments().needed().map(|segment| segment.size).sum()
    }

    /// How many bytes [`View::needed_bytes`] can come to be before nothing more is accepted.
    ///
    /// # Errors
    ///
    /// Any error of asking for the disk's free space.
    pub fn limit_bytes(&self) -> io::Result<u64> {
        space::limit(&self.0)
    }
}

impl Segments {
    /// Those that a reader holds a position in, and the last.
    fn needed(&self) -> impl Iterator<Item = &Segment> {
        let lowest = self.holds.values().min().map_or(u64::MAX, |hold| hold.0);
        // A segment ends where the next begins.
        let ends = self.list.iter().skip(1).map(|next| next.first).chain([u64::MAX]);
        self.list.iter().zip(ends).filter(move |(_, end)| lowest < *end || *end == u64::MAX).map(|(segment, _)| segment)
    }
}

impl Shared {
    fn segments(&self) -> MutexGuard<'_, Segments> {
        lock(&self.segments)
    }

    fn disk_bytes(&self) -> u64 {
        self.segments().list.iter().map(|segment| segment.size).sum::<u64>() + self.spare.bytes()
    }

    /// Poisons the journal.
    fn fail(&self, error: &io::Error) {
        tracing::error!(%error, dir = %self.dir.display(), "journal failed; nothing more is accepted");
        self.health.send_replace(Health::Failed(error.to_string()));
        self.is_serving.store(false, Ordering::Relaxed);
    }

    /// Says whether there is room, unless the journal has failed.
    fn set_full(&self, reason: Option<String>) {
        self.health.send_if_modified(|health| {
            let new = reason.map_or(Health::Serving, Health::Full);
            let changed = !matches!(health, Health::Failed(_)) && *health != new;
            if changed {
                match &new {
                    Health::Full(reason) => tracing::error!(%reason, "journal full; nothing is accepted until lanes catch up or space is freed"),
                    Health::Serving | Health::Away(_) | Health::Failed(_) => tracing::info!("journal has room again"),
                }
                self.is_serving.store(new == Health::Serving, Ordering::Relaxed);
                *health = new;
            }
            changed
        });
    }
}

impl From<recovery::Segment> for Segment {
    fn from(found: recovery::Segment) -> Self {
        Self {
            first: found.header.first,
            identity: found.header.identity,
            path: found.path.into(),
            size: found.size,
            end: found.end,
            next_seq: found.next_seq,
            sealed: Some(found.modified),
        }
    }
}

/// A panic elsewhere does not make the data wrong: every critical section leaves it whole.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn spawn(name: &str, run: impl FnOnce() + Send + 'static) -> io::Result<JoinHandle<()>> {
    std::thread::Builder::new().name(name.to_owned()).spawn(run)
}

/// Why a journal can't be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The file system said so.
    #[error("the journal can't be read or written")]
    Io(#[from] io::Error),
    /// A segment can't be read, which is not the same as damage: it may be readable again.
    #[error("{} can't be read; if its disk has lost that, `engage-relay fsck --repair` goes on without it", file.display())]
    Unreadable {
        /// The file.
        file: PathBuf,
        /// Why, and where in it.
        source: io::Error,
    },
    /// A directory where a file of the journal would be.
    #[error("{} is a directory, where the journal has a file: move it elsewhere", path.display())]
    Directory {
        /// The directory.
        path: PathBuf,
    },
    /// A newer version of the program wrote it.
    #[error("{} has format version {version}; this engage-relay reads version 1 only: run the newer one", file.display())]
    NewerVersion {
        /// The file.
        file: PathBuf,
        /// Its version.
        version: u32,
    },
}
