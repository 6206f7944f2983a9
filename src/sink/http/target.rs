//! The URL template of an HTTP sink: an event's values may fill in its path and query, and nothing else.

use url::{Position, Url};

use super::super::{DeliveryError, View};
use super::public;
use crate::event::Event;
use crate::template::{Escape, Template};

/// A URL template whose scheme, user, host and port are the same for every event.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Target {
    template: Template,
    /// One of the URLs that there can be.
    sample: Url,
    /// Whether there is no other.
    is_fixed: bool,
}

impl Target {
    /// # Errors
    ///
    /// Why no event, or not every event, could be sent there.
    pub(super) fn new(template: Template) -> Result<Self, String> {
        // The samples differ in every way that a URL parser tells apart: letters, digits, case.
        let samples = ["a", "7", "Z-9"].map(|sample| template.render_sample(sample));
        let parsed = samples.each_ref().map(|sample| Url::parse(sample));
        let [Ok(first), Ok(second), Ok(third)] = &parsed else {
            return Err(match parsed.iter().all(Result::is_err) {
                true => "not an absolute URL, such as \"https://example.com/path\"".to_owned(),
                false => MISPLACED.to_owned(),
            });
        };
        let authority = |url: &Url| url[..Position::BeforePath].to_owned();
        if authority(first) != authority(second) || authority(first) != authority(third) {
            return Err(MISPLACED.to_owned());
        }
        if !matches!(first.scheme(), "http" | "https") || !first.has_host() {
            return Err("an HTTP sink cannot send to this scheme; write http or https".to_owned());
        }
        if first.port() == Some(0) {
            return Err("nothing listens on port 0".to_owned());
        }
        if first.fragment().is_some() {
            return Err("what follows # in a URL is never sent".to_owned());
        }
        if samples.iter().any(|sample| has_dot_segment(sample)) {
            return Err("the path holds \".\" or \"..\"".to_owned());
        }
        let is_fixed = first == second && first == third;
        Ok(Self { template, sample: first.clone(), is_fixed })
    }

    /// Whether every event would go to an address that is not public.
    pub(super) fn is_private_address(&self) -> bool {
        public::is_private_address(self.sample.host())
    }

    /// Whether it is reached over TLS.
    pub(super) fn is_tls(&self) -> bool {
        self.sample.scheme() == "https"
    }

    /// Host and port, which are the same for every event.
    pub(super) fn address(&self) -> Option<(String, u16)> {
        Some((self.sample.host_str()?.to_owned(), self.sample.port_or_known_default()?))
    }

    /// The URL for an event. Rejects an event whose values would take path segments away.
    pub(super) fn url(&self, event: &Event) -> Result<Url, DeliveryError> {
        if self.is_fixed {
            return Ok(self.sample.clone());
        }
        let invalid = |text: &str| DeliveryError::reject("invalid_url", text);
        let url = View::Real.render(&self.template, event, Escape::Url);
        if has_dot_segment(&url) {
            return Err(invalid("a value makes a path segment \".\" or \"..\" of the URL"));
        }
        Url::parse(&url).map_err(|_| invalid("a value makes the URL one that can't be read"))
    }

    /// The same to be shown.
    pub(super) fn shown(&self, event: &Event) -> Result<String, DeliveryError> {
        self.url(event)?;
        Ok(View::Redacted.render(&self.template, event, Escape::Url))
    }
}

const MISPLACED: &str = "fields may stand in the path and the query of a URL, not in its scheme, user, host or port";

/// Whether a URL parser would take segments out of the path: `.` and `..`, also where they are percent-encoded.
fn has_dot_segment(url: &str) -> bool {
    let path = url.split(['?', '#']).next().unwrap_or_default();
    path.split(['/', '\\']).any(|segment| {
        let segment = segment.to_ascii_lowercase().replace("%2e", ".");
        segment == "." || segment == ".."
    })
}

#[cfg(test)]
mod tests {
    use super::super::super::tests::{event, template};
    use super::*;

    #[test]
    fn rules_at_load() {
        fn check(url: &str, expected: Result<(), &str>) {
            match (Target::new(template(url)), expected) {
                (Ok(_), Ok(())) => {}
                (Err(problem), Err(part)) => assert!(problem.contains(part), "{url}: {problem}"),
                (result, _) => panic!("{url}: {result:?}"),
            }
        }
        check("https://example.com", Ok(()));
        check("http://127.0.0.1:8080/{sender_id}/x?s={status}&x={/a/b}", Ok(()));
        check("https://user:pass@example.com/{status}{sender_id}", Ok(()));
        check("https://example.com/v1.0/.well-known/{status}..", Ok(()));
        check("https://example.com/{status}/?q=../x", Ok(()));
        check("{status}://example.com/", Err("scheme, user, host or port"));
        check("https://{status}.example.com/", Err("scheme, user, host or port"));
        check("https://example.com{status}/", Err("scheme, user, host or port"));
        check("https://example.com:{status}/", Err("scheme, user, host or port"));
        check("https://example.com:80{status}/", Err("scheme, user, host or port"));
        check("https://{status}@example.com/", Err("scheme, user, host or port"));
        check("https://user:{status}@example.com/", Err("scheme, user, host or port"));
        check("https:{status}/x", Err("scheme, user, host or port"));
        check("example.com/x", Err("not an absolute URL"));
        check("/x/{status}", Err("not an absolute URL"));
        check("https://", Err("not an absolute URL"));
        check("ftp://example.com/", Err("to this scheme"));
        check("mailto:a@example.com", Err("to this scheme"));
        check("http://example.com:0/", Err("port 0"));
        check("https://example.com/#{status}", Err("never sent"));
        check("https://example.com/a/../{status}", Err("the path holds"));
        check("https://example.com/a/%2E%2e/x", Err("the path holds"));
    }

    #[test]
    fn values_stay_in_their_segment() {
        fn check(url: &str, sender_id: &str, expected: Option<&str>) {
            let event = event(&serde_json::json!({ "channel": { "sender_id": sender_id } }).to_string());
            let rendered = Target::new(template(url)).unwrap().url(&event).map(String::from);
            assert_eq!(rendered.as_deref().ok(), expected, "{sender_id}");
            if let Some(url) = expected {
                assert_eq!(Url::parse(url).unwrap().as_str(), url, "a parser changes nothing");
            }
        }
        let url = "https://example.com/a/{sender_id}/b?c={sender_id}";
        check(url, "54911", Some("https://example.com/a/54911/b?c=54911"));
        check(url, "../x", Some("https://example.com/a/..%2Fx/b?c=..%2Fx"));
        check(url, "a?b#c\\d\r\n", Some("https://example.com/a/a%3Fb%23c%5Cd%0D%0A/b?c=a%3Fb%23c%5Cd%0D%0A"));
        check(url, "é", Some("https://example.com/a/%C3%A9/b?c=%C3%A9"));
        check(url, "%2e%2e", Some("https://example.com/a/%252e%252e/b?c=%252e%252e"));
        check(url, "", Some("https://example.com/a//b?c="));
        check(url, ".", Some("https://example.com/a/%252E/b?c=%252E"));
        check(url, "..", Some("https://example.com/a/%252E%252E/b?c=%252E%252E"));
        check("https://example.com/.{sender_id}", "", None);
        check("https://example.com/.{sender_id}.", "", None);
        check("https://example.com/%2E{sender_id}/b", "", None);
        check("https://example.com/x{sender_id}", "..", Some("https://example.com/x%252E%252E"));
    }
}
