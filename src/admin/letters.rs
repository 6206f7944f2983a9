//! Dead letters: listing them, trying them again, discarding them.

#![expect(unused_qualifications, reason = "in what the macros write")]

mod batch;

use std::time::Duration;

use axum::extract::State;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use tokio::time::{Instant, sleep_until};
use utoipa::{IntoParams, ToSchema};

use super::problem::{Failed, Json, Path, Problem, Query};
use super::up_to::UpTo;
use super::{BULK_LIMIT, Operated, Shared, limit, time};
use crate::event::{Event, Field, rfc3339};
use crate::ledger::{Filter, Letter, Millis};
use crate::routing::UNROUTED;
use batch::Batch;

/// How many a list has, unless it is asked for more.
const LIST_LIMIT: usize = 100;
/// How many are written together.
const CHUNK: usize = 500;
/// How often in a second a rate lets some through.
const PACES: usize = 10;
/// The highest rate that a request can ask for.
const MAX_RATE: u32 = 1_000_000;

/// A delivery that will not be tried again.
#[derive(Serialize, ToSchema)]
pub(super) struct DeadLetter {
    /// Its number.
    id: i64,
    sink: String,
    event_id: String,
    /// The route that led to the sink.
    route: String,
    /// `rejected`, `exhausted`, `expired`, `unrouted`, `sink_removed` or `unreadable`.
    reason: String,
    /// A short name of the last error.
    error_kind: String,
    /// The last error.
    error: String,
    /// How many attempts were made.
    attempts: u32,
    /// When the relay received the event.
    #[schema(format = "date-time")]
    received_at: Option<String>,
    #[schema(format = "date-time")]
    first_failed_at: Option<String>,
    #[schema(format = "date-time")]
    died_at: String,
    /// The value that its order was kept by.
    key: Option<String>,
    sender_id: Option<String>,
    campaign_id: Option<String>,
    status: Option<String>,
    message_id: Option<String>,
    /// The event as it was received; only where one dead letter is shown.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Object>)]
    body: Option<Box<RawValue>>,
}

/// A page of dead letters.
#[derive(Serialize, ToSchema)]
pub(super) struct DeadLetters {
    /// By number.
    dead_letters: Vec<DeadLetter>,
    /// Where the next page begins, for `after`; null on the last.
    next: Option<i64>,
    /// What there is now, for `up_to` of the next page, or of a request that is to take no others.
    up_to: UpTo,
}

/// Which dead letters. What is not given does not matter.
#[derive(Default, Deserialize, IntoParams, ToSchema)]
#[serde(deny_unknown_fields, default)]
#[into_params(parameter_in = Query)]
#[schema(default)]
pub(super) struct Selection {
    sink: Option<String>,
    /// The event's status.
    status: Option<String>,
    reason: Option<String>,
    error_kind: Option<String>,
    /// Dead at or after this time.
    #[serde(deserialize_with = "time::optional")]
    #[schema(value_type = Option<String>, format = "date-time")]
    #[param(value_type = Option<String>, format = "date-time")]
    since: Option<Millis>,
    /// Dead before this time.
    #[serde(deserialize_with = "time::optional")]
    #[schema(value_type = Option<String>, format = "date-time")]
    #[param(value_type = Option<String>, format = "date-time")]
    until: Option<Millis>,
    /// The value that their order was kept by.
    key: Option<String>,
    event_id: Option<String>,
    /// With a higher number.
    after: Option<i64>,
    /// With at most this number; or what `up_to` of an answer has, as it is.
    #[serde(deserialize_with = "UpTo::optional")]
    #[schema(value_type = Option<UpTo>)]
    #[param(value_type = Option<String>, pattern = r"^(\d{1,18}|\[\d{1,18}(,\d{1,18})*\])$")]
    up_to: Option<UpTo>,
    /// How many at most, up to 10,000. Lists have 100 without it, other requests 1,000.
    #[schema(minimum = 1, maximum = 10_000)]
    #[param(minimum = 1, maximum = 10_000)]
    limit: Option<usize>,
}

