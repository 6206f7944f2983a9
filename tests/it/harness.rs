//! What the tests stand on: the program as a child process, HTTP clients that can misbehave, and an HTTP server that
//! deliveries arrive at.
//!
//! Nothing here sleeps to synchronise: every wait is for a condition, ends at a deadline, and then says what it was
//! waiting for.

use std::collections::BTreeMap;
use std::future::{Future, pending};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Output, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use http::{HeaderMap, Method, Request, Response, Uri};
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper::client::conn::{http1, http2};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt as _, AsyncRead, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::process::{Child, Command};
use tokio::task::JoinHandle;

/// How long a wait may take: long, since it only passes where something is wrong.
pub(crate) const DEADLINE: Duration = Duration::from_secs(120);
/// Where webhooks are posted.
pub(crate) const PATH: &str = "/webhooks/engage";
/// The header that carries the token, and the token, unless a test sets others.
pub(crate) const TOKEN: (&str, &str) = ("x-auth-token", "a-token-of-the-tests");
/// How often a condition is looked at.
const POLL: Duration = Duration::from_millis(10);

/// The settings of a relay, in a directory of its own, and what can be run with them.
#[derive(Clone)]
pub(crate) struct Setup {
    dir: Arc<TempDir>,
    env: BTreeMap<String, String>,
    wrapper: Vec<String>,
}

impl Setup {
    /// Settings for tests, with these rules.
    pub(crate) fn new(routes: &str) -> Self {
        let dir = Arc::new(TempDir::new().unwrap());
        std::fs::write(dir.path().join("routes.toml"), routes).unwrap();
        let env = [
            ("PATH", &*std::env::var("PATH").unwrap_or_default()),
            ("RELAY_INGRESS__LISTEN", "127.0.0.1:0"),
            ("RELAY_INGRESS__AUTH__TOKENS", &format!("[{{name=\"test\",value=\"{}\"}}]", TOKEN.1)),
            ("RELAY_ADMIN__LISTEN", "127.0.0.1:0"),
            ("RELAY_SHUTDOWN__DELAY", "0s"),
            ("RELAY_TELEMETRY__LOG_FORMAT", "json"),
        ];
        let env = env.map(|(name, value)| (name.to_owned(), value.to_owned())).into();
        Self { dir, env, wrapper: Vec::new() }
    }

    /// With this environment variable.
    pub(crate) fn env(mut self, name: &str, value: impl Into<String>) -> Self {
        self.env.insert(name.to_owned(), value.into());
        self
    }

    /// Without this environment variable.
    pub(crate) fn without(mut self, name: &str) -> Self {
        self.env.remove(name);
        self
    }

    /// Started by another program, which must replace itself by it (`strace -D …`).
    pub(crate) fn wrapped<const N: usize>(mut self, command: [&str; N]) -> Self {
        self.wrapper = command.map(str::to_owned).into();
        self
    }

    /// Where it runs: `routes.toml` is here, and `data`.
    pub(crate) fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// A file beside `routes.toml`.
    pub(crate) fn file(&self, name: &str, content: &str) -> PathBuf {
        let path = self.dir().join(name);
        std::fs::write(&path, content).unwrap();
        path
    }

