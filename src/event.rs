//! The event: one accepted webhook body, with the fields that rules can read.
//!
//! [`parse`] takes a request body apart without copying it, [`Parsed::encode`] writes the versioned record that the
//! journal keeps, and [`Event::decode`] gives it back. The body stays as it came, byte for byte; fields are spans into
//! it, so that reading an event from the journal allocates nothing.
//!
//! This part knows JSON and the names of Engage's fields. It does not know where events are stored or sent.

use std::borrow::Cow;
use std::fmt;
use std::ops::Range;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use serde::de::{DeserializeSeed, Deserializer, MapAccess, Visitor};
use serde_json::value::RawValue;
use sha2::{Digest, Sha256};

/// One accepted webhook body, as lanes and sinks see it. Cloning is cheap: all of it shares one buffer.
#[derive(Clone, Debug)]
pub struct Event {
    id: EventId,
    received_at: SystemTime,
    token: Range<usize>,
    traceparent: Range<usize>,
    body: Range<usize>,
    fields: [Option<Span>; Field::COUNT],
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
        let mut fields = [None; Field::COUNT];
        for field in &mut fields {
            let span = (u32::from_le_bytes(input.array()?), u32::from_le_bytes(input.array()?));
            *field = (span.0 != ABSENT).then_some(span);
        }
        let token = HEAD..HEAD + token_len;
        let traceparent = token.end..token.end + traceparent_len;
        let body = traceparent.end..traceparent.end + body_len;
        let after_head = record.len().checked_sub(body.start).ok_or(DecodeError::Malformed)?;
        let inside = |&(offset, len): &Span| u64::from(offset) + u64::from(len) <= after_head as u64;
        if body.end > record.len() || !fields.iter().flatten().all(inside) {
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
        let (offset, len) = (*self.fields.get(field as usize)?)?;
        let start = self.body.start + offset as usize;
        self.text(start..start + len as usize)
    }

    fn text(&self, range: Range<usize>) -> Option<&str> {
        std::str::from_utf8(self.record.get(range)?).ok()
    }
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

    fn traceparent(self) -> String {
        let trace = u128::from_be_bytes(self.0);
        let span = Sha256::new().chain_update(b"span").chain_update(self.0).finalize();
        let span = span.iter().take(8).fold(0_u64, |span, byte| span << 8 | u64::from(*byte));
        format!("00-{:032x}-{:016x}-00", trace.max(1), span.max(1))
    }
}

impl fmt::Display for EventId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bits = u128::from_be_bytes(self.0);
        let mut text = *b"evt_00000000000000000000000000";
        for (place, digit) in text.iter_mut().skip(4).enumerate() {
            let five = (bits >> (5 * (25 - place))) & 31;
            *digit = Self::ALPHABET.get(five as usize).copied().unwrap_or(b'0');
        }
        f.write_str(std::str::from_utf8(&text).unwrap_or_default())
    }
}

impl fmt::Debug for EventId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// An event of a request body, before it is stored.
#[derive(Debug)]
pub struct Parsed<'a> {
    body: &'a str,
    fields: Fields,
}

/// Where an event's fields are: in the body, or, counted on behind it, among the values that had escapes in them.
#[derive(Debug, Default)]
struct Fields {
    spans: [Option<Span>; Field::COUNT],
    unescaped: String,
}

/// Takes a request body apart: one JSON object, or a non-empty array of them.
///
/// # Errors
///
/// [`BodyError`] when it is neither. What follows the first level is checked for syntax only.
pub fn parse(body: &[u8]) -> Result<Vec<Parsed<'_>>, BodyError> {
    let body = std::str::from_utf8(body).map_err(|_| BodyError::NotUtf8)?;
    match body.trim_ascii_start().as_bytes().first() {
        Some(b'[') => {
            let elements: Vec<&RawValue> = serde_json::from_str(body)?;
            if elements.is_empty() {
                return Err(BodyError::EmptyArray);
            }
            elements.into_iter().map(|element| Parsed::object(element.get())).collect()
        }
        Some(b'{') => Ok(vec![Parsed::object(body)?]),
        Some(_) => serde_json::from_str::<&RawValue>(body).map_or_else(|e| Err(e.into()), |_| Err(BodyError::NotObject)),
        None => Err(BodyError::Empty),
    }
}

