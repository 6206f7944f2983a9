//! What the journal measures.

use prometheus::{Error, Histogram, HistogramOpts, IntCounterVec, Opts, Registry};

use super::recovery::{Finding, Kind};

/// Upper bounds in seconds, and in events.
const SYNC_SECONDS: [f64; 12] = [0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 2.5];
const BATCH_EVENTS: [f64; 12] = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 4096.0];

/// What the journal measures. Clones measure the same.
#[derive(Clone)]
pub struct Metrics {
    pub(super) sync_seconds: Histogram,
    pub(super) batch_events: Histogram,
    recovered: IntCounterVec,
}

impl Metrics {
    /// Metrics that a registry shows.
    ///
    /// # Errors
    ///
    /// The registry has metrics of these names.
    pub fn new(registry: &Registry) -> Result<Self, Error> {
        let histogram = |name, help, buckets: &[f64]| {
            let histogram = Histogram::with_opts(HistogramOpts::new(name, help).buckets(buckets.into()))?;
            registry.register(Box::new(histogram.clone())).map(|()| histogram)
        };
        let help = "What opening the journal found and mended, by its kind.";
        let recovered = IntCounterVec::new(Opts::new("relay_journal_recovered_total", help), &["kind"])?;
        registry.register(Box::new(recovered.clone()))?;
        for kind in Kind::ALL {
            recovered.with_label_values(&[kind.as_str()]);
        }
        Ok(Self {
            sync_seconds: histogram(
                "relay_journal_sync_seconds",
                "How long it took to make a batch of events durable, in seconds.",
                &SYNC_SECONDS,
            )?,
            batch_events: histogram(
                "relay_journal_batch_events",
                "How many events were made durable at once.",
                &BATCH_EVENTS,
            )?,
            recovered,
        })
    }

    /// Metrics that nobody sees.
    ///
    /// # Errors
    ///
    /// Never, as far as is known.
    #[cfg(test)]
    pub(super) fn unseen() -> Self {
        Self::new(&Registry::new()).unwrap()
    }

    /// Counts what opening has found.
    pub(super) fn found(&self, findings: &[Finding]) {
        for finding in findings {
            self.recovered.with_label_values(&[finding.kind.as_str()]).inc();
        }
    }
}