    pub(crate) fn command(&self, arguments: &[&str]) -> Command {
        let program = env!("CARGO_BIN_EXE_engage-relay");
        let mut line = self.wrapper.iter().map(String::as_str).chain([program]).chain(arguments.iter().copied());
        let mut command = Command::new(line.next().unwrap());
        command.args(line).env_clear().envs(&self.env).current_dir(self.dir()).kill_on_drop(true);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    /// Runs a command to its end.
    pub(crate) async fn run(&self, arguments: &[&str], stdin: &str) -> Done {
        let mut child = self.command(arguments).spawn().unwrap();
        let mut input = child.stdin.take().unwrap();
        let output = async {
            // A command that does not read its input may have ended.
            drop(input.write_all(stdin.as_bytes()).await);
            drop(input);
            child.wait_with_output().await.unwrap()
        };
        let Output { status, stdout, stderr } = within(&format!("the end of {arguments:?}"), output).await;
        let [stdout, stderr] = [stdout, stderr].map(|text| String::from_utf8(text).unwrap());
        Done { code: status.code(), stdout, stderr }
    }

    /// Starts the relay, and returns when it takes connections.
    pub(crate) async fn start(&self) -> Relay {
        let mut child = self.command(&[]).spawn().unwrap();
        let stdout = Lines::read(child.stdout.take().unwrap());
        let stderr = Lines::read(child.stderr.take().unwrap());
        let nowhere = SocketAddr::from(([0; 4], 0));
        let mut relay = Relay { setup: self.clone(), child, stdout, stderr, address: nowhere, admin: nowhere };
        let listening = async {
            loop {
                let log = relay.logged("accepting webhooks");
                if let Some(line) = log.first() {
                    return ["listen", "admin"].map(|field| line[field].as_str().unwrap().parse().unwrap());
                }
                if let Some(status) = relay.child.try_wait().unwrap() {
                    panic!("the relay did not start ({status}): {:#?}", relay.stderr.all());
                }
                tokio::time::sleep(POLL).await;
            }
        };
        [relay.address, relay.admin] = within("the relay to listen", listening).await;
        relay
    }
}

/// What a command that has ended left.
#[derive(Debug)]
pub(crate) struct Done {
    pub(crate) code: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

/// The lines that a process writes.
struct Lines {
    seen: Arc<Mutex<Vec<String>>>,
    reader: JoinHandle<()>,
}

/// How many lines of a relay's log are shown where a test has failed.
const LAST_LINES: usize = 40;

impl Lines {
    fn read(pipe: impl AsyncRead + Unpin + Send + 'static) -> Self {
        let seen = Arc::<Mutex<Vec<String>>>::default();
        let lines = Arc::clone(&seen);
        let reader = tokio::spawn(async move {
            let mut pipe = BufReader::new(pipe).lines();
            while let Ok(Some(line)) = pipe.next_line().await {
                lock(&lines).push(line);
            }
        });
        Self { seen, reader }
    }

    fn all(&self) -> Vec<String> {
        lock(&self.seen).clone()
    }
}

/// A running relay. Dropping it kills it.
pub(crate) struct Relay {
    setup: Setup,
    child: Child,
    stdout: Lines,
    stderr: Lines,
    address: SocketAddr,
    admin: SocketAddr,
}

impl Drop for Relay {
    /// What it has said last, where a test has failed.
    fn drop(&mut self) {
        if std::thread::panicking() {
            let log = self.stderr.all();
            let last = log.iter().skip(log.len().saturating_sub(LAST_LINES));
            last.for_each(|line| eprintln!("the relay at {}: {line}", self.address));
        }
    }
}

impl Relay {
    /// Where it listens.
    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// Where its admin side listens.
    pub(crate) fn admin(&self) -> SocketAddr {
        self.admin
    }

    /// Asks its admin side.
    pub(crate) async fn ask(&self, request: Request<Full<Bytes>>) -> Answer {
        Client::http1(self.admin).await.send(request).await
    }

    /// What its admin side says there; it must be a 200.
    pub(crate) async fn get(&self, path: &str) -> Value {
        self.ask(Request::get(path).header("host", self.admin.to_string()).body(Full::default()).unwrap()).await.json()
    }

    /// Posts JSON to its admin side; the answer must be a 200.
    pub(crate) async fn operate(&self, path: &str, body: &Value) -> Value {
        let request =
            Request::post(path).header("host", self.admin.to_string()).header("content-type", "application/json");
        self.ask(request.body(Full::new(body.to_string().into())).unwrap()).await.json()
    }

    /// What a sink is doing.
    pub(crate) async fn sink(&self, name: &str) -> Value {
        self.get(&format!("/api/v1/sinks/{name}")).await
    }

