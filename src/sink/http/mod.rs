//! The `http` sink: one request per attempt. Accepted means a 2xx answer.
//!
//! Redirects are not followed, proxies of the environment not used, and nothing is sent twice within an attempt. An
//! answer's body is read, up to a limit, so that the connection can be used again, and thrown away: it may repeat
//! personal data.
//!
//! A header value cannot hold line breaks, other control characters or anything beyond ASCII. Where an event's value
//! has one, it is percent-encoded as UTF-8 and the rest of the value stays as it is.

mod public;
mod target;

use std::borrow::Cow;
use std::error::Error as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use http::header::{CONTENT_TYPE, RETRY_AFTER};
use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode};
use percent_encoding::{CONTROLS, utf8_percent_encode};

use self::public::{NotPublic, PublicOnly};
use self::target::Target;
use super::metadata::{self, Binding, Format};
use super::signing::Secrets;
use super::tls::Tls;
use super::{Attempt, BuildError, DeliveryError, MAX_ASKED, Preview, Verdict, View};
use crate::document::Section;
use crate::event::Event;
use crate::signature;
use crate::telemetry::Begin;
use crate::template::{Escape, Template};

const DEFAULT_TIMEOUT: Duration = Duration::from_secs(15);
/// How much of an answer's body is read for the sake of the connection.
const MAX_DISCARDED: usize = 64 * 1024;
/// Connections kept for the next deliveries: more than lanes usually have under way at once.
const MAX_IDLE: usize = 256;
/// Shorter than the idle time-outs of common servers and balancers, so that they seldom close what is about to be used.
const IDLE_TIMEOUT: Duration = Duration::from_secs(50);

/// Headers that belong to the connection or the framing.
const FRAMING: [&str; 9] =
    ["connection", "content-length", "expect", "host", "keep-alive", "te", "trailer", "transfer-encoding", "upgrade"];

/// The checked settings.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    target: Target,
    method: Method,
    headers: Vec<(HeaderName, Template)>,
    format: Format,
    secrets: Secrets,
    timeout: Duration,
    tls: Tls,
    deny_private: bool,
}

impl Config {
    pub(super) fn read(section: &mut Section<'_>) -> Option<Self> {
        let target = super::require_template(section, "url")
            .and_then(|template| Target::new(template).map_err(|problem| section.problem("url", problem)).ok());
        let method = section.parse("method", parse_method).unwrap_or(Method::POST);
        let headers = metadata::read_headers(section, Binding::Http, check_header);
        let deny_private = section.get("deny_private").unwrap_or(false);
        if deny_private && target.as_ref().is_some_and(Target::is_private_address) {
            section.problem("url", "the host is not a public address, and deny_private refuses others");
        }
        let tls = Tls::read(section);
        if tls.is_set() && target.as_ref().is_some_and(|target| !target.is_tls()) {
            section.problem("tls", "the URL does not use TLS; write https://");
        }
        let config = Self {
            method,
            headers: headers.into_iter().filter_map(|(name, value)| Some((name.parse().ok()?, value))).collect(),
            format: metadata::read_format(section),
            secrets: Secrets::read(section),
            timeout: super::read_timeout(section, DEFAULT_TIMEOUT),
            tls,
            deny_private,
            target: target?,
        };
        Some(config)
    }

    pub(super) fn files(&self) -> Vec<PathBuf> {
        self.tls.files().map(Path::to_owned).collect()
    }

    pub(super) fn preview(
        &self,
        event: &Event,
        attempt: &Attempt<'_>,
        now: SystemTime,
    ) -> Result<Preview, DeliveryError> {
        let request = self.request(event, attempt, now, View::Redacted)?;
        let headers = request.headers.into_iter().map(|(name, value)| (name.to_string(), value)).collect();
        Ok(Preview { target: vec![("method", self.method.to_string()), ("url", self.target.shown(event)?)], headers })
    }

