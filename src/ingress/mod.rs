//! The ingress: the HTTP server that takes webhooks.
//!
//! One acceptor hands each connection to the core with the fewest; each core is a thread with a runtime of its own and
//! a batch of the journal, which it submits whenever it is about to park. A request is answered 200 only when all of its
//! events are durable.
//!
//! Every connection is limited in time and size, and holds nothing but itself: see [`Config`]. The ingress knows the
//! journal's way in, and nothing of sinks.

mod access;
mod auth;
mod connection;
mod dedup;
mod handler;
mod metrics;
mod origin;
mod signed;

use std::io;
use std::net::{IpAddr, SocketAddr, TcpStream as StdStream};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime};

use bytesize::ByteSize;
use percent_encoding::{AsciiSet, CONTROLS, utf8_percent_encode};
use prometheus::IntGauge;
use serde::Deserialize;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch};
use tracing::{debug, warn};

pub use access::{Access, AccessError, Gate};
pub use auth::{AuthConfig, AuthError, TokenConfig, generated_token_path, problem_of_token};
pub use metrics::Metrics;
pub use signed::{Scheme, SignatureConfig, Signed};

use crate::journal::{Appender, Start, View};
use crate::telemetry::{Throttle, Traces};
use crate::tls;
use connection::Limits;
use dedup::Dedup;
use handler::Handler;

/// How many accepted connections may wait for a core to take them.
const HANDOVER: usize = 128;
/// How many connections the kernel should keep until they are accepted; it may allow fewer.
pub const BACKLOG: u32 = 4096;
/// What RFC 3986 has clients percent-encode in a path. A `%` may begin an escape.
const NOT_IN_PATHS: &AsciiSet = &CONTROLS
    .add(b' ')
    .add(b'"')
    .add(b'#')
    .add(b'<')
    .add(b'>')
    .add(b'?')
    .add(b'[')
    .add(b'\\')
    .add(b']')
    .add(b'^')
    .add(b'`')
    .add(b'{')
    .add(b'|')
    .add(b'}');
/// The most that `max_connections` may be, and the longest time that may be given for anything.
const MAX_CONNECTIONS: usize = 1_000_000;
const MAX_TIME: Duration = Duration::from_hours(7 * 24);
/// How long accepting pauses when the system has no more descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// The `[ingress]` settings.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Address and port.
    pub listen: SocketAddr,
    /// The path of the webhook.
    pub path: String,
    /// The longest body, in bytes; from 1 KiB to 64 MiB.
    pub max_body: ByteSize,
    /// The most connections at once; further ones wait in the kernel.
    pub max_connections: usize,
    /// How long a request's headers may take.
    #[serde(with = "humantime_serde")]
    pub header_timeout: Duration,
    /// How long a request's body may take after its headers.
    #[serde(with = "humantime_serde")]
    pub body_timeout: Duration,
    /// How long a connection may stay without a request.
    #[serde(with = "humantime_serde")]
    pub idle_timeout: Duration,
    /// An event that is sent again within this time is answered, and not stored again.
    #[serde(with = "humantime_serde")]
    pub dedup: Option<Duration>,
    /// By which tokens one may send.
    pub auth: AuthConfig,
    /// How bodies have to be signed, if so.
    pub signature: Option<SignatureConfig>,
    /// The addresses and networks that may send; every one where it is left out.
    pub allow: Option<Vec<String>>,
    /// The addresses and networks whose `x-forwarded-for` is believed.
    pub trusted_proxies: Vec<String>,
    /// TLS for the listener.
    pub tls: Option<tls::Config>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from(([0, 0, 0, 0], 8080)),
            path: "/webhooks/engage".to_owned(),
            max_body: ByteSize::kib(256),
            max_connections: 10_000,
            header_timeout: Duration::from_secs(10),
            body_timeout: Duration::from_secs(10),
            idle_timeout: Duration::from_secs(75),
            dedup: None,
            auth: AuthConfig::default(),
            signature: None,
            allow: None,
            trusted_proxies: Vec::new(),
            tls: None,
        }
    }
}

impl Config {
    /// The settings that have no effect in a running ingress, with the others left out.
    pub fn unchangeable(&self) -> Self {
        let (auth, trusted_proxies) = (AuthConfig::default(), Vec::new());
        Self { auth, trusted_proxies, signature: None, allow: None, tls: None, ..self.clone() }
    }

