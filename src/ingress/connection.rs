//! One connection: HTTP/1.1 or HTTP/2, in cleartext or over TLS, with a limit on every time it may take.

use std::convert::Infallible;
use std::future::poll_fn;
use std::io;
use std::net::IpAddr;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::rt::{Read, ReadBufCursor, Write};
use hyper::server::conn::{http1, http2};
use hyper::service::{HttpService, service_fn};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::io::{AsyncBufReadExt as _, AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout};
use tokio_rustls::server::TlsStream;
use tracing::debug;

use super::Config;
use super::handler::{Handler, MAX_HEADERS, REQUEST_TIMEOUT_RESPONSE};
use crate::tls;

/// The most bytes that a request's line and headers may take.
const MAX_HEADER_BYTES: usize = 32 << 10;
/// The most requests that one HTTP/2 connection may have open.
const MAX_STREAMS: u32 = 256;
/// How long, and for how many bytes, a connection goes on after its last request was refused.
const LINGER: Duration = Duration::from_secs(1);
const LINGER_BYTES: usize = 1 << 20;
/// How an HTTP/2 connection begins. No HTTP/1 request does.
const HTTP2_PREFACE: &[u8; 4] = b"PRI ";
/// How often a connection is looked at that has sent less than a preface's beginning.
const PEEK_PAUSE: Duration = Duration::from_millis(5);

/// How long a connection may take for what.
#[derive(Clone, Copy)]
pub(super) struct Limits {
    header_timeout: Duration,
    idle_timeout: Duration,
}

impl Limits {
    pub(super) fn new(config: &Config) -> Self {
        Self { header_timeout: config.header_timeout, idle_timeout: config.idle_timeout }
    }
}

/// Serves a connection until it ends, takes too long, or `stop` says that it has to end after the request at hand.
pub(super) async fn serve(
    stream: TcpStream,
    peer: IpAddr,
    handler: Arc<Handler>,
    limits: Limits,
    mut stop: watch::Receiver<bool>,
) {
    // Answers are small and complete: waiting to fill a packet only delays them.
    if let Err(error) = stream.set_nodelay(true) {
        debug!(%error, "no TCP_NODELAY");
    }
    let tls = handler.gate().load().tls().cloned();
    let begun = tokio::select! {
        begun = begin(stream, tls, limits) => begun,
        () = told(&mut stop) => return,
    };
    let answering = Answering { handler, peer };
    let result = match begun {
        Ok(Begun::Cleartext(stream, is_http2)) => serve_http(stream, is_http2, answering, limits, stop).await,
        Ok(Begun::Tls(stream, is_http2)) => serve_http(stream, is_http2, answering, limits, stop).await,
        Ok(Begun::TooSlow(stream)) => {
            answering.handler.timed_out();
            return tell_of_timeout(stream).await;
        }
        // There is no request to answer.
        Err(error) => return debug!(%error, "connection ended before a request"),
    };
    if let Err(error) = result {
        debug!(%error, "connection ended");
    }
}

/// A connection whose first request has begun to come, none of it taken yet; and whether it is HTTP/2.
enum Begun {
    Cleartext(TcpStream, bool),
    /// In a box, so that connections without TLS have no room for it.
    Tls(Box<TlsStream<TcpStream>>, bool),
    /// The beginning of the preface of HTTP/2, and no more of it in time.
    TooSlow(TcpStream),
}

