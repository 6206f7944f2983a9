//! The event: one accepted webhook body, with the fields that rules can read.
//!
//! [`parse`] takes a request body apart without copying it, [`Parsed::encode`] writes the versioned record that the
//! journal keeps, and [`Event::decode`] gives it back. The body stays as it came, byte for byte; fields are spans into
//! it, so that reading an event from the journal allocates nothing.
//!
//! This part knows JSON and the names of Engage's fields. It does not know where events are stored or sent.

mod body;

use std::borrow::Cow;
use std::fmt;
use std::ops::Range;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use sha2::{Digest as _, Sha256};

pub use body::{BodyError, MAX_EVENTS, Parsed, parse};

/// One accepted webhook body, as lanes and sinks see it. Cloning is cheap: all of it shares one buffer.
#[derive(Clone, Debug)]
pub struct Event {
    id: EventId,
    received_at: SystemTime,
    token: Range<usize>,
    traceparent: Range<usize>,
    body: Range<usize>,
    /// With [`ABSENT`] for offset where there is none.
    fields: [Span; Field::COUNT],
    record: Bytes,
}

/// A part of the record that follows its fixed head: offset from the body's first byte, and length.
type Span = (u32, u32);

/// Version of the encoding that [`Parsed::encode`] writes.
const VERSION: u8 = 1;
/// Bytes of a record before its variable part.
const HEAD: usize = 1 + 1 + 1 + 16 + 8 + 4 + Field::COUNT * 8;
/// Offset that stands for a field which the event lacks.
const ABSENT: u32 = u32::MAX;
/// Length of a version 00 `traceparent`.
const TRACEPARENT_LEN: usize = 55;

impl Event {
    /// Reads an event back from a journal record.
    ///
    /// # Errors
    ///
    /// [`DecodeError`] when the record was written by a newer version or is not an event.
    pub fn decode(record: Bytes) -> Result<Self, DecodeError> {
        let mut input = Input(&record);
        let version = input.byte()?;
        if version != VERSION {
            return Err(DecodeError::Version(version));
        }
        let token_len = usize::from(input.byte()?);
        let traceparent_len = usize::from(input.byte()?);
        let id = EventId(input.array()?);
        let received_at = SystemTime::UNIX_EPOCH + Duration::from_micros(u64::from_le_bytes(input.array()?));
        let body_len = usize::try_from(u32::from_le_bytes(input.array()?)).map_err(|_| DecodeError::Malformed)?;
        let mut fields = [(ABSENT, 0); Field::COUNT];
        for field in &mut fields {
            *field = (u32::from_le_bytes(input.array()?), u32::from_le_bytes(input.array()?));
        }
        let token = HEAD..HEAD + token_len;
        let traceparent = token.end..token.end + traceparent_len;
        let body = traceparent.end..traceparent.end + body_len;
        let after_head = record.len().checked_sub(body.start).ok_or(DecodeError::Malformed)?;
        let inside =
            |&(offset, len): &Span| offset == ABSENT || u64::from(offset) + u64::from(len) <= after_head as u64;
        if body.end > record.len() || !fields.iter().all(inside) {
            return Err(DecodeError::Malformed);
        }
        Ok(Self { id, received_at, token, traceparent, body, fields, record })
    }

    /// The event's id: equal for a webhook that was sent twice.
    pub fn id(&self) -> EventId {
        self.id
    }

    /// When the ingress had read the whole request, by this machine's clock, in microseconds.
    pub fn received_at(&self) -> SystemTime {
        self.received_at
    }

    /// [`Event::received_at`] as RFC 3339 in UTC with milliseconds.
    pub fn received_at_rfc3339(&self) -> String {
        rfc3339(self.received_at)
    }

    /// The body as it was received; of an array, this event's element.
    pub fn body(&self) -> Bytes {
        self.record.slice(self.body.clone())
    }

    /// The body as text. Only UTF-8 is ever accepted.
    pub fn body_str(&self) -> &str {
        self.text(self.body.clone()).unwrap_or_default()
    }

    /// The record that the event was decoded from.
    pub fn record(&self) -> Bytes {
        self.record.clone()
    }

    /// How many bytes of memory the event takes, about.
    pub fn size(&self) -> usize {
        self.record.len() + size_of::<Self>()
    }

    /// The event in a buffer of its own, so that it does not keep a larger one alive.
    #[must_use]
    pub fn detached(self) -> Self {
        Self { record: Bytes::copy_from_slice(&self.record), ..self }
    }

    /// The name (never the value) of the token that the sender used.
    pub fn token(&self) -> &str {
        self.text(self.token.clone()).unwrap_or_default()
    }

