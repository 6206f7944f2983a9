//! The `stdout` sink: one JSON object a line, for trying things out and for log shippers.
//!
//! Accepted means written and flushed. The body stands in the line unchanged, except that line breaks between its
//! tokens are spaces.

use serde::Serialize;
use serde_json::value::RawValue;
use tokio::io::{AsyncWrite, AsyncWriteExt};
use tokio::sync::Mutex;

use super::metadata::{Format, read_format};
use super::{Attempt, DeliveryError, Preview};
use crate::document::Section;
use crate::event::Event;

/// There is nothing to set.
#[derive(Clone, Debug, PartialEq)]
pub struct Config(());

impl Config {
    pub(super) fn read(section: &mut Section<'_>) -> Option<Self> {
        if read_format(section) == Format::CloudEvents {
            section.problem("format", "a stdout sink has no headers to put CloudEvents attributes into");
            return None;
        }
        Some(Self(()))
    }
}

/// The sink.
pub(super) struct Stdout<W = tokio::io::Stdout> {
    name: String,
    output: Mutex<W>,
}

impl Stdout {
    pub(super) fn new(name: &str) -> Self {
        Self { name: name.to_owned(), output: Mutex::new(tokio::io::stdout()) }
    }
}

impl<W: AsyncWrite + Unpin> Stdout<W> {
    pub(super) async fn deliver(&self, event: &Event, attempt: &Attempt<'_>) -> Result<(), DeliveryError> {
        let line = line(&self.name, event, attempt);
        let mut output = self.output.lock().await;
        let written = async {
            output.write_all(line.as_bytes()).await?;
            output.flush().await
        };
        written
            .await
            .map_err(|error| DeliveryError::retry("write", format!("cannot write to standard output: {error}")))
    }
}

pub(super) fn preview(name: &str, event: &Event, attempt: &Attempt<'_>) -> Preview {
    Preview { target: vec![("line", line(name, event, attempt).trim_end().to_owned())], headers: Vec::new() }
}

#[derive(Serialize)]
struct Line<'a> {
    id: String,
    received_at: String,
    sink: &'a str,
    route: &'a str,
    body: Option<&'a RawValue>,
}

/// The line with its end. In JSON a raw line break can only stand between tokens, where a space means the same.
fn line(sink: &str, event: &Event, attempt: &Attempt<'_>) -> String {
    let body = event.body_str().trim_ascii().replace(['\r', '\n'], " ");
    let line = Line {
        id: event.id().to_string(),
        received_at: event.received_at_rfc3339(),
        sink,
        route: attempt.route,
        body: serde_json::from_str(&body).ok(),
    };
    let mut line = serde_json::to_string(&line).unwrap_or_default();
    line.push('\n');
    line
}

#[cfg(test)]
mod tests {
    use super::super::tests::event;
    use super::*;

    #[test]
    fn one_line_each() {
        fn check(body: &str, expected: &str) {
            let event = event(body);
            let head = format!(r#"{{"id":"{}","received_at":"2023-11-14T22:13:20.123Z""#, event.id());
            let expected = format!("{head},\"sink\":\"out\",\"route\":\"every\\\"thing\",\"body\":{expected}}}\n");
            assert_eq!(line("out", &event, &Attempt { number: 1, route: "every\"thing", traceparent: None }), expected);
        }
        check("{}", "{}");
        check("{ \"n\" : 1.50,\r\n\t\"s\":\"a\\nb\" }\n", "{ \"n\" : 1.50,  \t\"s\":\"a\\nb\" }");
    }

    #[tokio::test]
    async fn whole_lines() {
        let (output, mut input) = tokio::io::duplex(64);
        let sink = Stdout { name: "out".into(), output: Mutex::new(output) };
        let event = event("{}");
        let attempt = Attempt { number: 1, route: "all", traceparent: None };
        let all = async {
            let (first, second) = tokio::join!(sink.deliver(&event, &attempt), sink.deliver(&event, &attempt));
            first.and(second).unwrap();
            drop(sink);
        };
        let mut text = String::new();
        let ((), read) = tokio::join!(all, tokio::io::AsyncReadExt::read_to_string(&mut input, &mut text));
        read.unwrap();
        assert_eq!(text, line("out", &event, &attempt).repeat(2));
    }

    #[tokio::test]
    async fn a_closed_pipe_is_a_retry() {
        let (output, input) = tokio::io::duplex(64);
        drop(input);
        let sink = Stdout { name: "out".into(), output: Mutex::new(output) };
        let error =
            sink.deliver(&event("{}"), &Attempt { number: 1, route: "all", traceparent: None }).await.unwrap_err();
        assert_eq!(error.verdict, super::super::Verdict::Retry { after: None });
    }
}
