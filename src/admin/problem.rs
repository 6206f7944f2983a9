//! Errors as RFC 9457 has them, and requests that end in one.

use std::fmt;
use std::time::Duration;

use axum::body::Bytes;
use axum::extract::rejection::{BytesRejection, JsonRejection, PathRejection, QueryRejection};
use axum::extract::{FromRequest, FromRequestParts, OptionalFromRequest, Request};
use axum::http::StatusCode;
use axum::http::header::{CONTENT_TYPE, HeaderValue};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};
use tokio::time::timeout;
use utoipa::{IntoResponses, ToSchema};

use crate::lane::Stopped;
use crate::ledger::LedgerError;

/// How long a request's body may take.
const BODY_TIMEOUT: Duration = Duration::from_secs(10);

/// Why a request was not served.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Problem {
    /// Always `about:blank`.
    #[serde(rename = "type")]
    kind: &'static str,
    /// What the status means.
    title: &'static str,
    /// The status.
    #[schema(minimum = 400, maximum = 599)]
    status: u16,
    /// What went wrong, and what to do.
    detail: String,
}

/// The answers to requests that were not served, for the document.
#[derive(IntoResponses)]
#[expect(dead_code, reason = "says what the document has to say; nothing is made of it")]
pub(super) enum Failed {
    /// The request has to be another one.
    #[response(status = "4XX", content_type = "application/problem+json")]
    Request(Problem),
    /// The relay can't serve it at present.
    #[response(status = "5XX", content_type = "application/problem+json")]
    Relay(Problem),
}

impl Problem {
    pub(super) fn new(status: StatusCode, detail: impl Into<String>) -> Self {
        let title = status.canonical_reason().unwrap_or("Error");
        Self { kind: "about:blank", title, status: status.as_u16(), detail: detail.into() }
    }

    pub(super) fn bad_request(detail: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, detail)
    }

    pub(super) fn not_found(detail: impl Into<String>) -> Self {
        Self::new(StatusCode::NOT_FOUND, detail)
    }

    pub(super) fn conflict(detail: impl Into<String>) -> Self {
        Self::new(StatusCode::CONFLICT, detail)
    }

    pub(super) fn unavailable(detail: impl Into<String>) -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, detail)
    }

    pub(super) fn method_not_allowed() -> Self {
        Self::new(StatusCode::METHOD_NOT_ALLOWED, "the path is right, the method is not; see the header Allow")
    }

    pub(super) fn internal(error: impl fmt::Display) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, error.to_string())
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let status = StatusCode::from_u16(self.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let mut response = (status, axum::Json(self)).into_response();
        response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/problem+json"));
        response
    }
}

impl From<Stopped> for Problem {
    fn from(stopped: Stopped) -> Self {
        Self::unavailable(stopped.to_string())
    }
}

impl From<LedgerError> for Problem {
    fn from(error: LedgerError) -> Self {
        Self::internal(error)
    }
}

impl From<JsonRejection> for Problem {
    fn from(rejection: JsonRejection) -> Self {
        // That it is JSON of the wrong kind is the client's mistake like any other.
        match rejection.status() {
            StatusCode::UNPROCESSABLE_ENTITY => Self::bad_request(rejection.body_text()),
            status => Self::new(status, rejection.body_text()),
        }
    }
}

impl From<BytesRejection> for Problem {
    fn from(rejection: BytesRejection) -> Self {
        Self::new(rejection.status(), rejection.body_text())
    }
}

impl From<QueryRejection> for Problem {
    fn from(rejection: QueryRejection) -> Self {
        Self::bad_request(rejection.body_text())
    }
}

impl From<PathRejection> for Problem {
    fn from(rejection: PathRejection) -> Self {
        Self::bad_request(rejection.body_text())
    }
}

/// A JSON object, as the body of a request or an answer.
pub(super) struct Json<T>(pub(super) T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequest<S> for Json<T> {
    type Rejection = Problem;

    async fn from_request(request: Request, state: &S) -> Result<Self, Problem> {
        let axum::Json(object) =
            in_time(<axum::Json<Map<_, _>> as FromRequest<S>>::from_request(request, state)).await?;
        object_into(object).map(Self)
    }
}

impl<T: DeserializeOwned, S: Send + Sync> OptionalFromRequest<S> for Json<T> {
    type Rejection = Problem;

    async fn from_request(request: Request, state: &S) -> Result<Option<Self>, Problem> {
        let object = <axum::Json<Option<Map<_, _>>> as OptionalFromRequest<S>>::from_request(request, state);
        let object = in_time(object).await?;
        object.and_then(|axum::Json(object)| object).map(|object| object_into(object).map(Self)).transpose()
    }
}

/// The body of a request as it came.
pub(super) struct Body(pub(super) Bytes);

impl<S: Send + Sync> FromRequest<S> for Body {
    type Rejection = Problem;

    async fn from_request(request: Request, state: &S) -> Result<Self, Problem> {
        in_time(Bytes::from_request(request, state)).await.map(Self)
    }
}

/// Reads a body, if it comes in time.
async fn in_time<T, R: Into<Problem>>(reading: impl Future<Output = Result<T, R>>) -> Result<T, Problem> {
    let too_late = || {
        let detail = format!("the body did not come within {} seconds", BODY_TIMEOUT.as_secs());
        Problem::new(StatusCode::REQUEST_TIMEOUT, detail)
    };
    timeout(BODY_TIMEOUT, reading).await.map_err(|_| too_late())?.map_err(Into::into)
}

fn object_into<T: DeserializeOwned>(mut object: Map<String, Value>) -> Result<T, Problem> {
    object.values_mut().for_each(whole_numbers);
    T::deserialize(Value::Object(object)).map_err(|error| Problem::bad_request(error.to_string()))
}

/// To JSON `10.0` is the same number as `10`.
fn whole_numbers(value: &mut Value) {
    if let Value::Array(values) = value {
        return values.iter_mut().for_each(whole_numbers);
    }
    #[expect(clippy::cast_possible_truncation, reason = "the range is looked at first")]
    if let Some(number) = value.as_f64().filter(|number| value.is_f64() && number.fract() == 0.0 && number.abs() < 9e15)
    {
        *value = Value::from(number as i64);
    }
}

impl<T: Serialize> IntoResponse for Json<T> {
    fn into_response(self) -> Response {
        axum::Json(self.0).into_response()
    }
}

/// What the query says.
#[derive(FromRequestParts)]
#[from_request(via(axum::extract::Query), rejection(Problem))]
pub(super) struct Query<T>(pub(super) T);

/// What the path says.
#[derive(FromRequestParts)]
#[from_request(via(axum::extract::Path), rejection(Problem))]
pub(super) struct Path<T>(pub(super) T);
