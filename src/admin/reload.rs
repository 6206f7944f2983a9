//! Reading settings and rules again.

use std::time::SystemTime;

use axum::extract::State;
use axum::http::StatusCode;
use serde::Serialize;
use tokio::sync::oneshot;
use utoipa::ToSchema;

use super::Shared;
use super::problem::{Failed, Json, Problem};
use crate::event::rfc3339;

/// Asks for a reload, and is answered with how it went.
pub type ReloadRequest = oneshot::Sender<Reload>;

/// How a reload went.
#[derive(Clone, Debug)]
pub struct Reload {
    /// When.
    pub at: SystemTime,
    /// What became of it.
    pub outcome: Outcome,
    /// What is wrong if it was refused; else warnings.
    pub problems: Vec<String>,
}

/// What became of a reload.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "lowercase")]
#[schema(as = ReloadOutcome)]
pub enum Outcome {
    /// The files are in force.
    Applied,
    /// They hold what is in force already.
    Unchanged,
    /// They can't be used; what was in force still is.
    Refused,
}

impl Outcome {
    /// Its name in metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Applied => "applied",
            Self::Unchanged => "unchanged",
            Self::Refused => "refused",
        }
    }
}

/// A reload.
#[derive(Serialize, ToSchema)]
pub(super) struct Reloaded {
    /// When it was done.
    #[schema(format = "date-time")]
    at: String,
    outcome: Outcome,
    /// What is wrong with the files, each with its place, if it was refused; else warnings.
    problems: Vec<String>,
}

impl From<&Reload> for Reloaded {
    fn from(reload: &Reload) -> Self {
        Self { at: rfc3339(reload.at), outcome: reload.outcome, problems: reload.problems.clone() }
    }
}

/// Reads `relay.toml`, `routes.toml` and the secrets and certificates that they name again. All of it comes into force, or
/// nothing does: then the answer is 422 and says what is wrong, a line for each problem. The relay does so by itself when
/// a file changes.
#[utoipa::path(
    post,
    path = "/api/v1/reload",
    responses((status = 200, body = Reloaded), Failed)
)]
pub(super) async fn reload(State(operated): State<Shared>) -> Result<Json<Reloaded>, Problem> {
    let (request, answer) = oneshot::channel();
    let stopping = || Problem::unavailable("the relay is stopping");
    operated.reload.send(request).await.map_err(|_| stopping())?;
    let reload = answer.await.map_err(|_| stopping())?;
    match reload.outcome {
        Outcome::Applied | Outcome::Unchanged => Ok(Json(Reloaded::from(&reload))),
        Outcome::Refused => Err(Problem::new(StatusCode::UNPROCESSABLE_ENTITY, reload.problems.join("\n"))),
    }
}
