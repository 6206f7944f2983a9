//! The tables, and how those of an older version become today's.

use std::path::Path;

use rusqlite::Connection;

use super::LedgerError;

/// The steps from an empty file to today's schema; `user_version` says how many were taken. A step is never changed once
/// it was released.
pub(super) const STEPS: [&str; 4] = [
    "
    CREATE TABLE cursors (
        lane TEXT PRIMARY KEY,
        position INTEGER NOT NULL,      -- the next event that is not settled
        updated_at INTEGER NOT NULL     -- Unix milliseconds, like all times
    ) WITHOUT ROWID;
    CREATE TABLE dead_letters (
        id INTEGER PRIMARY KEY,
        lane TEXT NOT NULL,
        position INTEGER NOT NULL,
        event_id TEXT NOT NULL,
        route TEXT NOT NULL,
        reason TEXT NOT NULL,           -- why it is not tried again
        error_kind TEXT NOT NULL,
        error TEXT NOT NULL,
        attempts INTEGER NOT NULL,
        died_at INTEGER NOT NULL,
        record BLOB NOT NULL,           -- the event as the journal had it
        UNIQUE (lane, position)
    );
    ",
    "
    ALTER TABLE cursors ADD COLUMN ahead BLOB NOT NULL DEFAULT x'';  -- settled events after the cursor: u32 LE, counted from it
    CREATE TABLE letters (
        id INTEGER PRIMARY KEY AUTOINCREMENT,   -- never given twice
        lane TEXT NOT NULL,
        position INTEGER NOT NULL,
        event_id TEXT NOT NULL,
        status TEXT,
        key TEXT,                       -- what its order was kept by
        route TEXT NOT NULL,
        reason TEXT NOT NULL,           -- why it is not tried again
        error_kind TEXT NOT NULL,
        error TEXT NOT NULL,
        attempts INTEGER NOT NULL,
        first_failed_at INTEGER,
        died_at INTEGER NOT NULL,
        record BLOB NOT NULL,           -- the event as the journal had it
        UNIQUE (lane, position)
    );
    INSERT INTO letters (id, lane, position, event_id, route, reason, error_kind, error, attempts, died_at, record)
        SELECT id, lane, position, event_id, route, reason, error_kind, error, attempts, died_at, record FROM dead_letters;
    DROP TABLE dead_letters;
    ALTER TABLE letters RENAME TO dead_letters;
    CREATE TABLE parked (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        lane TEXT NOT NULL,
        key TEXT,                       -- rows with one key go one after the other, by id
        position INTEGER NOT NULL,
        event_id TEXT NOT NULL,
        status TEXT,
        route TEXT NOT NULL,
        attempts INTEGER NOT NULL,
        since INTEGER NOT NULL,         -- what its age counts from
        first_failed_at INTEGER,
        due_at INTEGER,                 -- when to try again; NULL: after the one before it with this key
        error_kind TEXT NOT NULL,
        error TEXT NOT NULL,
        record BLOB NOT NULL
    );
    CREATE INDEX parked_by_due ON parked (lane, due_at) WHERE due_at IS NOT NULL;
    CREATE INDEX parked_by_key ON parked (lane, key, id);
    ",
    "
    ALTER TABLE cursors ADD COLUMN order_by TEXT;       -- what the keys of what is parked were made of
    ALTER TABLE parked ADD COLUMN asked_until INTEGER;  -- its destination does not want it before; NULL: it did not say
    DROP INDEX parked_by_due;
    CREATE INDEX parked_by_due ON parked (lane, due_at, asked_until) WHERE due_at IS NOT NULL;
    ",
    "
    CREATE TABLE rules (
        number INTEGER PRIMARY KEY,     -- counted on with each change
        stage TEXT NOT NULL             -- the rules that came into force, and how far sinks had read by then: JSON
    );
    CREATE INDEX dead_letters_by_lane ON dead_letters (lane);
    ",
];

/// The schema that this version writes.
pub(super) const VERSION: i64 = STEPS.len() as i64;

/// The steps that a file has still to take.
pub(super) fn steps_left(connection: &Connection, path: &Path) -> Result<&'static [&'static str], LedgerError> {
    let version: i64 = connection.pragma_query_value(None, "user_version", |row| row.get(0))?;
    let taken = usize::try_from(version).unwrap_or(usize::MAX);
    STEPS.get(taken..).ok_or_else(|| LedgerError::NewerVersion { file: path.to_owned(), version })
}

/// Brings the file to today's schema. Writes nothing if it is there already: it has to open on a full disk too.
pub(super) fn prepare(connection: &mut Connection, path: &Path) -> Result<(), LedgerError> {
    let transaction = connection.transaction()?;
    let steps = steps_left(&transaction, path)?;
    if !steps.is_empty() {
        steps.iter().try_for_each(|step| transaction.execute_batch(step))?;
        transaction.pragma_update(None, "user_version", VERSION)?;
    }
    Ok(transaction.commit()?)
}

#[cfg(test)]
mod tests {
    use super::super::parked;
    use super::*;

    #[test]
    fn what_an_older_version_has_parked_stays() {
        let mut connection = Connection::open_in_memory().unwrap();
        let park = "INSERT INTO parked (lane, key, position, event_id, route, attempts, since, due_at, error_kind, error, record)
                    VALUES ('crm', 'a', 5, 'evt_5', 'all', 2, 10, 20, 'timeout', 'too slow', x'00')";
        STEPS[..2].iter().chain([&park]).for_each(|step| connection.execute_batch(step).unwrap());
        connection.pragma_update(None, "user_version", 2).unwrap();
        prepare(&mut connection, "".as_ref()).unwrap();
        let parked = parked::whole(&connection, 1).unwrap().expect("it is there");
        assert_eq!((parked.key.as_deref(), parked.attempts, parked.due_at), (Some("a"), 2, 20));
        assert_eq!(parked.asked_until, None);
    }
}
