use std::time::{Duration, SystemTime};

use super::*;
use crate::event;

struct Fixed;

impl Lookup for Fixed {
    fn variable(&self, name: &str) -> Option<String> {
        (name == "SECRET").then(|| "s{status}3cr}t".to_owned())
    }

    fn file(&self, path: &str) -> std::io::Result<String> {
        if path == "/key" { Ok("k3y\n".to_owned()) } else { Err(std::io::ErrorKind::NotFound.into()) }
    }
}

const BODY: &str = concat!(
    r#"{"message_id":"wamid.A==","message_status":"read","channel":{"channel_type":"Whatsapp","name":"Ünï/x","#,
    r#""sender_id":5491122223333},"campaign":{"id":null,"name":""},"event_name":"msg_status","#,
    r#""recipient":{"id":".."},"extra":{"n":1.0,"list":[1, 2],"dot":".","pipe":"a|b","esc":"a\nb"}}"#
);

fn event() -> Event {
    let parsed = event::parse(BODY.as_bytes()).unwrap().pop().unwrap();
    let mut record = Vec::new();
    parsed.encode(parsed.id(), SystemTime::UNIX_EPOCH + Duration::from_secs(1), "aivo", None, &mut record);
    Event::decode(record.into()).unwrap()
}

#[test]
fn renders() {
    let event = event();
    let check = |text: &str, expected: &str| {
        assert_eq!(Template::parse(text, &Fixed).unwrap().render(&event, Escape::None), expected, "{text}");
    };
    check("", "");
    check("plain", "plain");
    check("{status}", "read");
    check("a{status}b{sender_id}c", "areadb5491122223333c");
    check("{channel_type} {channel_name} {event_name} {message_id}", "Whatsapp Ünï/x msg_status wamid.A==");
    check("{recipient_id}", "..");
    check("{campaign_id}", "-");
    check("{campaign_id|none}", "none");
    check("{campaign_id|}", "");
    check("{campaign_id|a|b}", "a|b");
    check("{campaign_name|none}", "");
    check("{status|none}", "read");
    check("{/extra/n}", "1.0");
    check("{/extra/list}", "[1,2]");
    check("{/extra/list/1}", "2");
    check("{/extra/pipe}", "a|b");
    check("{/extra/esc}", "a\nb");
    check("{/campaign/id}", "-");
    check("{/none|x}", "x");
    check("{{{status}}}", "{read}");
    check("{{status}}", "{status}");
    check("}}{{", "}{");
    check("${SECRET}", "s{status}3cr}t");
    check("{status}${SECRET}{status}", "reads{status}3cr}tread");
    check("${file:/key}", "k3y");
    check("${NONE:-x{y}", "x{y");
    check("${NONE:-}", "");
    check("${SECRET:-x}", "s{status}3cr}t");
    check("$${SECRET}", "${SECRET}");
    check("$${status}{status}", "${status}read");
    check("$$$", "$$$");
    check("$", "$");
    check("{event_id}", &event.id().to_string());
    check("{event_id|x}", &event.id().to_string());
}

#[test]
fn encodes_values_for_urls() {
    let event = event();
    let check = |text: &str, expected: &str| {
        assert_eq!(Template::parse(text, &Fixed).unwrap().render(&event, Escape::Url), expected, "{text}");
    };
    check("https://h/{status}?q=/", "https://h/read?q=/");
    check("{message_id}", "wamid.A%3D%3D");
    check("{channel_name}", "%C3%9Cn%C3%AF%2Fx");
    check("/{recipient_id}/", "/%252E%252E/");
    check("/{/extra/dot}/", "/%252E/");
    check("{campaign_id|a/b}", "a%2Fb");
    check("{campaign_id}", "-");
    check("{/extra/esc}", "a%0Ab");
    check("${SECRET}", "s{status}3cr}t");
}

#[test]
fn redacts() {
    let event = event();
    let check = |text: &str, expected: &str| {
        let template = Template::parse(text, &Fixed).unwrap();
        assert_eq!(template.render_redacted(&event, Escape::None), expected, "{text}");
        assert!(!format!("{template:?}").contains("3cr"), "{template:?}");
    };
    check("Bearer ${SECRET} {status}", "Bearer ${SECRET} read");
    check("${file:/key}", "${file:/key}");
    check("$${SECRET}", "${SECRET}");
}

#[test]
fn knows_what_is_literal() {
    let check = |text: &str, expected: Option<&str>| {
        assert_eq!(Template::parse(text, &Fixed).unwrap().as_literal(), expected, "{text}");
    };
    check("", Some(""));
    check("a{{b", Some("a{b"));
    check("Bearer ${SECRET}!", Some("Bearer s{status}3cr}t!"));
    check("{status}", None);
    check("a{/b}", None);
    check("{event_id}", None);
    assert_eq!(Template::literal("{status}").as_literal(), Some("{status}"));
}

#[test]
fn renders_a_sample() {
    let template = Template::parse("https://${file:/key}/{status}/{/a}/{event_id}", &Fixed).unwrap();
    assert_eq!(template.render_sample("x"), "https://k3y/x/x/x");
}

#[test]
fn reports_every_problem() {
    let check = |text: &str, expected: &[&str]| {
        assert_eq!(Template::parse(text, &Fixed).unwrap_err(), expected, "{text}");
    };
    check("{statsu}", &["unknown field `statsu`; did you mean `status`?"]);
    check(
        "{}",
        &["unknown field ``; known are sender_id, campaign_id, status, campaign_name, channel_type, channel_name, \
           event_name, recipient_id, message_id, event_id, /json/pointer"],
    );
    check(
        "{event_ids} {sender}",
        &[
            "unknown field `event_ids`; did you mean `event_id`?",
            "unknown field `sender`; known are sender_id, campaign_id, status, campaign_name, channel_type, channel_name, \
         event_name, recipient_id, message_id, event_id, /json/pointer",
        ],
    );
    check(
        "{status",
        &["`{` is not closed by `}`, and no `${…}` can stand between the two; for a literal brace write `{{`"],
    );
    check("{", &["`{` is not closed by `}`, and no `${…}` can stand between the two; for a literal brace write `{{`"]);
    check("a}b", &["`}` closes nothing; for a literal brace write `}}`"]);
    check("{/a~}", &["`{/a~}`: in a JSON pointer `~` is written `~0`, and `/` in a name `~1`"]);
    check("${NONE}", &["the environment variable `NONE` is not set"]);
    check("${file:/none}", &["cannot read the file `/none`: entity not found"]);
    check("${NONE", &["`${` is not closed by `}`; for a literal `${` write `$${`"]);
    check("${a b}", &["`${a b}` is neither `${NAME}`, `${NAME:-default}` nor `${file:PATH}`"]);
    check("${}", &["`${}` is neither `${NAME}`, `${NAME:-default}` nor `${file:PATH}`"]);
    check(
        "${NONE} {statsu} ${SECRET} }",
        &[
            "the environment variable `NONE` is not set",
            "unknown field `statsu`; did you mean `status`?",
            "`}` closes nothing; for a literal brace write `}}`",
        ],
    );
}
