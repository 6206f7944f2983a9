//! Appending: requests gather per core, one thread writes and syncs for all of them, and each core is woken once.
//!
//! A core's requests fill its open batch. When the core has nothing more to do it [submits](Appender::submit) the batch;
//! batches therefore grow with the load by themselves. The writer takes all batches that were submitted, gives the
//! records their sequence numbers and checksums in place, writes each batch with one call and syncs once. Then it tells
//! each core, whose courier wakes the requests there.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant, SystemTime};

use tokio::sync::Notify;

use super::record::{self, HEADER, TERMINATOR};
use super::segment::{self, HEADER_BLOCK};
use super::{AppendError, Durability, Health, Position, Segment, Shared, lock, space};

/// A core's open batch is submitted when it has this many bytes, even if the core is not idle yet.
const SUBMIT_BYTES: usize = 512 << 10;
/// The most bytes of records that one core's requests may have waiting; beyond it appends are refused.
const MAX_WAITING_BYTES: usize = 32 << 20;
/// After a commit of this many requests or more, the writer lets half as many gather for the next: a commit costs about
/// the same for few as for many.
const MANY: usize = 16;
/// But not for longer than this from the beginning of the last commit.
const COMMIT_GAP: Duration = Duration::from_millis(2);
/// A buffer that has grown beyond this is not kept for the next batch.
const KEPT_BUFFER: usize = 1 << 20;
/// What a write ends with is filled up to a multiple of this many bytes, a file system's block: of a block that is written in
/// part, and not in memory, as in a segment that is used again, the rest would have to be read from the disk first.
const BLOCK: usize = 4096;
/// How many buffers a core keeps.
const KEPT_BUFFERS: usize = 4;

/// One core's way into the journal. Clones share the core's open batch.
#[derive(Clone)]
pub struct Appender {
    core: Arc<Core>,
    shared: Arc<Shared>,
    max_record: u64,
}

struct Core {
    open: Mutex<Batch>,
    /// Bytes of the records that were handed over and are not written yet.
    waiting: AtomicUsize,
    done: Mutex<Vec<Batch>>,
    /// Buffers of committed batches, for the next ones.
    free: Mutex<Vec<Vec<u8>>>,
    /// Told when `done` has batches.
    wake: Notify,
}

/// The records of the requests that are committed together, and those who wait for it.
#[derive(Default)]
struct Batch {
    records: Vec<u8>,
    /// How many bytes they were when they were handed over.
    bytes: usize,
    count: usize,
    ticket: Arc<Ticket>,
    core: Option<Arc<Core>>,
}

/// What a batch's requests share: first their wakers, then the outcome.
#[derive(Default)]
struct Ticket(Mutex<TicketState>);

#[derive(Default)]
struct TicketState {
    outcome: Option<Outcome>,
    wakers: Vec<Waker>,
}

/// The first `durable` records of a batch are; the others failed.
#[derive(Clone)]
struct Outcome {
    durable: usize,
    error: Option<AppendError>,
}

/// Where an append's entries are written to.
pub struct Entries<'b>(record::Builder<'b>);

impl Entries<'_> {
    /// Adds an entry: whatever `write` appends to the buffer.
    pub fn entry(&mut self, write: impl FnOnce(&mut Vec<u8>)) {
        self.0.entry(write);
    }
}

