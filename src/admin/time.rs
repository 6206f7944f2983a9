//! Times as the API has them: RFC 3339.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Deserializer};

use crate::event::{Event, rfc3339};
use crate::journal::Start;
use crate::ledger::{Millis, millis};

/// The time in RFC 3339.
pub(super) fn text(time: Millis) -> String {
    rfc3339(system(time))
}

/// The time as the system has it.
pub(super) fn system(time: Millis) -> SystemTime {
    UNIX_EPOCH + Duration::from_millis(u64::try_from(time).unwrap_or(0))
}

/// Reads a time that may be missing.
pub(super) fn optional<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Millis>, D::Error> {
    let Some(text) = Option::<String>::deserialize(deserializer)? else { return Ok(None) };
    parse(&text).map(Some).map_err(serde::de::Error::custom)
}

/// When events were received: at or after the one, before the other.
pub(super) struct Period {
    pub(super) since: Option<Millis>,
    pub(super) until: Option<Millis>,
}

impl Period {
    /// Where in the journal to begin to look for them.
    pub(super) fn start(&self) -> Start {
        self.since.map_or(Start::Earliest, |since| Start::WrittenSince(system(since)))
    }

    pub(super) fn has(&self, event: &Event) -> bool {
        let received = millis(event.received_at());
        self.since.is_none_or(|since| received >= since) && self.until.is_none_or(|until| received < until)
    }
}

fn parse(text: &str) -> Result<Millis, String> {
    let message = || format!("{text:?} is no time; give RFC 3339, such as 2026-01-31T12:00:00Z");
    let timestamp: jiff::Timestamp = text.parse().map_err(|_| message())?;
    Ok(timestamp.as_millisecond().max(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_read_as_they_are_written() {
        assert_eq!(parse("2023-06-24T05:02:24.250Z"), Ok(1_687_582_944_250));
        assert_eq!(parse("2023-06-24T02:02:24-03:00"), Ok(1_687_582_944_000));
        assert_eq!(parse(&text(1_687_582_944_250)), Ok(1_687_582_944_250));
        for wrong in ["", "yesterday", "2023-06-24", "1687582944"] {
            assert!(parse(wrong).unwrap_err().contains("RFC 3339"), "{wrong}");
        }
    }
}
