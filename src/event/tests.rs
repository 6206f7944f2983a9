use proptest::prelude::*;

use super::*;

const SAMPLE: &str = concat!(
    r#"{"message_id":"wamid.HBgMMzU5ODg0NjE4MTgAERgSTMwMTQ5ODY1NTFERUY0AA==","message_status":"delivered","#,
    r#""channel":{"channel_type":"Whatsapp","name":"Channel Name","sender_id":"5491122223333"},"#,
    r#""campaign":{"id":"074116ff-76f3-47b7-8be2-92f465718a3e","name":"campaign name"},"#,
    r#""event_name":"msg_status","event_timestamp":"1687548944","recipient":{"id":"541112341234"}}"#
);
const TRACEPARENT: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

fn one(body: &str) -> Parsed<'_> {
    let mut events = parse(body.as_bytes()).unwrap_or_else(|error| panic!("{body}: {error}"));
    assert_eq!(events.len(), 1, "{body}");
    events.remove(0)
}

fn record(body: &str, token: &str, traceparent: Option<&str>) -> Vec<u8> {
    let (parsed, mut record) = (one(body), Vec::new());
    let received_at = SystemTime::UNIX_EPOCH + Duration::from_micros(1_700_000_000_123_456);
    parsed.encode(parsed.id(), received_at, token, traceparent, &mut record);
    record
}

fn event(body: &str) -> Event {
    Event::decode(record(body, "aivo", None).into()).unwrap()
}

