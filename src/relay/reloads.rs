//! Reloading while the relay runs: when files have changed, when a signal or an operator asks for it.
//!
//! Everything is read and compiled before anything is changed. What can't be used changes nothing, and is logged with its
//! place and shown by the API until it is mended.

use std::path::Path;
use std::time::SystemTime;

use prometheus::IntCounterVec;
use tokio::sync::mpsc;
use tracing::{error, info, warn};

use super::in_force::Changes;
use super::storage::Carriers;
use super::{Origin, RunError};
use crate::admin::{self, Outcome, Reload, ReloadRequest};
use crate::config::Config;
use crate::ingress;
use crate::reload::{Loaded, Seen};
use crate::rules::with_causes;

/// How many operators may wait for a reload.
const REQUESTS: usize = 16;

/// Who is let in, which changes with the settings.
#[derive(Clone)]
pub(super) struct Gates {
    pub(super) ingress: ingress::Gate,
    pub(super) admin: admin::Gate,
}

/// Waits for reasons to reload, and does so.
pub(super) struct Reloads {
    origin: Origin,
    /// What is in force, and the files as they were when it was read.
    config: Config,
    read: Seen,
    gates: Gates,
    requests: mpsc::Receiver<ReloadRequest>,
    counts: IntCounterVec,
}

impl Reloads {
    /// Also returns the way in for operators.
    pub(super) fn new(
        origin: Origin,
        config: Config,
        gates: Gates,
        counts: IntCounterVec,
    ) -> (Self, mpsc::Sender<ReloadRequest>) {
        let (asked, requests) = mpsc::channel(REQUESTS);
        let read = origin.seen.clone();
        (Self { origin, config, read, gates, requests, counts }, asked)
    }

    /// Looks after the lanes until one ends that should not have.
    pub(super) async fn run(&mut self, carriers: &mut Carriers) -> RunError {
        loop {
            let request = tokio::select! {
                ended = carriers.ended() => match carriers.go_on(ended).await {
                    Ok(()) => continue,
                    Err(error) => return error,
                },
                () = self.origin.seen.changed() => None,
                Some(()) = self.origin.hangup.recv() => None,
                Some(request) = self.requests.recv() => Some(request),
            };
            let reload = self.reload(carriers).await;
            carriers.in_force().note(reload.clone());
            if let Some(request) = request {
                // Whoever asked and has gone away does not need the answer.
                drop(request.send(reload));
            }
        }
    }

    async fn reload(&mut self, carriers: &mut Carriers) -> Reload {
        let sources = self.origin.sources.clone();
        let (at, refused) = (SystemTime::now(), |problems| (Outcome::Refused, problems));
        let (outcome, problems) = match tokio::task::spawn_blocking(move || sources.load()).await {
            Err(error) => refused(vec![error.to_string()]),
            Ok((loaded, seen)) => {
                let same = seen.holds_same(&self.origin.seen);
                let emptied: Vec<_> = seen.emptied(&self.read).map(emptied).collect();
                self.origin.seen = seen;
                match loaded {
                    Ok(_) if !emptied.is_empty() => refused(emptied),
                    Ok(_) if same && !carriers.in_force().was_refused() => (Outcome::Unchanged, Vec::new()),
                    Ok(loaded) => match self.apply(loaded, carriers).await {
                        Ok(warnings) => (Outcome::Applied, warnings),
                        Err(error) => refused(vec![with_causes(&error)]),
                    },
                    Err(error) => refused(error.errors()),
                }
            }
        };
        self.counts.with_label_values(&[outcome.as_str()]).inc();
        match outcome {
            Outcome::Applied => {
                info!("reloaded");
                problems.iter().for_each(|problem| warn!("{problem}"));
            }
            Outcome::Unchanged => info!("asked to reload; nothing has changed"),
            Outcome::Refused => {
                for problem in &problems {
                    error!("{problem}");
                }
                error!(problems = problems.len(), "not reloaded; what was in force stays in force");
            }
        }
        Reload { at, outcome, problems }
    }

    /// Puts into force what can change in a running relay; what there is to say about it.
    async fn apply(&mut self, loaded: Loaded, carriers: &mut Carriers) -> Result<Vec<String>, RunError> {
        let Loaded { config, rules, mut warnings, problems } = loaded;
        // What can fail comes before what changes anything.
        let plan = carriers.plan(&rules)?;
        let (access, generated) = ingress::Access::new(&config.ingress, &self.config.data_dir)?;
        let operators = admin::Access::new(&config.admin)?;
        let Changes { added, changed, removed } = carriers.follow(rules, plan).await?;
        let replaced = [self.gates.ingress.replace(access), self.gates.admin.replace(operators)];
        info!(?added, ?changed, ?removed, "rules changed");
        self.origin.note_token(generated);
        self.read = self.origin.seen.clone();
        if config.telemetry.log != self.config.telemetry.log {
            // It parses, or the settings would not have been loaded.
            drop(self.origin.logs.set(&config.telemetry.log));
            self.config.telemetry.log.clone_from(&config.telemetry.log);
        }
        warnings.extend(problems.iter().map(ToString::to_string));
        warnings.extend(replaced.into_iter().filter_map(Result::err).map(|error| error.to_string()));
        for setting in self.config.needs_restart(&config) {
            warnings.push(format!("{setting} has changed, which has no effect before a restart"));
        }
        Ok(warnings)
    }
}

fn emptied(file: &Path) -> String {
    let file = file.display();
    format!("{file} is gone or empty, and had something in it before: write it again, or restart without it")
}
