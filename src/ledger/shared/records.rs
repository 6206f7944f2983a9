//! How parked deliveries, dead letters and progress look in Kafka.
//!
//! | topic | key | value | headers |
//! |---|---|---|---|
//! | `.parked` | `<sink>/<offset>` | the event as the journal has it | `parked`: a JSON object |
//! | `.parked` | `<sink>/opened` | what tells who opened the lane last | |
//! | `.dead-letters` | `<sink>/<partition>/<offset>` | the event as the journal has it | `dead`: a JSON object |
//!
//! A record without a value removes what has its key. Offsets are committed with what is settled after them: a bit for
//! each position, as Base64.

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD_NO_PAD as BASE64;
use bytes::Bytes;
use rdkafka::message::{BorrowedMessage, Headers as _, Message as _};
use serde::{Deserialize, Serialize};

use super::super::{DeadLetter, Millis, Parked, Progress, Written};
use crate::journal::Position;
use crate::journal::kafka::{Config, number_of, place_of};
use crate::kafka::Record;

/// The end of the key of a partition's mark.
const OPENED: &str = "opened";
/// The headers that say what is parked, and what has become of a dead letter.
const PARKED: &str = "parked";
const DEAD: &str = "dead";
/// The most bytes of settled positions: a broker's limit on an offset's metadata is 4096, and Base64 takes a third more.
/// Deliveries further ahead than that are repeated when another replica takes over.
const MAX_AHEAD: usize = 3000;

/// A dead letter as it was found.
#[derive(Debug)]
pub(super) struct Died {
    /// Whose.
    pub(super) sink: String,
    /// Where its event stands: the place in the journal as one number.
    pub(super) position: Position,
    /// Nothing if it was removed.
    pub(super) letter: Option<(DeadLetter, Millis)>,
}

#[derive(Serialize, Deserialize)]
struct ParkedMeta {
    key: Option<String>,
    event_id: String,
    status: Option<String>,
    route: String,
    attempts: u32,
    since: Millis,
    first_failed_at: Option<Millis>,
    due_at: Millis,
    /// Older relays do not write it.
    #[serde(default)]
    asked_until: Option<Millis>,
    error_kind: String,
    error: String,
}

#[derive(Serialize, Deserialize)]
struct DeadMeta {
    event_id: String,
    status: Option<String>,
    key: Option<String>,
    route: String,
    reason: String,
    error_kind: String,
    error: String,
    attempts: u32,
    first_failed_at: Option<Millis>,
    died_at: Millis,
}

/// What is found in a partition of what is parked.
pub(super) enum Found {
    /// A lane was opened, and how to tell when.
    Opened(Vec<u8>),
    Parked(Box<Parked>),
    /// Nothing is parked there any more.
    Unparked(Position),
    /// What is said of it can't be read.
    Unreadable(Position),
}

/// What something that was written becomes, if it becomes a record.
pub(super) fn of(config: &Config, sink: &str, written: &Written) -> Option<Record> {
    let number = |lane: &str| lane.parse().unwrap_or(-1);
    let parked = |lane: &str, end: &str, headers, body| Record {
        topic: config.parked(),
        partition: Some(number(lane)),
        key: Some(format!("{sink}/{end}")),
        headers,
        body,
    };
    match written {
        Written::Progress { .. } => None,
        Written::Opened { lane, mark } => {
            Some(parked(lane, OPENED, Vec::new(), Some(Bytes::copy_from_slice(mark.as_bytes()))))
        }
        Written::Parked { lane, position, parked: found } => {
            let headers = found.iter().map(|found| header(PARKED, &parked_meta(found))).collect();
            let body = found.as_ref().map(|found| found.record.clone());
            Some(parked(lane, &position.to_stored().to_string(), headers, body))
        }
        Written::Dead { lane, letter, died_at } => {
            Some(of_dead(&config.dead_letters(), sink, number(lane), letter, *died_at))
        }
    }
}

/// A dead letter, for an entry of this partition.
pub(super) fn of_dead(topic: &str, sink: &str, partition: i32, letter: &DeadLetter, died_at: Millis) -> Record {
    Record {
        topic: topic.to_owned(),
        partition: Some(partition),
        key: Some(dead_key(sink, partition, letter.position)),
        headers: vec![header(DEAD, &dead_meta(letter, died_at))],
        body: Some(letter.record.clone()),
    }
}

/// What removes a dead letter whose event is at this place.
pub(super) fn removed(topic: &str, sink: &str, place: Position) -> Record {
    let (partition, offset) = place_of(place);
    let key = Some(dead_key(sink, partition, Position::from_stored(offset)));
    Record { topic: topic.to_owned(), partition: Some(partition), key, headers: Vec::new(), body: None }
}

fn dead_key(sink: &str, partition: i32, position: Position) -> String {
    format!("{sink}/{partition}/{}", position.to_stored())
}

