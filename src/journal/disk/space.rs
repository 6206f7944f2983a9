//! Space: a thread that keeps the next segment ready and gives up segments that nobody needs.
//!
//! A segment is needed while it is written to, or while a reader holds a position in it. Others are kept for
//! `retention`, but given up before, the oldest first, when `max_disk` or `min_free_disk` asks for it. A segment that is
//! given up becomes a spare file where there are fewer than two: it has all its blocks already, and spares the disk the
//! zeros of a new one.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use bytesize::ByteSize;
use rustix::io::Errno;

use super::segment::SPARE;
use super::{Segment, Shared, lock, segment};

/// How often free space and retention are looked at.
pub(super) const INTERVAL: Duration = Duration::from_secs(1);

/// Why there is no spare.
const NO_DESCRIPTOR: &str = "the process has no file descriptor left";

/// How many files at most are kept ready; only one is made anew.
const MAX_SPARES: usize = 2;

/// A file that is ready to become the next segment.
#[derive(Debug)]
pub(super) struct Spare {
    pub(super) file: File,
    pub(super) path: PathBuf,
    pub(super) size: u64,
}

/// Where the space keeper leaves the spare file and the writer takes it.
pub(super) struct Slot {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    spares: Vec<Spare>,
    /// Bytes of a spare that was taken and is not yet among the segments.
    taken: u64,
    /// Why there is none, if it was tried.
    refused: Option<Arc<str>>,
    /// Whether the writer has asked for one in vain. Until then what comes fits into the segment that it has.
    missed: bool,
    closed: bool,
}

impl Slot {
    pub(super) fn new(spare: Option<Spare>) -> Self {
        Self {
            state: Mutex::new(State { spares: spare.into_iter().collect(), ..State::default() }),
            changed: Condvar::new(),
        }
    }

