//! What is in force until the rules change, and what a change of them needs: the same for either journal.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use arc_swap::ArcSwap;
use tokio::time::timeout;
use tracing::warn;

use crate::admin::{Live, Outcome, Reload};
use crate::lane::{self, Controls};
use crate::rules::{Rules, SinkRules};
use crate::sink::{BuildError, Sink};
use crate::telemetry::Traces;

/// How long a sink may take to close its connections.
const SINK_CLOSE: Duration = Duration::from_secs(3);

/// The rules in force, and what the admin side sees of them.
pub(super) struct InForce {
    now: Live,
    /// The same, as it was published last.
    live: Arc<ArcSwap<Live>>,
}

/// A sink that was built by its rules.
pub(super) struct Built {
    rules: Box<SinkRules>,
    sink: Sink,
}

/// What a change of the rules needs that can fail.
#[derive(Default)]
pub(super) struct Plan {
    pub(super) added: Vec<Built>,
    pub(super) replaced: Vec<Built>,
}

/// What there is of a sink when rules change.
pub(super) enum Standing<'s> {
    Stays(&'s Built),
    /// It will be replaced or closed already.
    Ends,
    None,
}

/// What a change of the rules means for the sinks.
#[derive(Debug, Default)]
pub(super) struct Changes {
    pub(super) added: Vec<String>,
    pub(super) changed: Vec<String>,
    pub(super) removed: Vec<String>,
}

impl InForce {
    pub(super) fn new(rules: Rules) -> Self {
        let now = Live { rules, lanes: Vec::new(), loaded_at: SystemTime::now(), last_reload: None };
        let live = Arc::new(ArcSwap::from_pointee(now.clone()));
        Self { now, live }
    }

    pub(super) fn rules(&self) -> &Rules {
        &self.now.rules
    }

    /// The rules in force, and how to reach the lanes.
    pub(super) fn live(&self) -> Arc<ArcSwap<Live>> {
        Arc::clone(&self.live)
    }

    /// All sinks of the rules.
    pub(super) fn build(&self, traces: Option<&Traces>) -> Result<Vec<Built>, BuildError> {
        self.now.rules.sinks.iter().map(|sink| Built::new(sink, traces)).collect()
    }

    /// What other rules mean; `standing` is what there is of a sink's name. Nothing has changed yet.
    pub(super) fn plan<'s>(
        rules: &Rules,
        traces: Option<&Traces>,
        standing: impl Fn(&str) -> Standing<'s>,
    ) -> Result<Plan, BuildError> {
        let mut plan = Plan::default();
        for sink in &rules.sinks {
            match standing(&sink.name) {
                Standing::Stays(built) if built.is(sink) => {}
                Standing::Stays(_) | Standing::Ends => plan.replaced.push(Built::new(sink, traces)?),
                Standing::None => plan.added.push(Built::new(sink, traces)?),
            }
        }
        Ok(plan)
    }

    /// Other rules are in force now.
    pub(super) fn change(&mut self, rules: Rules) {
        (self.now.rules, self.now.loaded_at) = (rules, SystemTime::now());
    }

    /// Says what is in force to those who look at it.
    pub(super) fn publish(&mut self, controls: impl Fn(&str) -> Option<Controls>) {
        let sinks = self.now.rules.sinks.iter();
        self.now.lanes = sinks.filter_map(|sink| Some((sink.name.clone(), controls(&sink.name)?))).collect();
        self.live.store(Arc::new(self.now.clone()));
    }

    /// Remembers how the last reload went, for those who look at it.
    pub(super) fn note(&mut self, reload: Reload) {
        self.now.last_reload = Some(reload);
        self.live.store(Arc::new(self.now.clone()));
    }

    /// Whether the last reload was refused.
    pub(super) fn was_refused(&self) -> bool {
        self.now.last_reload.as_ref().is_some_and(|reload| reload.outcome == Outcome::Refused)
    }
}

impl Built {
    fn new(rules: &SinkRules, traces: Option<&Traces>) -> Result<Self, BuildError> {
        let sink = Sink::build(&rules.name, &rules.sink)?.traced(traces);
        Ok(Self { rules: Box::new(rules.clone()), sink })
    }

    pub(super) fn name(&self) -> &str {
        &self.rules.name
    }

    pub(super) fn sink(&self) -> Sink {
        self.sink.clone()
    }

    /// The settings of its lane.
    pub(super) fn lane(&self) -> &lane::Config {
        &self.rules.lane
    }

    fn is(&self, rules: &SinkRules) -> bool {
        *self.rules == *rules
    }

    /// Closes its connections, within a time.
    pub(super) async fn close(&self) {
        if timeout(SINK_CLOSE, self.sink.close()).await.is_err() {
            warn!(sink = self.name(), "a sink did not close in time");
        }
    }
}