impl<'a> Parsed<'a> {
    fn object(body: &'a str) -> Result<Self, BodyError> {
        if !body.trim_ascii_start().starts_with('{') {
            return Err(BodyError::NotObject);
        }
        let mut fields = Fields::default();
        collect(body, body, Level::Root, &mut fields)?;
        Ok(Self { body, fields })
    }

    fn field(&self, field: Field) -> Option<&str> {
        let (offset, len) = (*self.fields.spans.get(field as usize)?)?;
        let (start, len) = (offset as usize, len as usize);
        match start.checked_sub(self.body.len()) {
            None => self.body.get(start..start + len),
            Some(start) => self.fields.unescaped.get(start..start + len),
        }
    }

    /// The event's id: a digest of what identifies the status change, or else of the body.
    pub fn id(&self) -> EventId {
        let mut digest = Sha256::new();
        let mut part = |text: &str| {
            digest.update((text.len() as u64).to_be_bytes());
            digest.update(text.as_bytes());
        };
        if let (Some(message), Some(status)) = (self.field(Field::MessageId), self.field(Field::Status)) {
            part(self.field(Field::SenderId).unwrap_or_default());
            part(message);
            part(status);
            part(self.field(Field::EventTimestamp).unwrap_or_default());
        } else {
            digest.update(self.body.as_bytes());
        }
        let mut id = [0; 16];
        id.iter_mut().zip(digest.finalize()).for_each(|(to, from)| *to = from);
        EventId(id)
    }

    /// Writes the record that [`Event::decode`] reads. A `traceparent` that is none is left out.
    pub fn encode(&self, id: EventId, received_at: SystemTime, token: &str, traceparent: Option<&str>, out: &mut Vec<u8>) {
        let micros = received_at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_micros();
        let traceparent = traceparent.filter(|value| is_traceparent(value)).unwrap_or_default();
        let token = truncated(token, u8::MAX.into());
        out.extend([VERSION, byte_len(token), byte_len(traceparent)]);
        out.extend(id.0);
        out.extend(u64::try_from(micros).unwrap_or(u64::MAX).to_le_bytes());
        out.extend(span_len(self.body.len()).to_le_bytes());
        for (offset, len) in self.fields.spans.iter().map(|span| span.unwrap_or((ABSENT, 0))) {
            out.extend(offset.to_le_bytes());
            out.extend(len.to_le_bytes());
        }
        for text in [token, traceparent, self.body, &self.fields.unescaped] {
            out.extend_from_slice(text.as_bytes());
        }
    }
}

/// Where in the webhook a key stands.
#[derive(Clone, Copy)]
enum Level {
    Root,
    Channel,
    Campaign,
    Recipient,
}

/// What a key leads to.
enum Slot {
    Field(Field),
    Object(Level),
}

impl Level {
    fn slot(self, key: &str) -> Option<Slot> {
        Some(match (self, key) {
            (Self::Root, "message_id") => Slot::Field(Field::MessageId),
            (Self::Root, "message_status") => Slot::Field(Field::Status),
            (Self::Root, "event_name") => Slot::Field(Field::EventName),
            (Self::Root, "event_timestamp") => Slot::Field(Field::EventTimestamp),
            (Self::Root, "channel") => Slot::Object(Self::Channel),
            (Self::Root, "campaign") => Slot::Object(Self::Campaign),
            (Self::Root, "recipient") => Slot::Object(Self::Recipient),
            (Self::Channel, "channel_type") => Slot::Field(Field::ChannelType),
            (Self::Channel, "name") => Slot::Field(Field::ChannelName),
            (Self::Channel, "sender_id") => Slot::Field(Field::SenderId),
            (Self::Campaign, "id") => Slot::Field(Field::CampaignId),
            (Self::Campaign, "name") => Slot::Field(Field::CampaignName),
            (Self::Recipient, "id") => Slot::Field(Field::RecipientId),
            _ => return None,
        })
    }
}

