//! Who may operate the relay.

use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::StatusCode;
use axum::http::header::{AUTHORIZATION, HeaderValue, WWW_AUTHENTICATE};
use axum::middleware::Next;
use axum::response::{IntoResponse as _, Response};
use sha2::{Digest as _, Sha256};
use subtle::ConstantTimeEq as _;
use utoipa::Modify;
use utoipa::openapi::OpenApi;
use utoipa::openapi::security::{Http, HttpAuthScheme, SecurityScheme};

use super::problem::Problem;

/// The digest of the token, if there is one.
#[derive(Clone)]
pub(super) struct Guard(Option<Arc<[u8; 32]>>);

impl Guard {
    pub(super) fn new(token: Option<&str>) -> Self {
        Self(token.map(|token| Arc::new(Sha256::digest(token.as_bytes()).into())))
    }

    /// Takes the same time whatever was given.
    fn lets_in(&self, given: Option<&HeaderValue>) -> bool {
        let Some(expected) = &self.0 else { return true };
        let given = given.map(HeaderValue::as_bytes).unwrap_or_default();
        let (scheme, token) = given.split_at_checked(7).unwrap_or_default();
        let digest: [u8; 32] = Sha256::digest(token).into();
        scheme.eq_ignore_ascii_case(b"bearer ") & bool::from(digest.ct_eq(&**expected))
    }
}

/// Lets the request pass if it carries the token.
pub(super) async fn check(State(guard): State<Guard>, request: Request, next: Next) -> Response {
    if guard.lets_in(request.headers().get(AUTHORIZATION)) {
        return next.run(request).await;
    }
    let detail = "the token of admin.token is wanted, as `authorization: Bearer …`";
    let mut response = Problem::new(StatusCode::UNAUTHORIZED, detail).into_response();
    response.headers_mut().insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
    response
}

/// Says in the document that there may be a token.
pub(super) struct Bearer;

impl Modify for Bearer {
    fn modify(&self, document: &mut OpenApi) {
        let components = document.components.get_or_insert_default();
        components.add_security_scheme("token", SecurityScheme::Http(Http::new(HttpAuthScheme::Bearer)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_token_opens() {
        let check = |token: Option<&str>, given: Option<&str>, expected| {
            let given = given.map(|given| HeaderValue::from_str(given).unwrap());
            assert_eq!(Guard::new(token).lets_in(given.as_ref()), expected, "{given:?}");
        };
        check(None, None, true);
        check(None, Some("Bearer x"), true);
        check(Some("s3cret"), Some("Bearer s3cret"), true);
        check(Some("s3cret"), Some("bearer s3cret"), true);
        for wrong in ["Bearer s3cres", "Bearer s3cret ", "Bearer ", "Bearer", "s3cret", "Basic s3cret", ""] {
            check(Some("s3cret"), Some(wrong), false);
        }
        check(Some("s3cret"), None, false);
    }
}