    fn request(
        &self,
        event: &Event,
        attempt: &Attempt<'_>,
        now: SystemTime,
        view: View,
    ) -> Result<Request, DeliveryError> {
        let body = event.body();
        let mut headers = vec![(CONTENT_TYPE, metadata::CONTENT_TYPE.to_owned())];
        for (name, value) in metadata::headers(event, attempt, now, self.format, Binding::Http) {
            let name = match name {
                Cow::Borrowed(name) => HeaderName::from_static(name),
                Cow::Owned(name) => name.parse().map_err(|_| invalid_header(&name))?,
            };
            headers.push((name, value));
        }
        let (id, timestamp) = (event.id().to_string(), signature::unix_seconds(now).to_string());
        if let Some(signature) = self.secrets.sign(&id, &timestamp, &body) {
            headers.push((HeaderName::from_static("webhook-signature"), signature));
        }
        for (name, template) in &self.headers {
            let value = view.render(template, event, Escape::None);
            headers.push((name.clone(), utf8_percent_encode(&value, CONTROLS).to_string()));
        }
        Ok(Request { headers, body })
    }

    pub(super) fn check(&self) -> Result<(), BuildError> {
        if self.tls.is_set() { self.client().map(drop) } else { Ok(()) }
    }

    /// Why building fails, if it does, as the sink's own error.
    fn client(&self) -> Result<reqwest::Client, BuildError> {
        let failed = |error: reqwest::Error| BuildError::Client(error.into());
        let mut client = reqwest::Client::builder()
            .user_agent(concat!("engage-relay/", env!("CARGO_PKG_VERSION")))
            .redirect(reqwest::redirect::Policy::none())
            .retry(reqwest::retry::never())
            .no_proxy()
            .referer(false)
            .timeout(self.timeout)
            .tcp_nodelay(true)
            .tcp_keepalive(Duration::from_secs(30))
            .pool_max_idle_per_host(MAX_IDLE)
            .pool_idle_timeout(IDLE_TIMEOUT);
        if self.deny_private {
            client = client.dns_resolver(PublicOnly);
        }
        let pem = self.tls.load()?;
        if let Some(ca) = pem.ca {
            client = client.tls_certs_only(reqwest::Certificate::from_pem_bundle(ca.as_bytes()).map_err(failed)?);
        }
        if let Some((cert, key)) = pem.identity {
            client = client.identity(reqwest::Identity::from_pem(format!("{cert}\n{key}").as_bytes()).map_err(failed)?);
        }
        client.build().map_err(failed)
    }
}

/// What one attempt sends.
struct Request {
    headers: Vec<(HeaderName, String)>,
    body: Bytes,
}

/// The sink: one pool of connections.
pub(super) struct Http {
    config: Config,
    client: reqwest::Client,
}

impl Http {
    pub(super) fn build(config: Config) -> Result<Self, BuildError> {
        Ok(Self { client: config.client()?, config })
    }

    /// What the span of an attempt begins with. A URL may hold values of the event, or a password.
    pub(super) fn begin(&self) -> Begin {
        let method = self.config.method.to_string();
        let mut begin = Begin::client(method.clone()).with("http.request.method", method);
        if let Some((host, port)) = self.config.target.address() {
            begin = begin.with("server.address", host).with("server.port", i64::from(port));
        }
        begin
    }

    /// Returns the status of an answer that accepts.
    pub(super) async fn deliver(&self, event: &Event, attempt: &Attempt<'_>) -> Result<StatusCode, DeliveryError> {
        let request = self.config.request(event, attempt, SystemTime::now(), View::Real)?;
        let mut headers = HeaderMap::with_capacity(request.headers.len());
        for (name, value) in request.headers {
            let value = HeaderValue::try_from(value).map_err(|_| invalid_header(name.as_str()))?;
            headers.append(name, value);
        }
        let url = self.config.target.url(event)?;
        let request = self.client.request(self.config.method.clone(), url).headers(headers).body(request.body);
        let answer = request.send().await.map_err(|error| transport_error(error, self.config.timeout))?;
        let status = answer.status();
        let verdict = judge(status, answer.headers(), SystemTime::now());
        discard(answer).await;
        verdict.map(|()| status)
    }
}

