//! The `rabbitmq` sink: one message per event. Accepted means a positive confirm of a message that was routed to a
//! queue.
//!
//! There is one connection with one confirm channel, and any number of messages may be unconfirmed on it. A message
//! that no queue wants comes back, and is rejected. When the connection is lost, the messages that were not confirmed are
//! retried; a task of its own reconnects for ever ([`link`]). Until the first try has succeeded or failed an attempt waits
//! for it, and while the next is not due attempts fail at once.
//!
//! A broker refuses a message by closing the channel, and does not say which message it was. Each that was not confirmed
//! then goes on a channel of its own, a few at a time, still within its attempt: only the one that is refused there fails.
//! Those that the broker had taken already come twice. That takes a new connection, and nothing else is published meanwhile:
//! lapin may still send messages on a channel that has been closed, or on the next one with its number.
//!
//! A broker that blocks publishers (it is short of memory or disk) is slow, not gone: the time-out of attempts does not
//! run then.

mod confirms;
mod link;
mod publisher;
mod verdict;
mod words;

use std::path::{Path, PathBuf};
use std::pin::pin;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use lapin::types::{AMQPValue, FieldTable, LongString, ShortString};
use lapin::uri::{AMQPScheme, AMQPUri};
use lapin::{BasicProperties, ExchangeKind};
use serde::Deserialize;
use tokio::sync::watch;
use tokio::time::Instant;
use url::Url;

use self::link::{Dialer, Link};
use self::words::Unsaid;
use super::metadata::{self, Binding, Format};
use super::tls::Tls;
use super::{Attempt, BuildError, DeliveryError, Preview, View};
use crate::document::{self, Section, Shape, Value};
use crate::event::Event;
use crate::signature;
use crate::telemetry::Begin;
use crate::template::{Escape, Template};

const DEFAULT_TIMEOUT: Duration = Duration::from_secs(10);
/// Seconds between heartbeats, unless a URL has its own.
const DEFAULT_HEARTBEAT: u16 = 15;
/// The longest text that AMQP can hold where it is short: names of exchanges, routing keys, names of headers.
const MAX_SHORT: usize = u8::MAX as usize;

/// The checked settings.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    urls: Vec<AmqpUrl>,
    exchange: Template,
    routing_key: Template,
    headers: Vec<(String, Template)>,
    format: Format,
    declare: Option<Declare>,
    timeout: Duration,
    tls: Tls,
    /// Names that came from variables or files.
    unsaid: Unsaid,
}

/// A broker's address. Debug does not show its credentials.
#[derive(Clone, PartialEq)]
struct AmqpUrl(AMQPUri);

/// An exchange to declare whenever a connection is made.
#[derive(Clone, Debug, PartialEq)]
struct Declare {
    exchange: String,
    kind: ExchangeKind,
    durable: bool,
}

impl Config {
    pub(super) fn read(section: &mut Section<'_>) -> Option<Self> {
        let urls = read_urls(section);
        let exchange = section.template("exchange").unwrap_or_else(|| Template::literal(""));
        let routing_key = section.template("routing_key").unwrap_or_else(|| Template::literal(""));
        for (key, template) in [("exchange", &exchange), ("routing_key", &routing_key)] {
            if template.render_sample("").len() > MAX_SHORT {
                section.problem(key, "AMQP allows 255 bytes here");
            }
        }
        if exchange.as_literal() == Some("") && routing_key.as_literal() == Some("") {
            section.problem("routing_key", "the default exchange needs a `routing_key`: the name of the queue");
        }
        let tls = Tls::read(section);
        if tls.is_set() && !urls.is_empty() && !urls.iter().any(AmqpUrl::is_tls) {
            section.problem("tls", "no URL uses TLS; write amqps://");
        }
        Some(Self {
            unsaid: read_unsaid(section, &urls, &exchange, &routing_key),
            declare: read_declare(section, &exchange),
            headers: metadata::read_headers(section, Binding::Amqp, |name, _| check_header_name(name)),
            format: metadata::read_format(section),
            timeout: super::read_timeout(section, DEFAULT_TIMEOUT),
            urls,
            exchange,
            routing_key,
            tls,
        })
    }

