//! The one handler: from a request to an answer.

use std::net::IpAddr;
use std::pin::pin;
use std::sync::Arc;
use std::task::Poll;
use std::time::{Duration, Instant, SystemTime};

use bytes::{Bytes, BytesMut};
use futures_util::poll;
use http::header::{
    ALLOW, CONNECTION, CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_TYPE, EXPECT, RETRY_AFTER, WWW_AUTHENTICATE,
};
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, Version};
use http_body_util::{BodyExt as _, Full};
use hyper::body::{Body as _, Incoming};
use serde_json::json;
use tokio::task::JoinHandle;
use tokio::time::timeout;

use super::Config;
use super::access::{Access, Gate};
use super::dedup::{Claim, Dedup};
use super::metrics::Metrics;
use crate::event::{self, BodyError, EventId, Parsed};
use crate::journal::{Append, AppendError, Appender};
use crate::telemetry::{Begin, Span, Traces};

/// What is written to an HTTP/1.1 connection whose request's headers have taken too long.
pub(super) const REQUEST_TIMEOUT_RESPONSE: &[u8] = b"HTTP/1.1 408 Request Timeout\r\n\
    content-type: application/problem+json\r\ncontent-length: 136\r\nconnection: close\r\n\r\n\
    {\"type\":\"about:blank\",\"title\":\"Request Timeout\",\"status\":408,\"detail\":\"the headers took too long; send the whole request without pause\"}";

/// After a refusal this many times `max_body` are still read and thrown away, so that the sender gets to read the answer.
const DRAIN: u64 = 16;

/// The most headers that a request may have.
pub(super) const MAX_HEADERS: usize = 64;

const TRACEPARENT: &str = "traceparent";

/// How much of a path a span has: who sends nothing good must not fill the memory.
const MAX_SPAN_PATH: usize = 256;

/// How often a request looks whether an event of its own, which another request brings too, is stored.
const CLAIM_POLL: Duration = Duration::from_millis(2);

/// Answers requests on one core.
pub(super) struct Handler {
    path: String,
    max_body: u64,
    body_timeout: Duration,
    gate: Gate,
    dedup: Option<Arc<Dedup>>,
    appender: Appender,
    metrics: Metrics,
    traces: Option<Traces>,
}

impl Handler {
    pub(super) fn new(
        config: &Config,
        gate: Gate,
        dedup: Option<Arc<Dedup>>,
        appender: Appender,
        metrics: Metrics,
        traces: Option<Traces>,
    ) -> Self {
        let (path, max_body) = (config.path.clone(), config.max_body.as_u64());
        Self { path, max_body, body_timeout: config.body_timeout, gate, dedup, appender, metrics, traces }
    }

    pub(super) fn appender(&self) -> &Appender {
        &self.appender
    }

    pub(super) fn gate(&self) -> &Gate {
        &self.gate
    }

    /// Answers a request. May be dropped at any time: events that were handed to the journal are stored nevertheless.
    ///
    /// Borrows the request, since it is large, and each future that owned it would be larger by twice as much.
    pub(super) async fn handle(&self, request: &mut Request<Incoming>, peer: IpAddr) -> Response<Full<Bytes>> {
        let begun = Instant::now();
        // Over HTTP/1.1 hyper counts them. The span adds one of its own.
        let has_too_many = request.headers().len() > MAX_HEADERS;
        let span = self.traces.as_ref().map(|traces| Box::new(self.span(traces, request)));
        let accepted = match has_too_many {
            true => Err(Refusal::TooManyHeaders),
            false => self.accept(request, peer).await,
        };
        let response = match accepted {
            Ok(response) => {
                self.metrics.acknowledged(begun.elapsed());
                response
            }
            Err(refusal) => {
                let response = refusal.into_response(self, request.version());
                // Over HTTP/2 hyper would send the content nevertheless, which breaks the protocol.
                if request.method() == Method::HEAD { response.map(|_| Full::default()) } else { response }
            }
        };
        let status = response.status();
        self.metrics.answered(status);
        if let Some(mut span) = span {
            span.set("http.response.status_code", i64::from(status.as_u16()));
            if status.is_server_error() {
                span.fail(status.as_str().to_owned(), "");
            }
        }
        response
    }