/// Reads the body's beginning. What comes of that changes nothing: the status is the answer.
async fn discard(mut answer: reqwest::Response) {
    let mut left = MAX_DISCARDED;
    while let Ok(Some(chunk)) = answer.chunk().await {
        match left.checked_sub(chunk.len()) {
            Some(rest) => left = rest,
            None => return,
        }
    }
}

/// What an answer means.
fn judge(status: StatusCode, headers: &HeaderMap, now: SystemTime) -> Result<(), DeliveryError> {
    let kind = || format!("http_{}", status.as_u16());
    let text = || format!("the destination answered {status}");
    match status.as_u16() {
        200..=299 => Ok(()),
        408 | 425 | 429 | 500.. => {
            let after = headers.get(RETRY_AFTER).and_then(|value| retry_after(value, now));
            Err(DeliveryError { verdict: Verdict::Retry { after }, ..DeliveryError::retry(kind(), text()) })
        }
        410 => Err(DeliveryError::gone("gone", text() + ": it wants no more events")),
        300..=399 => Err(DeliveryError::reject(kind(), text() + "; redirects are not followed")),
        0..=199 | 400..=499 => Err(DeliveryError::reject(kind(), text())),
    }
}

/// `Retry-After` as seconds or as an HTTP date.
fn retry_after(value: &HeaderValue, now: SystemTime) -> Option<Duration> {
    let value = value.to_str().ok()?.trim();
    let after = match value.parse() {
        Ok(seconds) => Duration::from_secs(seconds),
        Err(_) if !value.is_empty() && value.bytes().all(|digit| digit.is_ascii_digit()) => MAX_ASKED,
        Err(_) => httpdate::parse_http_date(value).ok()?.duration_since(now).unwrap_or_default(),
    };
    Some(after.min(MAX_ASKED))
}

fn transport_error(error: reqwest::Error, timeout: Duration) -> DeliveryError {
    if error.is_timeout() {
        let timeout = humantime::format_duration(timeout);
        return DeliveryError::retry("timeout", format!("the destination did not answer within {timeout}"));
    }
    if error.is_builder() {
        return DeliveryError::reject("invalid_request", "no HTTP request can be made of this event");
    }
    let connecting = error.is_connect();
    let error = error.without_url();
    let mut text = error.to_string();
    let (mut refused, mut private) = (false, false);
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        refused |= error
            .downcast_ref::<std::io::Error>()
            .is_some_and(|error| error.kind() == std::io::ErrorKind::ConnectionRefused);
        private |= error.is::<NotPublic>();
        cause = error.source();
    }
    let kind = match (refused, connecting) {
        _ if private => "private_address",
        (true, _) => "refused",
        (false, true) => "connect",
        (false, false) => "transport",
    };
    DeliveryError::retry(kind, text)
}

fn invalid_header(name: &str) -> DeliveryError {
    DeliveryError::reject("invalid_header", format!("the header {name} cannot hold this value"))
}

fn parse_method(text: &str) -> Result<Method, String> {
    match Method::from_bytes(text.as_bytes()) {
        Err(_) => Err(format!("{text:?} is not a method")),
        Ok(method) if !has_content(&method) => Err(format!(
            "{text:?} is not a method that can carry an event: HTTP gives its body no meaning; use \"POST\""
        )),
        Ok(method) if method.as_str().chars().any(|c| c.is_ascii_lowercase()) => {
            Err(format!("methods are case-sensitive; did you mean {:?}?", text.to_ascii_uppercase()))
        }
        Ok(method) => Ok(method),
    }
}

/// Whether a request may do something by what its body says. Those that only ask may moreover be answered by a cache.
fn has_content(method: &Method) -> bool {
    !method.is_safe() && *method != Method::CONNECT
}

fn check_header(name: &str, value: &Template) -> Option<String> {
    if name.parse::<HeaderName>().is_err() {
        Some(format!("{name:?} is not a header name"))
    } else if FRAMING.contains(&name.to_ascii_lowercase().as_str()) {
        Some(format!("{name:?} cannot be set: it belongs to the connection"))
    } else if value.render_sample("x").contains(|c: char| c.is_control() && c != '\t') {
        Some(format!("the value of {name:?} holds a line break or control character"))
    } else {
        None
    }
}

#[cfg(test)]
mod tests;