/// Waits for the first request: for its first byte as long as for any other, and no longer for the rest of what tells HTTP/2
/// from HTTP/1.1, or for the handshake, than for a request's headers.
async fn begin(stream: TcpStream, tls: Option<tls::Server>, limits: Limits) -> io::Result<Begun> {
    let Some(tls) = tls else {
        timeout(limits.idle_timeout, stream.peek(&mut [0])).await??;
        return Ok(match timeout(limits.header_timeout, is_http2(&stream)).await {
            Ok(is_http2) => Begun::Cleartext(stream, is_http2?),
            Err(_) => Begun::TooSlow(stream),
        });
    };
    let mut stream = Box::new(timeout(limits.header_timeout, Box::pin(tls.accept(stream))).await??);
    if timeout(limits.idle_timeout, stream.fill_buf()).await??.is_empty() {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    let is_http2 = tls::is_http2(&stream);
    Ok(Begun::Tls(stream, is_http2))
}

/// What requests of a connection are answered with.
struct Answering {
    handler: Arc<Handler>,
    peer: IpAddr,
}

/// Whether the client begins with HTTP/2's preface. Takes nothing off the stream.
async fn is_http2(stream: &TcpStream) -> io::Result<bool> {
    let mut begin = [0; HTTP2_PREFACE.len()];
    loop {
        let len = stream.peek(&mut begin).await?;
        let seen = begin.get(..len).unwrap_or_default();
        match len {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            _ if !HTTP2_PREFACE.starts_with(seen) => return Ok(false),
            _ if len == HTTP2_PREFACE.len() => return Ok(true),
            // The first bytes of either; readiness will not tell when more come.
            _ => sleep(PEEK_PAUSE).await,
        }
    }
}

async fn serve_http(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    is_http2: bool,
    answering: Answering,
    limits: Limits,
    stop: watch::Receiver<bool>,
) -> hyper::Result<()> {
    if is_http2 {
        serve_http2(stream, answering, limits, stop).await
    } else {
        serve_http1(stream, answering, limits, stop).await
    }
}

async fn serve_http1(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    answering: Answering,
    limits: Limits,
    mut stop: watch::Receiver<bool>,
) -> hyper::Result<()> {
    let activity = Arc::new(Activity::new());
    let handler = Arc::clone(&answering.handler);
    let io = Watched { io: TokioIo::new(stream), activity: Arc::clone(&activity) };
    let mut connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(None)
        .max_buf_size(MAX_HEADER_BYTES)
        .max_headers(MAX_HEADERS)
        // An answer is small: one buffer costs less than a list of them.
        .writev(false)
        // Or else hyper looks for the end of the stream while an answer waits for the disk, with a new buffer each time.
        // A sender that has closed its half still gets the answer.
        .half_close(true)
        .serve_connection(io, service(answering, activity.clone()));
    let stopping = stop.clone();
    let mut timer = pin!(sleep(limits.header_timeout));
    let mut told = pin!(told(&mut stop));
    let (mut timer_armed, mut told_armed, mut is_told) = (false, false, false);
    loop {
        let wake = poll_fn(|cx| {
            if let Poll::Ready(result) = Pin::new(&mut connection).poll(cx) {
                return Poll::Ready(Wake::Ended(result));
            }
            // A task keeps its waker, so polling these once is enough until they are due; each poll takes a lock.
            if (!timer_armed || timer.is_elapsed()) && timer.as_mut().poll(cx).is_ready() {
                return Poll::Ready(Wake::Timer);
            }
            timer_armed = true;
            let due = !told_armed || stopping.has_changed().unwrap_or(true);
            if !is_told && due && told.as_mut().poll(cx).is_ready() {
                return Poll::Ready(Wake::Told);
            }
            told_armed = true;
            Poll::Pending
        });
        match wake.await {
            Wake::Ended(result) => {
                if result.as_ref().is_err_and(hyper::Error::is_parse) {
                    linger(connection.into_parts().io.io.into_inner()).await;
                }
                return result;
            }
            Wake::Timer => match activity.expired(limits) {
                Expired::Not(at) => {
                    timer.as_mut().reset(at);
                    timer_armed = false;
                }
                Expired::Idle => return Ok(()),
                Expired::Headers => {
                    handler.timed_out();
                    tell_of_timeout(connection.into_parts().io.io.into_inner()).await;
                    return Ok(());
                }
            },
            Wake::Told => {
                is_told = true;
                Pin::new(&mut connection).graceful_shutdown();
            }
        }
    }
}

/// Reads on for a moment after a request that was refused for its headers: a connection that is closed with unread bytes
/// on it is reset, and the client may never see the answer.
async fn linger(mut stream: impl AsyncRead + Unpin) {
    let mut left = LINGER_BYTES;
    // Not in the future, which every connection has room for.
    let mut buffer = vec![0; 4096];
    let read_on = async {
        while let Ok(read @ 1..) = stream.read(&mut buffer).await
            && left > 0
        {
            left = left.saturating_sub(read);
        }
    };
    // Whether it has come to an end by then does not matter.
    drop(timeout(LINGER, read_on).await);
}

/// Says that a request's headers took too long.
async fn tell_of_timeout(mut stream: impl AsyncWrite + Unpin) {
    let tell = async {
        stream.write_all(REQUEST_TIMEOUT_RESPONSE).await?;
        stream.shutdown().await
    };
    // The client may be gone, or take nothing; then nobody is there to be told.
    drop(timeout(LINGER, tell).await);
}

/// Why a connection's task goes on.
enum Wake {
    Ended(hyper::Result<()>),
    Timer,
    Told,
}

/// Returns when it is time to stop.
async fn told(stop: &mut watch::Receiver<bool>) {
    drop(stop.wait_for(|stop| *stop).await);
}

/// The handler, with the activity noted around it.
fn service(
    answering: Answering,
    activity: Arc<Activity>,
) -> impl HttpService<Incoming, ResBody = Full<Bytes>, Error = Infallible, Future: Send> {
    service_fn(move |mut request| {
        let busy = activity.begin();
        let (handler, peer) = (Arc::clone(&answering.handler), answering.peer);
        async move {
            let response = handler.handle(&mut request, peer).await;
            handler.drain(request, response.status(), busy);
            Ok(response)
        }
    })
}

async fn serve_http2(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    answering: Answering,
    limits: Limits,
    mut stop: watch::Receiver<bool>,
) -> hyper::Result<()> {
    // Only requests count: what else may come (pings, half of a request's headers) does not keep a connection open.
    let activity = Arc::new(Activity::new());
    let mut connection = pin!(
        http2::Builder::new(TokioExecutor::new())
            .timer(TokioTimer::new())
            .max_concurrent_streams(MAX_STREAMS)
            .max_header_list_size(u32::try_from(MAX_HEADER_BYTES).unwrap_or(u32::MAX))
            .serve_connection(TokioIo::new(stream), service(answering, activity.clone()))
    );
    let mut timer = pin!(sleep(limits.idle_timeout));
    let mut stopping = false;
    loop {
        tokio::select! {
            biased;
            result = &mut connection => return result,
            () = &mut timer => match activity.expired(limits) {
                Expired::Not(at) => timer.as_mut().reset(at),
                Expired::Idle | Expired::Headers => {
                    connection.as_mut().graceful_shutdown();
                    // A request may have come in between; what else does not end then is dropped.
                    loop {
                        match timeout(limits.header_timeout, &mut connection).await {
                            Ok(result) => return result,
                            Err(_) if activity.is_busy() => {}
                            Err(_) => return Ok(()),
                        }
                    }
                }
            },
            () = told(&mut stop), if !stopping => {
                stopping = true;
                connection.as_mut().graceful_shutdown();
            }
        }
    }
}

/// What a connection is doing, and since when.
struct Activity {
    started: Instant,
    /// Milliseconds after `started`.
    since: AtomicU64,
    /// Whether bytes of a request have come whose headers are not complete.
    reading: AtomicBool,
    /// How many requests are being answered.
    busy: AtomicU32,
}

/// Whether a connection has taken too long, and for what.
enum Expired {
    Not(Instant),
    Headers,
    Idle,
}

impl Activity {
    fn new() -> Self {
        Self {
            started: Instant::now(),
            since: AtomicU64::new(0),
            reading: AtomicBool::new(false),
            busy: AtomicU32::new(0),
        }
    }

    fn touch(&self) {
        let millis = u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.since.store(millis, Ordering::Relaxed);
    }

    /// Bytes have come, over HTTP/1.1.
    fn read(&self) {
        let begins = self.busy.load(Ordering::Relaxed) == 0 && !self.reading.load(Ordering::Relaxed);
        if begins {
            self.touch();
            self.reading.store(true, Ordering::Relaxed);
        }
    }

    /// A request's headers are complete. It is being answered until the result is dropped, also if that is because the
    /// client went away.
    fn begin(self: &Arc<Self>) -> Busy {
        self.reading.store(false, Ordering::Relaxed);
        self.busy.fetch_add(1, Ordering::Relaxed);
        Busy(Arc::clone(self))
    }

    fn is_busy(&self) -> bool {
        self.busy.load(Ordering::Relaxed) > 0
    }

    fn expired(&self, limits: Limits) -> Expired {
        let since = self.started + Duration::from_millis(self.since.load(Ordering::Relaxed));
        let reading = self.reading.load(Ordering::Relaxed);
        let limit = if reading { limits.header_timeout } else { limits.idle_timeout };
        let now = Instant::now();
        if self.is_busy() {
            // Answering is limited elsewhere. A request may begin right after.
            return Expired::Not(now + limits.header_timeout / 2);
        }
        if now >= since + limit {
            return if reading { Expired::Headers } else { Expired::Idle };
        }
        // The next request may begin at any time, and has only `header_timeout` then.
        Expired::Not((since + limit).min(now + limits.header_timeout / 2))
    }
}

struct Busy(Arc<Activity>);

impl Drop for Busy {
    fn drop(&mut self) {
        self.0.busy.fetch_sub(1, Ordering::Relaxed);
        self.0.touch();
    }
}

/// A stream whose reads are noted.
struct Watched<S> {
    io: TokioIo<S>,
    activity: Arc<Activity>,
}

impl<S: AsyncRead + Unpin> Read for Watched<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: ReadBufCursor<'_>) -> Poll<io::Result<()>> {
        let result = Pin::new(&mut self.io).poll_read(cx, buf);
        if let Poll::Ready(Ok(())) = result {
            self.activity.read();
        }
        result
    }
}

impl<S: AsyncWrite + Unpin> Write for Watched<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write_vectored(cx, bufs)
    }
}