    /// Takes the spare file; waits while one is being made.
    ///
    /// # Errors
    ///
    /// Why there is none.
    pub(super) fn take(&self) -> Result<Spare, Arc<str>> {
        let mut state = lock(&self.state);
        loop {
            if let Some(spare) = state.spares.pop() {
                state.taken = spare.size;
                self.changed.notify_all();
                return Ok(spare);
            }
            if let Some(reason) = state.refused.clone() {
                state.missed = true;
                return Err(reason);
            }
            if state.closed {
                return Err("closing".into());
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Says that the file taken last is now among the segments.
    pub(super) fn used(&self) {
        lock(&self.state).taken = 0;
    }

    /// How many bytes the spares take, and the one on its way.
    pub(super) fn bytes(&self) -> u64 {
        let state = lock(&self.state);
        state.taken + state.spares.iter().map(|spare| spare.size).sum::<u64>()
    }

    pub(super) fn close(&self) {
        lock(&self.state).closed = true;
        self.changed.notify_all();
    }

    fn is_empty(&self) -> bool {
        lock(&self.state).spares.is_empty()
    }

    fn has_room(&self) -> bool {
        lock(&self.state).spares.len() < MAX_SPARES
    }

    fn put(&self, spare: Result<Spare, Arc<str>>) {
        let mut state = lock(&self.state);
        match spare {
            Ok(spare) => {
                state.spares.push(spare);
                (state.refused, state.missed) = (None, false);
            }
            Err(reason) => state.refused = Some(reason),
        }
        self.changed.notify_all();
    }

    /// Waits until no spare is left, the slot is closed, or `INTERVAL` is over; says whether to go on.
    fn wait(&self) -> bool {
        let state = lock(&self.state);
        let idle = |state: &mut State| !state.closed && (!state.spares.is_empty() || state.refused.is_some());
        let waited = self.changed.wait_timeout_while(state, INTERVAL, idle);
        let (state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        !state.closed
    }
}

/// What the files may take in all: as much as `max_disk` says, or, with less free on the disk, what is left of it.
pub(super) fn limit(shared: &Shared) -> io::Result<u64> {
    let free = free_disk(&shared.dir)?.saturating_sub(shared.config.min_free_disk.as_u64());
    Ok(shared.config.max_disk.as_u64().min(shared.disk_bytes().saturating_add(free)))
}

/// Says whether there is room for what comes.
pub(super) fn tell_room(shared: &Shared) {
    // Under the lock, so that what was seen last is said last.
    let state = lock(&shared.spare.state);
    let reason = state.refused.as_ref().filter(|_| state.missed);
    shared.set_full(reason.map(ToString::to_string));
}

/// The thread that looks after space.
pub(super) struct Keeper {
    shared: Arc<Shared>,
    made: u64,
}

impl Keeper {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        Self { shared, made: 0 }
    }

    /// Runs until the slot is closed.
    pub(super) fn run(mut self) {
        loop {
            if let Err(error) = self.look() {
                self.shared.fail(&error);
                self.shared.spare.put(Err("the journal has failed".into()));
                return;
            }
            if !self.shared.spare.wait() {
                return;
            }
        }
    }

    /// One look: gives up what retention ended, makes the spare ready, and says whether there is room.
    fn look(&mut self) -> io::Result<()> {
        let retention = self.shared.config.retention;
        while let Some(old) = self.take_unneeded(|sealed| sealed.elapsed().is_ok_and(|age| age >= retention)) {
            self.give_up(&old)?;
        }
        let min_free = self.shared.config.min_free_disk.as_u64();
        // Some file systems show only later what a removed file has freed.
        let mut known = 0;
        loop {
            known = known.max(free_disk(&self.shared.dir)?);
            if known >= min_free {
                break;
            }
            let Some(old) = self.take_unneeded(|_| true) else {
                let reason = format!("less than {} of disk is free", ByteSize::b(min_free));
                self.shared.set_full(Some(reason));
                if self.shared.spare.is_empty() {
                    self.shared.spare.put(Err("the disk is full".into()));
                }
                return Ok(());
            };
            std::fs::remove_file(&old.path)?;
            known += old.size;
        }
        // It may have been more before the last start.
        while self.shared.disk_bytes() > self.shared.config.max_disk.as_u64()
            && let Some(old) = self.take_unneeded(|_| true)
        {
            std::fs::remove_file(&old.path)?;
        }
        if self.shared.spare.is_empty() {
            let spare = self.make_spare()?;
            self.shared.spare.put(spare);
        }
        tell_room(&self.shared);
        Ok(())
    }

    /// A new spare file, or why there can be none now.
    fn make_spare(&mut self) -> io::Result<Result<Spare, Arc<str>>> {
        let path = self.spare_path();
        let config = &self.shared.config;
        let (size, max) = (config.segment.as_u64(), config.max_disk.as_u64());
        let floor = config.min_free_disk.as_u64().saturating_add(size);
        if self.shared.disk_bytes() + size <= max && free_disk(&self.shared.dir)? >= floor {
            match segment::create_zeroed(&path, size) {
                Ok(file) => return Ok(Ok(Spare { file, path, size })),
                Err(e) if matches!(e.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded) => {}
                Err(e) if lacks_descriptors(&e) => return Ok(Err(NO_DESCRIPTOR.into())),
                Err(e) => return Err(e),
            }
        }
        while let Some(old) = self.take_unneeded(|_| true) {
            match self.recycle(&old) {
                Ok(Some(spare)) => return Ok(Ok(spare)),
                Ok(None) => std::fs::remove_file(&old.path)?,
                Err(error) if lacks_descriptors(&error) => {
                    self.shared.segments().list.push_front(old);
                    return Ok(Err(NO_DESCRIPTOR.into()));
                }
                Err(error) => return Err(error),
            }
        }
        Ok(Err("no segment can be given up, and max_disk or the disk has no room for another".into()))
    }

    /// Takes the oldest segment off the list if nobody needs it and `wanted` says so of the time it was sealed.
    fn take_unneeded(&self, wanted: impl Fn(SystemTime) -> bool) -> Option<Segment> {
        let mut segments = self.shared.segments();
        let oldest = segments.list.front()?;
        // What follows the oldest segment begins where it ends.
        let end = segments.list.get(1)?.first;
        let held = segments.holds.values().any(|hold| hold.0 < end);
        let give_up = !held && oldest.sealed.is_some_and(wanted);
        give_up.then(|| segments.list.pop_front())?
    }

    /// A name that no file has: there may be other spares, and one that the writer is renaming.
    fn spare_path(&mut self) -> PathBuf {
        loop {
            self.made += 1;
            let path = self.shared.dir.join(format!("{}.{SPARE}", self.made));
            if !path.exists() {
                return path;
            }
        }
    }

    fn give_up(&mut self, old: &Segment) -> io::Result<()> {
        if self.shared.spare.has_room() {
            match self.recycle(old) {
                Ok(Some(spare)) => {
                    self.shared.spare.put(Ok(spare));
                    return Ok(());
                }
                Ok(None) => {}
                Err(error) if lacks_descriptors(&error) => {}
                Err(error) => return Err(error),
            }
        }
        std::fs::remove_file(&old.path)
    }

    /// Makes a spare of a segment, if it has the right length.
    fn recycle(&mut self, old: &Segment) -> io::Result<Option<Spare>> {
        if old.size != self.shared.config.segment.as_u64() {
            return Ok(None);
        }
        let file = segment::open(&old.path)?;
        let path = self.spare_path();
        std::fs::rename(&old.path, &path)?;
        self.shared.folder.sync_all()?;
        Ok(Some(Spare { file, path, size: old.size }))
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.shared.fail(&io::Error::other("the space keeper panicked"));
        }
    }
}

/// Others have used them up, and not for ever: no reason to fail.
fn lacks_descriptors(error: &io::Error) -> bool {
    matches!(Errno::from_io_error(error), Some(Errno::MFILE | Errno::NFILE))
}

/// Bytes that the file system has left for this process.
fn free_disk(dir: &Path) -> io::Result<u64> {
    let stat = rustix::fs::statvfs(dir)?;
    Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
}
