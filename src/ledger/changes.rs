//! What a lane settles, as SQL.

use std::collections::HashSet;

use bytes::Bytes;
use rusqlite::{Connection, OptionalExtension as _, Transaction, params};

use super::{Books, Millis, RulesKept, Written, parked};
use crate::journal::Position;

/// How far a lane has come.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Progress {
    /// The lowest event that is not settled.
    pub cursor: Position,
    /// Events from there on that are settled, in order.
    pub ahead: Vec<Position>,
}

/// What a lane settles besides its progress. Changes take effect in the order in which they are given.
#[derive(Clone, Debug)]
pub enum Change {
    /// A delivery is to be tried later.
    Park(Box<Parked>),
    /// A parked delivery failed again.
    Postpone {
        /// Its row.
        id: i64,
        /// How many attempts were made.
        attempts: u32,
        /// When the first of them failed.
        first_failed_at: Millis,
        /// When to try again.
        due_at: Millis,
        /// Until when the destination has asked to wait, if it has; else what it asked for before still holds.
        asked_until: Option<Millis>,
        /// What the last one failed with.
        error_kind: String,
        /// For people.
        error: String,
    },
    /// A parked delivery is settled.
    Unpark {
        /// Its row.
        id: i64,
    },
    /// A delivery will not be tried again.
    Bury(Box<DeadLetter>),
    /// A dead letter, of whichever lane, is to be tried again by this one, if it is still there.
    Exhume {
        /// Its row.
        id: i64,
        /// What its order is kept by.
        key: Option<String>,
        /// Now.
        due_at: Millis,
    },
    /// Deliveries that have first failed since then need not wait any longer, unless their destination has asked for that.
    Hasten {
        /// When the first of them failed.
        since: Millis,
        /// Now.
        due_at: Millis,
    },
}

impl Change {
    /// How many bytes of memory it takes, about.
    pub fn size(&self) -> usize {
        let more = match self {
            Self::Park(parked) => size_of::<Parked>() + parked.record.len(),
            Self::Bury(letter) => size_of::<DeadLetter>() + letter.record.len(),
            Self::Postpone { .. } | Self::Unpark { .. } | Self::Exhume { .. } | Self::Hasten { .. } => 0,
        };
        size_of::<Self>() + more
    }
}

/// A delivery to be tried later.
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "named like the columns")]
pub struct Parked {
    pub key: Option<String>,
    pub position: Position,
    pub event_id: String,
    pub status: Option<String>,
    pub route: String,
    pub attempts: u32,
    pub since: Millis,
    pub first_failed_at: Option<Millis>,
    /// Without effect while another of the same key is parked: then it comes after that.
    pub due_at: Millis,
    /// Not later than that.
    pub asked_until: Option<Millis>,
    pub error_kind: String,
    pub error: String,
    pub record: Bytes,
}

/// A delivery that will not be tried again.
#[derive(Clone, Debug)]
#[expect(missing_docs, reason = "named like the columns")]
pub struct DeadLetter {
    pub position: Position,
    pub event_id: String,
    pub status: Option<String>,
    pub key: Option<String>,
    pub route: String,
    pub reason: Reason,
    pub error_kind: String,
    pub error: String,
    pub attempts: u32,
    pub first_failed_at: Option<Millis>,
    pub record: Bytes,
}

/// Why a delivery is not tried again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// The sink said that no attempt can succeed.
    Rejected,
    /// `max_attempts` were made.
    Exhausted,
    /// It is older than `max_age`.
    Expired,
    /// No route matched the event.
    Unrouted,
    /// Its sink is no longer in the rules.
    SinkRemoved,
    /// This version can't read it.
    Unreadable,
}

impl Reason {
    /// Its name in the ledger and the API.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Rejected => "rejected",
            Self::Exhausted => "exhausted",
            Self::Expired => "expired",
            Self::Unrouted => "unrouted",
            Self::SinkRemoved => "sink_removed",
            Self::Unreadable => "unreadable",
        }
    }

    /// The reason of that name.
    pub(super) fn from_name(name: &str) -> Option<Self> {
        let all = [Self::Rejected, Self::Exhausted, Self::Expired, Self::Unrouted, Self::SinkRemoved, Self::Unreadable];
        all.into_iter().find(|reason| reason.as_str() == name)
    }
}