    /// Begins the span of a request, and puts it in the place of the sender's, so that it is what events go on from.
    fn span(&self, traces: &Traces, request: &mut Request<Incoming>) -> Span {
        let method = match *request.method() {
            Method::GET
            | Method::HEAD
            | Method::POST
            | Method::PUT
            | Method::DELETE
            | Method::OPTIONS
            | Method::PATCH => request.method().to_string(),
            _ => "_OTHER".to_owned(),
        };
        let path = request.uri().path().chars().take(MAX_SPAN_PATH).collect::<String>();
        let begin = match path == self.path {
            true => Begin::server(format!("{method} {path}")).with("http.route", path.clone()),
            false => Begin::server(method.clone()),
        };
        let version = if request.version() == Version::HTTP_2 { "2" } else { "1.1" };
        let begin = begin
            .with("http.request.method", method)
            .with("url.path", path)
            .with("url.scheme", if self.gate.load().tls().is_some() { "https" } else { "http" })
            .with("network.protocol.version", version);
        let sender = request.headers().get(TRACEPARENT).and_then(|value| value.to_str().ok());
        let span = traces.span(begin, sender);
        if let Ok(traceparent) = HeaderValue::try_from(span.traceparent()) {
            request.headers_mut().insert(TRACEPARENT, traceparent);
        }
        span
    }

    /// Counts a request whose headers have not come in time.
    pub(super) fn timed_out(&self) {
        self.metrics.answered(StatusCode::REQUEST_TIMEOUT);
    }

    async fn accept(&self, request: &mut Request<Incoming>, peer: IpAddr) -> Result<Response<Full<Bytes>>, Refusal> {
        let access = self.gate.load();
        let token = self.check(&access, request, peer)?;
        let content = self.read(request.body_mut()).await?;
        if !access.verify(request.headers(), &content) {
            return Err(Refusal::Unauthorized { wanted: access.wanted() });
        }
        let (storing, answer) = match &self.dedup {
            None => self.store(&content, token, request.headers())?,
            Some(dedup) => self.store_new(dedup, &content, token, request.headers()).await?,
        };
        let events = self.metrics.events(token);
        drop((content, access));
        events.inc_by(storing.done().await?);
        // The request's map of headers serves the answer.
        let mut headers = std::mem::take(request.headers_mut());
        headers.clear();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        let mut response = Response::new(Full::from(answer));
        *response.headers_mut() = headers;
        Ok(response)
    }

    /// Reads a whole body, in the time it may take.
    async fn read(&self, body: &mut Incoming) -> Result<Bytes, Refusal> {
        let mut reading = pin!(read(body, self.max_body));
        // Most bodies are there when their headers are, and need no timer.
        match poll!(reading.as_mut()) {
            Poll::Ready(content) => content,
            Poll::Pending => timeout(self.body_timeout, reading).await.unwrap_or(Err(Refusal::BodyTimeout)),
        }
    }

    /// Hands the events of a body to the journal; returns the answer that is due when they are durable.
    fn store(&self, content: &[u8], token: &str, headers: &HeaderMap) -> Result<(Storing, String), Refusal> {
        let events = parse(content, headers)?;
        let (append, answer) = self.append(events.iter().map(|event| (event, event.id(), true)), token, headers)?;
        Ok((Storing::Appended { append, events: events.len() }, answer))
    }