/// Reads the fields of one object in the body; of a repeated key the last counts.
fn collect(body: &str, object: &str, level: Level, fields: &mut Fields) -> serde_json::Result<()> {
    let mut input = serde_json::Deserializer::from_str(object);
    input.deserialize_map(Collector { body, level, fields })?;
    input.end()
}

struct Collector<'c> {
    body: &'c str,
    level: Level,
    fields: &'c mut Fields,
}

impl<'a> Visitor<'a> for Collector<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON object")
    }

    fn visit_map<M: MapAccess<'a>>(self, mut map: M) -> Result<(), M::Error> {
        while let Some(slot) = map.next_key_seed(self.level)? {
            let value: &'a RawValue = map.next_value()?;
            match slot {
                None => {}
                Some(Slot::Field(field)) => self.fields.set(field, value.get(), self.body),
                Some(Slot::Object(level)) if value.get().starts_with('{') => {
                    collect(self.body, value.get(), level, self.fields).map_err(serde::de::Error::custom)?;
                }
                Some(Slot::Object(_)) => {}
            }
        }
        Ok(())
    }
}

impl Fields {
    /// Notes where a field is: a string's content, or a number or boolean as it was written.
    fn set(&mut self, field: Field, json: &str, body: &str) {
        let in_body = |text: &str| (span_len(text.as_ptr().addr() - body.as_ptr().addr()), span_len(text.len()));
        let span = match json.as_bytes().first() {
            Some(b'"') if !json.contains('\\') => Some(in_body(json.trim_matches('"'))),
            Some(b'"') => serde_json::from_str::<String>(json).ok().map(|text| {
                let offset = body.len() + self.unescaped.len();
                self.unescaped.push_str(&text);
                (span_len(offset), span_len(text.len()))
            }),
            Some(b'{' | b'[' | b'n') | None => None,
            Some(_) => Some(in_body(json)),
        };
        if let Some(place) = self.spans.get_mut(field as usize) {
            *place = span;
        }
    }
}

impl<'a> DeserializeSeed<'a> for Level {
    type Value = Option<Slot>;

    fn deserialize<D: Deserializer<'a>>(self, key: D) -> Result<Self::Value, D::Error> {
        key.deserialize_str(self)
    }
}

impl Visitor<'_> for Level {
    type Value = Option<Slot>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a key")
    }

    fn visit_str<E>(self, key: &str) -> Result<Self::Value, E> {
        Ok(self.slot(key))
    }
}

/// Whether the text is a version 00 W3C traceparent with a trace and a span that are not zero.
fn is_traceparent(text: &str) -> bool {
    let hex = |part: &str, len| part.len() == len && part.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
    let set = |part: &str| part.bytes().any(|b| b != b'0');
    let mut parts = text.split('-');
    text.len() == TRACEPARENT_LEN
        && parts.next() == Some("00")
        && parts.next().is_some_and(|trace| hex(trace, 32) && set(trace))
        && parts.next().is_some_and(|span| hex(span, 16) && set(span))
        && parts.next().is_some_and(|flags| hex(flags, 2))
}

fn truncated(text: &str, max: usize) -> &str {
    let mut end = text.len().min(max);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text.get(..end).unwrap_or_default()
}

fn byte_len(text: &str) -> u8 {
    u8::try_from(text.len()).unwrap_or(u8::MAX)
}

/// Bodies are limited to far below 4 GiB, so this never saturates.
fn span_len(len: usize) -> u32 {
    u32::try_from(len).unwrap_or(ABSENT)
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

/// Why a request body is not accepted.
#[derive(Debug, thiserror::Error)]
pub enum BodyError {
    /// Nothing was sent.
    #[error("the body is empty; send one event as a JSON object, or an array of them")]
    Empty,
    /// JSON is UTF-8.
    #[error("the body is not UTF-8")]
    NotUtf8,
    /// Not JSON.
    #[error("the body is not JSON: {0}")]
    NotJson(#[from] serde_json::Error),
    /// JSON, but a scalar, or an array with something else in it.
    #[error("an event is a JSON object; send one, or an array of them")]
    NotObject,
    /// An array without events.
    #[error("the array is empty; send at least one event")]
    EmptyArray,
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