impl Progress {
    pub(super) fn encode_ahead(&self) -> Vec<u8> {
        let offsets = self.ahead.iter().map(|position| u32::try_from(position.since(self.cursor)).unwrap_or(u32::MAX));
        offsets.flat_map(u32::to_le_bytes).collect()
    }

    pub(super) fn decode(cursor: Position, ahead: &[u8]) -> Self {
        let (offsets, _) = ahead.as_chunks();
        let at = |offset: &[u8; 4]| cursor.to_stored().saturating_add(u32::from_le_bytes(*offset).into());
        Self { cursor, ahead: offsets.iter().map(|offset| Position::from_stored(at(offset))).collect() }
    }
}

/// Writes a lane's progress, and what it passes; which dead letters were exhumed.
pub(super) fn settle(
    books: &mut Books<'_>,
    lane: &str,
    progress: Option<&Progress>,
    changes: &[Change],
    now: Millis,
) -> rusqlite::Result<HashSet<i64>> {
    let mut exhumed = HashSet::new();
    for change in changes {
        exhumed.extend(apply(books, lane, change, now)?);
    }
    let Some(progress) = progress else { return Ok(exhumed) };
    let mut upsert = books.transaction.prepare_cached(
        "INSERT INTO cursors (lane, position, ahead, updated_at) VALUES (?1, ?2, ?3, ?4)
         ON CONFLICT (lane) DO UPDATE SET position = excluded.position, ahead = excluded.ahead, updated_at = excluded.updated_at",
    )?;
    upsert.execute(params![lane, progress.cursor.to_stored(), progress.encode_ahead(), now])?;
    if let Some(written) = &mut books.written {
        written.push(Written::Progress { lane: lane.to_owned(), progress: progress.clone() });
    }
    Ok(exhumed)
}

/// Keeps rules, and nothing before what is needed.
pub(super) fn keep_rules(transaction: &Transaction<'_>, rules: &RulesKept) -> rusqlite::Result<()> {
    transaction.execute("DELETE FROM rules WHERE number < ?1", [rules.first])?;
    let keep = "INSERT OR REPLACE INTO rules (number, stage) VALUES (?1, ?2)";
    transaction.execute(keep, params![rules.number, rules.stage]).map(drop)
}

pub(super) fn rules(transaction: &Transaction<'_>) -> rusqlite::Result<Vec<(i64, String)>> {
    let mut statement = transaction.prepare("SELECT number, stage FROM rules ORDER BY number")?;
    statement.query_map([], |row| Ok((row.get(0)?, row.get(1)?)))?.collect()
}

/// Makes one change; the number of the dead letter that was exhumed, if one was.
fn apply(books: &mut Books<'_>, lane: &str, change: &Change, now: Millis) -> rusqlite::Result<Option<i64>> {
    let transaction = &books.transaction;
    match change {
        Change::Park(parked) => {
            park(transaction, lane, parked)?;
            if let Some(written) = &mut books.written {
                let (lane, position) = (lane.to_owned(), parked.position);
                written.push(Written::Parked { lane, position, parked: Some(parked.clone()) });
            }
        }
        Change::Postpone { id, attempts, first_failed_at, due_at, asked_until, error_kind, error } => {
            let mut update = transaction.prepare_cached(
                "UPDATE parked SET attempts = ?2, first_failed_at = ?3, due_at = ?4, asked_until = coalesce(?5, asked_until),
                        error_kind = ?6, error = ?7
                 WHERE id = ?1",
            )?;
            update.execute(params![id, attempts, first_failed_at, due_at, asked_until, error_kind, error])?;
            if let Some(written) = &mut books.written
                && let Some(parked) = parked::whole(transaction, *id)?
            {
                let (lane, position) = (lane.to_owned(), parked.position);
                written.push(Written::Parked { lane, position, parked: Some(Box::new(parked)) });
            }
        }
        Change::Unpark { id } => {
            let position = unpark(transaction, *id, now)?;
            if let (Some(written), Some(position)) = (&mut books.written, position) {
                written.push(Written::Parked { lane: lane.to_owned(), position, parked: None });
            }
        }
        Change::Bury(letter) => match &mut books.written {
            Some(written) => {
                written.push(Written::Dead { lane: lane.to_owned(), letter: letter.clone(), died_at: now });
            }
            None => bury(transaction, None, owner(lane, letter), letter, now)?,
        },
        Change::Exhume { id, key, due_at } => {
            return Ok(exhume(transaction, lane, *id, key.as_deref(), *due_at)?.then_some(*id));
        }
        // Who takes a lane over knows the times that were written before: they wait at most that long.
        Change::Hasten { since, due_at } => {
            let mut update = transaction.prepare_cached(
                "UPDATE parked SET due_at = max(?3, coalesce(asked_until, ?3))
                 WHERE lane = ?1 AND due_at > ?3 AND first_failed_at >= ?2",
            )?;
            update.execute(params![lane, since, due_at])?;
        }
    }
    Ok(None)
}

