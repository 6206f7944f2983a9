//! Request bodies: taking them apart without copying, and writing the record of each event.

use std::borrow::Cow;
use std::fmt;
use std::time::SystemTime;

use serde::Deserialize;
use serde::de::{DeserializeSeed, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::value::RawValue;
use sha2::{Digest as _, Sha256};

use super::{ABSENT, EventId, Field, HEAD, Span, TRACEPARENT_LEN, VERSION};
use crate::pointer::text;

/// The most events of one body: in memory each takes a multiple of the few bytes that it may have.
pub const MAX_EVENTS: usize = 100_000;

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
            let Elements { first, count } = serde_json::from_str(body)?;
            match count {
                0 => Err(BodyError::EmptyArray),
                1..=MAX_EVENTS => first.into_iter().map(|element| Parsed::object(element.get())).collect(),
                _ => Err(BodyError::TooMany),
            }
        }
        Some(b'{') => Ok(vec![Parsed::object(body)?]),
        Some(_) => {
            serde_json::from_str::<&RawValue>(body).map_or_else(|e| Err(e.into()), |_| Err(BodyError::NotObject))
        }
        None => Err(BodyError::Empty),
    }
}

/// The elements of an array, as far as they are taken, and how many there are.
struct Elements<'a> {
    first: Vec<&'a RawValue>,
    count: usize,
}

impl<'de: 'a, 'a> Deserialize<'de> for Elements<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Counted;

        impl<'de> Visitor<'de> for Counted {
            type Value = Elements<'de>;

            fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                formatter.write_str("an array")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut array: A) -> Result<Self::Value, A::Error> {
                let mut elements = Elements { first: Vec::new(), count: 0 };
                while elements.count < MAX_EVENTS
                    && let Some(element) = array.next_element()?
                {
                    elements.first.push(element);
                    elements.count += 1;
                }
                // What is beyond that is checked for syntax only.
                while elements.count >= MAX_EVENTS && array.next_element::<IgnoredAny>()?.is_some() {
                    elements.count += 1;
                }
                Ok(elements)
            }
        }

        deserializer.deserialize_seq(Counted)
    }
}

impl<'a> Parsed<'a> {
    fn object(body: &'a str) -> Result<Self, BodyError> {
        if !body.trim_ascii_start().starts_with('{') {
            return Err(BodyError::NotObject);
        }
        let mut fields = Fields::default();
        let mut input = serde_json::Deserializer::from_str(body);
        input.deserialize_map(Collector { body, level: Level::Root, fields: &mut fields })?;
        input.end()?;
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
        // An empty one says nothing of which message it is.
        let given = |field| self.field(field).filter(|value| !value.is_empty());
        if let (Some(message), Some(status)) = (given(Field::MessageId), given(Field::Status)) {
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

    /// Writes the record that [`super::Event::decode`] reads. A `traceparent` that is none is left out.
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
        let texts = [token, traceparent, self.body, &self.fields.unescaped];
        out.reserve(HEAD + texts.iter().map(|text| text.len()).sum::<usize>());
        out.extend([VERSION, byte_len(token), byte_len(traceparent)]);
        out.extend(id.0);
        out.extend(u64::try_from(micros).unwrap_or(u64::MAX).to_le_bytes());
        out.extend(span_len(self.body.len()).to_le_bytes());
        for (offset, len) in self.fields.spans.iter().map(|span| span.unwrap_or((ABSENT, 0))) {
            out.extend(offset.to_le_bytes());
            out.extend(len.to_le_bytes());
        }
        for text in texts {
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

impl Fields {
    fn put(&mut self, field: Field, span: Option<Span>) {
        if let Some(place) = self.spans.get_mut(field as usize) {
            *place = span;
        }
    }

    /// Where a value of the body is: a string's content, or a number or boolean as it was written.
    fn span(&mut self, json: &str, body: &str) -> Option<Span> {
        let in_body = |text: &str| (span_len(text.as_ptr().addr() - body.as_ptr().addr()), span_len(text.len()));
        match json.as_bytes().first()? {
            b'"' => Some(match text(json)? {
                Cow::Borrowed(text) => in_body(text),
                Cow::Owned(text) => {
                    let offset = body.len() + self.unescaped.len();
                    self.unescaped.push_str(&text);
                    (span_len(offset), span_len(text.len()))
                }
            }),
            b'{' | b'[' | b'n' => None,
            _ => Some(in_body(json)),
        }
    }
}

struct Collector<'c> {
    body: &'c str,
    level: Level,
    fields: &'c mut Fields,
}

impl<'a> DeserializeSeed<'a> for Collector<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'a>>(self, object: D) -> Result<(), D::Error> {
        object.deserialize_map(self)
    }
}

impl<'a> Visitor<'a> for Collector<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON object")
    }

    fn visit_map<M: MapAccess<'a>>(self, mut map: M) -> Result<(), M::Error> {
        let Self { body, level, fields } = self;
        while let Some((slot, is_object)) = map.next_key_seed(Key { body, level })? {
            match slot {
                None => {
                    map.next_value::<IgnoredAny>()?;
                }
                Some(Slot::Field(field)) => {
                    let value: &'a RawValue = map.next_value()?;
                    let span = fields.span(value.get(), body);
                    fields.put(field, span);
                }
                Some(Slot::Object(level)) => {
                    for field in level.fields() {
                        fields.put(*field, None);
                    }
                    if is_object {
                        map.next_value_seed(Collector { body, level, fields })?;
                    } else {
                        map.next_value::<IgnoredAny>()?;
                    }
                }
            }
        }
        Ok(())
    }
}

/// A key in the body, and whether an object follows. A key with escapes that stand for no character leads to nothing.
struct Key<'c> {
    body: &'c str,
    level: Level,
}

impl<'a> DeserializeSeed<'a> for Key<'_> {
    type Value = (Option<Slot>, bool);

    fn deserialize<D: Deserializer<'a>>(self, key: D) -> Result<Self::Value, D::Error> {
        let key = <&RawValue>::deserialize(key)?.get();
        let slot = text(key).and_then(|key| self.level.slot(&key));
        let end = key.as_ptr().addr() - self.body.as_ptr().addr() + key.len();
        let mut behind = self.body.as_bytes().iter().skip(end);
        let first = behind.find(|byte| !matches!(byte, b' ' | b'\t' | b'\r' | b'\n' | b':'));
        Ok((slot, first == Some(&b'{')))
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
    /// Not JSON, and where. Senders are shown this text alone, so it has the cause in it and no source.
    #[error("the body is not JSON: {0}")]
    NotJson(serde_json::Error),
    /// JSON, but a scalar, or an array with something else in it.
    #[error("an event is a JSON object; send one, or an array of them")]
    NotObject,
    /// An array without events.
    #[error("the array is empty; send at least one event")]
    EmptyArray,
    /// An array of more than [`MAX_EVENTS`].
    #[error("the array has more than {MAX_EVENTS} events; send fewer at once")]
    TooMany,
}

impl From<serde_json::Error> for BodyError {
    fn from(error: serde_json::Error) -> Self {
        Self::NotJson(error)
    }
}
