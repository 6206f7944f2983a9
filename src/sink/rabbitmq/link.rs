//! The connection to a broker: made in the background, and made again for ever.
//!
//! lapin can recover connections by itself; that is left off, because it does not work with confirms.

use std::collections::{HashMap, HashSet};
use std::iter;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::Duration;

use futures_util::stream::{self, StreamExt};
use lapin::options::{ConfirmSelectOptions, ExchangeDeclareOptions};
use lapin::tcp::{AMQPUriTcpExt, AsyncTcpStream, RustlsConnector, RustlsConnectorConfig, TLSConfig};
use lapin::types::FieldTable;
use lapin::uri::{AMQPScheme, AMQPUri};
use lapin::{Channel, Connection, ConnectionProperties, ExchangeKind};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio::sync::{Notify, mpsc, oneshot, watch};
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout};
use tracing::{info, warn};

use super::confirms::Outcome;
use super::publisher::{self, Job};
use super::words::Unsaid;
use super::{AmqpUrl, Config, Declare, Message, short, verdict};
use crate::sink::{BuildError, DeliveryError};

/// How long one URL is tried.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// How long closing may take.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(5);
/// The first and the longest wait between tries.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(5));
/// A connection that lasted this long was a good one: waits start over.
const LASTED: Duration = Duration::from_secs(10);
/// Jobs between attempts and the publisher. Attempts wait where there are more.
const QUEUED_JOBS: usize = 256;
/// Exchanges remembered as existing. Templates can make more names than that.
const KNOWN_EXCHANGES: usize = 1024;
/// For how long one that was not there is not looked for again.
const MISSING_FOR: Duration = Duration::from_secs(1);
/// Messages on channels of their own at once.
const MAX_ALONE: usize = 8;

/// The connection as attempts see it.
pub(super) struct Link {
    state: watch::Receiver<State>,
    blocked: watch::Receiver<bool>,
    jobs: mpsc::Sender<Job>,
    task: JoinHandle<()>,
}

#[derive(Clone)]
enum State {
    Connecting,
    Up(Arc<Session>),
    /// The next try is not due yet; why the last one failed.
    Down(String),
}

impl Link {
    /// Starts connecting. Dropping the link ends that.
    pub(super) fn start(dialer: Dialer) -> Self {
        let (state_sender, state) = watch::channel(State::Connecting);
        let (blocked_sender, blocked) = watch::channel(false);
        let (jobs, receiver) = mpsc::channel(QUEUED_JOBS);
        let task = tokio::spawn(maintain(dialer, receiver, state_sender, blocked_sender));
        Self { state, blocked, jobs, task }
    }

    /// The connection, after waiting for a try that is under way.
    pub(super) async fn session(&self) -> Result<Arc<Session>, DeliveryError> {
        if let State::Up(session) = &*self.state.borrow() {
            return Ok(Arc::clone(session));
        }
        let mut state = self.state.clone();
        let settled = state.wait_for(|state| !matches!(state, State::Connecting)).await;
        match settled.as_deref() {
            Ok(State::Up(session)) => Ok(Arc::clone(session)),
            Ok(State::Down(reason)) => Err(DeliveryError::retry("not_connected", reason)),
            Ok(State::Connecting) | Err(_) => Err(DeliveryError::retry("closed", "the sink is closed")),
        }
    }

    /// Waits until this connection is no longer the one that is used.
    pub(super) async fn another_than(&self, session: &Arc<Session>) {
        let is_this = |state: &State| matches!(state, State::Up(up) if Arc::ptr_eq(up, session));
        drop(self.state.clone().wait_for(|state| !is_this(state)).await);
    }

    /// Publishes a message and waits for what the broker says about it.
    pub(super) async fn publish(&self, message: Message) -> Result<(), DeliveryError> {
        let lost = || verdict::lost("it has ended");
        let (reply, result) = oneshot::channel();
        self.jobs.send(Job { message, reply }).await.map_err(|_| lost())?;
        result.await.unwrap_or_else(|_| Err(lost()))
    }

    /// Whether the broker blocks publishers.
    pub(super) fn blocked(&self) -> watch::Receiver<bool> {
        self.blocked.clone()
    }