impl Appender {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        let (open, done, free) = (Mutex::default(), Mutex::default(), Mutex::default());
        let core = Core { open, waiting: AtomicUsize::new(0), done, free, wake: Notify::new() };
        let max_record = shared.config.segment.as_u64() - HEADER_BLOCK;
        Self { core: Arc::new(core), shared, max_record }
    }

    /// Adds the entries that `fill` writes to the open batch, all of them or none. The result is ready when they are
    /// durable; dropping it does not take them back.
    ///
    /// # Errors
    ///
    /// [`AppendError`]: nothing was added.
    pub fn append(&self, fill: impl FnOnce(&mut Entries<'_>)) -> Result<Append, AppendError> {
        if !self.shared.is_serving.load(Ordering::Relaxed) {
            match &*self.shared.health.borrow() {
                Health::Serving | Health::Away(_) => {}
                Health::Full(reason) => return Err(AppendError::Full(reason.as_str().into())),
                Health::Failed(_) => return Err(AppendError::Failed),
            }
        }
        let mut batch = lock(&self.core.open);
        if self.core.waiting.load(Ordering::Relaxed) + batch.records.len() > MAX_WAITING_BYTES {
            return Err(AppendError::Busy);
        }
        let mut entries = Entries(record::Builder::new(&mut batch.records));
        fill(&mut entries);
        entries.0.finish(self.max_record).map_err(|bytes| AppendError::TooLarge { bytes, max: self.max_record })?;
        let append = Append { ticket: Arc::clone(&batch.ticket), index: batch.count, waker: None };
        batch.count += 1;
        if batch.records.len() >= SUBMIT_BYTES {
            self.hand_over(&mut batch);
        }
        Ok(append)
    }

    /// Asks for the open batch to be committed. To be called when the core is about to park.
    pub fn submit(&self) {
        let mut batch = lock(&self.core.open);
        if batch.count > 0 {
            self.hand_over(&mut batch);
        }
    }

    /// Wakes this core's requests when their batches are committed; runs for ever. One per core, on that core.
    pub async fn courier(self) {
        loop {
            self.core.wake.notified().await;
            for mut batch in std::mem::take(&mut *lock(&self.core.done)) {
                let wakers = std::mem::take(&mut lock(&batch.ticket.0).wakers);
                wakers.into_iter().for_each(Waker::wake);
                let mut free = lock(&self.core.free);
                if free.len() < KEPT_BUFFERS && batch.records.capacity() <= KEPT_BUFFER {
                    batch.records.clear();
                    free.push(batch.records);
                }
            }
        }
    }

    fn hand_over(&self, batch: &mut Batch) {
        let records = lock(&self.core.free).pop().unwrap_or_default();
        let mut full = std::mem::replace(batch, Batch { records, ..Batch::default() });
        full.core = Some(Arc::clone(&self.core));
        full.bytes = full.records.len();
        self.core.waiting.fetch_add(full.bytes, Ordering::Relaxed);
        self.shared.queue.push(full);
    }
}

/// An append on its way to the disk.
#[must_use = "nothing is durable before this is"]
pub struct Append {
    ticket: Arc<Ticket>,
    index: usize,
    waker: Option<usize>,
}

impl Future for Append {
    type Output = Result<(), AppendError>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = &mut *self;
        let mut state = lock(&this.ticket.0);
        if let Some(outcome) = &state.outcome {
            return Poll::Ready(match &outcome.error {
                Some(error) if this.index >= outcome.durable => Err(error.clone()),
                Some(_) | None => Ok(()),
            });
        }
        match this.waker.and_then(|index| state.wakers.get_mut(index)) {
            Some(waker) => waker.clone_from(cx.waker()),
            None => {
                this.waker = Some(state.wakers.len());
                state.wakers.push(cx.waker().clone());
            }
        }
        Poll::Pending
    }
}

/// The batches that wait for the writer.
#[derive(Default)]
pub(super) struct Queue {
    state: Mutex<QueueState>,
    filled: Condvar,
}

#[derive(Default)]
struct QueueState {
    batches: Vec<Batch>,
    /// How many requests wait in them.
    waiting: usize,
    /// From how many on the writer wants to be woken.
    wanted: usize,
    closed: bool,
}

impl Queue {
    fn push(&self, batch: Batch) {
        let mut state = lock(&self.state);
        if state.closed {
            drop(state);
            batch.complete(Outcome { durable: 0, error: Some(AppendError::Closed) });
            return;
        }
        let before = state.waiting;
        state.waiting += batch.count;
        let enough = before < state.wanted && state.waiting >= state.wanted;
        state.batches.push(batch);
        drop(state);
        if enough {
            self.filled.notify_one();
        }
    }

    pub(super) fn close(&self) {
        lock(&self.state).closed = true;
        self.filled.notify_one();
    }