    pub(super) fn check(&self) -> Result<(), BuildError> {
        if self.tls.is_set() { link::connector(self).map(drop) } else { Ok(()) }
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
        let message = self.message(event, attempt, now, View::Redacted)?;
        let target = vec![
            ("exchange", message.exchange),
            ("routing_key", message.routing_key),
            ("message_id", message.id),
            ("timestamp", message.timestamp.to_string()),
            ("content_type", metadata::CONTENT_TYPE.to_owned()),
            ("delivery_mode", PERSISTENT.to_string()),
        ];
        Ok(Preview { target, headers: message.headers })
    }

    fn message(
        &self,
        event: &Event,
        attempt: &Attempt<'_>,
        now: SystemTime,
        view: View,
    ) -> Result<Message, DeliveryError> {
        let mut headers = Vec::new();
        for (name, value) in metadata::headers(event, attempt, now, self.format, Binding::Amqp) {
            headers.push((name.into_owned(), value));
        }
        for (name, template) in &self.headers {
            headers.push((name.clone(), view.render(template, event, Escape::None)));
        }
        let message = Message {
            exchange: view.render(&self.exchange, event, Escape::None),
            exchange_varies: self.exchange.as_literal().is_none(),
            routing_key: view.render(&self.routing_key, event, Escape::None),
            routing_key_varies: self.routing_key.as_literal().is_none(),
            id: event.id().to_string(),
            timestamp: signature::unix_seconds(now),
            headers,
            body: event.body(),
        };
        for (what, text) in [("exchange name", &message.exchange), ("routing key", &message.routing_key)] {
            if text.len() > MAX_SHORT {
                let text = format!("the event's values make the {what} longer than AMQP's 255 bytes");
                return Err(DeliveryError::reject("name_too_long", text));
            }
        }
        Ok(message)
    }
}

/// AMQP's delivery mode of a message that survives a restart of the broker.
const PERSISTENT: u8 = 2;

/// What one attempt sends.
struct Message {
    exchange: String,
    routing_key: String,
    /// Whether they are the event's own, and not the same for all.
    exchange_varies: bool,
    routing_key_varies: bool,
    id: String,
    timestamp: u64,
    headers: Vec<(String, String)>,
    body: Bytes,
}

/// A little more than a frame takes with properties that are not headers.
const FRAME_OVERHEAD: usize = 128;
/// What a header takes beside its name and its value: the lengths of both, and a type.
const HEADER_OVERHEAD: usize = 6;

impl Message {
    /// About how long the frame is that all properties have to fit into, and never less than that.
    fn frame_len(&self) -> usize {
        let headers = self.headers.iter().map(|(name, value)| HEADER_OVERHEAD + name.len() + value.len());
        FRAME_OVERHEAD + headers.sum::<usize>()
    }

    /// The names in it that are the event's.
    fn names_of_event(&self) -> impl Iterator<Item = &str> {
        let names = [(&self.exchange, self.exchange_varies), (&self.routing_key, self.routing_key_varies)];
        names.into_iter().filter_map(|(name, varies)| varies.then_some(name.as_str()))
    }

    fn properties(&self) -> BasicProperties {
        let mut headers = FieldTable::default();
        for (name, value) in &self.headers {
            headers.insert(short(name), AMQPValue::LongString(LongString::from(value.as_str())));
        }
        BasicProperties::default()
            .with_content_type(short(metadata::CONTENT_TYPE))
            .with_delivery_mode(PERSISTENT)
            .with_message_id(short(&self.id))
            .with_timestamp(self.timestamp)
            .with_headers(headers)
    }
}

/// Callers have checked the length.
fn short(text: &str) -> ShortString {
    ShortString::from(text)
}