    /// What is wrong with the settings, without touching any file. Each problem names its setting first.
    pub fn problems(&self) -> Vec<String> {
        let mut problems = Access::problems(self);
        if !is_path(&self.path) {
            problems.push(format!(
                "ingress.path is {:?}; it must begin with / and be percent-encoded as in a URL, such as \"/%C3%A9\" for \"/é\"",
                self.path
            ));
        }
        if !(ByteSize::kib(1)..=ByteSize::mib(64)).contains(&self.max_body) {
            problems.push(format!("ingress.max_body is {}; it must be from 1 KiB to 64 MiB", self.max_body));
        }
        let times = [
            ("header_timeout", self.header_timeout),
            ("body_timeout", self.body_timeout),
            ("idle_timeout", self.idle_timeout),
            ("dedup", self.dedup.unwrap_or(MAX_TIME)),
        ];
        for (name, time) in times {
            if time.is_zero() {
                problems.push(format!("ingress.{name} is 0; give a time such as \"10s\""));
            } else if time > MAX_TIME {
                let (time, max) = (humantime::format_duration(time), humantime::format_duration(MAX_TIME));
                problems.push(format!("ingress.{name} is {time}; it must be at most {max}"));
            }
        }
        if !(1..=MAX_CONNECTIONS).contains(&self.max_connections) {
            problems.push(format!(
                "ingress.max_connections is {}; it must be from 1 to {MAX_CONNECTIONS}",
                self.max_connections
            ));
        }
        problems
    }

    /// The files that [`Access`] is made of besides the settings.
    pub fn files(&self) -> impl Iterator<Item = &Path> {
        self.tls.iter().flat_map(tls::Config::files)
    }
}

/// Whether clients can ask for it: paths are compared as they stand in a request.
fn is_path(text: &str) -> bool {
    let mut escapes = text.split('%').skip(1).map(|escape| escape.bytes().take(2));
    text.starts_with('/')
        && utf8_percent_encode(text, NOT_IN_PATHS).eq([text])
        && escapes.all(|mut digits| digits.len() == 2 && digits.all(|digit| digit.is_ascii_hexdigit()))
}

/// A running ingress: its cores wait for connections.
pub struct Ingress {
    cores: Vec<Core>,
    gate: Gate,
    permits: Arc<Semaphore>,
    stop: watch::Sender<bool>,
    metrics: Metrics,
}

struct Core {
    connections: mpsc::Sender<Connection>,
    load: Arc<AtomicUsize>,
    thread: JoinHandle<()>,
}

/// An accepted connection on its way to a core.
struct Connection {
    stream: StdStream,
    peer: IpAddr,
    _permit: OwnedSemaphorePermit,
    _load: Load,
}

/// Counts a connection among its core's, and among all, for as long as it lives.
struct Load {
    of_core: Arc<AtomicUsize>,
    of_all: IntGauge,
}

impl Load {
    fn new(of_core: &Arc<AtomicUsize>, of_all: &IntGauge) -> Self {
        of_core.fetch_add(1, Ordering::Relaxed);
        of_all.inc();
        Self { of_core: Arc::clone(of_core), of_all: of_all.clone() }
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.of_core.fetch_sub(1, Ordering::Relaxed);
        self.of_all.dec();
    }
}

impl Ingress {
    /// Starts a thread per core. Reads what the journal has of the `dedup` window, if there is one; that blocks.
    ///
    /// # Errors
    ///
    /// Any error of starting threads or their runtimes.
    pub fn start(
        config: &Config,
        access: Access,
        journal: &View,
        cores: usize,
        metrics: Metrics,
        traces: Option<&Traces>,
    ) -> io::Result<Self> {
        let stop = watch::Sender::new(false);
        let gate = Gate::new(access);
        let dedup = config.dedup.map(|window| Arc::new(recall(window, journal, &metrics)));
        let start_core = |index| {
            let (metrics, traces) = (metrics.clone(), traces.cloned());
            let handler = Handler::new(config, gate.clone(), dedup.clone(), journal.appender(), metrics, traces);
            Core::start(index, handler, Limits::new(config), stop.subscribe())
        };
        let cores = (0..cores.max(1)).map(start_core).collect::<io::Result<_>>()?;
        let permits = Arc::new(Semaphore::new(config.max_connections));
        Ok(Self { cores, gate, permits, stop, metrics })
    }

    /// Where to say who may send from now on.
    pub fn gate(&self) -> Gate {
        self.gate.clone()
    }