    /// Waits for batches and takes them all; `None` once the queue is closed and empty.
    fn take(&self, last: &LastCommit, spare: Vec<Batch>) -> Option<Vec<Batch>> {
        let mut state = lock(&self.state);
        if last.count >= MANY {
            state.wanted = last.count / 2;
            let left = COMMIT_GAP.saturating_sub(last.begun.elapsed());
            let gathered =
                self.filled.wait_timeout_while(state, left, |state| state.waiting < state.wanted && !state.closed);
            (state, _) = gathered.unwrap_or_else(PoisonError::into_inner);
        }
        state.wanted = 1;
        let filled = self.filled.wait_while(state, |state| state.batches.is_empty() && !state.closed);
        state = filled.unwrap_or_else(PoisonError::into_inner);
        state.waiting = 0;
        (!state.batches.is_empty()).then(|| std::mem::replace(&mut state.batches, spare))
    }
}

impl Batch {
    /// Gives the outcome to those who wait.
    fn complete(mut self, outcome: Outcome) {
        lock(&self.ticket.0).outcome = Some(outcome);
        if let Some(core) = self.core.take() {
            core.waiting.fetch_sub(self.bytes, Ordering::Relaxed);
            lock(&core.done).push(self);
            core.wake.notify_one();
        }
    }
}

/// When the last commit began, and how many requests it took.
struct LastCommit {
    begun: Instant,
    count: usize,
}

/// The thread that writes.
pub(super) struct Writer {
    shared: Arc<Shared>,
    active: Option<Active>,
    next_seq: u64,
}

impl Drop for Writer {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.shared.fail(&io::Error::other("the writer panicked"));
        }
    }
}

/// The segment that is written to.
struct Active {
    file: File,
    identity: u64,
    offset: u64,
    size: u64,
}

impl Active {
    /// Bytes left; none where the file was cut short.
    fn room(&self) -> u64 {
        self.size.saturating_sub(self.offset)
    }
}

/// Why a batch could not be written in full.
enum CommitError {
    /// There is no segment to go on in. The journal works on once there is.
    Full(Arc<str>),
    /// A write or sync failed.
    Io(io::Error),
}

impl From<io::Error> for CommitError {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

impl Writer {
    pub(super) fn new(shared: Arc<Shared>, active: Option<(File, Segment)>, next: Position) -> Self {
        let active = active.map(|(file, segment)| Active {
            file,
            identity: segment.identity,
            offset: segment.end,
            size: segment.size,
        });
        Self { shared, active, next_seq: next.0 }
    }

    /// Runs until the queue is closed and empty, or a write fails.
    pub(super) fn run(mut self) {
        let mut last = LastCommit { begun: Instant::now(), count: 0 };
        let mut taken = Vec::new();
        while let Some(mut batches) = self.shared.queue.take(&last, taken) {
            last = LastCommit { begun: Instant::now(), count: batches.iter().map(|batch| batch.count).sum() };
            let first = self.next_seq;
            let result = self.commit(&mut batches);
            self.shared.metrics.sync_seconds.observe(last.begun.elapsed().as_secs_f64());
            self.shared.metrics.batch_events.observe((self.next_seq - first) as f64);
            for (batch, durable) in batches.drain(..).zip(result.durable) {
                batch.complete(Outcome { durable, error: result.error.clone() });
            }
            taken = batches;
        }
    }

    /// Writes and syncs the batches; says how many records of each are durable.
    fn commit(&mut self, batches: &mut [Batch]) -> Committed {
        let mut durable = vec![0; batches.len()];
        if let Health::Failed(_) = &*self.shared.health.borrow() {
            return Committed { durable, error: Some(AppendError::Failed) };
        }
        let mut stopped = None;
        for (batch, written) in batches.iter_mut().zip(&mut durable) {
            if stopped.is_none() {
                stopped = self.write(&mut batch.records, written).err();
            }
        }
        let result = match stopped {
            None => self.sync().map(|()| None),
            Some(CommitError::Full(reason)) => self.sync().map(|()| Some(AppendError::Full(reason))),
            Some(CommitError::Io(error)) => Err(error),
        };
        result.map_or_else(
            |error| {
                self.shared.fail(&error);
                Committed { durable: vec![0; batches.len()], error: Some(AppendError::Failed) }
            },
            |error| Committed { durable, error },
        )
    }