    /// Waits until a sink is as it should be.
    pub(crate) async fn sink_is(&self, name: &str, what: &str, condition: impl Fn(&Value) -> bool) -> Value {
        self.shows(&format!("/api/v1/sinks/{name}"), &format!("the sink {name} {what}"), condition).await
    }

    /// Waits until the relay's status is as it should be.
    pub(crate) async fn status_is(&self, what: &str, condition: impl Fn(&Value) -> bool) -> Value {
        self.shows("/api/v1/status", what, condition).await
    }

    async fn shows(&self, path: &str, what: &str, condition: impl Fn(&Value) -> bool) -> Value {
        let mut found = Value::Null;
        eventually(what, async || {
            found = self.get(path).await;
            condition(&found)
        })
        .await;
        found
    }

    /// Runs a command that talks to it.
    pub(crate) async fn command(&self, arguments: &[&str]) -> Done {
        let admin = format!("http://{}", self.admin);
        self.setup.run(&[arguments, &["--admin", &admin]].concat(), "").await
    }

    /// What a command that must succeed prints with `--json`.
    pub(crate) async fn command_json(&self, arguments: &[&str]) -> Value {
        let done = self.command(&[arguments, &["--json"]].concat()).await;
        assert_eq!(done.code, Some(0), "{arguments:?}: {done:?}");
        serde_json::from_str(&done.stdout).unwrap_or_else(|error| panic!("{arguments:?}: {error}: {done:?}"))
    }

    /// Where it takes webhooks.
    pub(crate) fn url(&self) -> String {
        format!("http://{}{PATH}", self.address)
    }

    /// Writes other rules to its file.
    pub(crate) fn change_rules(&self, rules: &str) {
        self.setup.file("routes.toml", rules);
    }

    /// Writes other settings to its file.
    pub(crate) fn change_settings(&self, settings: &str) {
        self.setup.file("relay.toml", settings);
    }

    /// The process.
    pub(crate) fn pid(&self) -> Pid {
        Pid::from_raw(i32::try_from(self.child.id().unwrap()).unwrap()).unwrap()
    }

    /// What it has logged so far: one JSON object a line.
    pub(crate) fn log(&self) -> Vec<Value> {
        self.stderr
            .all()
            .iter()
            .map(|line| serde_json::from_str(line).unwrap_or_else(|_| line.as_str().into()))
            .collect()
    }

    /// The log lines with this message.
    pub(crate) fn logged(&self, message: &str) -> Vec<Value> {
        self.log().into_iter().filter(|line| line["message"] == message).collect()
    }

    /// What it has written to standard output so far.
    pub(crate) fn stdout(&self) -> Vec<String> {
        self.stdout.all()
    }

    /// Sends it a signal.
    pub(crate) fn signal(&self, signal: Signal) {
        kill_process(self.pid(), signal).unwrap();
    }

    /// Waits for its end, and for all that it wrote.
    pub(crate) async fn ended(&mut self) -> ExitStatus {
        let ended = async {
            let status = self.child.wait().await.unwrap();
            (&mut self.stdout.reader).await.unwrap();
            (&mut self.stderr.reader).await.unwrap();
            status
        };
        within("the relay's end", ended).await
    }

    /// Ends it by SIGTERM; the exit status must be 0.
    pub(crate) async fn stop(mut self) -> Vec<Value> {
        self.signal(Signal::TERM);
        let status = self.ended().await;
        assert_eq!(status.code(), Some(0), "{:#?}", self.log());
        self.log()
    }

    /// Kills it (SIGKILL); the same settings and directory can be started again.
    pub(crate) async fn kill(mut self) -> Setup {
        self.signal(Signal::KILL);
        self.ended().await;
        self.setup.clone()
    }

    /// Posts a webhook on a connection of its own.
    pub(crate) async fn post(&self, body: impl Into<Bytes>) -> Answer {
        self.send(webhook(body)).await
    }

