//! Parked deliveries: which are due.

use std::collections::HashSet;

use bytes::Bytes;
use rusqlite::{Connection, OptionalExtension as _, Row, params};

use super::{Millis, Parked};
use crate::journal::Position;

/// How many of one key's parked deliveries are fetched together, so that they follow each other at once.
const CHAIN: i64 = 256;
/// No more is fetched together than what takes about so many bytes.
const MAX_BYTES: usize = 8 << 20;

/// What to look for.
#[derive(Debug)]
pub struct Wanted {
    /// Due by then.
    pub now: Millis,
    /// What is due later than that was written before the clock jumped back, and counts as due.
    pub horizon: Millis,
    /// The same for what the destination has asked to wait with.
    pub asked_horizon: Millis,
    /// How many, about.
    pub limit: usize,
    /// Which of the others.
    pub which: Which,
    /// Rows that the lane has already.
    pub except: HashSet<i64>,
}

/// Which parked deliveries are wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Which {
    /// Those that are due.
    Due,
    /// Also those that are not, unless the destination has asked to wait with them.
    Unasked,
    /// Also these.
    Any,
}

impl Wanted {
    /// What is due later was written before the clock jumped back.
    fn horizon_of(&self, asked_until: Option<Millis>) -> Millis {
        if asked_until.is_some() { self.asked_horizon } else { self.horizon }
    }

    /// Whether a delivery is wanted that is not beyond the horizon.
    fn wants(&self, due_at: Millis, asked_until: Option<Millis>) -> bool {
        match self.which {
            Which::Due => due_at <= self.now,
            Which::Unasked => asked_until.is_none_or(|until| until <= self.now),
            Which::Any => true,
        }
    }
}

/// What was found.
#[derive(Debug, Default)]
pub struct Due {
    /// Rows of one key are in their order.
    pub rows: Vec<ParkedRow>,
    /// When the next of the others is due, as far as is known.
    pub next: Option<Millis>,
}

/// A parked delivery.
#[derive(Debug)]
#[expect(missing_docs, reason = "named like the columns")]
pub struct ParkedRow {
    pub id: i64,
    pub key: Option<String>,
    pub position: i64,
    pub route: String,
    pub attempts: u32,
    pub since: Millis,
    pub first_failed_at: Option<Millis>,
    /// Only where that is later than now.
    pub due_at: Option<Millis>,
    pub error_kind: String,
    pub error: String,
    pub record: Bytes,
}

pub(super) fn due(connection: &Connection, lane: &str, wanted: &Wanted) -> rusqlite::Result<Due> {
    let (mut due, mut bytes) = (Due::default(), 0);
    // The index has all of this: what is not wanted costs no look at its row.
    let mut heads = connection.prepare_cached(
        "SELECT id, due_at, asked_until FROM parked INDEXED BY parked_by_due
         WHERE lane = ?1 AND due_at IS NOT NULL ORDER BY due_at",
    )?;
    let mut one = connection.prepare_cached(
        "SELECT id, key, position, route, attempts, since, first_failed_at, error_kind, error, record FROM parked WHERE id = ?1",
    )?;
    let mut rows = heads.query([lane])?;
    while let Some(row) = rows.next()? {
        let (id, due_at, asked_until): (i64, Millis, Option<Millis>) = (row.get(0)?, row.get(1)?, row.get(2)?);
        if wanted.except.contains(&id) {
            continue;
        }
        let is_full = due.rows.len() >= wanted.limit || bytes >= MAX_BYTES;
        if is_full || !wanted.wants(due_at, asked_until) {
            due.next.get_or_insert(due_at.max(wanted.now));
            // They are ordered by when they are due, and by nothing else.
            if is_full || wanted.which == Which::Due {
                break;
            }
            continue;
        }
        let first = due.rows.len();
        let mut head = one.query_row([id], read)?;
        head.due_at = Some(due_at).filter(|at| (wanted.now + 1..=wanted.horizon_of(asked_until)).contains(at));
        let key = head.key.clone();
        due.rows.push(head);
        if let Some(key) = key {
            followers(connection, lane, &key, id, wanted, &mut due.rows)?;
        }
        bytes += due.rows.iter().skip(first).map(|row| row.record.len()).sum::<usize>();
    }
    if due.rows.len() < wanted.limit {
        beyond_horizon(connection, lane, wanted, &mut due)?;
    }
    Ok(due)
}