/// Where to.
#[derive(Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub(super) struct ReplayTo {
    /// Another sink than they died at. Those of `unrouted` go where the rules now say, unless this says otherwise.
    to: Option<String>,
}

/// What to replay.
#[derive(Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub(super) struct ReplayLetters {
    sink: Option<String>,
    /// The event's status.
    status: Option<String>,
    reason: Option<String>,
    error_kind: Option<String>,
    /// Dead at or after this time.
    #[serde(deserialize_with = "time::optional")]
    #[schema(value_type = Option<String>, format = "date-time")]
    since: Option<Millis>,
    /// Dead before this time.
    #[serde(deserialize_with = "time::optional")]
    #[schema(value_type = Option<String>, format = "date-time")]
    until: Option<Millis>,
    /// The value that their order was kept by.
    key: Option<String>,
    event_id: Option<String>,
    /// With a higher number.
    after: Option<i64>,
    /// With at most this number; or what `up_to` of an answer has, as it is.
    #[serde(deserialize_with = "UpTo::optional")]
    #[schema(value_type = Option<UpTo>)]
    up_to: Option<UpTo>,
    /// How many at most, up to 10,000; 1,000 without it.
    #[schema(minimum = 1, maximum = 10_000)]
    limit: Option<usize>,
    /// Another sink than they died at. Those of `unrouted` go where the rules now say, unless this says otherwise.
    to: Option<String>,
    /// How many a second; the answer comes when the last was taken.
    #[schema(minimum = 1, maximum = 1_000_000)]
    rate: Option<u32>,
}

/// What was done.
#[derive(Serialize, ToSchema)]
pub(super) struct Done {
    /// How many were given to their sinks, or discarded.
    done: u64,
    /// How many stay dead letters: no sink of the rules is theirs any more.
    skipped: u64,
    /// The highest number that was looked at; for `after` of the next request.
    last: Option<i64>,
    /// How many with higher numbers the filter still lets through.
    remaining: u64,
    /// For `up_to` of the next request, so that it does not meet letters that have died again.
    up_to: UpTo,
}

/// Lists dead letters, by number. Pages are stable: what there was at the first is on one of them unless it is gone, and
/// what is gone leaves no hole. What dies meanwhile is on none of them with `up_to` of the first. Without, it comes last;
/// where relays share a journal, last of its partition, so that it is on none if those have been shown.
#[utoipa::path(
    get,
    path = "/api/v1/dead-letters",
    params(Selection),
    responses((status = 200, body = DeadLetters), Failed)
)]
pub(super) async fn list(
    State(operated): State<Shared>,
    Query(selection): Query<Selection>,
) -> Result<Json<DeadLetters>, Problem> {
    let limit = limit(selection.limit, LIST_LIMIT)?;
    let up_to = selection.up_to(&operated).await?;
    let filter = selection.filter();
    let mut letters = operated.letters.read(move |letters| letters.list(&filter, limit + 1)).await?;
    let more = letters.len() > limit;
    letters.truncate(limit);
    let next = letters.last().map(|letter| letter.id).filter(|_| more);
    Ok(Json(DeadLetters {
        dead_letters: letters.into_iter().map(|letter| DeadLetter::new(letter, false)).collect(),
        next,
        up_to,
    }))
}

/// Shows a dead letter, with the whole event.
#[utoipa::path(
    get,
    path = "/api/v1/dead-letters/{id}",
    params(("id" = i64, Path, description = "The dead letter")),
    responses((status = 200, body = DeadLetter), Failed)
)]
pub(super) async fn show(State(operated): State<Shared>, Path(id): Path<i64>) -> Result<Json<DeadLetter>, Problem> {
    Ok(Json(DeadLetter::new(one(&operated, id).await?, true)))
}

/// Discards a dead letter, for good.
#[utoipa::path(
    delete,
    path = "/api/v1/dead-letters/{id}",
    params(("id" = i64, Path, description = "The dead letter")),
    responses((status = 200, body = Done), Failed)
)]
pub(super) async fn discard(State(operated): State<Shared>, Path(id): Path<i64>) -> Result<Json<Done>, Problem> {
    one(&operated, id).await?;
    let done = operated.letters.discard(vec![id]).await?;
    Ok(Json(Done::one(id, done as u64)))
}