    /// Sends a request on a connection of its own.
    pub(crate) async fn send(&self, request: Request<Full<Bytes>>) -> Answer {
        Client::http1(self.address).await.send(request).await
    }
}

/// A webhook with the right token.
pub(crate) fn webhook(body: impl Into<Bytes>) -> Request<Full<Bytes>> {
    let request = Request::post(PATH).header(TOKEN.0, TOKEN.1).header("host", "relay");
    request.body(Full::new(body.into())).unwrap()
}

/// A webhook's body, as Engage sends them, for message `number`.
pub(crate) fn event(number: u32, status: &str) -> String {
    format!(
        "{{\"message_id\":\"wamid.{number:08}\",\"message_status\":\"{status}\",\"channel\":{{\"channel_type\":\"Whatsapp\",\
         \"name\":\"Channel Name\",\"sender_id\":\"5491122223333\"}},\"campaign\":{{\"id\":\"074116ff-76f3-47b7-8be2-92f465718a3e\",\
         \"name\":\"campaign name\"}},\"event_name\":\"msg_status\",\"event_timestamp\":\"1687548944\",\
         \"recipient\":{{\"id\":\"5411{number:08}\"}}}}"
    )
}

/// An answer to a request.
#[derive(Debug, Clone)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Bytes,
}

impl Answer {
    /// The ids of the events that were accepted.
    pub(crate) fn ids(&self) -> Vec<String> {
        assert_eq!(self.status, 200, "{self:?}");
        let body: Value = serde_json::from_slice(&self.body).unwrap();
        body["ids"].as_array().unwrap().iter().map(|id| id.as_str().unwrap().to_owned()).collect()
    }

    /// The content of a 200.
    pub(crate) fn json(&self) -> Value {
        assert_eq!(self.status, 200, "{self:?}");
        serde_json::from_slice(&self.body).unwrap()
    }

    /// A header's value, or nothing.
    pub(crate) fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", |value| value.to_str().unwrap())
    }
}

/// A well-behaved connection, for one request after the other, and with HTTP/2 several at once.
#[derive(Clone)]
pub(crate) enum Client {
    Http1(Arc<tokio::sync::Mutex<http1::SendRequest<Full<Bytes>>>>),
    Http2(http2::SendRequest<Full<Bytes>>, SocketAddr),
}

impl Client {
    pub(crate) async fn http1(address: SocketAddr) -> Self {
        Self::try_http1(address).await.unwrap()
    }

    /// A connection for HTTP/1.1, if anybody takes it.
    pub(crate) async fn try_http1(address: SocketAddr) -> Option<Self> {
        let stream = TokioIo::new(within("a connection", TcpStream::connect(address)).await.ok()?);
        let (sender, connection) = within("HTTP/1 handshake", http1::handshake(stream)).await.ok()?;
        tokio::spawn(connection);
        Some(Self::Http1(Arc::new(tokio::sync::Mutex::new(sender))))
    }

    /// Without asking first: prior knowledge.
    pub(crate) async fn http2(address: SocketAddr) -> Self {
        let handshake = http2::handshake(TokioExecutor::new(), connect(address).await);
        let (sender, connection) = within("HTTP/2 handshake", handshake).await.unwrap();
        tokio::spawn(connection);
        Self::Http2(sender, address)
    }

    pub(crate) async fn send(&self, request: Request<Full<Bytes>>) -> Answer {
        self.try_send(request).await.unwrap()
    }

    pub(crate) async fn try_send(&self, mut request: Request<Full<Bytes>>) -> hyper::Result<Answer> {
        let exchange = async {
            let response = match self {
                Self::Http1(sender) => {
                    let mut sender = sender.lock().await;
                    sender.ready().await?;
                    sender.send_request(request).await?
                }
                Self::Http2(sender, address) => {
                    request.headers_mut().remove("host");
                    *request.uri_mut() = format!("http://{address}{}", request.uri()).parse().unwrap();
                    sender.clone().send_request(request).await?
                }
            };
            let (head, body) = response.into_parts();
            let body = body.collect().await?.to_bytes();
            Ok(Answer { status: head.status.as_u16(), headers: head.headers, body })
        };
        within("an answer", exchange).await
    }
}