/// Whose dead letter it is: what no rule names a sink for is the reserved sink's, which is called like the reason, whoever has
/// found it.
fn owner<'l>(lane: &'l str, letter: &DeadLetter) -> &'l str {
    if letter.reason == Reason::Unrouted { letter.reason.as_str() } else { lane }
}

/// Parks a dead letter again; whether it was still there.
fn exhume(
    transaction: &Transaction<'_>,
    lane: &str,
    id: i64,
    key: Option<&str>,
    due_at: Millis,
) -> rusqlite::Result<bool> {
    let mut insert = transaction.prepare_cached(
        "INSERT INTO parked (lane, key, position, event_id, status, route, attempts, since, first_failed_at, due_at, error_kind, error, record)
         SELECT ?2, ?3, position, event_id, status, route, 0, ?4, NULL,
                CASE WHEN EXISTS (SELECT 1 FROM parked WHERE lane = ?2 AND key = ?3) THEN NULL ELSE ?4 END,
                error_kind, error, record
         FROM dead_letters WHERE id = ?1",
    )?;
    insert.execute(params![id, lane, key, due_at])?;
    Ok(transaction.prepare_cached("DELETE FROM dead_letters WHERE id = ?1")?.execute([id])? > 0)
}

/// Puts what was parked elsewhere, or otherwise, where a lane looks for it.
pub(super) fn adopt(transaction: &Transaction<'_>, lane: &str, parked: &[Parked]) -> rusqlite::Result<()> {
    transaction.prepare_cached("DELETE FROM parked WHERE lane = ?1")?.execute([lane])?;
    parked.iter().try_for_each(|parked| park(transaction, lane, parked))
}

/// Gives parked deliveries other keys, if theirs were made of something else than `order_by`. They go by their positions then.
pub(super) fn order_parked(
    transaction: &Transaction<'_>,
    lane: &str,
    order_by: &str,
    key: impl Fn(&Bytes) -> Option<String>,
) -> rusqlite::Result<()> {
    let mut update = transaction
        .prepare_cached("UPDATE cursors SET order_by = ?2 WHERE lane = ?1 AND order_by IS DISTINCT FROM ?2")?;
    if update.execute([lane, order_by])? == 0 {
        return Ok(());
    }
    let mut parked = parked::all(transaction, lane)?;
    for parked in &mut parked {
        parked.key = key(&parked.record);
    }
    adopt(transaction, lane, &parked)
}

fn park(transaction: &Transaction<'_>, lane: &str, parked: &Parked) -> rusqlite::Result<()> {
    let mut insert = transaction.prepare_cached(
        "INSERT INTO parked (lane, key, position, event_id, status, route, attempts, since, first_failed_at, due_at, asked_until,
                             error_kind, error, record)
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9,
                 CASE WHEN EXISTS (SELECT 1 FROM parked WHERE lane = ?1 AND key = ?2) THEN NULL ELSE ?10 END, ?11, ?12, ?13, ?14)",
    )?;
    insert.execute(params![
        lane,
        parked.key,
        parked.position.to_stored(),
        parked.event_id,
        parked.status,
        parked.route,
        parked.attempts,
        parked.since,
        parked.first_failed_at,
        parked.due_at,
        parked.asked_until,
        parked.error_kind,
        parked.error,
        &parked.record[..],
    ])?;
    Ok(())
}

