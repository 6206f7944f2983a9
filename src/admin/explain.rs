//! Where an event would go.

#![expect(unused_qualifications, reason = "in what the macros write")]

use axum::extract::State;
use serde::Deserialize;
use utoipa::openapi::RefOr;
use utoipa::openapi::schema::{AdditionalProperties, ArrayBuilder, ObjectBuilder, OneOfBuilder, Schema};
use utoipa::{IntoParams, PartialSchema, ToSchema};

use super::Shared;
use super::problem::{Body, Failed, Json, Problem, Query};
use crate::event::{self, BodyError};
use crate::rules::Explained;

#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct Sender {
    /// The name of the token that the sender used, for rules on `token`: the first of the settings without it, `generated` or
    /// `none` where there is none.
    token: Option<String>,
}

/// What the ingress takes, for the document: an event, or an array of them.
struct Events;

impl PartialSchema for Events {
    fn schema() -> RefOr<Schema> {
        let event = ObjectBuilder::new().additional_properties(Some(AdditionalProperties::FreeForm(true))).build();
        let several = ArrayBuilder::new().items(event.clone()).min_items(Some(1));
        OneOfBuilder::new().item(event).item(several).into()
    }
}

impl ToSchema for Events {}

/// Says which routes an event matches, which it doesn't and why, and what each sink would be sent. Takes what the ingress
/// takes: an event, or an array of them. Nothing is sent or stored.
#[utoipa::path(
    post,
    path = "/api/v1/explain",
    params(Sender),
    request_body(content = Events, content_type = "application/json"),
    responses(
        (status = 200, body = [Explained], description = "One explanation for each event"),
        Failed
    )
)]
pub(super) async fn explain(
    State(operated): State<Shared>,
    Query(sender): Query<Sender>,
    Body(body): Body,
) -> Result<Json<Vec<Explained>>, Problem> {
    let token = sender.token.unwrap_or_else(|| operated.gate.first_token());
    // There may be thousands of events.
    let explain = move || {
        let (events, live) = (event::sample(&body, &token)?, operated.live.load());
        Ok(events.iter().map(|event| live.rules.explain(event)).collect())
    };
    let explained = tokio::task::spawn_blocking(explain).await.map_err(Problem::internal)?;
    explained.map(Json).map_err(|error: BodyError| Problem::bad_request(error.to_string()))
}