    /// Writes a batch's records, over several segments where need be; `written` counts those that went out.
    fn write(&mut self, records: &mut Vec<u8>, written: &mut usize) -> Result<(), CommitError> {
        let all = records.len();
        records.resize(all + TERMINATOR.len() + BLOCK, 0);
        let (mut start, mut at, mut in_run) = (0, 0, 0);
        while at < all {
            let header = records.get(at..).and_then(record::Header::read);
            let len = header.map_or(usize::MAX, |header| HEADER + header.len as usize);
            let room = self.active.as_ref().map_or(0, Active::room);
            if ((at - start) as u64).saturating_add(len as u64) > room {
                self.write_run(records.get(start..at).unwrap_or_default(), at - start)?;
                *written += std::mem::take(&mut in_run);
                start = at;
                self.roll()?;
                continue;
            }
            let (Some(record), Some(active)) = (records.get_mut(at..at + len), &self.active) else { break };
            record::stamp(record, self.next_seq, active.identity);
            self.next_seq += header.map_or(0, |header| u64::from(header.count));
            at += len;
            in_run += 1;
        }
        self.write_run(records.get(start..).unwrap_or_default(), all - start)?;
        *written += in_run;
        Ok(())
    }

    /// Writes a run to the active segment: `len` bytes of records, and of the zeros behind them a terminator, if the segment
    /// has room for it, and what is left of the last block.
    fn write_run(&mut self, run: &[u8], len: usize) -> io::Result<()> {
        let Some(active) = self.active.as_mut().filter(|_| len > 0) else { return Ok(()) };
        let end = (active.offset + (len + TERMINATOR.len()) as u64).next_multiple_of(BLOCK as u64).min(active.size);
        let written = usize::try_from(end.saturating_sub(active.offset)).unwrap_or(usize::MAX);
        active.file.write_all_at(run.get(..written).unwrap_or(run), active.offset)?;
        active.offset += len as u64;
        Ok(())
    }

    /// Makes what was written durable, and shows it to readers.
    fn sync(&mut self) -> io::Result<()> {
        let Some(active) = &self.active else { return Ok(()) };
        if self.shared.config.durability == Durability::Fsync {
            active.file.sync_data()?;
        }
        if let Some(last) = self.shared.segments().list.back_mut() {
            (last.end, last.next_seq) = (active.offset, self.next_seq);
        }
        self.shared.durable.send_replace(Position(self.next_seq));
        Ok(())
    }

    /// Ends the active segment and begins the next.
    fn roll(&mut self) -> Result<(), CommitError> {
        let spare = self.shared.spare.take().map_err(|reason| {
            space::tell_room(&self.shared);
            CommitError::Full(reason)
        })?;
        if let Some(active) = &self.active {
            let room = usize::try_from(active.room()).unwrap_or(usize::MAX);
            active.file.write_all_at(TERMINATOR.get(..room).unwrap_or(&TERMINATOR), active.offset)?;
            self.sync()?;
        }
        let header = segment::Header::new(self.next_seq)?;
        let path = segment::path(&self.shared.dir, self.next_seq);
        segment::begin(&spare.file, header, &spare.path, &path, &self.shared.folder)?;
        let mut segments = self.shared.segments();
        if let Some(last) = segments.list.back_mut() {
            last.sealed.get_or_insert_with(SystemTime::now);
        }
        segments.list.push_back(Segment {
            first: header.first,
            identity: header.identity,
            path: path.into(),
            size: spare.size,
            end: HEADER_BLOCK,
            next_seq: header.first,
            sealed: None,
        });
        drop(segments);
        self.shared.spare.used();
        let space::Spare { file, size, .. } = spare;
        self.active = Some(Active { file, identity: header.identity, offset: HEADER_BLOCK, size });
        Ok(())
    }
}

/// How many records of each batch are durable, and why the others are not.
struct Committed {
    durable: Vec<usize>,
    error: Option<AppendError>,
}
