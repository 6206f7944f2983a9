//! Dead letters as operators see them: lists with filters, one, counts. Reading has a connection of its own and holds up
//! nobody.

use std::collections::HashMap;
use std::path::Path;

use bytes::Bytes;
use rusqlite::types::Value;
use rusqlite::{Connection, OpenFlags, OptionalExtension as _, Row, params_from_iter};

use super::{BUSY, LedgerError, Millis};
use crate::journal::kafka::OFFSET_BITS;

/// Which dead letters. What is not given does not matter.
#[derive(Clone, Debug, Default)]
pub struct Filter {
    /// Of this sink.
    pub sink: Option<String>,
    /// Of events with this status.
    pub status: Option<String>,
    /// Dead for this reason.
    pub reason: Option<String>,
    /// Whose last attempt failed with this.
    pub error_kind: Option<String>,
    /// Dead at or after.
    pub since: Option<Millis>,
    /// Dead before.
    pub until: Option<Millis>,
    /// With this value of what their order was kept by.
    pub key: Option<String>,
    /// Of this event.
    pub event_id: Option<String>,
    /// With a higher number.
    pub after: Option<i64>,
    /// With at most this number.
    pub up_to: Option<i64>,
    /// With at most the number of these that is of the same partition of the journal.
    pub ends: Option<Vec<i64>>,
}

/// A dead letter.
#[derive(Clone, Debug)]
#[expect(missing_docs, reason = "named like the columns")]
pub struct Letter {
    pub id: i64,
    pub sink: String,
    pub event_id: String,
    pub route: String,
    pub reason: String,
    pub error_kind: String,
    pub error: String,
    pub attempts: u32,
    pub first_failed_at: Option<Millis>,
    pub died_at: Millis,
    pub key: Option<String>,
    pub position: i64,
    pub record: Bytes,
}

/// A view of the dead letters.
pub struct Letters(Connection);

const COLUMNS: &str =
    "id, lane, event_id, route, reason, error_kind, error, attempts, first_failed_at, died_at, key, position, record";

impl Letters {
    /// Opens the ledger's file for reading.
    ///
    /// # Errors
    ///
    /// [`LedgerError`]: it can't be read.
    pub fn open(path: &Path) -> Result<Self, LedgerError> {
        let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let connection = Connection::open_with_flags(path, flags)?;
        connection.busy_timeout(BUSY)?;
        Ok(Self(connection))
    }

    pub(super) fn of(connection: Connection) -> Self {
        Self(connection)
    }

    pub(super) fn connection(&self) -> &Connection {
        &self.0
    }

    /// The first dead letters that the filter lets through, by number.
    ///
    /// # Errors
    ///
    /// [`LedgerError`].
    pub fn list(&self, filter: &Filter, limit: usize) -> Result<Vec<Letter>, LedgerError> {
        let (condition, mut values) = filter.sql();
        values.push(Value::Integer(i64::try_from(limit).unwrap_or(i64::MAX)));
        let sql = format!("SELECT {COLUMNS} FROM dead_letters WHERE {condition} ORDER BY id LIMIT ?");
        let mut statement = self.0.prepare_cached(&sql)?;
        let rows = statement.query_map(params_from_iter(values), letter)?;
        Ok(rows.collect::<Result<_, _>>()?)
    }

    /// How many the filter lets through.
    ///
    /// # Errors
    ///
    /// [`LedgerError`].
    pub fn count(&self, filter: &Filter) -> Result<u64, LedgerError> {
        let (condition, values) = filter.sql();
        let sql = format!("SELECT count(*) FROM dead_letters WHERE {condition}");
        let count = |row: &Row<'_>| Ok(row.get::<_, i64>(0)?.unsigned_abs());
        Ok(self.0.prepare_cached(&sql)?.query_row(params_from_iter(values), count)?)
    }

    /// The highest number of those that the filter lets through; of each partition, where the journal has some. Whatever
    /// dies later has a higher one than those of its partition.
    ///
    /// # Errors
    ///
    /// [`LedgerError`].
    pub fn ends(&self, filter: &Filter) -> Result<Vec<i64>, LedgerError> {
        let (condition, values) = filter.sql();
        let sql = format!("SELECT max(id) FROM dead_letters WHERE {condition} GROUP BY id >> {OFFSET_BITS}");
        let mut statement = self.0.prepare_cached(&sql)?;
        let ends = statement.query_map(params_from_iter(values), |row| row.get(0))?;
        Ok(ends.collect::<Result<_, _>>()?)
    }

    /// The dead letter of that number.
    ///
    /// # Errors
    ///
    /// [`LedgerError`].
    pub fn get(&self, id: i64) -> Result<Option<Letter>, LedgerError> {
        let sql = format!("SELECT {COLUMNS} FROM dead_letters WHERE id = ?1");
        Ok(self.0.prepare_cached(&sql)?.query_row([id], letter).optional()?)
    }

    /// How many each sink has.
    ///
    /// # Errors
    ///
    /// [`LedgerError`].
    pub fn counts(&self) -> Result<HashMap<String, u64>, LedgerError> {
        let mut statement = self.0.prepare_cached("SELECT lane, count(*) FROM dead_letters GROUP BY lane")?;
        let rows = statement.query_map([], |row| Ok((row.get(0)?, row.get::<_, i64>(1)?.unsigned_abs())))?;
        Ok(rows.collect::<Result<_, _>>()?)
    }
}

impl Filter {
    fn sql(&self) -> (String, Vec<Value>) {
        let text = |value: &Option<String>| value.clone().map(Value::Text);
        let number = |value: Option<i64>| value.map(Value::Integer);
        let ends = self.ends.as_ref().map(|ends| Value::Text(format!("{ends:?}")));
        // What is listed has an `id` too.
        let of_its_partition = format!("value >> {OFFSET_BITS} = dead_letters.id >> {OFFSET_BITS}");
        let end = format!("id <= (SELECT max(value) FROM json_each(?) WHERE {of_its_partition})");
        let conditions = [
            ("lane = ?", text(&self.sink)),
            ("status = ?", text(&self.status)),
            ("reason = ?", text(&self.reason)),
            ("error_kind = ?", text(&self.error_kind)),
            ("died_at >= ?", number(self.since)),
            ("died_at < ?", number(self.until)),
            ("key = ?", text(&self.key)),
            ("event_id = ?", text(&self.event_id)),
            ("id > ?", number(self.after)),
            ("id <= ?", number(self.up_to)),
            (&end, ends),
        ];
        let (sql, values): (Vec<_>, Vec<_>) =
            conditions.into_iter().filter_map(|(sql, value)| Some((sql, value?))).unzip();
        let sql = if sql.is_empty() { "true".to_owned() } else { sql.join(" AND ") };
        (sql, values)
    }
}

fn letter(row: &Row<'_>) -> rusqlite::Result<Letter> {
    Ok(Letter {
        id: row.get(0)?,
        sink: row.get(1)?,
        event_id: row.get(2)?,
        route: row.get(3)?,
        reason: row.get(4)?,
        error_kind: row.get(5)?,
        error: row.get(6)?,
        attempts: row.get(7)?,
        first_failed_at: row.get(8)?,
        died_at: row.get(9)?,
        key: row.get(10)?,
        position: row.get(11)?,
        record: Bytes::from(row.get::<_, Vec<u8>>(12)?),
    })
}
