//! Request bodies: taking them apart without copying, and writing the record of each event.

use std::borrow::Cow;
use std::fmt;
use std::time::SystemTime;

use serde::de::{DeserializeSeed, Deserializer, MapAccess, Visitor};
use serde_json::value::RawValue;
use sha2::{Digest as _, Sha256};

use super::{ABSENT, EventId, Field, TRACEPARENT_LEN, VERSION};

/// An event of a request body, before it is stored: spans of that body.
#[derive(Debug)]
pub struct Parsed<'a> {
    body: &'a str,
    fields: [Option<Cow<'a, str>>; Field::COUNT],
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
        Some(_) => {
            serde_json::from_str::<&RawValue>(body).map_or_else(|e| Err(e.into()), |_| Err(BodyError::NotObject))
        }
        None => Err(BodyError::Empty),
    }
}

impl<'a> Parsed<'a> {
    fn object(body: &'a str) -> Result<Self, BodyError> {
        if !body.trim_ascii_start().starts_with('{') {
            return Err(BodyError::NotObject);
        }
        let mut fields = [const { None }; Field::COUNT];
        collect(body, Level::Root, &mut fields)?;
        Ok(Self { body, fields })
    }

    fn field(&self, field: Field) -> Option<&str> {
        self.fields.get(field as usize)?.as_deref()
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
    pub fn encode(
        &self,
        id: EventId,
        received_at: SystemTime,
        token: &str,
        traceparent: Option<&str>,
        out: &mut Vec<u8>,
    ) {
        let micros = received_at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_micros();
        let traceparent = traceparent.filter(|value| is_traceparent(value)).unwrap_or_default();
        let token = truncated(token, u8::MAX.into());
        out.extend([VERSION, byte_len(token), byte_len(traceparent)]);
        out.extend(id.0);
        out.extend(u64::try_from(micros).unwrap_or(u64::MAX).to_le_bytes());
        out.extend(span_len(self.body.len()).to_le_bytes());
        let mut unescaped = String::new();
        for field in &self.fields {
            let (offset, len) = match field {
                None => (ABSENT, 0),
                Some(Cow::Borrowed(text)) => {
                    (span_len(text.as_ptr().addr() - self.body.as_ptr().addr()), span_len(text.len()))
                }
                Some(Cow::Owned(text)) => {
                    let offset = self.body.len() + unescaped.len();
                    unescaped.push_str(text);
                    (span_len(offset), span_len(text.len()))
                }
            };
            out.extend(offset.to_le_bytes());
            out.extend(len.to_le_bytes());
        }
        for text in [token, traceparent, self.body, &unescaped] {
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
    /// The fields that an object at this level has: those of a repeated object go with it.
    fn fields(self) -> &'static [Field] {
        match self {
            Self::Root => &[],
            Self::Channel => &[Field::ChannelType, Field::ChannelName, Field::SenderId],
            Self::Campaign => &[Field::CampaignId, Field::CampaignName],
            Self::Recipient => &[Field::RecipientId],
        }
    }

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

type Fields<'a> = [Option<Cow<'a, str>>; Field::COUNT];

/// Reads the fields of one object; of a repeated key the last counts.
fn collect<'a>(object: &'a str, level: Level, fields: &mut Fields<'a>) -> serde_json::Result<()> {
    let mut input = serde_json::Deserializer::from_str(object);
    input.deserialize_map(Collector { level, fields })?;
    input.end()
}

fn put<'a>(fields: &mut Fields<'a>, field: Field, value: Option<Cow<'a, str>>) {
    if let Some(place) = fields.get_mut(field as usize) {
        *place = value;
    }
}

struct Collector<'f, 'a> {
    level: Level,
    fields: &'f mut Fields<'a>,
}

impl<'a> Visitor<'a> for Collector<'_, 'a> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON object")
    }

    fn visit_map<M: MapAccess<'a>>(self, mut map: M) -> Result<(), M::Error> {
        while let Some(slot) = map.next_key_seed(self.level)? {
            let value: &'a RawValue = map.next_value()?;
            match slot {
                None => {}
                Some(Slot::Field(field)) => put(self.fields, field, scalar(value.get())),
                Some(Slot::Object(level)) => {
                    for field in level.fields() {
                        put(self.fields, *field, None);
                    }
                    if value.get().starts_with('{') {
                        collect(value.get(), level, self.fields).map_err(serde::de::Error::custom)?;
                    }
                }
            }
        }
        Ok(())
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

/// A string's content, or a number or boolean as it was written.
fn scalar(json: &str) -> Option<Cow<'_, str>> {
    match json.as_bytes().first()? {
        b'"' if !json.contains('\\') => Some(Cow::Borrowed(json.strip_prefix('"')?.strip_suffix('"')?)),
        b'"' => serde_json::from_str(json).ok().map(Cow::Owned),
        b'{' | b'[' | b'n' => None,
        _ => Some(Cow::Borrowed(json)),
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