    /// The same, but for events that were stored not long ago.
    async fn store_new(
        &self,
        dedup: &Arc<Dedup>,
        content: &[u8],
        token: &str,
        headers: &HeaderMap,
    ) -> Result<(Storing, String), Refusal> {
        let events = parse(content, headers)?;
        let mut ids: Vec<_> = events.iter().map(Parsed::id).collect();
        let deadline = Instant::now() + self.body_timeout;
        let claimed = loop {
            match dedup.claim(&ids, Instant::now()) {
                Claim::Store(claimed) => break claimed,
                Claim::Wait if Instant::now() >= deadline => return Err(AppendError::Busy.into()),
                Claim::Wait => tokio::time::sleep(CLAIM_POLL).await,
            }
        };
        if !claimed.contains(&true) {
            let quoted: Vec<_> = ids.iter().map(|id| format!("\"{id}\"")).collect();
            return Ok((Storing::Stored, format!("{{\"ids\":[{}]}}", quoted.join(","))));
        }
        let with_claims = events.iter().zip(&ids).zip(&claimed).map(|((event, id), is_new)| (event, *id, *is_new));
        let appended = self.append(with_claims, token, headers);
        let mut is_new = claimed.into_iter();
        ids.retain(|_| is_new.next().unwrap_or(false));
        let (append, answer) = match appended {
            Ok(appended) => appended,
            Err(refusal) => {
                dedup.settle(&ids, false);
                return Err(refusal);
            }
        };
        // A task of its own: the sender may go away, and what it sent is stored nevertheless.
        let (dedup, events) = (Arc::clone(dedup), ids.len());
        let task = tokio::spawn(async move {
            let result = append.await;
            dedup.settle(&ids, result.is_ok());
            result
        });
        Ok((Storing::Claimed { task, events }, answer))
    }

    /// Hands those of the events to the journal for which it is asked; the answer names all of them.
    fn append<'e, 'b: 'e>(
        &self,
        events: impl Iterator<Item = (&'e Parsed<'b>, EventId, bool)>,
        token: &str,
        headers: &HeaderMap,
    ) -> Result<(Append, String), Refusal> {
        let received_at = SystemTime::now();
        let traceparent = headers.get(TRACEPARENT).and_then(|value| value.to_str().ok());
        let mut answer = String::with_capacity(r#"{"ids":[]}"#.len() + events.size_hint().0 * (EventId::LEN + 3));
        answer.push_str(r#"{"ids":["#);
        let append = self.appender.append(|entries| {
            for (index, (event, id, is_wanted)) in events.enumerate() {
                answer.push_str(if index == 0 { "\"" } else { ",\"" });
                id.write_to(&mut answer);
                answer.push('"');
                if is_wanted {
                    entries.entry(|out| event.encode(id, received_at, token, traceparent, out));
                }
            }
        })?;
        answer.push_str("]}");
        Ok((append, answer))
    }

    /// What can be said before the body is read; the name of the sender's token.
    fn check<'a>(&self, access: &'a Access, request: &Request<Incoming>, peer: IpAddr) -> Result<&'a str, Refusal> {
        let headers = request.headers();
        if !access.allows(peer, headers) {
            return Err(Refusal::Forbidden);
        }
        if request.uri().path() != self.path {
            return Err(Refusal::NotFound);
        }
        if request.method() != Method::POST {
            return Err(Refusal::MethodNotAllowed);
        }
        let token = access.token(headers).ok_or_else(|| Refusal::Unauthorized { wanted: access.wanted() })?;
        let length = headers.get(CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse::<u64>().ok());
        match length {
            Some(length) if length > self.max_body => Err(Refusal::TooLarge),
            Some(_) | None => Ok(token),
        }
    }

    /// Reads what is left of the body of a request that was refused, within limits: a connection that is closed with
    /// unread bytes on it is reset, and the sender may never see the answer.
    ///
    /// `busy` says for as long that what comes is no other request.
    pub(super) fn drain(&self, request: Request<Incoming>, answer: StatusCode, busy: impl Send + 'static) {
        // Nothing is left of what was handed to the journal; who is too slow is waited for no longer; and whoever waits to
        // be told to go on sends nothing after a refusal.
        let is_over = answer.is_success() || answer.is_server_error() || answer == StatusCode::REQUEST_TIMEOUT;
        if is_over || request.body().is_end_stream() || request.headers().contains_key(EXPECT) {
            return;
        }
        let mut body = request.into_body();
        let (limit, time) = (self.max_body.saturating_mul(DRAIN), self.body_timeout);
        tokio::spawn(timeout(time, async move {
            let mut read = 0;
            while let Some(Ok(frame)) = body.frame().await
                && read <= limit
            {
                read += frame.data_ref().map_or(0, |data| data.len() as u64);
            }
            drop(busy);
        }));
    }
}

