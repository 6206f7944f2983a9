//! `engage-relay run`: serves until a signal.

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::process::ExitCode;

use anyhow::Context as _;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::net::TcpSocket;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, watch};
use tracing::{info, warn};

use super::Global;
use crate::relay::{self, Listeners, Origin, Shutdown};
use crate::reload::{Loaded, Seen, Sources};
use crate::telemetry::Logs;

pub(super) fn run(global: &Global) -> anyhow::Result<ExitCode> {
    let sources = global.sources();
    let (loaded, seen) = sources.load();
    let loaded = loaded?;
    let logs = loaded.config.telemetry.init();
    raise_open_files();
    loaded.warnings.iter().for_each(|warning| warn!("{warning}"));
    loaded.problems.iter().for_each(|problem| warn!("{problem}"));
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().thread_name("relay").build()?;
    let result = runtime.block_on(serve(loaded, sources, seen, logs));
    // Whatever hangs in a thread for blocking work must not keep the process.
    runtime.shutdown_background();
    result.map(|()| ExitCode::SUCCESS)
}

/// Lets the process have as many descriptors as it may: each connection takes one, and so do files.
fn raise_open_files() {
    let limit = getrlimit(Resource::Nofile);
    if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit }) {
        warn!(%error, "the limit on open files can't be raised");
    }
}

/// As the standard library does it, but without listening.
fn bind(address: SocketAddr) -> io::Result<TcpSocket> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    Ok(socket)
}

async fn serve(loaded: Loaded, sources: Sources, seen: Seen, logs: Logs) -> anyhow::Result<()> {
    let (ingress, admin) = (loaded.config.ingress.listen, loaded.config.admin.listen);
    let context = |address: SocketAddr, setting| move || format!("can't listen on {address} ({setting})");
    let ingress = bind(ingress).with_context(context(ingress, "ingress.listen"))?;
    let admin = TcpListener::bind(admin).with_context(context(admin, "admin.listen"))?;
    let listeners = Listeners { ingress, admin };
    let shutdown = watch::Sender::new(Shutdown::No);
    let asked = shutdown.subscribe();
    let (hung_up, hangup) = mpsc::channel(1);
    let mut hangups = signal(SignalKind::hangup())?;
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let signals = async move {
        let first = tokio::select! {
            _ = terminate.recv() => Shutdown::AfterDelay,
            // Somebody sits at a terminal, and no balancer has to notice.
            _ = interrupt.recv() => Shutdown::Graceful,
        };
        shutdown.send_replace(first);
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        info!("second signal; stopping at once");
        shutdown.send_replace(Shutdown::Now);
        std::future::pending::<()>().await;
    };
    let reloads = async move {
        while hangups.recv().await.is_some() {
            // One that waits already is enough.
            hung_up.try_send(()).unwrap_or(());
        }
    };
    let origin = Origin { sources, seen, hangup, logs };
    tokio::select! {
        result = relay::run(loaded, origin, listeners, asked) => Ok(result?),
        () = signals => Ok(()),
        () = reloads => Ok(()),
    }
}
