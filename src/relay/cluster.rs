//! The lanes of a relay that shares its journal: a post for each sink.
//!
//! Every event was addressed when it was accepted, so that rules can change without asking the other replicas: those in
//! force here decide about what is accepted here. A sink that is new finds what is addressed to it when its group begins.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::SystemTime;

use arc_swap::ArcSwap;
use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet};

use super::RunError;
use super::addressing::ByRules;
use super::lanes::{Carries, Changes, Plan, close};
use super::post::Post;
use crate::admin::{self, Live, Outcome, Reload};
use crate::journal::kafka::{Board, Journal};
use crate::lane::{Controls, Course, Metrics, Phase, Remains};
use crate::rules::Rules;
use crate::sink::BuildError;
use crate::telemetry::Traces;

/// All posts.
pub(super) struct Cluster {
    journal: Arc<Journal>,
    board: Board,
    rules: Rules,
    posts: BTreeMap<String, Running>,
    /// Posts that end because their sinks are gone, or have changed.
    ending: JoinSet<()>,
    live: Arc<ArcSwap<Live>>,
    loaded_at: SystemTime,
    last_reload: Option<Reload>,
    metrics: Metrics,
    traces: Option<Traces>,
}

struct Running {
    carries: Arc<Carries>,
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
    ) -> Result<Self, RunError> {
        let loaded_at = SystemTime::now();
        let live = Live { rules: rules.clone(), lanes: Vec::new(), loaded_at, last_reload: None };
        let live = Arc::new(ArcSwap::from_pointee(live));
        let (posts, ending) = (BTreeMap::new(), JoinSet::new());
        let mut cluster =
            Self { journal, board, rules, posts, ending, live, loaded_at, last_reload: None, metrics, traces };
        let mut wanted = Vec::new();
        for sink in &cluster.rules.sinks {
            wanted.push((sink.name.clone(), Carries::build(sink, cluster.traces.as_ref())?));
        }
        for (name, carries) in wanted {
            cluster.spawn(name, carries, Controls::default())?;
        }
        cluster.publish();
        Ok(cluster)
    }

    /// The rules in force, and how to reach the lanes.
    pub(super) fn live(&self) -> Arc<ArcSwap<Live>> {
        Arc::clone(&self.live)
    }

    /// What other rules mean for the posts. Nothing has changed yet.
    pub(super) fn plan(&self, rules: &Rules) -> Result<Plan, BuildError> {
        let (mut plan, traces) = (Plan::default(), self.traces.as_ref());
        for sink in &rules.sinks {
            match self.posts.get(&sink.name) {
                Some(running) if running.carries.is(sink) => {}
                Some(_) => plan.replaced.push((sink.name.clone(), Carries::build(sink, traces)?)),
                None => plan.added.push((sink.name.clone(), Carries::build(sink, traces)?)),
            }
        }
        Ok(plan)
    }

    /// Follows other rules, as planned.
    pub(super) fn follow(&mut self, rules: Rules, plan: Plan) -> Result<Changes, RunError> {
        let mut changes = Changes::default();
        // A sink that is new has to be there before anything is addressed to it; one that goes, as long as something is.
        for (name, carries) in plan.added {
            self.spawn(name.clone(), carries, Controls::default())?;
            changes.added.push(name);
        }
        self.journal.readdress(Box::new(ByRules::new(&rules.table, self.journal.config(), &self.metrics)));
        for (name, carries) in plan.replaced {
            let controls = self.end(&name, false);
            self.spawn(name.clone(), carries, controls)?;
            changes.changed.push(name);
        }
        let is_gone = |name: &&String| rules.table.sink(name).is_none();
        for name in self.posts.keys().filter(is_gone).cloned().collect::<Vec<_>>() {
            self.end(&name, true);
            self.metrics.forget(&name);
            changes.removed.push(name);
        }
        self.rules = rules;
        self.loaded_at = SystemTime::now();
        self.publish();
        Ok(changes)
    }

    /// Remembers how the last reload went, for those who look at it.
    pub(super) fn note(&mut self, reload: Reload) {
        self.last_reload = Some(reload);
        self.publish();
    }

    /// Whether the last reload was refused.
    pub(super) fn was_refused(&self) -> bool {
        self.last_reload.as_ref().is_some_and(|reload| reload.outcome == Outcome::Refused)
    }

    /// Waits until a post has ended that should not have; nothing is lost if the future is dropped.
    pub(super) async fn ended(&mut self) -> String {
        loop {
            if let Some((name, _)) = self.posts.iter().find(|(_, running)| running.task.is_finished()) {
                return name.clone();
            }
            while self.ending.try_join_next().is_some() {}
            tokio::time::sleep(std::time::Duration::from_secs(1)).await;
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
        while self.ending.join_next().await.is_some() {}
    }

    /// Closes the connections of all sinks.
    pub(super) async fn close(&self) {
        let all = self.posts.iter().map(|(name, running)| close(name, &running.carries));
        futures_util::future::join_all(all).await;
        self.journal.close().await;
    }

    fn spawn(&mut self, name: String, carries: Carries, controls: Controls) -> Result<(), RunError> {
        let carries = Arc::new(carries);
        controls.set_paused(admin::Cluster::is_paused(&self.board, &name));
        let course = Arc::new(Course::new(Arc::clone(&self.rules.table)));
        let (journal, metrics) = (&self.journal, self.metrics.clone());
        let post = Post::open(&name, Arc::clone(&carries), journal, course, metrics, controls.clone())?;
        let (phase, bury) = (watch::Sender::new(Phase::Running), watch::Sender::new(false));
        let task = tokio::spawn(post.run(phase.subscribe(), bury.subscribe()));
        self.posts.insert(name, Running { carries, controls, phase, bury, task });
        Ok(())
    }

    /// Lets a post finish what is under way; how to reach the lanes of the next.
    fn end(&mut self, name: &str, bury: bool) -> Controls {
        let Some(Running { carries, controls, phase, bury: told, task }) = self.posts.remove(name) else {
            return Controls::default();
        };
        told.send_replace(bury);
        phase.send_replace(Phase::Finishing);
        let name = name.to_owned();
        self.ending.spawn(async move {
            // A panic there has been reported by the task itself.
            drop(task.await);
            drop(phase);
            close(&name, &carries).await;
        });
        controls
    }

    /// Says what is in force to those who look at it.
    fn publish(&self) {
        let controls = self.rules.sinks.iter().filter_map(|sink| {
            let running = self.posts.get(&sink.name)?;
            Some((sink.name.clone(), running.controls.clone()))
        });
        let (rules, loaded_at, last_reload) = (self.rules.clone(), self.loaded_at, self.last_reload.clone());
        self.live.store(Arc::new(Live { rules, lanes: controls.collect(), loaded_at, last_reload }));
    }
}
