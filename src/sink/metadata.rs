//! What travels beside the body, whatever the sink: the event's id and times, the attempt, the trace, and on request
//! the CloudEvents attributes in binary mode.
//!
//! A value that an event lacks is `-` in a CloudEvents `type` or `source`, as in templates; an event without a message
//! id has no `subject`; and where `event_timestamp` is no number of seconds, `time` is the time of receipt.

use std::borrow::Cow;
use std::time::SystemTime;

use percent_encoding::{AsciiSet, CONTROLS, utf8_percent_encode};
use serde::Deserialize;

use super::Attempt;
use crate::document::{Key, Section};
use crate::event::{Event, Field};
use crate::signature::unix_seconds;
use crate::telemetry::Begin;
use crate::template::{ALL_BUT_UNRESERVED, Template};

/// Media type of every body.
pub(super) const CONTENT_TYPE: &str = "application/json";

/// A header name and its value.
pub(super) type Header = (Cow<'static, str>, String);

/// The sink's `format`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Format {
    /// The relay's own headers.
    #[default]
    Raw,
    /// Those and CloudEvents 1.0 attributes.
    CloudEvents,
}

/// The protocol whose CloudEvents binding applies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Binding {
    Http,
    Kafka,
    Amqp,
}

/// Names that only the relay sets. Beside these all that start like a CloudEvents attribute of the binding.
const RESERVED: [&str; 7] = [
    "content-type",
    "relay-attempt",
    "relay-received-at",
    "traceparent",
    "webhook-id",
    "webhook-signature",
    "webhook-timestamp",
];

/// What the CloudEvents HTTP binding encodes: all but printable ASCII, and of that space, `"` and `%`.
const CE_ENCODED: &AsciiSet = &CONTROLS.add(b' ').add(b'"').add(b'%');

impl Binding {
    fn prefix(self) -> &'static str {
        match self {
            Self::Http => "ce-",
            Self::Kafka => "ce_",
            Self::Amqp => "cloudEvents_",
        }
    }

    fn encode(self, value: &str) -> String {
        match self {
            Self::Http => utf8_percent_encode(value, CE_ENCODED).to_string(),
            Self::Kafka | Self::Amqp => value.to_owned(),
        }
    }

    fn is_reserved(self, name: &str) -> bool {
        let name = name.to_ascii_lowercase();
        RESERVED.contains(&name.as_str()) || name.starts_with(&self.prefix().to_ascii_lowercase())
    }
}

/// The headers of one attempt, made at `now`, without the content type.
pub(super) fn headers(
    event: &Event,
    attempt: &Attempt<'_>,
    now: SystemTime,
    format: Format,
    binding: Binding,
) -> Vec<Header> {
    let mut headers: Vec<Header> = vec![
        ("webhook-id".into(), event.id().to_string()),
        ("webhook-timestamp".into(), unix_seconds(now).to_string()),
        ("relay-received-at".into(), event.received_at_rfc3339()),
        ("relay-attempt".into(), attempt.number.to_string()),
        ("traceparent".into(), attempt.traceparent.map_or_else(|| event.traceparent().into_owned(), str::to_owned)),
    ];
    if format == Format::CloudEvents {
        let attribute =
            |(name, value): (&str, String)| (Cow::Owned(format!("{}{name}", binding.prefix())), binding.encode(&value));
        headers.extend(attributes(event).map(attribute));
    }
    headers
}

/// What the span of sending a message to a broker begins with.
pub(super) fn begin(system: &'static str, destination: String, event: &Event) -> Begin {
    Begin::producer(format!("send {destination}"))
        .with("messaging.system", system)
        .with("messaging.destination.name", destination)
        .with("messaging.operation.type", "send")
        .with("messaging.operation.name", "send")
        .with("messaging.message.id", event.id().to_string())
}

/// Reads `format`.
pub(super) fn read_format(section: &mut Section<'_>) -> Format {
    section.get("format").unwrap_or_default()
}

/// Reads the sink's own `headers`. Names that the relay sets, and what `check` objects to, are problems.
pub(super) fn read_headers(
    section: &mut Section<'_>,
    binding: Binding,
    check: impl Fn(&str, &Template) -> Option<String>,
) -> Vec<(String, Template)> {
    let headers = section.templates("headers");
    for (position, (Key { name, place }, template)) in headers.iter().enumerate() {
        if binding.is_reserved(name) {
            section.problem_at(place, format!("{name:?} is set by the relay itself"));
        } else if let Some(problem) = check(name, template) {
            section.problem_at(place, problem);
        }
        if headers.iter().take(position).any(|(earlier, _)| earlier.name.eq_ignore_ascii_case(name)) {
            section.problem_at(place, format!("{name:?} is there twice"));
        }
    }
    headers.into_iter().map(|(key, template)| (key.name.to_owned(), template)).collect()
}

