//! The connections of the admin side: HTTP/1.1 and HTTP/2, in cleartext or over TLS, with a limit on every time that one
//! may take without a request. What requests take is limited where they are read.

use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use axum::Router;
use http_body_util::BodyExt as _;
use hyper::service::{Service as _, service_fn};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto::Builder;
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::time::{sleep, timeout};
use tracing::{debug, warn};

use super::Gate;
use crate::tls;

/// The most connections at once.
const MAX_CONNECTIONS: usize = 1024;
/// How long a handshake may take, and then a request's headers.
const HEADER_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a connection may have no request, or take nothing of an answer, after its first request.
const IDLE_TIMEOUT: Duration = Duration::from_secs(60);
/// The same where others wait for its place, and while it is being closed. Streams say something more often.
const SHORT_IDLE_TIMEOUT: Duration = Duration::from_secs(3);
/// How long accepting pauses when the system has no more descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Accepts connections for ever.
pub(super) async fn serve(listener: TcpListener, router: Arc<ArcSwap<Router>>, gate: Gate) {
    let permits = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let crowded = watch::Sender::new(false);
    loop {
        // Probes must not wait for those who say nothing.
        crowded.send_replace(permits.available_permits() == 0);
        let Ok(permit) = Arc::clone(&permits).acquire_owned().await else { return };
        crowded.send_replace(false);
        match listener.accept().await {
            Ok((stream, _)) => {
                let (router, tls) = (Arc::clone(&router), gate.load().tls.clone());
                tokio::spawn(serve_connection(stream, router, tls, Place::new(permit, crowded.subscribe())));
            }
            Err(error) => {
                warn!(%error, "a connection to the admin side could not be accepted");
                sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

async fn serve_connection(stream: TcpStream, router: Arc<ArcSwap<Router>>, tls: Option<tls::Server>, place: Place) {
    let Some(tls) = tls else { return serve_http(stream, router, place).await };
    let accepted = tokio::select! {
        accepted = tls.accept(stream) => accepted,
        () = place.idle(HEADER_TIMEOUT) => return debug!("a TLS handshake of the admin side took too long"),
    };
    match accepted {
        Ok(stream) => serve_http(stream, router, place).await,
        Err(error) => debug!(%error, "no TLS with a client of the admin side"),
    }
}

async fn serve_http(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    router: Arc<ArcSwap<Router>>,
    place: Place,
) {
    let mut builder = Builder::new(TokioExecutor::new());
    builder.http1().timer(TokioTimer::new()).header_read_timeout(HEADER_TIMEOUT);
    builder.http2().timer(TokioTimer::new());
    let service = service_fn(|request| {
        let answering = Answering::new(&place);
        let answer = TowerToHyperService::new(Router::clone(&router.load())).call(request);
        async move {
            let requests = answering.0.clone();
            let answer = answer.await;
            drop(answering);
            // An answer that goes on for ever keeps its connection as long as somebody takes it.
            let taken = move |frame| {
                requests.send_modify(|_| ());
                frame
            };
            answer.map(|answer| answer.map(|body| body.map_frame(taken)))
        }
    });
    let mut connection = pin!(builder.serve_connection(TokioIo::new(stream), service));
    let served = tokio::select! {
        // First the one that has to see what the other does.
        biased;
        () = place.idle(HEADER_TIMEOUT) => {
            // A request that is on its way is answered still.
            connection.as_mut().graceful_shutdown();
            tokio::select! {
                served = connection => served,
                () = place.idle(SHORT_IDLE_TIMEOUT) => Ok(()),
            }
        }
        served = &mut connection => served,
    };
    if let Err(error) = served {
        debug!(%error, "a connection of the admin side ended");
    }
}

/// A connection's place among those that there may be.
struct Place {
    /// How many requests are being answered. It is also written when some of an answer was taken.
    requests: watch::Sender<usize>,
    /// Whether others wait for a place.
    crowded: watch::Receiver<bool>,
    _permit: OwnedSemaphorePermit,
}

impl Place {
    fn new(permit: OwnedSemaphorePermit, crowded: watch::Receiver<bool>) -> Self {
        Self { requests: watch::Sender::new(0), crowded, _permit: permit }
    }

    /// Returns when the connection has done nothing for too long: for `limit` before anything happens.
    async fn idle(&self, mut limit: Duration) {
        let (mut requests, mut crowded) = (self.requests.subscribe(), self.crowded.clone());
        loop {
            let too_long = async {
                sleep(SHORT_IDLE_TIMEOUT).await;
                let rest = limit.saturating_sub(SHORT_IDLE_TIMEOUT);
                drop(timeout(rest, crowded.wait_for(|crowded| *crowded)).await);
            };
            tokio::select! {
                biased;
                _ = requests.changed() => limit = IDLE_TIMEOUT,
                () = too_long => if *requests.borrow() == 0 { return },
            }
        }
    }
}

/// A request that is being answered, until this is dropped.
struct Answering(watch::Sender<usize>);

impl Answering {
    fn new(place: &Place) -> Self {
        place.requests.send_modify(|requests| *requests += 1);
        Self(place.requests.clone())
    }
}

impl Drop for Answering {
    fn drop(&mut self) {
        self.0.send_modify(|requests| *requests -= 1);
    }
}

#[cfg(test)]
mod tests {
    use axum::response::sse::{Event, Sse};
    use axum::routing::{get, post};
    use futures_util::stream;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, duplex};
    use tokio::time::{Instant, interval};

    use super::super::problem::Body;
    use super::*;

    /// How many bytes a client that reads nothing lets the relay write.
    const WINDOW: usize = 4096;
    /// What begins HTTP/2, with settings by which the client takes nothing of an answer.
    const HTTP2: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\x06\x04\0\0\0\0\0\0\x04\0\0\0\0";
    /// `GET /` on the first stream of HTTP/2.
    const HTTP2_GET: &[u8] = b"\0\0\x03\x01\x05\0\0\0\x01\x82\x84\x86";

    fn router() -> Router {
        let tick = || {
            let events = stream::unfold(interval(Duration::from_secs(1)), async |mut ticks| {
                ticks.tick().await;
                Some((Ok::<_, std::convert::Infallible>(Event::default().data("tick")), ticks))
            });
            Sse::new(futures_util::StreamExt::take(events, 300))
        };
        Router::new()
            .route("/", get(|| async { "x".repeat(10 * WINDOW) }))
            .route("/slow", get(|| sleep(Duration::from_secs(300))))
            .route("/ticks", get(async move || tick()))
            .route("/body", post(async |Body(body)| body))
    }

    /// Sends bytes and then nothing: how many seconds it takes until the connection is closed, and what was answered.
    async fn closed_after(sent: &[u8], reads: bool, crowded: bool) -> (u64, String) {
        let (mut client, server) = duplex(WINDOW);
        let permit = Arc::new(Semaphore::new(1)).try_acquire_owned().unwrap();
        let crowded = watch::Sender::new(crowded);
        let place = Place::new(permit, crowded.subscribe());
        let started = Instant::now();
        let served = tokio::spawn(serve_http(server, Arc::new(ArcSwap::from_pointee(router())), place));
        client.write_all(sent).await.unwrap();
        let mut answered = Vec::new();
        if reads {
            client.read_to_end(&mut answered).await.unwrap();
        }
        served.await.unwrap();
        (started.elapsed().as_secs(), String::from_utf8_lossy(&answered).into_owned())
    }

    #[tokio::test(start_paused = true)]
    async fn connections_without_requests_are_closed() {
        let check = async |sent: &[u8], expected: u64, crowded: u64| {
            for (is_crowded, expected) in [(false, expected), (true, crowded)] {
                let (seconds, _) = closed_after(sent, true, is_crowded).await;
                assert_eq!(seconds, expected, "{} {is_crowded}", sent.escape_ascii());
            }
        };
        check(b"", 10, 3).await;
        check(b"P", 10, 3).await;
        check(b"GET / HTTP/1.1\r\nhost: x\r\n", 10, 6).await;
        check(HTTP2, 13, 6).await;
        check(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n", 10, 3).await;
        check(b"GET /slow HTTP/1.1\r\nhost: x\r\n\r\n", 310, 303).await;
        check(b"GET /ticks HTTP/1.1\r\nhost: x\r\n\r\n", 309, 302).await;
    }

    #[tokio::test(start_paused = true)]
    async fn answers_are_taken_or_the_connection_is_closed() {
        let check = async |sent: &[u8], crowded: bool, expected: u64| {
            assert_eq!(closed_after(sent, false, crowded).await.0, expected, "{} {crowded}", sent.escape_ascii());
        };
        for sent in [b"GET / HTTP/1.1\r\nhost: x\r\n\r\n", &[HTTP2, HTTP2_GET].concat()[..]] {
            check(sent, false, 63).await;
            check(sent, true, 6).await;
        }
    }

    #[tokio::test(start_paused = true)]
    async fn bodies_have_to_come() {
        let request = b"POST /body HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\nx";
        let (seconds, answer) = closed_after(request, true, false).await;
        assert!(seconds == 10 && answer.starts_with("HTTP/1.1 408 "), "{seconds} s: {answer}");
        assert!(answer.contains("application/problem+json") && answer.contains("within 10 seconds"), "{answer}");
    }
}