    /// Closes the connection, as far as the broker plays along, and makes no other.
    pub(super) async fn close(&self) {
        self.task.abort();
        let State::Up(session) = self.state.borrow().clone() else { return };
        let close = session.connection.close(lapin::protocol::constants::REPLY_SUCCESS, short("closed"));
        match timeout(CLOSE_TIMEOUT, close).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => info!(error = session.unsaid.describe(&error), "the connection was closed already"),
            Err(_elapsed) => warn!("the broker did not answer the request to close the connection"),
        }
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// One connection, with the confirm channel that messages share.
pub(super) struct Session {
    connection: Connection,
    unsaid: Unsaid,
    /// Exchanges that were there when they were last looked for.
    exchanges: RwLock<HashSet<String>>,
    /// Those that were not there, and when that was.
    missing: Mutex<HashMap<String, Instant>>,
    looking: tokio::sync::Mutex<()>,
    /// How many channels a refusal has closed: lapin uses none of their numbers again.
    refusals: AtomicUsize,
    /// Told when too few are left.
    worn: Notify,
    /// Closes itself when the last is dropped. While the connection is being closed, now and then neither would end.
    _channel: Channel,
    _cut: Cut,
}

impl Session {
    /// Makes sure that a message can be published at all; whether it can on this connection.
    pub(super) async fn admit(&self, message: &Message) -> Result<bool, DeliveryError> {
        if message.frame_len() > self.connection.configuration().frame_max() as usize {
            return Err(DeliveryError::reject("headers_too_large", "the headers are larger than a frame may be"));
        }
        self.require_exchange(message).await
    }

    /// Finds out which of these messages the broker refuses.
    async fn find_out(&self, unclear: Vec<Job>) {
        let each = async |mut job: Job| {
            tokio::select! {
                result = self.publish_alone(&job.message) => job.tell(result),
                () = job.reply.closed() => {}
            }
        };
        stream::iter(unclear).for_each_concurrent(MAX_ALONE, each).await;
    }

    /// Publishes a message on a channel of its own: if the broker closes that, it is for this message.
    async fn publish_alone(&self, message: &Message) -> Result<(), DeliveryError> {
        let publish = async { publisher::send(&confirm_channel(&self.connection).await?, message).await };
        match publisher::read(publish.await.map_err(|error| self.refused(&error, message))?) {
            (true, None) => Ok(()),
            (true, Some((_id, returned))) => verdict::judge(Outcome::Unroutable(returned)),
            (false, _) => verdict::judge(Outcome::Nacked),
        }
    }

    /// Makes sure that a message's exchange exists, on a channel of its own: publishing to a missing one closes the
    /// channel, and would put everything in doubt that is under way on it. False: another connection is needed for that.
    async fn require_exchange(&self, message: &Message) -> Result<bool, DeliveryError> {
        let name = &message.exchange;
        if name.is_empty() || self.knows(name) {
            return Ok(true);
        }
        let _one_at_a_time = self.looking.lock().await;
        if self.knows(name) {
            return Ok(true);
        }
        if self.misses(name) {
            return Err(verdict::no_exchange(message));
        }
        let channel = match self.connection.create_channel().await {
            Ok(channel) => channel,
            // What it says is of another channel that had the number.
            Err(_) if self.connection.status().connected() && self.refusals.load(Ordering::Relaxed) > 0 => {
                self.worn.notify_one();
                return Ok(false);
            }
            // On the next connection it shows whether the exchange exists; or there may be no other channel than that for
            // messages, and there it shows.
            Err(_) => return Ok(true),
        };
        let passive = ExchangeDeclareOptions { passive: true, ..Default::default() };
        match channel.exchange_declare(short(name), ExchangeKind::Direct, passive, FieldTable::default()).await {
            Ok(()) => {}
            Err(error) if error.is_amqp_soft_error() => {
                let refused = self.refused(&error, message);
                self.note_refusal(name, &refused);
                return Err(refused);
            }
            // The connection has ended.
            Err(_) => return Ok(true),
        }
        let mut exchanges = self.exchanges.write().unwrap_or_else(PoisonError::into_inner);
        if exchanges.len() >= KNOWN_EXCHANGES {
            exchanges.clear();
        }
        exchanges.insert(name.clone());
        Ok(true)
    }

    fn refused(&self, error: &lapin::Error, message: &Message) -> DeliveryError {
        verdict::refused(error, message, &self.unsaid)
    }

    fn knows(&self, exchange: &str) -> bool {
        self.exchanges.read().unwrap_or_else(PoisonError::into_inner).contains(exchange)
    }

    /// Whether an exchange was not there a moment ago.
    fn misses(&self, exchange: &str) -> bool {
        let missing = self.missing.lock().unwrap_or_else(PoisonError::into_inner);
        missing.get(exchange).is_some_and(|since| since.elapsed() < MISSING_FOR)
    }