/// Removes a row; the next one with its key may go then. Returns what position it had.
fn unpark(transaction: &Transaction<'_>, id: i64, now: Millis) -> rusqlite::Result<Option<Position>> {
    let mut delete = transaction.prepare_cached("DELETE FROM parked WHERE id = ?1 RETURNING lane, key, position")?;
    let row: Option<(String, Option<String>, i64)> =
        delete.query_row([id], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?))).optional()?;
    let position = row.as_ref().map(|(_, _, position)| Position::from_stored(*position));
    if let Some((lane, Some(key), _)) = row {
        let mut promote = transaction.prepare_cached(
            "UPDATE parked SET due_at = max(?3, coalesce(asked_until, ?3)) WHERE due_at IS NULL
             AND id = (SELECT min(id) FROM parked WHERE lane = ?1 AND key = ?2)",
        )?;
        promote.execute(params![lane, key, now])?;
    }
    Ok(position)
}

/// Notes a dead letter; with a number of its own, or the next that is free. After a crash the same delivery may die again.
pub(super) fn bury(
    connection: &Connection,
    id: Option<i64>,
    lane: &str,
    dead: &DeadLetter,
    died_at: Millis,
) -> rusqlite::Result<()> {
    let mut insert = connection.prepare_cached(
        "INSERT OR REPLACE INTO dead_letters
         (id, lane, position, event_id, status, key, route, reason, error_kind, error, attempts, first_failed_at, died_at, record)
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13, ?14)",
    )?;
    insert.execute(params![
        id,
        lane,
        dead.position.to_stored(),
        dead.event_id,
        dead.status,
        dead.key,
        dead.route,
        dead.reason.as_str(),
        dead.error_kind,
        dead.error,
        dead.attempts,
        dead.first_failed_at,
        died_at,
        &dead.record[..],
    ])?;
    Ok(())
}

/// How many parked deliveries are made dead letters at once where a ledger is shared.
const BURIED_AT_ONCE: i64 = 500;

/// Makes dead letters of some parked deliveries of a lane whose ledger is shared, which keeps its place; how many they were.
pub(super) fn bury_parked(books: &mut Books<'_>, lane: &str, now: Millis) -> rusqlite::Result<usize> {
    let ids: Vec<i64> = {
        let mut ids = books.transaction.prepare_cached("SELECT id FROM parked WHERE lane = ?1 ORDER BY id LIMIT ?2")?;
        ids.query_map(params![lane, BURIED_AT_ONCE], |row| row.get(0))?.collect::<Result<_, _>>()?
    };
    if ids.is_empty() {
        return Ok(0);
    }
    for id in &ids {
        let Some(parked) = parked::whole(&books.transaction, *id)? else { continue };
        let letter = DeadLetter {
            position: parked.position,
            event_id: parked.event_id,
            status: parked.status,
            key: parked.key,
            route: parked.route,
            reason: Reason::SinkRemoved,
            error_kind: parked.error_kind,
            error: parked.error,
            attempts: parked.attempts,
            first_failed_at: parked.first_failed_at,
            record: parked.record,
        };
        apply(books, lane, &Change::Bury(Box::new(letter)), now)?;
        apply(books, lane, &Change::Unpark { id: *id }, now)?;
    }
    let progress =
        books.transaction.query_row("SELECT position, ahead FROM cursors WHERE lane = ?1", [lane], |row| {
            Ok(Progress::decode(Position::from_stored(row.get(0)?), &row.get::<_, Vec<u8>>(1)?))
        })?;
    settle(books, lane, Some(&progress), &[], now)?;
    Ok(ids.len())
}

/// Makes dead letters of a lane's parked deliveries, and forgets its cursor; how many they were.
pub(super) fn close_lane(transaction: &Transaction<'_>, lane: &str, now: Millis) -> rusqlite::Result<usize> {
    let buried = transaction.execute(
        "INSERT OR REPLACE INTO dead_letters
         (lane, position, event_id, status, key, route, reason, error_kind, error, attempts, first_failed_at, died_at, record)
         SELECT lane, position, event_id, status, key, route, ?2, error_kind, error, attempts, first_failed_at, ?3, record
         FROM parked WHERE lane = ?1 ORDER BY id",
        params![lane, Reason::SinkRemoved.as_str(), now],
    )?;
    transaction.execute("DELETE FROM parked WHERE lane = ?1", [lane])?;
    transaction.execute("DELETE FROM cursors WHERE lane = ?1", [lane])?;
    Ok(buried)
}
