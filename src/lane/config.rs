//! The `delivery` table of a sink.

use std::str::FromStr;
use std::time::Duration;

use crate::document::Section;
use crate::event::{Event, Field};

use super::breaker::BreakerConfig;
use super::retry::Backoff;

/// How a lane delivers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// The most deliveries under way at once; at least 1.
    pub concurrency: usize,
    /// What has to stay in order.
    pub order_by: OrderBy,
    /// The waits between attempts.
    pub backoff: Backoff,
    /// When to stop trying, and how to find out that the sink is back.
    pub breaker: BreakerConfig,
    /// Where a lane begins that has no cursor yet.
    pub start: StartAt,
}

/// The most that `concurrency` may be.
const MAX_CONCURRENCY: usize = 100_000;
/// Keys of the `delivery` table that are understood and have no effect yet.
const LATER: [&str; 5] = ["rate", "max_attempts", "max_age", "max_parked", "schedule"];

impl Config {
    /// Settings where the table says nothing.
    pub fn new(concurrency: usize) -> Self {
        Self {
            concurrency,
            order_by: OrderBy::Field(Field::MessageId),
            backoff: Backoff { initial: Duration::from_secs(1), max: Duration::from_secs(3600) },
            breaker: BreakerConfig { failures: 10, probe: Duration::from_secs(10) },
            start: StartAt::End,
        }
    }

    /// Reads the `delivery` and `start` keys of a sink. Problems are reported to the section; `concurrency` is the
    /// default.
    pub fn read(sink: &mut Section<'_>, concurrency: usize) -> Self {
        let mut config = Self::new(concurrency);
        config.start = sink.parse("start", StartAt::from_str).unwrap_or(config.start);
        let Some(mut delivery) = sink.table("delivery") else { return config };
        if let Some(given) = delivery.get::<usize>("concurrency") {
            if !(1..=MAX_CONCURRENCY).contains(&given) {
                delivery.problem(
                    "concurrency",
                    format!("`concurrency` is {given}; it must be from 1 to {MAX_CONCURRENCY}"),
                );
            }
            config.concurrency = given.clamp(1, MAX_CONCURRENCY);
        }
        config.order_by = delivery.parse("order_by", OrderBy::from_str).unwrap_or(config.order_by);
        if let Some(mut backoff) = delivery.table("backoff") {
            config.backoff.initial = duration(&mut backoff, "initial").unwrap_or(config.backoff.initial);
            config.backoff.max = duration(&mut backoff, "max").unwrap_or(config.backoff.max);
            if config.backoff.max < config.backoff.initial {
                backoff.problem("max", "`max` is shorter than `initial`");
            }
            backoff.finish();
        }
        if let Some(mut breaker) = delivery.table("breaker") {
            config.breaker.probe = duration(&mut breaker, "probe").unwrap_or(config.breaker.probe);
            if let Some(failures) = breaker.get::<u32>("failures") {
                if failures == 0 {
                    breaker.problem("failures", "`failures` is 0; it must be at least 1");
                }
                config.breaker.failures = failures.max(1);
            }
            breaker.finish();
        }
        for key in LATER {
            if delivery.value(key).is_some() {
                delivery.warning(
                    key,
                    format!("`{key}` has no effect in this version: a failed delivery is tried until it succeeds"),
                );
            }
        }
        delivery.finish();
        config
    }
}

fn duration(section: &mut Section<'_>, key: &'static str) -> Option<Duration> {
    let duration = section.parse(key, humantime::parse_duration)?;
    if duration.is_zero() {
        section.problem(key, format!("`{key}` is 0; give a time such as \"10s\""));
    }
    Some(duration)
}

/// What has to stay in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OrderBy {
    /// Events with the same value of this field. Events that lack it are in no order.
    Field(Field),
    /// Nothing.
    None,
}

impl OrderBy {
    /// What the event is ordered by.
    pub(super) fn value(self, event: &Event) -> Option<&str> {
        match self {
            Self::Field(field) => event.field(field),
            Self::None => None,
        }
    }
}

impl FromStr for OrderBy {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "none" => Ok(Self::None),
            "message_id" => Ok(Self::Field(Field::MessageId)),
            "recipient_id" => Ok(Self::Field(Field::RecipientId)),
            "sender_id" => Ok(Self::Field(Field::SenderId)),
            _ => Err(format!("`order_by` is \"{text}\"; it can be message_id, recipient_id, sender_id or none")),
        }
    }
}

/// Where a lane begins that has no cursor yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StartAt {
    /// At the next event that comes in.
    End,
    /// At the oldest event that is kept.
    Earliest,
}

impl FromStr for StartAt {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "end" => Ok(Self::End),
            "earliest" => Ok(Self::Earliest),
            _ => Err(format!("`start` is \"{text}\"; it can be end or earliest")),
        }
    }
}