    /// The W3C `traceparent`: the sender's, or else one whose trace id is the event id, so that all deliveries of an
    /// event join one trace.
    pub fn traceparent(&self) -> Cow<'_, str> {
        match self.text(self.traceparent.clone()) {
            Some(given) if !given.is_empty() => Cow::Borrowed(given),
            _ => Cow::Owned(self.id.traceparent()),
        }
    }

    /// The value of a field: a string's content, a number or boolean as it was written. `None` where the event lacks it
    /// or has null, an array or an object in its place.
    pub fn field(&self, field: Field) -> Option<&str> {
        let (offset, len) = *self.fields.get(field as usize).filter(|(offset, _)| *offset != ABSENT)?;
        let start = self.body.start + offset as usize;
        self.text(start..start + len as usize)
    }

    fn text(&self, range: Range<usize>) -> Option<&str> {
        std::str::from_utf8(self.record.get(range)?).ok()
    }
}

/// The events of a body as if they were received now.
///
/// # Errors
///
/// [`BodyError`], as from [`parse`].
pub fn sample(body: &[u8], token: &str) -> Result<Vec<Event>, BodyError> {
    let decoded = parse(body)?.into_iter().map(|parsed| {
        let mut record = Vec::new();
        parsed.encode(parsed.id(), SystemTime::now(), token, None, &mut record);
        Event::decode(record.into())
    });
    // What was encoded just now can be decoded.
    Ok(decoded.filter_map(Result::ok).collect())
}

/// A time as RFC 3339 in UTC with milliseconds.
pub fn rfc3339(time: SystemTime) -> String {
    jiff::Timestamp::try_from(time).map_or_else(|_| "-".to_owned(), |time| format!("{time:.3}"))
}

/// A field of the webhook that rules and templates can name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
#[expect(missing_docs, reason = "each is the field of that name")]
pub enum Field {
    SenderId,
    CampaignId,
    Status,
    CampaignName,
    ChannelType,
    ChannelName,
    EventName,
    RecipientId,
    MessageId,
    /// `event_timestamp`: not for rules, but part of the event id.
    EventTimestamp,
}

impl Field {
    const COUNT: usize = 10;

    /// The fields that rules and templates can name, with those names.
    pub const NAMED: [(&'static str, Self); 9] = [
        ("sender_id", Self::SenderId),
        ("campaign_id", Self::CampaignId),
        ("status", Self::Status),
        ("campaign_name", Self::CampaignName),
        ("channel_type", Self::ChannelType),
        ("channel_name", Self::ChannelName),
        ("event_name", Self::EventName),
        ("recipient_id", Self::RecipientId),
        ("message_id", Self::MessageId),
    ];

    /// The field that rules and templates call `name`.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::NAMED.iter().find(|(known, _)| *known == name).map(|(_, field)| *field)
    }

    /// What rules and templates call the field.
    pub fn name(self) -> &'static str {
        Self::NAMED.iter().find(|(_, field)| *field == self).map_or("event_timestamp", |(name, _)| name)
    }
}

/// 128 bits that identify an event: written as `evt_` and 26 characters of lower-case Crockford base32.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct EventId([u8; 16]);

impl EventId {
    /// Length of the written form, in characters.
    pub const LEN: usize = 30;
    const ALPHABET: &'static [u8; 32] = b"0123456789abcdefghjkmnpqrstvwxyz";

    /// Adds the written form to a text.
    pub fn write_to(self, text: &mut String) {
        text.push_str(std::str::from_utf8(&self.written()).unwrap_or_default());
    }

    fn written(self) -> [u8; Self::LEN] {
        let bits = u128::from_be_bytes(self.0);
        let mut text = *b"evt_00000000000000000000000000";
        for (place, digit) in text.iter_mut().skip(4).enumerate() {
            let five = (bits >> (5 * (25 - place))) & 31;
            *digit = Self::ALPHABET.get(five as usize).copied().unwrap_or(b'0');
        }
        text
    }

    fn traceparent(self) -> String {
        let trace = u128::from_be_bytes(self.0);
        let span = Sha256::new().chain_update(b"span").chain_update(self.0).finalize();
        let span = span.iter().take(8).fold(0_u64, |span, byte| span << 8 | u64::from(*byte));
        format!("00-{:032x}-{:016x}-00", trace.max(1), span.max(1))
    }
}

impl fmt::Display for EventId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(std::str::from_utf8(&self.written()).unwrap_or_default())
    }
}

impl fmt::Debug for EventId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Reads fixed-size values off the front of a slice.
struct Input<'a>(&'a [u8]);

impl Input<'_> {
    fn array<const N: usize>(&mut self) -> Result<[u8; N], DecodeError> {
        let (head, rest) = self.0.split_first_chunk().ok_or(DecodeError::Malformed)?;
        self.0 = rest;
        Ok(*head)
    }

    fn byte(&mut self) -> Result<u8, DecodeError> {
        self.array::<1>().map(|[byte]| byte)
    }
}

/// Why a journal record is not an event that this version can read.
#[derive(Debug, thiserror::Error)]
pub enum DecodeError {
    /// Written by another version.
    #[error("the event is encoded in version {0}, which this version of engage-relay does not know")]
    Version(u8),
    /// Not an event.
    #[error("the record is not an event")]
    Malformed,
}

#[cfg(test)]
mod tests;
