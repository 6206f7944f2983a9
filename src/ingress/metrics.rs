//! What the ingress counts.

use std::time::Duration;

use http::StatusCode;
use prometheus::{Error, Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge, Opts, Registry};

/// Upper bounds in seconds.
const ACK_SECONDS: [f64; 13] = [0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0, 10.0];
/// The answers that there are.
const CODES: [u16; 9] = [200, 400, 401, 403, 404, 405, 408, 413, 503];

/// What the ingress counts. Clones count the same.
#[derive(Clone)]
pub struct Metrics {
    requests: IntCounterVec,
    /// Those of [`CODES`], found once.
    answers: Vec<IntCounter>,
    events: IntCounterVec,
    ack_seconds: Histogram,
    resent: IntCounter,
    pub(super) connections: IntGauge,
}

impl Metrics {
    /// Metrics that a registry shows.
    ///
    /// # Errors
    ///
    /// The registry has metrics of these names.
    pub fn new(registry: &Registry) -> Result<Self, Error> {
        let counters = |name, help, label| {
            let counters = IntCounterVec::new(Opts::new(name, help), &[label])?;
            registry.register(Box::new(counters.clone())).map(|()| counters)
        };
        let requests = counters("relay_ingress_requests_total", "Requests by the status of the answer.", "code")?;
        let help = "Events that were made durable, by the name of the sender's token.";
        let events = counters("relay_ingress_events_total", help, "token")?;
        let help = "From a request's headers to its 200, in seconds.";
        let ack_seconds = HistogramOpts::new("relay_ingress_ack_seconds", help).buckets(ACK_SECONDS.into());
        let ack_seconds = Histogram::with_opts(ack_seconds)?;
        registry.register(Box::new(ack_seconds.clone()))?;
        let connections = IntGauge::new("relay_ingress_connections", "Open connections.")?;
        registry.register(Box::new(connections.clone()))?;
        let help = "Events that were not stored again, because they had been within ingress.dedup.";
        let resent = IntCounter::new("relay_ingress_resent_events_total", help)?;
        registry.register(Box::new(resent.clone()))?;
        let answers = CODES.iter().map(|code| requests.with_label_values(&[code.to_string()])).collect();
        Ok(Self { requests, answers, events, ack_seconds, resent, connections })
    }

    /// Counts an answer.
    pub(super) fn answered(&self, status: StatusCode) {
        let known = CODES.iter().position(|code| *code == status.as_u16()).and_then(|index| self.answers.get(index));
        match known {
            Some(counter) => counter.inc(),
            None => self.requests.with_label_values(&[status.as_str()]).inc(),
        }
    }

    /// Measures a request that was answered 200.
    pub(super) fn acknowledged(&self, took: Duration) {
        self.ack_seconds.observe(took.as_secs_f64());
    }

    /// What counts the events of those who send with this token.
    pub(super) fn events(&self, token: &str) -> IntCounter {
        self.events.with_label_values(&[token])
    }

    /// What counts events that were not stored again.
    pub(super) fn resent(&self) -> IntCounter {
        self.resent.clone()
    }

    /// How many events were not stored again.
    pub fn resent_events(&self) -> u64 {
        self.resent.get()
    }
}
