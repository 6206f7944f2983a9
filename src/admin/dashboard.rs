//! The dashboard: a page that shows what the API says and operates the relay by it.
//!
//! It is part of the program and loads nothing from elsewhere. It answers anyone, since it shows nothing by itself: where
//! there is a token, the page asks for it. What it shows comes from senders and receivers in part, so it may run no script
//! but its own.

use axum::Router;
use axum::http::header::{
    CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, REFERRER_POLICY, X_CONTENT_TYPE_OPTIONS,
};
use axum::response::IntoResponse;
use axum::routing::get;

use super::Shared;

const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src data:; connect-src 'self'; \
                      base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/// The page and its parts.
pub(super) fn router() -> Router<Shared> {
    let file = |content_type, content| get(async move || served(content_type, content));
    Router::new()
        .route("/", file("text/html; charset=utf-8", include_str!("dashboard/index.html")))
        .route("/dashboard.css", file("text/css; charset=utf-8", include_str!("dashboard/dashboard.css")))
        .route("/dashboard.js", file("text/javascript; charset=utf-8", include_str!("dashboard/dashboard.js")))
}

fn served(content_type: &'static str, content: &'static str) -> impl IntoResponse {
    let headers = [
        (CONTENT_TYPE, content_type),
        (CONTENT_SECURITY_POLICY, POLICY),
        (X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (REFERRER_POLICY, "no-referrer"),
        // Another version of the program may be asked next.
        (CACHE_CONTROL, "no-cache"),
    ];
    (headers, content)
}