/// The sink.
pub(super) struct RabbitMq {
    config: Config,
    link: Link,
}

impl RabbitMq {
    pub(super) fn build(name: &str, config: Config) -> Result<Self, BuildError> {
        let dialer = Dialer::new(name, &config)?;
        Ok(Self { config, link: Link::start(dialer) })
    }

    /// What the span of an attempt begins with. The default exchange has no name: there the key names the queue.
    pub(super) fn begin(&self, event: &Event) -> Begin {
        let named = if self.config.exchange.as_literal() == Some("") {
            &self.config.routing_key
        } else {
            &self.config.exchange
        };
        metadata::begin("rabbitmq", named.render_redacted(event, Escape::None), event)
    }

    pub(super) async fn deliver(&self, event: &Event, attempt: &Attempt<'_>) -> Result<(), DeliveryError> {
        let message = self.config.message(event, attempt, SystemTime::now(), View::Real)?;
        let mut publish = pin!(async {
            loop {
                let session = self.link.session().await?;
                if session.admit(&message).await? {
                    break;
                }
                self.link.another_than(&session).await;
            }
            self.link.publish(message).await
        });
        // By reference, or the attempt would take twice the memory.
        let in_time = within(self.config.timeout, self.link.blocked(), &mut publish).await;
        in_time.unwrap_or_else(|| {
            let timeout = humantime::format_duration(self.config.timeout);
            Err(DeliveryError::retry("timeout", format!("the broker did not confirm within {timeout}")))
        })
    }

    pub(super) async fn close(&self) {
        self.link.close().await;
    }
}

/// Waits for `work`, but at most for `timeout` in which `paused` is not true.
async fn within<T>(
    timeout: Duration,
    mut paused: watch::Receiver<bool>,
    mut work: impl Future<Output = T> + Unpin,
) -> Option<T> {
    let mut left = timeout;
    loop {
        let running = !*paused.borrow_and_update();
        let since = Instant::now();
        tokio::select! {
            biased;
            output = &mut work => return Some(output),
            () = tokio::time::sleep(left), if running => return None,
            changed = paused.changed() => match changed {
                Ok(()) if running => left = left.saturating_sub(since.elapsed()),
                Ok(()) => {}
                // Nobody can say any more that it is paused.
                Err(_closed) => return tokio::time::timeout(left, work).await.ok(),
            },
        }
    }
}

/// What a URL can say after its `?`.
const PARAMETERS: [&str; 5] = ["auth_mechanism", "channel_max", "connection_timeout", "frame_max", "heartbeat"];

impl AmqpUrl {
    fn parse(text: &str) -> Result<Self, &'static str> {
        const EXPECTED: &str = "not an AMQP URL, such as \"amqps://user:password@host/vhost\"";
        let url = Url::parse(text).map_err(|_| EXPECTED)?;
        let mut uri: AMQPUri = text.parse().map_err(|_| EXPECTED)?;
        uri.authority.host = match url.host() {
            None | Some(url::Host::Domain("")) => return Err("the URL names no host"),
            Some(url::Host::Domain(_)) => uri.authority.host,
            Some(url::Host::Ipv4(address)) => address.to_string(),
            Some(url::Host::Ipv6(address)) => address.to_string(),
        };
        if url.port() == Some(0) {
            return Err("nothing listens on port 0");
        }
        if url.path().get(1..).is_some_and(|path| path.contains('/')) {
            return Err("a / within the virtual host is written %2f");
        }
        if url.fragment().is_some() {
            return Err("what follows # in a URL is never sent; within a password it is written %23");
        }
        if url.query_pairs().any(|(name, _)| !PARAMETERS.contains(&&*name)) {
            return Err(
                "a parameter of the URL is none of auth_mechanism, channel_max, connection_timeout, frame_max, heartbeat",
            );
        }
        if [&uri.vhost, &uri.authority.userinfo.username].iter().any(|text| text.len() > MAX_SHORT) {
            return Err("the URL's user or virtual host is longer than AMQP's 255 bytes");
        }
        uri.query.heartbeat.get_or_insert(DEFAULT_HEARTBEAT);
        Ok(Self(uri))
    }

    /// Names that a broker may quote.
    fn names(&self) -> [&str; 2] {
        [&self.0.authority.userinfo.username, &self.0.vhost]
    }

    fn is_tls(&self) -> bool {
        self.0.scheme == AMQPScheme::AMQPS
    }
}

