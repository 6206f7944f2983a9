//! `engage-relay run`: serves until a signal.

use std::net::{SocketAddr, TcpListener};
use std::process::ExitCode;

use anyhow::Context as _;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tracing::{info, warn};

use super::Global;
use crate::config::Config;
use crate::relay::{self, Listeners, Shutdown};
use crate::rules::Rules;

pub(super) fn run(global: &Global) -> anyhow::Result<ExitCode> {
    let (config, warnings) = global.settings()?;
    let (rules, problems) = global.rules(&config)?;
    config.telemetry.init();
    warnings.iter().for_each(|warning| warn!("{warning}"));
    problems.iter().for_each(|problem| warn!("{problem}"));
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().thread_name("relay").build()?;
    let result = runtime.block_on(serve(config, rules));
    // Whatever hangs in a thread for blocking work must not keep the process.
    runtime.shutdown_background();
    result.map(|()| ExitCode::SUCCESS)
}

async fn serve(config: Config, rules: Rules) -> anyhow::Result<()> {
    let bind = |address: SocketAddr, setting| {
        TcpListener::bind(address).with_context(|| format!("can't listen on {address} ({setting})"))
    };
    let ingress = bind(config.ingress.listen, "ingress.listen")?;
    let admin = bind(config.admin.listen, "admin.listen")?;
    let listeners = Listeners { ingress, admin };
    let shutdown = watch::Sender::new(Shutdown::No);
    let asked = shutdown.subscribe();
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
    tokio::select! {
        result = relay::run(config, rules, listeners, asked) => Ok(result?),
        () = signals => Ok(()),
    }
}