async fn connect(address: SocketAddr) -> TokioIo<TcpStream> {
    TokioIo::new(within("a connection", TcpStream::connect(address)).await.unwrap())
}

/// A connection on which bytes are sent as the test says, right or wrong.
pub(crate) struct Raw(BufReader<TcpStream>);

impl Raw {
    pub(crate) async fn connect(address: SocketAddr) -> Self {
        let stream = within("a connection", TcpStream::connect(address)).await.unwrap();
        stream.set_nodelay(true).unwrap();
        Self(BufReader::new(stream))
    }

    pub(crate) async fn write(&mut self, bytes: impl AsRef<[u8]>) {
        self.try_write(bytes).await.unwrap();
    }

    /// Writes, where the other side may have closed.
    pub(crate) async fn try_write(&mut self, bytes: impl AsRef<[u8]>) -> std::io::Result<()> {
        within("bytes to be taken", self.0.get_mut().write_all(bytes.as_ref())).await
    }

    /// The next HTTP/1.1 answer.
    pub(crate) async fn answer(&mut self) -> Answer {
        self.try_answer().await.unwrap()
    }

    /// The next HTTP/1.1 answer, where the other side may close instead.
    pub(crate) async fn try_answer(&mut self) -> std::io::Result<Answer> {
        within("an answer", async {
            let mut line = String::new();
            if self.0.read_line(&mut line).await? == 0 {
                return Err(std::io::ErrorKind::UnexpectedEof.into());
            }
            let status = line.split(' ').nth(1).unwrap().parse().unwrap();
            let mut headers = HeaderMap::new();
            loop {
                line.clear();
                self.0.read_line(&mut line).await?;
                let Some((name, value)) = line.trim_end().split_once(": ") else { break };
                headers.append(http::HeaderName::try_from(name).unwrap(), value.parse().unwrap());
            }
            let length = headers.get("content-length").map_or(0, |length| length.to_str().unwrap().parse().unwrap());
            let mut body = BytesMut::zeroed(length);
            self.0.read_exact(&mut body).await?;
            Ok(Answer { status, headers, body: body.freeze() })
        })
        .await
    }

    /// Waits until the other side has closed, and returns what it said before.
    pub(crate) async fn closed(&mut self) -> Vec<u8> {
        let mut rest = Vec::new();
        // A reset is an end too.
        drop(within("the connection's end", self.0.read_to_end(&mut rest)).await);
        rest
    }
}

/// What a [`Receiver`] is to do with a request.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Reply {
    /// Answer with this status.
    Status(u16),
    /// Answer with this status, after a while.
    After(Duration, u16),
    /// Answer 429, with this `Retry-After`.
    Later(&'static str),
    /// Keep the connection open and say nothing.
    Never,
    /// Close the connection.
    Close,
}

/// A request that a [`Receiver`] got.
#[derive(Clone, Debug)]
pub(crate) struct Received {
    pub(crate) method: Method,
    pub(crate) uri: Uri,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Bytes,
    pub(crate) at: Instant,
}

impl Received {
    /// A header's value, or nothing.
    pub(crate) fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", |value| value.to_str().unwrap())
    }

    /// The event's id.
    pub(crate) fn id(&self) -> &str {
        self.header("webhook-id")
    }
}

type Answering = dyn Fn(&Received) -> Reply + Send + Sync;

/// An HTTP server that deliveries arrive at. Ends with the test's runtime.
pub(crate) struct Receiver {
    address: SocketAddr,
    seen: Arc<Mutex<Vec<Received>>>,
}