/// Events on their way to the disk.
enum Storing {
    Appended {
        append: Append,
        events: usize,
    },
    /// Whoever sends them again has to know what comes of it.
    Claimed {
        task: JoinHandle<Result<(), AppendError>>,
        events: usize,
    },
    /// All of them were stored before.
    Stored,
}

impl Storing {
    /// Waits until they are durable; how many there were.
    async fn done(self) -> Result<u64, AppendError> {
        let events = match self {
            Self::Appended { append, events } => append.await.map(|()| events)?,
            Self::Claimed { task, events } => {
                task.await.unwrap_or(Err(AppendError::Closed))?;
                events
            }
            Self::Stored => 0,
        };
        Ok(events as u64)
    }
}

/// The events of a body.
fn parse<'b>(content: &'b [u8], headers: &HeaderMap) -> Result<Vec<Parsed<'b>>, Refusal> {
    event::parse(content).map_err(|error| match error {
        BodyError::NotUtf8 | BodyError::NotJson(_) if headers.contains_key(CONTENT_ENCODING) => Refusal::Encoded,
        error => error.into(),
    })
}

/// Reads a whole body of at most `max` bytes.
async fn read(body: &mut Incoming, max: u64) -> Result<Bytes, Refusal> {
    let mut first = Bytes::new();
    let mut whole = BytesMut::new();
    while let Some(frame) = body.frame().await {
        let Ok(data) = frame.map_err(|_| Refusal::Aborted)?.into_data() else { continue };
        if (first.len() + whole.len() + data.len()) as u64 > max {
            return Err(Refusal::TooLarge);
        }
        if first.is_empty() && whole.is_empty() {
            // Most bodies come in one piece, which needs no copy.
            first = data;
        } else {
            whole.extend_from_slice(&std::mem::take(&mut first));
            whole.extend_from_slice(&data);
        }
    }
    Ok(if whole.is_empty() { first } else { whole.freeze() })
}

/// Why a request is not accepted.
#[derive(Debug)]
enum Refusal {
    TooManyHeaders,
    Forbidden,
    NotFound,
    MethodNotAllowed,
    Unauthorized {
        wanted: String,
    },
    TooLarge,
    BodyTimeout,
    /// The sender went away, or broke the protocol.
    Aborted,
    Body(BodyError),
    /// The same, of a body that may have been compressed.
    Encoded,
    Journal(AppendError),
}

impl From<BodyError> for Refusal {
    fn from(error: BodyError) -> Self {
        Self::Body(error)
    }
}

impl From<AppendError> for Refusal {
    fn from(error: AppendError) -> Self {
        Self::Journal(error)
    }
}

impl Refusal {
    fn status(&self) -> StatusCode {
        match self {
            Self::TooManyHeaders => StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE,
            Self::Forbidden => StatusCode::FORBIDDEN,
            Self::NotFound => StatusCode::NOT_FOUND,
            Self::MethodNotAllowed => StatusCode::METHOD_NOT_ALLOWED,
            Self::Unauthorized { .. } => StatusCode::UNAUTHORIZED,
            Self::TooLarge | Self::Journal(AppendError::TooLarge { .. }) => StatusCode::PAYLOAD_TOO_LARGE,
            Self::BodyTimeout => StatusCode::REQUEST_TIMEOUT,
            Self::Body(BodyError::TooMany) => StatusCode::PAYLOAD_TOO_LARGE,
            Self::Aborted | Self::Body(_) | Self::Encoded => StatusCode::BAD_REQUEST,
            Self::Journal(
                AppendError::Full(_)
                | AppendError::Busy
                | AppendError::Unconfirmed(_)
                | AppendError::Failed
                | AppendError::Closed,
            ) => StatusCode::SERVICE_UNAVAILABLE,
        }
    }

