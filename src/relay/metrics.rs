//! What the parts count, in one registry.

use prometheus::{Error, IntCounterVec, Opts, Registry};

use crate::journal::disk;
use crate::{ingress, lane};

/// The registry and the parts' metrics in it.
pub(super) struct Metrics {
    pub(super) registry: Registry,
    pub(super) ingress: ingress::Metrics,
    pub(super) journal: disk::Metrics,
    pub(super) lanes: lane::Metrics,
    pub(super) reloads: IntCounterVec,
}

impl Metrics {
    pub(super) fn new() -> Result<Self, Error> {
        let registry = Registry::new();
        #[cfg(target_os = "linux")]
        registry.register(Box::new(prometheus::process_collector::ProcessCollector::for_self()))?;
        let help = "Attempts to load settings and rules again: applied, unchanged or refused.";
        let reloads = IntCounterVec::new(Opts::new("relay_reloads_total", help), &["outcome"])?;
        for outcome in ["applied", "unchanged", "refused"] {
            // Shown as 0 before the first.
            reloads.with_label_values(&[outcome]);
        }
        registry.register(Box::new(reloads.clone()))?;
        Ok(Self {
            ingress: ingress::Metrics::new(&registry)?,
            journal: disk::Metrics::new(&registry)?,
            lanes: lane::Metrics::new(&registry)?,
            reloads,
            registry,
        })
    }
}
