//! The connections of the admin side: HTTP/1.1 and HTTP/2, in cleartext or over TLS.

use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use axum::Router;
use hyper::service::{Service as _, service_fn};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto::Builder;
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::time::{sleep, timeout};
use tracing::{debug, warn};

use super::Gate;
use crate::tls;

/// The most connections at once.
const MAX_CONNECTIONS: usize = 1024;
/// How long a handshake may take, and then a request's headers.
const HEADER_TIMEOUT: Duration = Duration::from_secs(10);
/// How long accepting pauses when the system has no more descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Accepts connections for ever.
pub(super) async fn serve(listener: TcpListener, router: Arc<ArcSwap<Router>>, gate: Gate) {
    let permits = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        let Ok(permit) = Arc::clone(&permits).acquire_owned().await else { return };
        match listener.accept().await {
            Ok((stream, _)) => {
                let (router, tls) = (Arc::clone(&router), gate.load().tls.clone());
                tokio::spawn(async move {
                    serve_connection(stream, router, tls).await;
                    drop(permit);
                });
            }
            Err(error) => {
                warn!(%error, "a connection to the admin side could not be accepted");
                sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

async fn serve_connection(stream: TcpStream, router: Arc<ArcSwap<Router>>, tls: Option<tls::Server>) {
    let Some(tls) = tls else { return serve_http(stream, router).await };
    match timeout(HEADER_TIMEOUT, tls.accept(stream)).await {
        Ok(Ok(stream)) => serve_http(stream, router).await,
        Ok(Err(error)) => debug!(%error, "no TLS with a client of the admin side"),
        Err(_) => debug!("a TLS handshake of the admin side took too long"),
    }
}

async fn serve_http(stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static, router: Arc<ArcSwap<Router>>) {
    let mut builder = Builder::new(TokioExecutor::new());
    builder.http1().timer(TokioTimer::new()).header_read_timeout(HEADER_TIMEOUT);
    builder.http2().timer(TokioTimer::new());
    let service = service_fn(move |request| TowerToHyperService::new(Router::clone(&router.load())).call(request));
    let served = builder.serve_connection(TokioIo::new(stream), service).await;
    if let Err(error) = served {
        debug!(%error, "a connection of the admin side ended");
    }
}