    /// What happened and what to do about it.
    fn detail(&self, handler: &Handler) -> String {
        match self {
            Self::TooManyHeaders => format!("a request may have at most {MAX_HEADERS} headers"),
            Self::Forbidden => "nothing is taken from this address; it has to be in ingress.allow".to_owned(),
            Self::NotFound => format!("webhooks are taken at {}", handler.path),
            Self::MethodNotAllowed => "use POST".to_owned(),
            Self::Unauthorized { wanted } => wanted.clone(),
            Self::TooLarge => {
                format!(
                    "the body may have at most {} bytes (ingress.max_body); send fewer events at once",
                    handler.max_body
                )
            }
            Self::BodyTimeout => format!(
                "the body did not come within {} (ingress.body_timeout)",
                humantime::format_duration(handler.body_timeout)
            ),
            Self::Aborted => "the body ended early".to_owned(),
            Self::Body(error) => error.to_string(),
            Self::Encoded => "the body is not JSON, and has a content-encoding; send it without".to_owned(),
            Self::Journal(AppendError::TooLarge { .. }) => {
                "the journal can't take so much at once; send fewer events in a request, or shorter ones".to_owned()
            }
            Self::Journal(AppendError::Full(_) | AppendError::Busy) => {
                "there is no room for the event at present; it was not stored, send it again later".to_owned()
            }
            Self::Journal(AppendError::Unconfirmed(_)) => {
                "the event was not confirmed as stored in time, and may be stored or not; send it again".to_owned()
            }
            Self::Journal(AppendError::Failed) => {
                "the journal has failed; the event may be stored or not, send it again".to_owned()
            }
            Self::Journal(AppendError::Closed) => {
                "the relay is going down; the event was not stored, send it again".to_owned()
            }
        }
    }

    /// After how many seconds to try again.
    fn retry_after(&self) -> Option<&'static str> {
        match self {
            Self::Journal(AppendError::Full(_)) => Some("5"),
            Self::Journal(
                AppendError::Busy | AppendError::Unconfirmed(_) | AppendError::Closed | AppendError::Failed,
            ) => Some("1"),
            _ => None,
        }
    }

    /// The answer as RFC 9457 has it.
    fn into_response(self, handler: &Handler, version: Version) -> Response<Full<Bytes>> {
        let status = self.status();
        let problem = json!({
            "type": "about:blank",
            "title": status.canonical_reason(),
            "status": status.as_u16(),
            "detail": self.detail(handler),
        });
        let mut response = Response::new(Full::from(problem.to_string()));
        *response.status_mut() = status;
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/problem+json"));
        if let Some(seconds) = self.retry_after() {
            headers.insert(RETRY_AFTER, HeaderValue::from_static(seconds));
        }
        match self {
            Self::MethodNotAllowed => drop(headers.insert(ALLOW, HeaderValue::from_static("POST"))),
            Self::Unauthorized { .. } => drop(headers.insert(WWW_AUTHENTICATE, HeaderValue::from_static("ApiKey"))),
            Self::BodyTimeout if version < Version::HTTP_2 => {
                drop(headers.insert(CONNECTION, HeaderValue::from_static("close")));
            }
            _ => {}
        }
        response
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ready_made_answer_is_what_it_says() {
        let text = std::str::from_utf8(REQUEST_TIMEOUT_RESPONSE).unwrap();
        let (head, body) = text.split_once("\r\n\r\n").unwrap();
        assert!(head.contains(&format!("content-length: {}\r\n", body.len())), "{}", body.len());
        assert_eq!(serde_json::from_str::<serde_json::Value>(body).unwrap()["status"], 408);
    }
}