fn attributes(event: &Event) -> impl Iterator<Item = (&'static str, String)> {
    let part = |field| event.field(field).unwrap_or("-");
    let source = utf8_percent_encode(part(Field::SenderId), ALL_BUT_UNRESERVED);
    let kind = format!("com.aivo.engage.{}.{}", part(Field::EventName), part(Field::Status));
    [
        ("specversion", Some("1.0".to_owned())),
        ("id", Some(event.id().to_string())),
        ("source", Some(format!("/aivo/engage/{source}"))),
        ("type", Some(kind)),
        ("subject", event.field(Field::MessageId).map(str::to_owned)),
        ("time", Some(event_time(event).unwrap_or_else(|| event.received_at_rfc3339()))),
    ]
    .into_iter()
    .filter_map(|(name, value)| Some((name, value.filter(|value| !value.is_empty())?)))
}

/// `event_timestamp` as RFC 3339, where it is a number of seconds up to the year 9999.
fn event_time(event: &Event) -> Option<String> {
    let seconds = event.field(Field::EventTimestamp)?.parse().ok()?;
    Some(jiff::Timestamp::from_second(seconds).ok()?.to_string())
}

#[cfg(test)]
mod tests {
    use super::super::tests::{event, event_at};
    use super::*;

    fn rendered(body: &str, format: Format, binding: Binding) -> Vec<String> {
        let now = SystemTime::UNIX_EPOCH + std::time::Duration::from_millis(1_700_000_000_999);
        headers(&event(body), &Attempt { number: 3, route: "all", traceparent: None }, now, format, binding)
            .into_iter()
            .map(|(name, value)| format!("{name}: {value}"))
            .collect()
    }

    const BODY: &str = r#"{"message_id":"wamid.A=","message_status":"read","event_name":"msg_status",
        "event_timestamp":"1687548944","channel":{"sender_id":"5491122223333"}}"#;

    #[test]
    fn raw_headers() {
        let event = event(BODY);
        assert_eq!(
            rendered(BODY, Format::Raw, Binding::Kafka),
            [
                format!("webhook-id: {}", event.id()),
                "webhook-timestamp: 1700000000".into(),
                "relay-received-at: 2023-11-14T22:13:20.123Z".into(),
                "relay-attempt: 3".into(),
                format!("traceparent: {}", event.traceparent()),
            ]
        );
    }

    #[test]
    fn cloudevents_attributes() {
        fn check(body: &str, binding: Binding, expected: &[&str]) {
            let headers = rendered(body, Format::CloudEvents, binding);
            assert_eq!(headers[..5], rendered(body, Format::Raw, binding)[..], "{body}");
            let attributes: Vec<_> = headers[5..].iter().filter(|header| !header.contains("id: evt_")).collect();
            assert_eq!(attributes, expected, "{body}");
        }
        let attributes = [
            "specversion: 1.0",
            "source: /aivo/engage/5491122223333",
            "type: com.aivo.engage.msg_status.read",
            "subject: wamid.A=",
            "time: 2023-06-23T19:35:44Z",
        ];
        for (binding, prefix) in [(Binding::Http, "ce-"), (Binding::Kafka, "ce_"), (Binding::Amqp, "cloudEvents_")] {
            let expected: Vec<_> = attributes.iter().map(|attribute| format!("{prefix}{attribute}")).collect();
            check(BODY, binding, &expected.iter().map(String::as_str).collect::<Vec<_>>());
        }
        let lacking = [
            "ce_specversion: 1.0",
            "ce_source: /aivo/engage/-",
            "ce_type: com.aivo.engage.-.-",
            "ce_time: 2023-11-14T22:13:20.123Z",
        ];
        check("{}", Binding::Kafka, &lacking);
        check(r#"{"event_timestamp":"soon"}"#, Binding::Kafka, &lacking);
        check(r#"{"event_timestamp":1687548944000000,"message_id":""}"#, Binding::Kafka, &lacking);
        let odd = r#"{"message_id":"a b\"%é","message_status":"x y","channel":{"sender_id":"a/b"}}"#;
        check(
            odd,
            Binding::Http,
            &[
                "ce-specversion: 1.0",
                "ce-source: /aivo/engage/a%252Fb",
                "ce-type: com.aivo.engage.-.x%20y",
                "ce-subject: a%20b%22%25%C3%A9",
                "ce-time: 2023-11-14T22:13:20.123Z",
            ],
        );
    }

    #[test]
    fn own_and_foreign_names() {
        fn check(name: &str, binding: Binding, expected: bool) {
            assert_eq!(binding.is_reserved(name), expected, "{name}");
        }
        check("Webhook-Id", Binding::Http, true);
        check("content-type", Binding::Kafka, true);
        check("ce-type", Binding::Http, true);
        check("ce-type", Binding::Kafka, false);
        check("cloudevents_x", Binding::Amqp, true);
        check("authorization", Binding::Http, false);
    }

    #[test]
    fn times() {
        let early = event_at("{}", SystemTime::UNIX_EPOCH);
        assert_eq!(early.received_at_rfc3339(), "1970-01-01T00:00:00.000Z");
        assert_eq!(unix_seconds(SystemTime::UNIX_EPOCH), 0);
    }
}
