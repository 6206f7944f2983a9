//! `/metrics`: what the parts count, and what the lanes are doing at the moment, as Prometheus reads it.

use std::collections::HashMap;
use std::time::SystemTime;

use axum::extract::State;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use prometheus::{Encoder as _, Error, Gauge, GaugeVec, Opts, Registry, TEXT_FORMAT, TextEncoder};

use super::problem::Problem;
use super::replicas::Cluster;
use super::sinks::dead_letters;
use super::{Operated, Shared};
use crate::journal::disk;
use crate::lane::Status;
use crate::ledger::millis;
use crate::routing::UNROUTED;

/// All metrics, in the text format.
pub(super) async fn metrics(State(operated): State<Shared>) -> Result<Response, Problem> {
    let now = at_the_moment(&operated).await?.map_err(Problem::internal)?;
    let mut families = operated.registry.gather();
    families.extend(now.gather());
    let mut text = Vec::new();
    TextEncoder::new().encode(&families, &mut text).map_err(Problem::internal)?;
    Ok(([(CONTENT_TYPE, TEXT_FORMAT)], text).into_response())
}

/// What is not counted, but is so at the moment. Sinks that are gone are not in it.
async fn at_the_moment(operated: &Operated) -> Result<Result<Registry, Error>, Problem> {
    let live = operated.live.load_full();
    let lanes = live.lanes.iter().map(|(name, control)| async move { (name, control.status().await) });
    // One whose sink was removed meanwhile is left out.
    let lanes = futures_util::future::join_all(lanes).await;
    let lanes: Vec<_> = lanes.into_iter().filter_map(|(name, status)| Some((name.as_str(), status.ok()?))).collect();
    // Sums over all relays are right: what is the same for all is told by one of them, whoever has which partition.
    let cluster = operated.cluster.as_ref();
    let dead_letters = match cluster.is_none_or(Cluster::tells) {
        true => dead_letters(operated).await?,
        false => HashMap::new(),
    };
    let unheld = |sink: &str| match cluster.filter(|cluster| cluster.tells()) {
        Some(cluster) => cluster.unheld(sink, operated.journal.partitions()) as f64,
        None => 0.0,
    };
    // Also where there are none.
    let none = lanes.iter().map(|(sink, _)| *sink).chain([UNROUTED]).map(|sink| (sink, 0.0));
    let dead_letters = none.chain(dead_letters.iter().map(|(sink, count)| (sink.as_str(), *count as f64)));
    let registry = Registry::new();
    let show = || {
        of_sinks(&registry, &lanes)?;
        let help = "Deliveries that will not be tried again; where relays share the journal, one of them tells all.";
        by_sink(&registry, "relay_sink_dead_letters", help, dead_letters.clone())?;
        let help = "Partitions that no relay delivers from, where relays share the journal; one of them says so.";
        let unheld = lanes.iter().map(|(sink, _)| (*sink, unheld(sink)));
        by_sink(&registry, "relay_sink_unheld_partitions", help, unheld)?;
        if let Some(files) = operated.journal.files() {
            of_files(&registry, files)?;
        }
        let ready = if (operated.unready)().is_none() { 1.0 } else { 0.0 };
        one(&registry, "relay_ready", "Whether events are accepted: 1, or 0.", ready)?;
        let help = "When the rules in force were loaded, in Unix time.";
        one(&registry, "relay_routes_loaded_timestamp_seconds", help, seconds(live.loaded_at))?;
        let expiry = Opts::new(
            "relay_tls_certificate_expiry_timestamp_seconds",
            "When the certificate of a listener expires, in Unix time.",
        );
        let expiry = GaugeVec::new(expiry, &["listener"])?;
        for (listener, expires) in (operated.certificates)() {
            expiry.with_label_values(&[listener]).set(seconds(expires));
        }
        registry.register(Box::new(expiry))?;
        let info = GaugeVec::new(Opts::new("relay_build_info", "Always 1."), &["version"])?;
        info.with_label_values(&[env!("CARGO_PKG_VERSION")]).set(1.0);
        registry.register(Box::new(info))
    };
    let shown = show();
    Ok(shown.map(|()| registry))
}

/// A lane's figure.
type Figure = fn(&Status) -> f64;

fn of_files(registry: &Registry, files: &disk::View) -> Result<(), Error> {
    let bytes = files.disk_bytes() as f64;
    one(registry, "relay_journal_bytes", "What the journal's files take, in bytes.", bytes)?;
    let help = "What those of the journal's files take that a sink still needs, or that is written to, in bytes.";
    one(registry, "relay_journal_needed_bytes", help, files.needed_bytes() as f64)?;
    // A disk that can't be asked shows elsewhere.
    if let Ok(limit) = files.limit_bytes() {
        let help = "What that can come to be before nothing more is accepted, in bytes.";
        one(registry, "relay_journal_limit_bytes", help, limit as f64)?;
    }
    Ok(())
}

fn of_sinks(registry: &Registry, lanes: &[(&str, Status)]) -> Result<(), Error> {
    let figures: [(&str, &str, Figure); 6] = [
        ("relay_sink_lag_events", "Events after the sink's cursor; not all of them are for this sink.", |lane| {
            lane.lag_events as f64
        }),
        (
            "relay_sink_lag_seconds",
            "How old the oldest event is that was read and is neither delivered, parked nor dead.",
            |lane| lane.lag.as_secs_f64(),
        ),
        ("relay_sink_inflight", "Attempts under way.", |lane| lane.in_flight as f64),
        ("relay_sink_parked", "Deliveries that wait for their next attempt.", |lane| lane.parked as f64),
        ("relay_sink_breaker_open", "Whether the sink has failed too often and is only probed: 1, or 0.", |lane| {
            f64::from(u8::from(lane.breaker_open))
        }),
        ("relay_sink_paused", "Whether an operator has paused the sink: 1, or 0.", |lane| {
            f64::from(u8::from(lane.paused))
        }),
    ];
    figures.into_iter().try_for_each(|(name, help, figure)| {
        by_sink(registry, name, help, lanes.iter().map(|(sink, status)| (*sink, figure(status))))
    })
}

fn by_sink<'s>(
    registry: &Registry,
    name: &str,
    help: &str,
    values: impl Iterator<Item = (&'s str, f64)>,
) -> Result<(), Error> {
    let gauges = GaugeVec::new(Opts::new(name, help), &["sink"])?;
    values.for_each(|(sink, value)| gauges.with_label_values(&[sink]).set(value));
    registry.register(Box::new(gauges))
}

fn one(registry: &Registry, name: &str, help: &str, value: f64) -> Result<(), Error> {
    let gauge = Gauge::new(name, help)?;
    gauge.set(value);
    registry.register(Box::new(gauge))
}

/// Unix time.
fn seconds(time: SystemTime) -> f64 {
    millis(time) as f64 / 1000.0
}