    /// Accepts connections until dropped. Runs for ever.
    pub async fn accept(&self, listener: TcpListener) {
        let mut warnings = Throttle::default();
        loop {
            let Ok(permit) = Arc::clone(&self.permits).acquire_owned().await else { return };
            match listener.accept().await.and_then(|(stream, peer)| Ok((stream.into_std()?, peer.ip()))) {
                Ok((stream, peer)) => self.hand_over(stream, peer, permit).await,
                Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {
                    debug!(%error, "a connection ended before it was accepted");
                }
                Err(error) => {
                    if let Some(suppressed) = warnings.admit(Instant::now()) {
                        warn!(%error, suppressed, "a connection could not be accepted");
                    }
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }

    async fn hand_over(&self, stream: StdStream, peer: IpAddr, permit: OwnedSemaphorePermit) {
        let fewest = self.cores.iter().min_by_key(|core| core.load.load(Ordering::Relaxed));
        if let Some(core) = fewest {
            let connection =
                Connection { stream, peer, _permit: permit, _load: Load::new(&core.load, &self.metrics.connections) };
            // A core ends only after this: its queue is closed by `stop`.
            drop(core.connections.send(connection).await);
        }
    }

    /// Ends idle connections, lets the others finish the request they are at, and returns when all are closed.
    pub async fn stop(self) {
        self.stop.send_replace(true);
        let threads: Vec<_> = self.cores.into_iter().map(|core| core.thread).collect();
        let joined = tokio::task::spawn_blocking(|| threads.into_iter().for_each(|thread| drop(thread.join())));
        // A panic in there has been reported by its thread.
        drop(joined.await);
    }
}

/// The events of the window that the journal has.
fn recall(window: Duration, journal: &View, metrics: &Metrics) -> Dedup {
    let dedup = Dedup::new(window, metrics.resent());
    let since = SystemTime::now().checked_sub(window).unwrap_or(SystemTime::UNIX_EPOCH);
    let recalled = journal.reader(Start::WrittenSince(since)).and_then(|reader| dedup.recall(reader));
    if let Err(error) = recalled {
        warn!(%error, "not all of the journal could be read; some resent events will be stored again");
    }
    dedup
}

impl Core {
    fn start(index: usize, handler: Handler, limits: Limits, stop: watch::Receiver<bool>) -> io::Result<Self> {
        let (connections, queue) = mpsc::channel(HANDOVER);
        let appender = handler.appender().clone();
        let submit = appender.clone();
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .on_thread_park(move || submit.submit())
            .build()?;
        let run = move || runtime.block_on(serve(queue, Arc::new(handler), limits, appender, stop));
        let thread = std::thread::Builder::new().name(format!("ingress-{index}")).spawn(run)?;
        Ok(Self { connections, load: Arc::default(), thread })
    }
}

/// Serves connections until there are no more to come and all have ended.
async fn serve(
    mut queue: mpsc::Receiver<Connection>,
    handler: Arc<Handler>,
    limits: Limits,
    appender: Appender,
    stop: watch::Receiver<bool>,
) {
    let courier = tokio::spawn(appender.courier());
    // Each connection holds a sender; the channel closes when the last has ended.
    let (open, mut all_closed) = mpsc::channel::<()>(1);
    while let Some(connection) = queue.recv().await {
        let (handler, stop, open) = (Arc::clone(&handler), stop.clone(), open.clone());
        tokio::spawn(async move {
            let Connection { stream, peer, _permit, _load } = connection;
            match TcpStream::from_std(stream) {
                Ok(stream) => connection::serve(stream, peer, handler, limits, stop).await,
                Err(error) => warn!(%error, "a connection could not be taken"),
            }
            drop(open);
        });
    }
    drop(open);
    // Nothing is sent: this waits for the channel's end.
    while all_closed.recv().await.is_some() {}
    courier.abort();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_path_is_one_that_clients_ask_for() {
        let check = |path: &str, good: bool| assert_eq!(is_path(path), good, "{path}");
        for path in ["/", "/webhooks/engage", "/a//b/", "/%C3%A9%2f", "/~a-b_c.d!$&'()*+,;=:@"] {
            check(path, true);
        }
        for path in
            ["", "a", "/a b", "/a?b", "/a#b", "/é", "/a\n", "/a%", "/a%2", "/a%2g", "/%é", "/{a}", "/a\\b", "/[a]"]
        {
            check(path, false);
        }
    }

    #[test]
    fn all_that_is_wrong_is_said() {
        let zero = Duration::ZERO;
        let config = Config {
            path: "x".to_owned(),
            max_body: ByteSize::b(1023),
            max_connections: 0,
            header_timeout: zero,
            body_timeout: zero,
            idle_timeout: zero,
            dedup: Some(zero),
            allow: Some(vec![]),
            auth: AuthConfig::Tokens { header: String::new(), tokens: vec![] },
            ..Config::default()
        };
        assert_eq!(config.problems().len(), 9, "{:?}", config.problems());
    }

    #[test]
    fn limits_have_limits() {
        let check = |config: Config, expected: &[&str]| assert_eq!(config.problems(), expected);
        let of = |connections, time| Config {
            max_connections: connections,
            header_timeout: time,
            body_timeout: time,
            idle_timeout: time,
            dedup: Some(time),
            ..Config::default()
        };
        check(of(MAX_CONNECTIONS, MAX_TIME), &[]);
        let long = MAX_TIME + Duration::from_nanos(1);
        check(
            of(MAX_CONNECTIONS + 1, long),
            &[
                "ingress.header_timeout is 7days 1ns; it must be at most 7days",
                "ingress.body_timeout is 7days 1ns; it must be at most 7days",
                "ingress.idle_timeout is 7days 1ns; it must be at most 7days",
                "ingress.dedup is 7days 1ns; it must be at most 7days",
                "ingress.max_connections is 1000001; it must be from 1 to 1000000",
            ],
        );
    }
}