/// Tries a dead letter again.
#[utoipa::path(
    post,
    path = "/api/v1/dead-letters/{id}/replay",
    params(("id" = i64, Path, description = "The dead letter")),
    request_body(content = Option<ReplayTo>, content_type = "application/json"),
    responses((status = 200, body = Done), Failed)
)]
pub(super) async fn replay(
    State(operated): State<Shared>,
    Path(id): Path<i64>,
    destination: Option<Json<ReplayTo>>,
) -> Result<Json<Done>, Problem> {
    let to = destination.and_then(|Json(destination)| destination.to);
    let letter = one(&operated, id).await?;
    let sink = letter.sink.clone();
    let batch = Batch::new(&operated, vec![letter], to.as_deref())?;
    if batch.skipped > 0 {
        return Err(Problem::conflict(match &*sink {
            UNROUTED => "no route matches the event; add one, or say to which sink it is to go".to_owned(),
            sink => format!("the sink {sink:?} is no longer in the rules; say to which other it is to go"),
        }));
    }
    match batch.send(&operated).await? {
        0 => Err(gone(id)),
        done => Ok(Json(Done::one(id, done))),
    }
}

/// Tries dead letters again, by filter. One request takes up to `limit` of them; to take all, repeat it with `after` and
/// `up_to` of the answer until nothing is remaining. What dies again is a new dead letter, beyond that `up_to`.
#[utoipa::path(
    post,
    path = "/api/v1/dead-letters/replay",
    request_body(content = ReplayLetters, content_type = "application/json"),
    responses((status = 200, body = Done), Failed)
)]
pub(super) async fn replay_all(
    State(operated): State<Shared>,
    Json(replay): Json<ReplayLetters>,
) -> Result<Json<Done>, Problem> {
    let (selection, to, rate) = replay.split();
    let limit = limit(selection.limit, BULK_LIMIT)?;
    if let Some(to) = &to {
        operated.lane(to)?;
    }
    if rate.is_some_and(|rate| !(1..=MAX_RATE).contains(&rate)) {
        return Err(Problem::bad_request(format!("`rate` is how many a second; it must be from 1 to {MAX_RATE}")));
    }
    let chunk = rate.map_or(CHUNK, |rate| (rate as usize / PACES).clamp(1, CHUNK));
    let mut rest = Rest::new(&operated, selection).await?;
    let mut done = Done { done: 0, skipped: 0, last: None, remaining: 0, up_to: rest.up_to.clone() };
    let (mut turn, mut left) = (Instant::now(), limit);
    while let letters = rest.next(&operated, chunk.min(left)).await?
        && !letters.is_empty()
    {
        sleep_until(turn).await;
        if let Some(rate) = rate {
            turn = turn.max(Instant::now()) + Duration::from_secs(letters.len() as u64) / rate;
        }
        left -= letters.len();
        let batch = Batch::new(&operated, letters, to.as_deref())?;
        done.skipped += batch.skipped;
        done.done += batch.send(&operated).await?;
    }
    (done.last, done.remaining) = rest.left(&operated).await?;
    Ok(Json(done))
}

/// Discards dead letters, by filter, for good. One request takes up to `limit` of them.
#[utoipa::path(
    post,
    path = "/api/v1/dead-letters/discard",
    request_body(content = Selection, content_type = "application/json"),
    responses((status = 200, body = Done), Failed)
)]
pub(super) async fn discard_all(
    State(operated): State<Shared>,
    Json(selection): Json<Selection>,
) -> Result<Json<Done>, Problem> {
    let limit = limit(selection.limit, BULK_LIMIT)?;
    let mut rest = Rest::new(&operated, selection).await?;
    let letters = rest.next(&operated, limit).await?;
    let discarded = operated.letters.discard(letters.iter().map(|letter| letter.id).collect()).await?;
    let (last, remaining) = rest.left(&operated).await?;
    Ok(Json(Done { done: discarded as u64, skipped: 0, last, remaining, up_to: rest.up_to }))
}