/// Reads a record of what is parked, if it is the sink's.
pub(super) fn read_parked(sink: &str, message: &BorrowedMessage<'_>) -> Option<Found> {
    let key = std::str::from_utf8(message.key()?).ok()?;
    let place = key.strip_prefix(sink)?.strip_prefix('/')?;
    if place == OPENED {
        return Some(Found::Opened(message.payload()?.to_vec()));
    }
    let position = Position::from_stored(place.parse().ok()?);
    let Some(record) = message.payload() else { return Some(Found::Unparked(position)) };
    let Some(meta) = read_header::<ParkedMeta>(PARKED, message) else { return Some(Found::Unreadable(position)) };
    Some(Found::Parked(Box::new(Parked {
        key: meta.key,
        position,
        event_id: meta.event_id,
        status: meta.status,
        route: meta.route,
        attempts: meta.attempts,
        since: meta.since,
        first_failed_at: meta.first_failed_at,
        due_at: meta.due_at,
        asked_until: meta.asked_until,
        error_kind: meta.error_kind,
        error: meta.error,
        record: Bytes::copy_from_slice(record),
    })))
}

/// Reads a record of dead letters.
pub(super) fn read_dead(message: &BorrowedMessage<'_>) -> Option<Died> {
    let key = std::str::from_utf8(message.key()?).ok()?;
    let (rest, offset) = key.rsplit_once('/')?;
    let (sink, partition) = rest.rsplit_once('/')?;
    let position = number_of(partition.parse().ok()?, offset.parse().ok()?);
    let sink = sink.to_owned();
    let Some(record) = message.payload() else { return Some(Died { sink, position, letter: None }) };
    let meta: DeadMeta = read_header(DEAD, message)?;
    let letter = DeadLetter {
        position,
        event_id: meta.event_id,
        status: meta.status,
        key: meta.key,
        route: meta.route,
        reason: super::super::Reason::from_name(&meta.reason)?,
        error_kind: meta.error_kind,
        error: meta.error,
        attempts: meta.attempts,
        first_failed_at: meta.first_failed_at,
        record: Bytes::copy_from_slice(record),
    };
    Some(Died { sink, position, letter: Some((letter, meta.died_at)) })
}

/// What is settled after the cursor.
pub(super) fn ahead_to_text(progress: &Progress) -> String {
    let mut bits = Vec::new();
    for position in &progress.ahead {
        let at = usize::try_from(position.since(progress.cursor)).unwrap_or(usize::MAX);
        if at / 8 >= MAX_AHEAD {
            break;
        }
        if bits.len() <= at / 8 {
            bits.resize(at / 8 + 1, 0_u8);
        }
        if let Some(byte) = bits.get_mut(at / 8) {
            *byte |= 1 << (at % 8);
        }
    }
    BASE64.encode(bits)
}

/// What [`ahead_to_text`] has written. What can't be read was not settled.
pub(super) fn ahead_from_text(cursor: Position, text: &str) -> Vec<Position> {
    let bits = BASE64.decode(text).unwrap_or_default();
    let settled = (0_i64..)
        .zip(bits)
        .flat_map(|(index, byte)| (0..8).filter(move |bit| byte & (1 << bit) != 0).map(move |bit| index * 8 + bit));
    settled.map(|at| Position::from_stored(cursor.to_stored() + at)).collect()
}

fn parked_meta(parked: &Parked) -> ParkedMeta {
    ParkedMeta {
        key: parked.key.clone(),
        event_id: parked.event_id.clone(),
        status: parked.status.clone(),
        route: parked.route.clone(),
        attempts: parked.attempts,
        since: parked.since,
        first_failed_at: parked.first_failed_at,
        due_at: parked.due_at,
        asked_until: parked.asked_until,
        error_kind: parked.error_kind.clone(),
        error: parked.error.clone(),
    }
}

fn dead_meta(letter: &DeadLetter, died_at: Millis) -> DeadMeta {
    DeadMeta {
        event_id: letter.event_id.clone(),
        status: letter.status.clone(),
        key: letter.key.clone(),
        route: letter.route.clone(),
        reason: letter.reason.as_str().to_owned(),
        error_kind: letter.error_kind.clone(),
        error: letter.error.clone(),
        attempts: letter.attempts,
        first_failed_at: letter.first_failed_at,
        died_at,
    }
}

/// Strings and numbers are always JSON.
fn header(name: &str, meta: &impl Serialize) -> (String, String) {
    (name.to_owned(), serde_json::to_string(meta).unwrap_or_default())
}

fn read_header<T: for<'d> Deserialize<'d>>(name: &str, message: &BorrowedMessage<'_>) -> Option<T> {
    let headers = message.headers()?;
    let header = headers.iter().find(|header| header.key == name)?;
    serde_json::from_slice(header.value?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_ahead_comes_back() {
        let check = |cursor: i64, ahead: &[i64], back: usize| {
            let at = |position: &i64| Position::from_stored(*position);
            let ahead: Vec<_> = ahead.iter().map(at).collect();
            let progress = Progress { cursor: at(&cursor), ahead: ahead.clone() };
            let text = ahead_to_text(&progress);
            assert!(text.len() <= 4000, "{}", text.len());
            assert_eq!(ahead_from_text(at(&cursor), &text), ahead[..back]);
        };
        check(10, &[], 0);
        check(10, &[11], 1);
        check(10, &[11, 12, 18, 19, 40_000], 4);
        check(0, &[7, 8, 23_999], 3);
        check(0, &[7, 8, 24_000], 2);
        assert_eq!(ahead_from_text(Position::from_stored(3), "not Base64!"), []);
    }
}
