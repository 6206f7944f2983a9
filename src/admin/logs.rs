//! What is logged.

use axum::extract::State;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::Shared;
use super::problem::{Failed, Json, Problem};

/// The longest text, in bytes.
const MAX: usize = 1000;

/// What is logged.
#[derive(Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Log {
    /// A level (`info`), or levels by module (`info,engage_relay::lane=debug`).
    #[schema(
        example = "info",
        max_length = 1000,
        pattern = "^([a-z_:]+=)?(off|error|warn|info|debug|trace)(,([a-z_:]+=)?(off|error|warn|info|debug|trace))*$"
    )]
    log: String,
}

/// What is logged at present.
#[utoipa::path(
    get,
    path = "/api/v1/log",
    responses((status = 200, body = Log), Failed)
)]
pub(super) async fn show(State(operated): State<Shared>) -> Json<Log> {
    Json(Log { log: operated.logs.directives() })
}

/// Changes what is logged, until the setting `telemetry.log` changes or the process ends.
#[utoipa::path(
    put,
    path = "/api/v1/log",
    request_body(content = Log, content_type = "application/json"),
    responses((status = 200, body = Log), Failed)
)]
pub(super) async fn change(State(operated): State<Shared>, Json(log): Json<Log>) -> Result<Json<Log>, Problem> {
    let wanted =
        "a level (off, error, warn, info, debug, trace), or levels by module such as \"info,engage_relay::lane=debug\"";
    let problem = || Problem::bad_request(format!("`log` is {:?}; it must be {wanted}", log.log));
    if log.log.len() > MAX || !log.log.split(',').all(is_directive) {
        return Err(problem());
    }
    operated.logs.set(&log.log).map_err(|_| problem())?;
    tracing::info!(log = %log.log, "logging changed");
    Ok(Json(log))
}

/// A level, or one for a module. The setting `telemetry.log` takes more; this is what can be described.
fn is_directive(text: &str) -> bool {
    let (module, level) = text.rsplit_once('=').unwrap_or(("_", text));
    let is_module = !module.is_empty() && module.bytes().all(|byte| byte.is_ascii_lowercase() || b"_:".contains(&byte));
    is_module && matches!(level, "off" | "error" | "warn" | "info" | "debug" | "trace")
}