impl std::fmt::Debug for AmqpUrl {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        std::fmt::Display::fmt(self, f)
    }
}

impl std::fmt::Display for AmqpUrl {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:{}", self.0.authority.host, self.0.authority.port)
    }
}

fn read_urls(section: &mut Section<'_>) -> Vec<AmqpUrl> {
    let Some(texts) = section.require::<Vec<String>>("urls") else { return Vec::new() };
    if texts.is_empty() {
        section.problem("urls", "the list of URLs is empty");
    }
    let mut urls = Vec::new();
    for (position, text) in texts.iter().enumerate() {
        let number = position + 1;
        match AmqpUrl::parse(text) {
            Ok(url) => {
                if url.0.vhost.is_empty() {
                    section.warning("urls", format!("URL {number} names the virtual host \"\"; the usual one is /%2f"));
                }
                urls.push(url);
            }
            Err(problem) => section.problem("urls", format!("URL {number}: {problem}")),
        }
    }
    urls
}

/// The names that have a variable or a file in them; those that an event has a part in are known with the event.
fn read_unsaid(section: &mut Section<'_>, urls: &[AmqpUrl], exchange: &Template, routing_key: &Template) -> Unsaid {
    let [of_urls, of_exchange, of_key] =
        ["urls", "exchange", "routing_key"].map(|key| section.value(key).is_some_and(refers));
    let urls = urls.iter().filter(|_| of_urls).flat_map(AmqpUrl::names);
    let exchange = exchange.as_literal().filter(|_| of_exchange);
    let routing_key = routing_key.as_literal().filter(|_| of_key);
    Unsaid::new(urls.chain(exchange).chain(routing_key).map(str::to_owned))
}

/// Whether a variable or a file is part of a text, or of one in a list.
fn refers(value: Value<'_>) -> bool {
    match value.shape() {
        Shape::Text(text) => document::refers(text),
        Shape::Array(values) => values.into_iter().any(refers),
        Shape::Scalar(_) | Shape::Table(_) | Shape::Datetime => false,
    }
}

/// Reads `declare`. Only an exchange that is the same for every event can be declared in advance.
fn read_declare(section: &mut Section<'_>, exchange: &Template) -> Option<Declare> {
    #[derive(Deserialize)]
    #[serde(rename_all = "lowercase")]
    enum Kind {
        Direct,
        Fanout,
        Headers,
        Topic,
    }
    let mut table = section.table("declare")?;
    let kind = match table.get("type") {
        None | Some(Kind::Topic) => ExchangeKind::Topic,
        Some(Kind::Direct) => ExchangeKind::Direct,
        Some(Kind::Fanout) => ExchangeKind::Fanout,
        Some(Kind::Headers) => ExchangeKind::Headers,
    };
    let durable = table.get("durable").unwrap_or(true);
    table.finish();
    match exchange.as_literal() {
        Some(name) if !name.is_empty() => Some(Declare { exchange: name.to_owned(), kind, durable }),
        Some(_) => {
            section.problem("declare", "the default exchange is there already");
            None
        }
        None => {
            section.problem("declare", "only an exchange without fields in its name can be declared");
            None
        }
    }
}

fn check_header_name(name: &str) -> Option<String> {
    let legal = (1..=MAX_SHORT).contains(&name.len());
    (!legal).then(|| format!("{name:?} is not a header name: those have 1 to 255 bytes"))
}

#[cfg(test)]
mod tests;
