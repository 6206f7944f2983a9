//! The running relay, as commands reach it.

use std::time::{Duration, SystemTime};

use anyhow::{Context as _, anyhow, bail, ensure};
use http::{Method, StatusCode};
use reqwest::Url;
use serde::de::DeserializeOwned;
use serde_json::Value;
use tokio::runtime::Runtime;

use super::{Global, Usage, plain};
use crate::event::rfc3339;

/// How long an answer may take. What takes long is asked for in small pieces.
const TIMEOUT: Duration = Duration::from_secs(60);

/// A client of the admin API.
pub(super) struct Api {
    runtime: Runtime,
    client: reqwest::Client,
    timeout: Duration,
    base: Url,
    token: Option<String>,
}

/// The relay can't use what is configured, or what it was given.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(super) struct Refused(String);

impl Api {
    pub(super) fn new(global: &Global) -> anyhow::Result<Self> {
        let settings = || global.settings().map(|(config, _)| config.admin);
        let token = global.admin_token.clone();
        let (base, token) = match &global.admin {
            // Settings that can't be used keep nobody from a relay that runs.
            Some(url) => (url.clone(), token.or_else(|| settings().ok()?.token)),
            None => {
                let admin = settings()?;
                (super::url(admin.listen, admin.tls.is_some()), token.or(admin.token))
            }
        };
        let base = Url::parse(&base).with_context(|| format!("--admin {base:?} is not a URL"))?;
        let client = super::client(global.admin_ca.as_deref(), global.admin_cert.as_deref())?.build()?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        Ok(Self { runtime, client, timeout: TIMEOUT, base, token })
    }

    /// With another time that answers may take.
    pub(super) fn within(self, timeout: Duration) -> Self {
        Self { timeout, ..self }
    }

    pub(super) fn get<T: DeserializeOwned>(&self, path: &[&str], query: &[(&str, String)]) -> anyhow::Result<T> {
        self.call(Method::GET, path, query, None)
    }

    pub(super) fn post(&self, path: &[&str], body: &Value) -> anyhow::Result<Value> {
        self.call(Method::POST, path, &[], Some(body))
    }

    /// Posts without a body.
    pub(super) fn ask(&self, path: &[&str], query: &[(&str, String)]) -> anyhow::Result<Value> {
        self.call(Method::POST, path, query, None)
    }

    pub(super) fn delete(&self, path: &[&str]) -> anyhow::Result<Value> {
        self.call(Method::DELETE, path, &[], None)
    }

    fn call<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &[&str],
        query: &[(&str, String)],
        body: Option<&Value>,
    ) -> anyhow::Result<T> {
        let mut url = self.base.clone();
        let mut segments =
            url.path_segments_mut().map_err(|()| anyhow!("{} can't be the URL of a relay", self.base))?;
        segments.pop_if_empty().extend(["api", "v1"]).extend(path);
        drop(segments);
        if !query.is_empty() {
            url.query_pairs_mut().extend_pairs(query);
        }
        let mut request = self.client.request(method, url).timeout(self.timeout);
        if let Some(token) = &self.token {
            request = request.bearer_auth(token);
        }
        if let Some(body) = body {
            request = request.header("content-type", "application/json").body(body.to_string());
        }
        let (status, content) = self.runtime.block_on(async {
            let response = request.send().await.map_err(|error| self.unreachable(&error))?;
            let status = response.status();
            Ok::<_, anyhow::Error>((status, response.bytes().await.context("the relay's answer broke off")?))
        })?;
        let not_ours = || format!("what answers at {} ({status}) is not a relay's admin side", self.base);
        if !status.is_success() {
            let answer: Value = serde_json::from_slice(&content).with_context(not_ours)?;
            let detail = answer.get("detail").and_then(Value::as_str).unwrap_or(status.as_str());
            match status {
                StatusCode::UNPROCESSABLE_ENTITY => bail!(Refused(detail.to_owned())),
                _ => bail!("{detail}"),
            }
        }
        serde_json::from_slice(&content).with_context(not_ours)
    }

    fn unreachable(&self, error: &reqwest::Error) -> anyhow::Error {
        let what = if error.is_timeout() { "gives no answer" } else { "can't be reached" };
        let mut cause: &dyn std::error::Error = error;
        while let Some(deeper) = cause.source() {
            cause = deeper;
        }
        anyhow!(
            "the relay's admin side at {} {what} ({cause}): is it running? Another address: --admin URL, or admin.listen in the settings",
            self.base
        )
    }
}

