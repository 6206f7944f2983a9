//! The yardstick of `scripts/bench`: a bare hyper server that reads the body and answers 200, built like the ingress (one
//! single-threaded runtime per core, connections dealt in turn) and doing nothing else.
//!
//! Usage: `bare-hyper ADDRESS`

use std::convert::Infallible;
use std::net::{SocketAddr, TcpListener, TcpStream};

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use tokio::sync::mpsc;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let address: SocketAddr = std::env::args().nth(1).ok_or("usage: bare-hyper ADDRESS")?.parse()?;
    let listener = TcpListener::bind(address)?;
    let cores = std::thread::available_parallelism()?.get();
    let queues: Vec<_> = (0..cores)
        .map(|_| {
            let (sender, queue) = mpsc::channel(128);
            std::thread::spawn(move || serve(queue));
            sender
        })
        .collect();
    for (queue, stream) in queues.iter().cycle().zip(listener.incoming()) {
        queue.blocking_send(stream?)?;
    }
    Ok(())
}

fn serve(mut queue: mpsc::Receiver<TcpStream>) -> std::io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        while let Some(stream) = queue.recv().await {
            stream.set_nodelay(true)?;
            stream.set_nonblocking(true)?;
            let io = TokioIo::new(tokio::net::TcpStream::from_std(stream)?);
            // A client that goes away is none of the measurement's business.
            tokio::spawn(async move {
                drop(http1::Builder::new().writev(false).serve_connection(io, service_fn(answer)).await)
            });
        }
        Ok(())
    })
}

async fn answer(request: Request<Incoming>) -> Result<Response<Full<Bytes>>, Infallible> {
    // As above.
    drop(request.into_body().collect().await);
    Ok(Response::new(Full::from("ok")))
}