#[test]
fn known_ids() {
    let check = |body: &str, expected: &str| assert_eq!(one(body).id().to_string(), expected, "{body}");
    // The digest over four length-prefixed parts …
    check(SAMPLE, "evt_05qjhgg5kapzq5k6xnr31hngw5");
    check(r#"{"message_status":"sent","message_id":"m"}"#, "evt_5qne0m1rgh12r71w1df0tjcdr3");
    // … or over the body.
    check("{}", "evt_242dqt6ndkcy512hnd2vvygs4y");
    assert_eq!(EventId([0; 16]).to_string(), "evt_00000000000000000000000000");
    assert_eq!(EventId([0xff; 16]).to_string(), "evt_7zzzzzzzzzzzzzzzzzzzzzzzzz");
    assert_eq!(EventId([0xff; 16]).to_string().len(), EventId::LEN);
}

#[test]
fn ids_tell_status_changes_apart_and_nothing_else() {
    let same = |a: &str, b: &str| one(a).id() == one(b).id();
    assert!(same(SAMPLE, &SAMPLE.replace("campaign name", "another name")));
    assert!(same(SAMPLE, &SAMPLE.replace(':', " : ").replace("{", "{\n")));
    assert!(same(r#"{"message_id":"1","message_status":"sent"}"#, r#"{"message_id":1,"message_status":"sent"}"#));
    for (from, to) in [("delivered", "read"), ("1687548944", "1687548945"), ("5491122223333", "1"), ("wamid", "vamid")]
    {
        assert!(!same(SAMPLE, &SAMPLE.replace(from, to)), "{from}");
    }
    // Lengths keep parts apart.
    assert!(!same(r#"{"message_id":"ab","message_status":"c"}"#, r#"{"message_id":"a","message_status":"bc"}"#));
    // Without what identifies a status change, any difference counts.
    assert!(!same(r#"{"message_id":"m"}"#, r#"{"message_id":"m" }"#));
    assert!(!same(r#"{"message_id":"m","message_status":null}"#, r#"{"message_id":"m","message_status":[]}"#));
}

#[test]
fn reads_fields() {
    let check = |body: &str, field: Field, expected: Option<&str>| {
        assert_eq!(event(body).field(field), expected, "{} of {body}", field.name());
    };
    let all = [
        (Field::SenderId, "5491122223333"),
        (Field::CampaignId, "074116ff-76f3-47b7-8be2-92f465718a3e"),
        (Field::Status, "delivered"),
        (Field::CampaignName, "campaign name"),
        (Field::ChannelType, "Whatsapp"),
        (Field::ChannelName, "Channel Name"),
        (Field::EventName, "msg_status"),
        (Field::RecipientId, "541112341234"),
        (Field::MessageId, "wamid.HBgMMzU5ODg0NjE4MTgAERgSTMwMTQ5ODY1NTFERUY0AA=="),
        (Field::EventTimestamp, "1687548944"),
    ];
    assert_eq!(all.len(), Field::COUNT);
    for (field, expected) in all {
        check(SAMPLE, field, Some(expected));
        check("{}", field, None);
        assert_eq!(Field::from_name(field.name()), (field != Field::EventTimestamp).then_some(field));
    }
    // What stands for a string.
    check(r#"{"message_id":5491122223333}"#, Field::MessageId, Some("5491122223333"));
    check(r#"{"message_id":123456789012345678901234567890}"#, Field::MessageId, Some("123456789012345678901234567890"));
    check(r#"{"message_id":-1.50e3}"#, Field::MessageId, Some("-1.50e3"));
    check(r#"{"message_id":true}"#, Field::MessageId, Some("true"));
    check(r#"{"message_id":""}"#, Field::MessageId, Some(""));
    for nothing in ["null", "[]", "{}", r#"["m"]"#, r#"{"id":"m"}"#] {
        check(&format!(r#"{{"message_id":{nothing},"recipient":{nothing}}}"#), Field::MessageId, None);
    }
    // What stands for an object.
    for nothing in ["null", "[]", "{}", "1", "\"x\"", r#"[{"sender_id":"1"}]"#] {
        check(&format!(r#"{{"channel":{nothing}}}"#), Field::SenderId, None);
    }
    // The same names elsewhere are other fields.
    check(r#"{"id":"1","name":"2","sender_id":"3","channel":{"id":"4","message_id":"5"}}"#, Field::SenderId, None);
    check(r#"{"channel":{"channel":{"sender_id":"1"}}}"#, Field::SenderId, None);
}

#[test]
fn reads_odd_json() {
    let check = |body: &str, expected: Option<&str>| assert_eq!(event(body).field(Field::SenderId), expected, "{body}");
    // Escapes, in values and in keys.
    check(r#"{"channel":{"sender_id":"\u0041\n\"\\\/\ud83d\ude00"}}"#, Some("A\n\"\\/😀"));
    check(r#"{"ch\u0061nnel":{"sender\u005fid":"1"}}"#, Some("1"));
    check("{\"channel\":{\"sender_id\":\"é😀\"}}", Some("é😀"));
    // Of a repeated key the last counts, also of an object's.
    check(r#"{"channel":{"sender_id":"1","sender_id":"2"}}"#, Some("2"));
    check(r#"{"channel":{"sender_id":"1","sender_id":null}}"#, None);
    check(r#"{"channel":{"sender_id":"1"},"channel":{"sender_id":"2"}}"#, Some("2"));
    check(r#"{"channel":{"sender_id":"1"},"channel":{"name":"2"}}"#, None);
    check(r#"{"channel":{"sender_id":"1"},"channel":null}"#, None);
    check(r#"{"channel":{"sender_id":"1"},"channel":{"sender_id":{"sender_id":"2"}}}"#, None);
    // What is no object there is no reason to refuse the event.
    for other in ["1e999", "-0", "[{\"sender_id\":\"1\"}]", "\"{\\\"sender_id\\\":1}\"", "true"] {
        check(&format!(r#"{{"channel":{other},"recipient" : {other}}}"#), None);
        check(&format!(r#"{{"ch\u0061nnel":{other},"channel":{{"sender_id":"1"}}}}"#), Some("1"));
    }
    // White space, and what is nested deeper than a stack.
    check(" \t\r\n{ \"channel\"\n:\t{ \"sender_id\" :\r\"1\" } } \n", Some("1"));
    let deep = format!("{}{}", "[".repeat(100_000), "]".repeat(100_000));
    check(&format!(r#"{{"x":{deep},"channel":{{"y":{deep},"sender_id":"1"}}}}"#), Some("1"));
}

#[test]
fn takes_bodies_apart() {
    let check = |body: &str, expected: &[&str]| {
        let events = parse(body.as_bytes()).unwrap();
        let bodies = events.iter().map(|parsed| {
            let mut record = Vec::new();
            parsed.encode(parsed.id(), SystemTime::UNIX_EPOCH, "", None, &mut record);
            String::from_utf8(Event::decode(record.into()).unwrap().body().to_vec()).unwrap()
        });
        assert_eq!(bodies.collect::<Vec<_>>(), expected, "{body}");
    };
    check(SAMPLE, &[SAMPLE]);
    check(" {\"a\" : 1}\r\n", &[" {\"a\" : 1}\r\n"]);
    check("[{}]", &["{}"]);
    check(" [ {\"a\":[{}]} ,\n{ } ] ", &["{\"a\":[{}]}", "{ }"]);
}

#[test]
fn refuses_bodies() {
    let check = |body: &[u8], expected: &str| {
        let error = parse(body).map(|events| events.len()).unwrap_err().to_string();
        assert!(error.starts_with(expected), "{}: {error}", String::from_utf8_lossy(body));
    };
    check(b"", "the body is empty");
    check(b" \r\n\t", "the body is empty");
    check(b"{\"a\":\"\xff\"}", "the body is not UTF-8");
    check(b"[]", "the array is empty");
    check(b" [ ] ", "the array is empty");
    let many = |count: usize| format!("[{}{{}}]", "{},".repeat(count - 1));
    assert_eq!(parse(many(MAX_EVENTS).as_bytes()).unwrap().len(), MAX_EVENTS);
    check(many(MAX_EVENTS + 1).as_bytes(), "the array has more than 100000 events");
    check(many(MAX_EVENTS + 1).replace("{}]", "{]").as_bytes(), "the body is not JSON: ");
    for scalar in ["1", "\"text\"", "null", "true", "[1]", "[{},null]", "[{},[{}]]"] {
        check(scalar.as_bytes(), "an event is a JSON object");
    }
    for text in [
        "{",
        "}",
        "{]",
        "[{}",
        "[{},]",
        "{} {}",
        "{}x",
        "{\"a\"}",
        "{\"a\":}",
        "{\"a\":1,}",
        "{a:1}",
        "{'a':1}",
        "nul",
        "\u{feff}{}",
        "{\"a\":01}",
        "{\"a\":\"\n\"}",
        "{\"a\":\"\\x\"}",
        "{\"channel\":{\"sender_id\"}}",
        "a=b",
    ] {
        check(text.as_bytes(), "the body is not JSON: ");
    }
    // Escapes that stand for no character: a rule could not read the field.
    assert_eq!(event(r#"{"message_id":"\ud800"}"#).field(Field::MessageId), None);
    for body in [
        r#"{"\ud800":1,"message_id":"m"}"#,
        r#"{"channel":{"\udc00":1},"message_id":"m"}"#,
        r#"{"x":{"\ud800":1},"mess\u0061ge_id":"m"}"#,
        r#"[{"\ud800\ud800":{"a":[]},"message_id":"m"}]"#,
    ] {
        assert_eq!(event(body).field(Field::MessageId), Some("m"), "{body}");
    }
}

#[test]
fn keeps_what_travels_along() {
    let decode = |token, traceparent| Event::decode(record(SAMPLE, token, traceparent).into()).unwrap();
    let event = decode("aivo", Some(TRACEPARENT));
    assert_eq!((event.token(), &*event.traceparent(), event.body_str()), ("aivo", TRACEPARENT, SAMPLE));
    assert_eq!(event.received_at_rfc3339(), "2023-11-14T22:13:20.123Z");
    assert_eq!(event.received_at(), SystemTime::UNIX_EPOCH + Duration::from_micros(1_700_000_000_123_456));
    assert_eq!(event.id(), one(SAMPLE).id());
    let long = "é".repeat(200);
    assert_eq!(decode(&long, None).token(), "é".repeat(127), "cut at a character");
    let copy = event.clone().detached();
    assert_eq!((copy.body(), copy.record(), copy.token()), (event.body(), event.record(), "aivo"));
    assert!(event.size() > SAMPLE.len());
}

#[test]
fn takes_only_valid_traceparents() {
    let own = "00-05bca308166ab7ee599bb5c0c31ac385-4cf5df745bc09c88-00";
    let check = |given: Option<&str>, expected: &str| {
        let event = Event::decode(record(SAMPLE, "", given).into()).unwrap();
        assert_eq!(event.traceparent(), expected, "{given:?}");
    };
    check(Some(TRACEPARENT), TRACEPARENT);
    check(None, own);
    for wrong in [
        "",
        "00",
        "01-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
        "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-x",
        "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-1",
        "00-4BF92F3577B34DA6A3CE929D0E0E4736-00f067aa0ba902b7-01",
        "00-00000000000000000000000000000000-00f067aa0ba902b7-01",
        "00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01",
        "00-4bf92f3577b34da6a3ce929d0e0e473-600f067aa0ba902b7-01",
        "00_4bf92f3577b34da6a3ce929d0e0e4736_00f067aa0ba902b7_01",
    ] {
        check(Some(wrong), own);
    }
    assert!(EventId([0; 16]).traceparent().starts_with("00-00000000000000000000000000000001-"), "never all zeros");
}

#[test]
fn refuses_what_is_no_record() {
    let good = record(SAMPLE, "aivo", Some(TRACEPARENT));
    let decode = |record: Vec<u8>| Event::decode(record.into()).map(|event| event.id().to_string());
    for len in 0..good.len() {
        assert!(matches!(decode(good[..len].to_vec()), Err(DecodeError::Malformed)), "cut to {len}");
    }
    let changed = |at: usize, value: u8| {
        let mut record = good.clone();
        record[at] = value;
        decode(record)
    };
    assert!(matches!(changed(0, 2), Err(DecodeError::Version(2))));
    assert_eq!(
        changed(0, 2).unwrap_err().to_string(),
        "the event is encoded in version 2, which this version of engage-relay does not know"
    );
    assert!(matches!(changed(1, 255), Err(DecodeError::Malformed)), "the token's length");
    assert!(matches!(changed(HEAD - 8 * Field::COUNT - 1, 1), Err(DecodeError::Malformed)), "the body's length");
    assert!(matches!(changed(HEAD - 1, 1), Err(DecodeError::Malformed)), "a field's length");
    assert!(decode(good).is_ok());
}

#[test]
fn times_before_and_after_all() {
    assert_eq!(rfc3339(SystemTime::UNIX_EPOCH), "1970-01-01T00:00:00.000Z");
    assert_eq!(rfc3339(SystemTime::UNIX_EPOCH + Duration::from_secs(1 << 50)), "-");
    let (parsed, mut record) = (one("{}"), Vec::new());
    parsed.encode(parsed.id(), SystemTime::UNIX_EPOCH - Duration::from_secs(9), "", None, &mut record);
    assert_eq!(Event::decode(record.into()).unwrap().received_at(), SystemTime::UNIX_EPOCH);
}

/// A JSON value as text, at most so deep.
fn json() -> impl Strategy<Value = String> {
    let text = "[a-z\"\\\\\n/é😀]{0,8}";
    let scalar = prop_oneof![
        Just("null".to_owned()),
        any::<bool>().prop_map(|b| b.to_string()),
        any::<i64>().prop_map(|n| n.to_string()),
        text.prop_map(|text| serde_json::Value::from(text).to_string()),
    ];
    scalar.prop_recursive(3, 24, 4, |inner| {
        let key = prop_oneof![
            proptest::sample::select(vec![
                "channel",
                "sender_id",
                "name",
                "id",
                "message_id",
                "message_status",
                "campaign"
            ])
            .prop_map(|key| format!("\"{key}\"")),
            "[a-z\"é]{0,4}".prop_map(|text| serde_json::Value::from(text).to_string()),
        ];
        prop_oneof![
            proptest::collection::vec(inner.clone(), 0..4).prop_map(|values| format!("[{}]", values.join(" , "))),
            proptest::collection::vec((key, inner), 0..6).prop_map(|entries| {
                let entries: Vec<_> = entries.iter().map(|(key, value)| format!("{key} :{value}")).collect();
                format!("{{{}}}", entries.join(","))
            }),
        ]
    })
}

/// The same field by way of a tree.
fn model(body: &str, path: &[&str]) -> Option<String> {
    let tree: serde_json::Value = serde_json::from_str(body).unwrap();
    match path.iter().try_fold(&tree, |at, key| at.as_object()?.get(*key))? {
        serde_json::Value::String(text) => Some(text.clone()),
        serde_json::Value::Number(number) => Some(number.to_string()),
        serde_json::Value::Bool(truth) => Some(truth.to_string()),
        _ => None,
    }
}

proptest! {
    /// What is decoded is what was encoded, byte for byte, and fields are those that a tree has.
    #[test]
    fn records_keep_bodies_and_fields(
        values in proptest::collection::vec(json(), 4),
        token in "[a-zé]{0,12}",
    ) {
        let [channel, id, status, extra] = values.try_into().unwrap();
        let body = format!(r#"{{"x":{extra},"channel":{channel},"message_id":{id}, "message_status":{status}}}"#);
        let event = Event::decode(record(&body, &token, None).into()).unwrap();
        prop_assert_eq!(event.body_str(), &body);
        prop_assert_eq!(event.token(), &token);
        let fields = [
            (Field::SenderId, &["channel", "sender_id"][..]),
            (Field::ChannelName, &["channel", "name"][..]),
            (Field::MessageId, &["message_id"][..]),
            (Field::Status, &["message_status"][..]),
        ];
        for (field, path) in fields {
            prop_assert_eq!(event.field(field).map(str::to_owned), model(&body, path));
        }
        prop_assert_eq!(event.id(), one(&body).id());
    }

    /// Nothing that comes in over the network or from a disk makes a panic.
    #[test]
    fn any_bytes_are_refused_or_read(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
        drop(parse(&bytes));
        let mut record = bytes;
        record.insert(0, VERSION);
        if let Ok(event) = Event::decode(record.into()) {
            let fields = Field::NAMED.map(|(_, field)| event.field(field).map(str::len));
            prop_assert!(fields.iter().flatten().all(|len| *len <= event.size()));
            prop_assert!(event.body_str().len() + event.token().len() + event.traceparent().len() > 0);
        }
    }
}
