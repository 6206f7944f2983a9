//! The lanes of a relay that shares its journal: a post for each sink.
//!
//! Every event was addressed when it was accepted, so that rules can change without asking the other replicas: those in
//! force here decide about what is accepted here. A sink that is new finds what is addressed to it when its group begins.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::timeout;
use tracing::{debug, warn};

use super::RunError;
use super::addressing::ByRules;
use super::in_force::{Built, Changes, InForce, Plan, Standing};
use super::post::{Legacy, Post};
use crate::admin;
use crate::journal::kafka::{Board, Config, Journal, known_sinks};
use crate::lane::{Controls, Course, Metrics, Phase, Remains};
use crate::routing::{Table, UNROUTED};
use crate::rules::Rules;
use crate::sink::BuildError;
use crate::telemetry::Traces;

/// All posts.
pub(super) struct Cluster {
    journal: Arc<Journal>,
    board: Board,
    in_force: InForce,
    posts: BTreeMap<String, Running>,
    /// Posts that end because their sinks are gone, or have changed.
    ending: JoinSet<()>,
    metrics: Metrics,
    traces: Option<Traces>,
    /// How long a post may take for what is under way that ends because its sink has changed.
    grace: Duration,
}

struct Running {
    built: Arc<Built>,
    legacy: Legacy,
    controls: Controls,
    phase: watch::Sender<Phase>,
    bury: watch::Sender<bool>,
    task: JoinHandle<Remains>,
}

impl Cluster {
    /// Starts a post for each sink.
    pub(super) fn start(
        rules: Rules,
        journal: Arc<Journal>,
        board: Board,
        metrics: Metrics,
        traces: Option<Traces>,
        grace: Duration,
    ) -> Result<Self, RunError> {
        let (in_force, posts, ending) = (InForce::new(rules), BTreeMap::new(), JoinSet::new());
        let mut cluster = Self { journal, board, in_force, posts, ending, metrics, traces, grace };
        for built in cluster.in_force.build(cluster.traces.as_ref())? {
            let (name, running) = cluster.open(built, &cluster.in_force.rules().table)?;
            cluster.posts.insert(name, running);
        }
        cluster.publish();
        let (config, table) = (cluster.journal.config().clone(), Arc::clone(&cluster.in_force.rules().table));
        tokio::task::spawn_blocking(move || tell_of_left_behind(&config, &table));
        Ok(cluster)
    }

    /// What is in force.
    pub(super) fn in_force(&mut self) -> &mut InForce {
        &mut self.in_force
    }

    /// What other rules mean for the posts. Nothing has changed yet.
    pub(super) fn plan(&self, rules: &Rules) -> Result<Plan, BuildError> {
        InForce::plan(rules, self.traces.as_ref(), |name| match self.posts.get(name) {
            Some(running) => Standing::Stays(&running.built),
            None => Standing::None,
        })
    }

    /// Follows other rules, as planned; or nothing has changed.
    pub(super) fn follow(&mut self, rules: Rules, plan: Plan) -> Result<Changes, RunError> {
        let mut changes = Changes::default();
        // A sink that is new has to be there before anything is addressed to it; one that goes, as long as something is.
        let mut opened = Vec::new();
        for built in plan.added.into_iter().chain(plan.replaced) {
            opened.push(self.open(built, &rules.table)?);
        }
        self.journal.readdress(Box::new(ByRules::new(&rules.table, self.journal.config(), &self.metrics)));
        for (name, running) in opened {
            let known = if self.end(&name, false) { &mut changes.changed } else { &mut changes.added };
            known.push(name.clone());
            self.posts.insert(name, running);
        }
        let is_gone = |name: &&String| rules.table.sink(name).is_none();
        for name in self.posts.keys().filter(is_gone).cloned().collect::<Vec<_>>() {
            self.end(&name, true);
            self.metrics.forget(&name);
            changes.removed.push(name);
        }
        self.in_force.change(rules);
        self.publish();
        Ok(changes)
    }

    /// Waits until a post has ended that should not have; nothing is lost if the future is dropped.
    pub(super) async fn ended(&mut self) -> String {
        loop {
            if let Some((name, _)) = self.posts.iter().find(|(_, running)| running.task.is_finished()) {
                return name.clone();
            }
            while self.ending.try_join_next().is_some() {}
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
    }

    /// Tells all posts to finish, or to end now, and waits for them.
    pub(super) async fn finish(&mut self, phase: Phase, remains: &mut Vec<(String, Remains)>) {
        for running in self.posts.values() {
            running.phase.send_replace(phase);
        }
        for (name, running) in &mut self.posts {
            if !running.task.is_finished()
                && let Ok(left) = (&mut running.task).await
            {
                remains.push((name.clone(), left));
            }
        }
        match phase {
            // They may be at what takes them long while brokers are away.
            Phase::Ending => self.ending.shutdown().await,
            Phase::Running | Phase::Finishing => while self.ending.join_next().await.is_some() {},
        }
    }

    /// Closes the connections of all sinks.
    pub(super) async fn close(&self) {
        futures_util::future::join_all(self.posts.values().map(|running| running.built.close())).await;
        self.journal.close().await;
    }

    /// A sink's post, which ends if it is dropped.
    fn open(&self, built: Built, table: &Arc<Table>) -> Result<(String, Running), RunError> {
        // Controls of its own: a post that ends says last of all that it has no lanes.
        let (name, built, controls) = (built.name().to_owned(), Arc::new(built), Controls::default());
        controls.set_paused(admin::Cluster::is_paused(&self.board, &name));
        let course = Arc::new(Course::new(Arc::clone(table)));
        let legacy = self.posts.get(&name).map(|former| former.legacy.clone()).unwrap_or_default();
        let (metrics, own) = (self.metrics.clone(), controls.clone());
        let post = Post::open(Arc::clone(&built), &self.journal, course, metrics, legacy.clone(), own)?;
        let (phase, bury) = (watch::Sender::new(Phase::Running), watch::Sender::new(false));
        let task = tokio::spawn(post.run(phase.subscribe(), bury.subscribe()));
        Ok((name, Running { built, legacy, controls, phase, bury, task }))
    }

    /// Lets a post finish what is under way; whether there is one.
    fn end(&mut self, name: &str, bury: bool) -> bool {
        let Some(Running { built, phase, bury: told, mut task, .. }) = self.posts.remove(name) else { return false };
        told.send_replace(bury);
        phase.send_replace(Phase::Finishing);
        let grace = self.grace;
        self.ending.spawn(async move {
            // A panic there has been reported by the task itself.
            if timeout(grace, &mut task).await.is_err() {
                phase.send_replace(Phase::Ending);
                drop(task.await);
            }
            built.close().await;
        });
        true
    }

    fn publish(&mut self) {
        self.in_force.publish(|name| Some(self.posts.get(name)?.controls.clone()));
    }
}

/// Says which sinks were in the rules once and are not any more. Blocks.
fn tell_of_left_behind(config: &Config, table: &Table) {
    let known = match known_sinks(config) {
        Ok(known) => known,
        Err(error) => return debug!(%error, "brokers do not say which groups there are"),
    };
    for sink in known.iter().filter(|sink| *sink != UNROUTED && table.sink(sink).is_none()) {
        let topic = config.parked();
        warn!(
            sink,
            topic,
            "a sink that was in the rules once is there no more: what it may have parked stays in the topic until it is back; \
             to make dead letters of it, bring the sink back, and take it away by a reload"
        );
    }
}
