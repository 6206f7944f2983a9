//! What the relay is doing, while it does it.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::State;
use axum::response::sse::{Event, Sse};
use futures_util::stream::{self, Stream};
use tokio::sync::{Mutex, Semaphore};
use tokio::time::{Instant, MissedTickBehavior, interval};

use super::Shared;
use super::problem::{Failed, Problem};
use super::sinks::{Status, status};

/// The most streams at once.
const MAX_STREAMS: usize = 64;
/// How often each says something.
const PERIOD: Duration = Duration::from_secs(1);
/// How old that may be. However many watch, the relay is asked no more often.
const MAX_AGE: Duration = Duration::from_millis(500);

/// What streams share.
pub struct Streams {
    permits: Arc<Semaphore>,
    /// The last status, as JSON, and when it was so.
    latest: Mutex<Option<(Instant, String)>>,
}

impl Default for Streams {
    fn default() -> Self {
        Self { permits: Arc::new(Semaphore::new(MAX_STREAMS)), latest: Mutex::default() }
    }
}

impl Streams {
    async fn latest(&self, operated: &Shared) -> Result<String, Problem> {
        let mut latest = self.latest.lock().await;
        if let Some((at, text)) = &*latest
            && at.elapsed() < MAX_AGE
        {
            return Ok(text.clone());
        }
        let text = serde_json::to_string(&status(operated).await?).map_err(Problem::internal)?;
        *latest = Some((Instant::now(), text.clone()));
        Ok(text)
    }
}

/// Sends what `/api/v1/status` says once a second, as server-sent events called `status`, until the client or the relay
/// goes away; a comment where the status can't be told. At most 64 streams are served at once.
#[utoipa::path(
    get,
    path = "/api/v1/stream",
    responses((status = 200, body = Status, content_type = "text/event-stream", description = "Each event's data"), Failed)
)]
pub(super) async fn watch(
    State(operated): State<Shared>,
) -> Result<Sse<impl Stream<Item = Result<Event, Infallible>>>, Problem> {
    let permit = Arc::clone(&operated.streams.permits).try_acquire_owned();
    let permit = permit.map_err(|_| {
        Problem::unavailable(format!("{MAX_STREAMS} streams are being served, which is the most; end one of them"))
    })?;
    let mut ticks = interval(PERIOD);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let events = stream::unfold((operated, ticks, permit), async |(operated, mut ticks, permit)| {
        ticks.tick().await;
        let event = next(&operated).await;
        Some((Ok(event), (operated, ticks, permit)))
    });
    Ok(Sse::new(events))
}

async fn next(operated: &Shared) -> Event {
    match operated.streams.latest(operated).await {
        Ok(text) => Event::default().event("status").data(text),
        Err(_) => Event::default().comment("nothing at present"),
    }
}
