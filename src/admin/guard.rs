//! Who may operate the relay.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::SystemTime;

use arc_swap::ArcSwap;
use axum::extract::{Request, State};
use axum::http::header::{AUTHORIZATION, HOST, HeaderMap, HeaderValue, ORIGIN, WWW_AUTHENTICATE};
use axum::http::uri::Authority;
use axum::http::{StatusCode, Uri};
use axum::middleware::Next;
use axum::response::{IntoResponse as _, Response};
use sha2::{Digest as _, Sha256};
use subtle::ConstantTimeEq as _;
use utoipa::Modify;
use utoipa::openapi::OpenApi;
use utoipa::openapi::security::{Http, HttpAuthScheme, SecurityScheme};

use super::Config;
use super::problem::Problem;
use crate::tls::{self, NeedsRestart, TlsError};

/// Who may operate, and how the admin side identifies itself: all that can change while it runs, as one value that is
/// replaced as a whole.
pub struct Access {
    /// The digest of the token, if there is one.
    token: Option<[u8; 32]>,
    pub(super) tls: Option<tls::Server>,
}

impl Access {
    /// Compiles the settings, and reads the files of `tls`.
    ///
    /// # Errors
    ///
    /// [`AccessError`]: the files don't work.
    pub fn new(config: &Config) -> Result<Self, AccessError> {
        let tls = config.tls.as_ref().map(tls::Server::load).transpose()?;
        Ok(Self { token: config.token.as_ref().map(|token| Sha256::digest(token).into()), tls })
    }

    /// Takes the same time whatever was given.
    fn lets_in(&self, given: Option<&HeaderValue>) -> bool {
        let Some(expected) = &self.token else { return true };
        let given = given.map(HeaderValue::as_bytes).unwrap_or_default();
        let (scheme, token) = given.split_at_checked(7).unwrap_or_default();
        let digest: [u8; 32] = Sha256::digest(token).into();
        scheme.eq_ignore_ascii_case(b"bearer ") & bool::from(digest.ct_eq(expected))
    }
}

/// The [`Access`] of a running admin side. Clones are of the same.
#[derive(Clone)]
pub struct Gate(Arc<ArcSwap<Access>>);

impl Gate {
    /// Lets in whom this lets in.
    pub fn new(access: Access) -> Self {
        Self(Arc::new(ArcSwap::from_pointee(access)))
    }

    /// What holds now. Meant to be given back soon.
    pub(super) fn load(&self) -> arc_swap::Guard<Arc<Access>> {
        self.0.load()
    }

    /// From now on this holds: for every request, and for the handshakes of new connections.
    ///
    /// # Errors
    ///
    /// [`NeedsRestart`]: one has TLS and the other has not. All the rest has changed.
    pub fn replace(&self, mut access: Access) -> Result<(), NeedsRestart> {
        let replaced = tls::replace("admin.tls", self.load().tls.as_ref(), &mut access.tls);
        self.0.store(Arc::new(access));
        replaced
    }

    /// When the certificate expires, if there is one.
    pub fn certificate_expires(&self) -> Option<SystemTime> {
        self.load().tls.as_ref().map(tls::Server::expires)
    }
}

/// Why nobody can be let in.
#[derive(Debug, thiserror::Error)]
#[error("admin.tls does not work")]
pub struct AccessError(#[from] TlsError);

/// Lets the request pass if it carries the token, or if there is none and no other site's page has made it.
pub(super) async fn check(State(gate): State<Gate>, request: Request, next: Next) -> Response {
    let access = gate.load();
    if !access.lets_in(request.headers().get(AUTHORIZATION)) {
        let detail = "the token of admin.token is wanted, as `authorization: Bearer …`";
        let mut response = Problem::new(StatusCode::UNAUTHORIZED, detail).into_response();
        response.headers_mut().insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        return response;
    }
    let foreign = access.token.is_none().then(|| foreign(request.headers(), request.uri())).flatten();
    drop(access);
    match foreign {
        Some(why) => Problem::new(StatusCode::FORBIDDEN, why).into_response(),
        None => next.run(request).await,
    }
}

/// Why a request may be that of another site's page, in the browser of somebody who can reach the relay. Browsers send
/// such requests anywhere and say so; or the site has given a name of its own the relay's address, which shows in the
/// host. A page can't know the token, so where one is wanted this does not matter.
fn foreign(headers: &HeaderMap, uri: &Uri) -> Option<&'static str> {
    let host = headers.get(HOST).map(HeaderValue::as_bytes).or(uri.authority().map(|host| host.as_str().as_bytes()));
    // Other programs than browsers may send none.
    if host.is_some_and(|host| !is_local(host)) {
        return Some(
            "without admin.token only requests to localhost or an IP address are served; set a token to reach the relay by another name",
        );
    }
    let is_other_site = headers.get("sec-fetch-site").is_some_and(|site| site != "same-origin" && site != "none");
    let is_other_origin = headers.get(ORIGIN).is_some_and(|origin| {
        let origin = Uri::try_from(origin.as_bytes()).ok();
        origin.as_ref().and_then(Uri::authority).map(|origin| origin.as_str().as_bytes()) != host
    });
    (is_other_site || is_other_origin)
        .then_some("this request was made by a page of another site, which may not operate the relay")
}

/// Whether a host is one that no other site can be called by.
fn is_local(host: &[u8]) -> bool {
    Authority::try_from(host).is_ok_and(|host| {
        let name = host.host().trim_matches(['[', ']']).to_ascii_lowercase();
        name.parse::<IpAddr>().is_ok() || name == "localhost" || name.ends_with(".localhost")
    })
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
    fn pages_of_other_sites_are_found_out() {
        let check = |headers: &[(&'static str, &'static str)], uri: &'static str, expected: bool| {
            let headers: HeaderMap =
                headers.iter().map(|(name, value)| (name.parse().unwrap(), HeaderValue::from_static(value))).collect();
            assert_eq!(foreign(&headers, &Uri::from_static(uri)).is_some(), expected, "{headers:?} {uri}");
        };
        for host in ["127.0.0.1:9090", "localhost:9090", "LOCALHOST", "[::1]:9090", "relay.localhost:1", "10.1.2.3"] {
            check(&[("host", host)], "/", false);
        }
        for host in
            ["evil.example:9090", "localhost.evil.example", "127.0.0.1.evil.example", "evillocalhost", "", "a b"]
        {
            check(&[("host", host)], "/", true);
        }
        check(&[], "/", false);
        check(&[], "http://127.0.0.1:9090/", false);
        check(&[], "http://evil.example:9090/", true);
        for (origin, foreign) in [
            ("http://localhost:9090", false),
            ("https://localhost:9090", false),
            ("http://localhost:3000", true),
            ("http://127.0.0.1:9090", true),
            ("https://evil.example", true),
            ("null", true),
            ("", true),
        ] {
            check(&[("host", "localhost:9090"), ("origin", origin)], "/", foreign);
            check(&[("origin", origin)], "http://localhost:9090/", foreign);
        }
        for (site, foreign) in [("same-origin", false), ("none", false), ("same-site", true), ("cross-site", true)] {
            check(&[("host", "localhost:9090"), ("sec-fetch-site", site)], "/", foreign);
        }
    }

    #[test]
    fn only_the_token_opens() {
        let check = |token: Option<&str>, given: Option<&str>, expected| {
            let given = given.map(|given| HeaderValue::from_str(given).unwrap());
            let config = Config { token: token.map(str::to_owned), ..Config::default() };
            assert_eq!(Access::new(&config).unwrap().lets_in(given.as_ref()), expected, "{given:?}");
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