fn followers(
    connection: &Connection,
    lane: &str,
    key: &str,
    after: i64,
    wanted: &Wanted,
    found: &mut Vec<ParkedRow>,
) -> rusqlite::Result<()> {
    if wanted.which != Which::Due {
        return Ok(());
    }
    let mut statement = connection.prepare_cached(
        "SELECT id, key, position, route, attempts, since, first_failed_at, error_kind, error, record, asked_until
         FROM parked
         WHERE lane = ?1 AND key = ?2 AND id > ?3 ORDER BY id LIMIT ?4",
    )?;
    let mut rows = statement.query(params![lane, key, after, CHAIN])?;
    let mut bytes = 0;
    while bytes < MAX_BYTES
        && let Some(row) = rows.next()?
    {
        // It is on its way already, and so are those after it; or it has to wait, and they with it.
        let asked_until: Option<Millis> = row.get(10)?;
        if wanted.except.contains(&row.get(0)?) || asked_until.is_some_and(|until| until > wanted.now) {
            break;
        }
        let follower = read(row)?;
        bytes += follower.record.len();
        found.push(follower);
    }
    Ok(())
}

fn beyond_horizon(connection: &Connection, lane: &str, wanted: &Wanted, due: &mut Due) -> rusqlite::Result<()> {
    let mut statement = connection.prepare_cached(
        "SELECT id, key, position, route, attempts, since, first_failed_at, error_kind, error, record FROM parked
         WHERE lane = ?1 AND due_at > ?2 AND (asked_until IS NULL OR due_at > ?3) ORDER BY due_at LIMIT ?4",
    )?;
    let limit = i64::try_from(wanted.limit - due.rows.len()).unwrap_or(i64::MAX);
    let mut rows = statement.query(params![lane, wanted.horizon, wanted.asked_horizon, limit])?;
    while let Some(row) = rows.next()? {
        let id = row.get(0)?;
        if !wanted.except.contains(&id) && !due.rows.iter().any(|found| found.id == id) {
            due.rows.push(read(row)?);
        }
    }
    Ok(())
}

fn read(row: &Row<'_>) -> rusqlite::Result<ParkedRow> {
    Ok(ParkedRow {
        id: row.get(0)?,
        key: row.get(1)?,
        position: row.get(2)?,
        route: row.get(3)?,
        attempts: row.get(4)?,
        since: row.get(5)?,
        first_failed_at: row.get(6)?,
        due_at: None,
        error_kind: row.get(7)?,
        error: row.get(8)?,
        record: Bytes::from(row.get::<_, Vec<u8>>(9)?),
    })
}

/// The lanes that have some.
pub(super) fn lanes(connection: &Connection) -> rusqlite::Result<Vec<String>> {
    let mut statement = connection.prepare("SELECT DISTINCT lane FROM parked")?;
    statement.query_map([], |row| row.get(0))?.collect()
}

/// All of a row.
pub(super) fn whole(connection: &Connection, id: i64) -> rusqlite::Result<Option<Parked>> {
    let mut statement = connection.prepare_cached(&format!("SELECT {WHOLE} FROM parked WHERE id = ?1"))?;
    statement.query_row([id], read_whole).optional()
}

/// All of a lane's rows, in the order of the journal.
pub(super) fn all(connection: &Connection, lane: &str) -> rusqlite::Result<Vec<Parked>> {
    let sql = format!("SELECT {WHOLE} FROM parked WHERE lane = ?1 ORDER BY position, id");
    connection.prepare(&sql)?.query_map([lane], read_whole)?.collect()
}

const WHOLE: &str = "key, position, event_id, status, route, attempts, since, first_failed_at, coalesce(due_at, since),
                     asked_until, error_kind, error, record";

fn read_whole(row: &Row<'_>) -> rusqlite::Result<Parked> {
    Ok(Parked {
        key: row.get(0)?,
        position: Position::from_stored(row.get(1)?),
        event_id: row.get(2)?,
        status: row.get(3)?,
        route: row.get(4)?,
        attempts: row.get(5)?,
        since: row.get(6)?,
        first_failed_at: row.get(7)?,
        due_at: row.get(8)?,
        asked_until: row.get(9)?,
        error_kind: row.get(10)?,
        error: row.get(11)?,
        record: Bytes::from(row.get::<_, Vec<u8>>(12)?),
    })
}

/// Sees to it that the first row of each key has a time: without one nobody would ever look at it.
pub(super) fn heal(connection: &Connection, now: Millis) -> rusqlite::Result<usize> {
    connection.execute(
        "UPDATE parked SET due_at = ?1 WHERE due_at IS NULL
         AND id IN (SELECT min(id) FROM parked GROUP BY lane, key)",
        [now],
    )
}

/// How many rows each key has.
pub(super) fn keys(connection: &Connection, lane: &str) -> rusqlite::Result<Vec<(Option<String>, usize)>> {
    let mut statement = connection.prepare("SELECT key, count(*) FROM parked WHERE lane = ?1 GROUP BY key")?;
    let rows = statement.query_map([lane], |row| {
        let count: i64 = row.get(1)?;
        Ok((row.get(0)?, usize::try_from(count).unwrap_or(0)))
    })?;
    rows.collect()
}