    /// Remembers that an exchange was not there, and counts the channel that it took to find out.
    fn note_refusal(&self, exchange: &str, refused: &DeliveryError) {
        if verdict::is_no_exchange(refused) {
            let mut missing = self.missing.lock().unwrap_or_else(PoisonError::into_inner);
            if missing.len() >= KNOWN_EXCHANGES {
                missing.clear();
            }
            missing.insert(exchange.to_owned(), Instant::now());
        }
        let most = match self.connection.configuration().channel_max() {
            0 => usize::from(u16::MAX),
            most => most.into(),
        };
        if self.refusals.fetch_add(1, Ordering::Relaxed) >= most / 2 {
            self.worn.notify_one();
        }
    }
}

/// Connects, publishes until the connection ends, and connects again.
async fn maintain(
    mut dialer: Dialer,
    mut jobs: mpsc::Receiver<Job>,
    state: watch::Sender<State>,
    blocked: watch::Sender<bool>,
) {
    let (mut failures, mut unclear) = (0, Vec::new());
    loop {
        state.send_replace(State::Connecting);
        let reason = match dialer.dial().await {
            Ok((session, channel)) => {
                let since = Instant::now();
                info!(sink = dialer.name, broker = %dialer.url(), "connected");
                state.send_replace(State::Up(Arc::clone(&session)));
                let (connection, events) = (session.connection.status(), session.connection.events_listener());
                session.find_out(unclear).await;
                let line =
                    publisher::Line { sink: &dialer.name, connection, channel: &channel, unsaid: &dialer.unsaid };
                let ended = publisher::run(&line, events, session.worn.notified(), &mut jobs, &blocked).await;
                blocked.send_replace(false);
                unclear = ended.unclear;
                if !unclear.is_empty() || ended.is_worn {
                    info!(sink = dialer.name, reason = ended.reason, "something was refused; connecting anew");
                    if ended.is_worn {
                        state.send_replace(State::Connecting);
                        tokio::time::sleep(BACKOFF.0).await;
                    }
                    continue;
                }
                warn!(sink = dialer.name, broker = %dialer.url(), reason = ended.reason, "connection lost");
                if since.elapsed() >= LASTED {
                    failures = 0;
                }
                format!("the connection was lost: {}", ended.reason)
            }
            Err(reason) => {
                warn!(sink = dialer.name, reason, "cannot connect");
                reason
            }
        };
        for job in unclear.drain(..).chain(iter::from_fn(|| jobs.try_recv().ok())) {
            job.tell(Err(DeliveryError::retry("not_connected", &*reason)));
        }
        state.send_replace(State::Down(reason));
        tokio::time::sleep(backoff(failures, rand::random())).await;
        failures += 1;
    }
}

/// The wait before another try: doubled with every failure, and between half and all of that. `jitter` is in 0..1.
fn backoff(failures: u32, jitter: f64) -> Duration {
    let (first, longest) = BACKOFF;
    let wait = first.saturating_mul(2_u32.saturating_pow(failures)).min(longest);
    wait.mul_f64(0.5 + jitter / 2.0)
}

/// Knows how to connect.
pub(super) struct Dialer {
    name: String,
    urls: Vec<AmqpUrl>,
    /// The URL to try first: the last one that worked.
    first: usize,
    tls: Option<Arc<RustlsConnector>>,
    declare: Option<Declare>,
    unsaid: Unsaid,
}

type Dialed = (Arc<Session>, Channel);

impl Dialer {
    /// # Errors
    ///
    /// A certificate that cannot be used.
    pub(super) fn new(name: &str, config: &Config) -> Result<Self, BuildError> {
        let tls = config.urls.iter().any(AmqpUrl::is_tls).then(|| connector(config)).transpose()?;
        let (urls, declare, unsaid) = (config.urls.clone(), config.declare.clone(), config.unsaid.clone());
        Ok(Self { name: name.to_owned(), urls, first: 0, tls: tls.map(Arc::new), declare, unsaid })
    }

    fn url(&self) -> String {
        self.urls.get(self.first).map(ToString::to_string).unwrap_or_default()
    }

    /// Tries every URL once. The error says what became of each.
    async fn dial(&mut self) -> Result<Dialed, String> {
        let mut reasons = Vec::new();
        for step in 0..self.urls.len() {
            let position = (self.first + step) % self.urls.len();
            let Some(url) = self.urls.get(position) else { continue };
            match timeout(CONNECT_TIMEOUT, self.dial_one(&url.0)).await {
                Ok(Ok(dialed)) => {
                    self.first = position;
                    return Ok(dialed);
                }
                Ok(Err(error)) => reasons.push(format!("{url}: {}", self.unsaid.describe(&error))),
                Err(_elapsed) => reasons.push(format!("{url}: no answer")),
            }
        }
        Err(format!("cannot connect: {}", reasons.join("; ")))
    }

