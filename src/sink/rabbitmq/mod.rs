//! The `rabbitmq` sink: one message per event. Accepted means a positive confirm of a message that was routed to a
//! queue.
//!
//! There is one connection with one confirm channel, and any number of messages may be unconfirmed on it. A message
//! that no queue wants comes back, and is rejected. When the connection or the channel is lost, the messages that were
//! not confirmed are retried; a task of its own reconnects for ever ([`link`]). Until the first try has succeeded or
//! failed an attempt waits for it, and while the next is not due attempts fail at once.
//!
//! A broker that blocks publishers (it is short of memory or disk) is slow, not gone: the time-out of attempts does not
//! run then.

mod confirms;
mod link;
mod publisher;

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
use super::metadata::{self, Binding, Format};
use super::tls::Tls;
use super::{Attempt, BuildError, DeliveryError, Preview, View};
use crate::document::Section;
use crate::event::Event;
use crate::telemetry::Begin;
use crate::template::{Escape, Template};

const DEFAULT_TIMEOUT: Duration = Duration::from_secs(10);
/// Seconds between heartbeats, unless a URL has its own.
const DEFAULT_HEARTBEAT: u16 = 15;
/// The longest text that AMQP can hold where it is short: names of exchanges, routing keys, names of headers.
const MAX_SHORT: usize = u8::MAX as usize;
/// All headers travel in one frame; brokers limit those to 128 KiB.
const MAX_HEADERS: usize = 64 * 1024;

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
            routing_key: view.render(&self.routing_key, event, Escape::None),
            id: event.id().to_string(),
            timestamp: metadata::unix_seconds(now),
            headers,
            body: event.body(),
        };
        for (what, text) in [("exchange name", &message.exchange), ("routing key", &message.routing_key)] {
            if text.len() > MAX_SHORT {
                let text = format!("the event's values make the {what} longer than AMQP's 255 bytes");
                return Err(DeliveryError::reject("name_too_long", text));
            }
        }
        if message.headers.iter().map(|(name, value)| name.len() + value.len()).sum::<usize>() > MAX_HEADERS {
            return Err(DeliveryError::reject("headers_too_large", "the headers are larger than 64 KiB"));
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
    id: String,
    timestamp: u64,
    headers: Vec<(String, String)>,
    body: Bytes,
}

impl Message {
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
            let session = self.link.session().await?;
            session.require_exchange(&message.exchange).await?;
            session.publish(message).await
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
        if [&uri.vhost, &uri.authority.userinfo.username].iter().any(|text| text.len() > MAX_SHORT) {
            return Err("the URL's user or virtual host is longer than AMQP's 255 bytes");
        }
        uri.query.heartbeat.get_or_insert(DEFAULT_HEARTBEAT);
        Ok(Self(uri))
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