async fn one(operated: &Operated, id: i64) -> Result<Letter, Problem> {
    let letter = operated.letters.read(move |letters| letters.get(id)).await?;
    letter.ok_or_else(|| gone(id))
}

fn gone(id: i64) -> Problem {
    Problem::not_found(format!("there is no dead letter {id}; it may be replayed or discarded"))
}

/// Dead letters, a few at a time, by number.
struct Rest {
    filter: Filter,
    last: Option<i64>,
    up_to: UpTo,
}

impl Rest {
    async fn new(operated: &Operated, selection: Selection) -> Result<Self, Problem> {
        let up_to = selection.up_to(operated).await?;
        let filter = Selection { up_to: Some(up_to.clone()), ..selection }.filter();
        Ok(Self { last: filter.after, filter, up_to })
    }

    async fn next(&mut self, operated: &Operated, limit: usize) -> Result<Vec<Letter>, Problem> {
        self.filter.after = self.last;
        let filter = self.filter.clone();
        let found = match limit {
            0 => Vec::new(),
            limit => operated.letters.read(move |letters| letters.list(&filter, limit)).await?,
        };
        self.last = found.last().map(|letter| letter.id).or(self.last);
        Ok(found)
    }

    /// The last that was looked at, and how many there are after it.
    async fn left(&self, operated: &Operated) -> Result<(Option<i64>, u64), Problem> {
        let filter = Filter { after: self.last, ..self.filter.clone() };
        Ok((self.last, operated.letters.read(move |letters| letters.count(&filter)).await?))
    }
}

impl Selection {
    /// What is given, or else what there is now. A number alone does not say where partitions end.
    async fn up_to(&self, operated: &Operated) -> Result<UpTo, Problem> {
        match &self.up_to {
            Some(up_to @ UpTo::Each(_)) => Ok(up_to.clone()),
            Some(UpTo::Number(_)) | None => UpTo::now(operated, self.filter()).await,
        }
    }

    fn filter(&self) -> Filter {
        let (up_to, ends) = self.up_to.clone().map_or((None, None), UpTo::bounds);
        Filter {
            sink: self.sink.clone(),
            status: self.status.clone(),
            reason: self.reason.clone(),
            error_kind: self.error_kind.clone(),
            since: self.since,
            until: self.until,
            key: self.key.clone(),
            event_id: self.event_id.clone(),
            after: self.after,
            up_to,
            ends,
        }
    }
}

impl ReplayLetters {
    fn split(self) -> (Selection, Option<String>, Option<u32>) {
        let Self { sink, status, reason, error_kind, since, until, key, event_id, after, up_to, limit, to, rate } =
            self;
        let selection =
            Selection { sink, status, reason, error_kind, since, until, key, event_id, after, up_to, limit };
        (selection, to, rate)
    }
}

impl Done {
    fn one(id: i64, done: u64) -> Self {
        Self { done, skipped: 0, last: Some(id), remaining: 0, up_to: UpTo::Number(id) }
    }
}

impl DeadLetter {
    fn new(letter: Letter, with_body: bool) -> Self {
        let event = Event::decode(letter.record).ok();
        let field = |field| event.as_ref().and_then(|event| event.field(field)).map(str::to_owned);
        let body = event.as_ref().filter(|_| with_body).map(|event| event.body_str().to_owned());
        Self {
            id: letter.id,
            sink: letter.sink,
            event_id: letter.event_id,
            route: letter.route,
            reason: letter.reason,
            error_kind: letter.error_kind,
            error: letter.error,
            attempts: letter.attempts,
            received_at: event.as_ref().map(|event| rfc3339(event.received_at())),
            first_failed_at: letter.first_failed_at.map(time::text),
            died_at: time::text(letter.died_at),
            key: letter.key,
            sender_id: field(Field::SenderId),
            campaign_id: field(Field::CampaignId),
            status: field(Field::Status),
            message_id: field(Field::MessageId),
            body: body.and_then(|body| RawValue::from_string(body).ok()),
        }
    }
}