    async fn dial_one(&self, uri: &AMQPUri) -> lapin::Result<Dialed> {
        let cut = Cut::default();
        let properties =
            ConnectionProperties::default().with_connection_name(format!("engage-relay/{}", self.name).into());
        let (socket, tls) = (Arc::clone(&cut.0), self.tls.clone());
        let connect = Connection::connector(
            uri.clone(),
            lapin::runtime::default_runtime()?,
            async move |uri, runtime| {
                let plain = AMQPUri { scheme: AMQPScheme::AMQP, ..uri.clone() };
                let connect = plain.connect_with_config_async(TLSConfig::default(), &runtime);
                let stream = timeout(CONNECT_TIMEOUT, connect).await.map_err(std::io::Error::from)??;
                if let AsyncTcpStream::Plain(stream) = &stream {
                    socket.arm(stream.get_ref().as_fd().try_clone_to_owned()?);
                }
                Ok(match (uri.scheme, &tls) {
                    (AMQPScheme::AMQPS, Some(tls)) => stream.into_rustls(tls, &uri.authority.host).await?,
                    (AMQPScheme::AMQPS | AMQPScheme::AMQP, _) => stream,
                })
            },
            properties,
        );
        let connection = connect.await?;
        let channel = confirm_channel(&connection).await?;
        let mut exchanges = HashSet::new();
        if let Some(Declare { exchange, kind, durable }) = &self.declare {
            let options = ExchangeDeclareOptions { durable: *durable, ..Default::default() };
            channel.exchange_declare(short(exchange), kind.clone(), options, FieldTable::default()).await?;
            exchanges.insert(exchange.clone());
        }
        let (looking, unsaid) = (tokio::sync::Mutex::new(()), self.unsaid.clone());
        let (exchanges, kept) = (exchanges.into(), channel.clone());
        let (missing, refusals, worn) = (Mutex::default(), AtomicUsize::new(0), Notify::new());
        let session =
            Session { connection, unsaid, exchanges, missing, looking, refusals, worn, _channel: kept, _cut: cut };
        Ok((Arc::new(session), channel))
    }
}

/// Opens a channel on which the broker confirms messages.
async fn confirm_channel(connection: &Connection) -> lapin::Result<Channel> {
    let channel = connection.create_channel().await?;
    channel.confirm_select(ConfirmSelectOptions::default()).await?;
    Ok(channel)
}

/// What trust and which identity to connect with.
pub(super) fn connector(config: &Config) -> Result<RustlsConnector, BuildError> {
    fn failed(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> BuildError {
        BuildError::Client(error.into())
    }
    let pem = config.tls.load()?;
    let mut tls = match &pem.ca {
        Some(_) => RustlsConnectorConfig::default(),
        None => RustlsConnectorConfig::new_with_native_certs().map_err(failed)?,
    };
    let certificates = |pem: &str| CertificateDer::pem_slice_iter(pem.as_bytes()).collect::<Result<Vec<_>, _>>();
    if let Some(ca) = &pem.ca {
        tls.add_parsable_certificates(certificates(ca).map_err(failed)?);
    }
    match &pem.identity {
        Some((cert, key)) => {
            let key = PrivateKeyDer::from_pem_slice(key.as_bytes()).map_err(failed)?;
            tls.connector_with_single_cert(certificates(cert).map_err(failed)?, key).map_err(failed)
        }
        None => tls.connector_with_no_client_auth().map_err(failed),
    }
}

/// Shuts the connection's socket down when it is dropped. lapin runs each connection in a thread of its own, which only
/// ends when its socket does: a broker that accepts connections but never says a word, or one that blocks publishers
/// while we close, would otherwise leave a thread behind each time.
#[derive(Default)]
struct Cut(Arc<Socket>);

#[derive(Default)]
struct Socket {
    handle: Mutex<Option<OwnedFd>>,
    cut: AtomicBool,
}

impl Socket {
    /// Hands the socket over to be shut down, which happens at once where its [`Cut`] was dropped already.
    fn arm(&self, handle: OwnedFd) {
        *self.handle.lock().unwrap_or_else(PoisonError::into_inner) = Some(handle);
        if self.cut.load(Ordering::SeqCst) {
            self.shut_down();
        }
    }

    fn shut_down(&self) {
        let handle = self.handle.lock().unwrap_or_else(PoisonError::into_inner).take();
        // An error means that the connection has ended already.
        drop(handle.map(|handle| std::net::TcpStream::from(handle).shutdown(std::net::Shutdown::Both)));
    }
}

impl Drop for Cut {
    fn drop(&mut self) {
        self.0.cut.store(true, Ordering::SeqCst);
        self.0.shut_down();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits() {
        fn check(failures: u32, jitter: f64, expected_ms: u64) {
            assert_eq!(backoff(failures, jitter), Duration::from_millis(expected_ms), "{failures}");
        }
        check(0, 0.0, 100);
        check(0, 1.0, 200);
        check(1, 1.0, 400);
        check(4, 0.0, 1600);
        check(5, 1.0, 5000);
        check(u32::MAX, 0.0, 2500);
    }
}