impl Receiver {
    /// Keeps every request, and answers as `answer` says.
    pub(crate) async fn start(answer: impl Fn(&Received) -> Reply + Send + Sync + 'static) -> Self {
        let seen = Arc::<Mutex<Vec<Received>>>::default();
        let record = Arc::clone(&seen);
        let recording = move |request: &Received| {
            lock(&record).push(request.clone());
            answer(request)
        };
        Self { address: Self::serve(Arc::new(recording)).await, seen }
    }

    /// Keeps nothing: for many or large requests.
    pub(crate) async fn start_without_memory(answer: impl Fn(&Received) -> Reply + Send + Sync + 'static) -> Self {
        Self { address: Self::serve(Arc::new(answer)).await, seen: Arc::default() }
    }

    /// Accepts everything.
    pub(crate) async fn accepting() -> Self {
        Self::start(|_| Reply::Status(204)).await
    }

    async fn serve(answering: Arc<Answering>) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move {
            loop {
                let Ok((stream, _)) = listener.accept().await else { continue };
                let answering = Arc::clone(&answering);
                let service = service_fn(move |request| answer(request, Arc::clone(&answering)));
                tokio::spawn(async move {
                    // The relay may be killed in the middle of a request.
                    drop(
                        auto::Builder::new(TokioExecutor::new()).serve_connection(TokioIo::new(stream), service).await,
                    );
                });
            }
        });
        address
    }

    /// A URL of this server.
    pub(crate) fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    /// Rules that send every event here.
    pub(crate) fn routes(&self) -> String {
        http_routes(&self.url("/"))
    }

    /// What has come so far.
    pub(crate) fn received(&self) -> Vec<Received> {
        lock(&self.seen).clone()
    }

    /// Waits until `count` requests have come, and returns them.
    pub(crate) async fn wait_for(&self, count: usize) -> Vec<Received> {
        eventually(&format!("{count} deliveries"), async || lock(&self.seen).len() >= count).await;
        self.received()
    }
}

async fn answer(request: Request<Incoming>, answering: Arc<Answering>) -> Result<Response<Full<Bytes>>, Refused> {
    let (head, body) = request.into_parts();
    let body = body.collect().await.map_err(|_| Refused)?.to_bytes();
    let received = Received { method: head.method, uri: head.uri, headers: head.headers, body, at: Instant::now() };
    let mut retry_after = None;
    let status = match answering(&received) {
        Reply::Status(status) => status,
        Reply::Later(time) => {
            retry_after = Some(time);
            429
        }
        Reply::After(time, status) => {
            tokio::time::sleep(time).await;
            status
        }
        Reply::Never => pending().await,
        Reply::Close => return Err(Refused),
    };
    let response = Response::builder().status(status);
    let response = retry_after.into_iter().fold(response, |response, time| response.header("retry-after", time));
    response.body(Full::default()).map_err(|_| Refused)
}

/// Why a [`Receiver`] closes a connection.
#[derive(Debug, thiserror::Error)]
#[error("closed on purpose")]
struct Refused;

/// Rules that send every event to one HTTP sink.
pub(crate) fn http_routes(url: &str) -> String {
    format!(
        "[sinks.http]\ntype = \"http\"\nurl = \"{url}\"\ntimeout = \"2s\"\n[[routes]]\nname = \"all\"\nto = [\"http\"]\n"
    )
}

/// Waits for a future, but not for ever.
pub(crate) async fn within<T>(what: &str, future: impl Future<Output = T>) -> T {
    match tokio::time::timeout(DEADLINE, future).await {
        Ok(output) => output,
        Err(_) => panic!("waited {DEADLINE:?} for {what}"),
    }
}

/// Waits for a condition, but not for ever.
pub(crate) async fn eventually(what: &str, mut condition: impl AsyncFnMut() -> bool) {
    let wait = async {
        while !condition().await {
            tokio::time::sleep(POLL).await;
        }
    };
    within(what, wait).await;
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