/// A time as the command line takes it, as RFC 3339: that, or how long ago (`2h`, `30m`).
pub(super) fn time(text: &str) -> Result<String, String> {
    if text.parse::<jiff::Timestamp>().is_ok() {
        return Ok(text.to_owned());
    }
    let message = || format!("{text:?} is no time; give RFC 3339 (2026-01-31T12:00:00Z), or how long ago (2h)");
    let ago = humantime::parse_duration(text).map_err(|_| message())?;
    let time = SystemTime::now().checked_sub(ago).map(rfc3339);
    // What is too long ago has no text.
    time.filter(|time| time.parse::<jiff::Timestamp>().is_ok()).ok_or_else(message)
}

/// Refuses a period in which nothing can be: two times in each other's place. Both as [`time`] gives them.
pub(super) fn check_period(since: Option<&str>, until: Option<&str>) -> anyhow::Result<()> {
    let parse = |text: &str| text.parse::<jiff::Timestamp>();
    if let (Some(since), Some(until)) = (since, until) {
        ensure!(parse(since)? < parse(until)?, Usage("--since must be before --until: nothing is in between"));
    }
    Ok(())
}

/// Rows under headings, in columns as wide as they have to be. What cells have is made [`plain`].
pub(super) fn table(headings: &[&str], rows: &[Vec<String>]) -> String {
    let rows: Vec<Vec<_>> = rows.iter().map(|row| row.iter().map(|cell| plain(cell)).collect()).collect();
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count());
        cells.chain(headings.get(column).map(|heading| heading.len())).max().unwrap_or(0)
    };
    let widths: Vec<_> = (0..headings.len()).map(width).collect();
    let line = |cells: &mut dyn Iterator<Item = &str>| {
        let cells = cells.zip(&widths).map(|(cell, width)| format!("{cell:width$}"));
        cells.collect::<Vec<_>>().join("  ").trim_end().to_owned() + "\n"
    };
    let mut text = line(&mut headings.iter().copied());
    for row in &rows {
        text += &line(&mut row.iter().map(String::as_str));
    }
    text
}

/// The text of a field, or nothing.
pub(super) fn text<'v>(value: &'v Value, field: &str) -> &'v str {
    value.get(field).and_then(Value::as_str).unwrap_or_default()
}

/// The number in a field, or 0.
pub(super) fn number(value: &Value, field: &str) -> u64 {
    value.get(field).and_then(Value::as_u64).unwrap_or(0)
}

/// The elements of a field.
pub(super) fn elements<'v>(value: &'v Value, field: &str) -> &'v [Value] {
    value.get(field).and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_are_aligned() {
        let rows =
            [vec!["a".to_owned(), "é".to_owned(), "x".to_owned()], vec!["longer".into(), "\n".into(), String::new()]];
        assert_eq!(table(&["NAME", "N", "LAST"], &rows), "NAME    N   LAST\na       é   x\nlonger  \\n\n");
    }

    #[test]
    fn times_are_given_in_two_ways() {
        assert_eq!(time("2026-01-31T12:00:00Z").unwrap(), "2026-01-31T12:00:00Z");
        assert!(time("2h").unwrap() < rfc3339(SystemTime::now()));
        for wrong in ["soon", "99999999y", "9999999999999y"] {
            assert!(time(wrong).unwrap_err().contains(&format!("{wrong:?} is no time; give RFC 3339")));
        }
        assert!(time("9000y").unwrap().parse::<jiff::Timestamp>().is_ok());
        let check = |since: &str, until: &str| check_period(Some(&time(since).unwrap()), Some(&time(until).unwrap()));
        assert!(check("2h", "1h").is_ok() && check("2026-01-31T12:00:00Z", "2026-01-31T12:00:00+01:00").is_err());
        assert!(check("1h", "2h").is_err() && check("2026-01-31T12:00:00Z", "2026-01-31T12:00:00Z").is_err());
        assert!(check_period(None, Some("x")).is_ok());
    }
}
