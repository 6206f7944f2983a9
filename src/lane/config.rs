//! The `delivery` table of a sink.

use std::str::FromStr;
use std::time::Duration;

use bytes::Bytes;

use crate::document::Section;
use crate::event::{Event, Field};

use super::breaker::BreakerConfig;
use super::retry::{Retry, Waits};

/// How a lane delivers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// The most deliveries under way at once; at least 1.
    pub concurrency: usize,
    /// What has to stay in order.
    pub order_by: OrderBy,
    /// The most attempts that begin in a second.
    pub rate: Option<Rate>,
    /// When to try again, and when not to.
    pub retry: Retry,
    /// At so many parked deliveries nothing more is read; at least 1.
    pub max_parked: usize,
    /// The most bytes of events that were read and are not settled.
    pub window_bytes: usize,
    /// When to stop trying, and how to find out that the sink is back.
    pub breaker: BreakerConfig,
    /// Where a lane begins that has no cursor yet.
    pub start: StartAt,
}

/// What a sink may hold in memory of what it has read, in bytes.
const MAX_WINDOW_BYTES: usize = 32 << 20;
/// The most that `concurrency` may be.
const MAX_CONCURRENCY: usize = 100_000;
/// The longest time that may be given for anything.
const MAX_TIME: Duration = Duration::from_hours(10 * 365 * 24);
/// The most that `max_parked` may be: each takes memory.
const MAX_PARKED: usize = 10_000_000;

impl Config {
    /// Settings where the table says nothing.
    pub fn new(concurrency: usize) -> Self {
        Self {
            concurrency,
            order_by: OrderBy::Field(Field::MessageId),
            rate: None,
            retry: Retry {
                waits: Waits::Backoff { initial: Duration::from_secs(1), max: Duration::from_secs(3600) },
                max_attempts: None,
                max_age: None,
            },
            max_parked: 100_000,
            window_bytes: MAX_WINDOW_BYTES,
            breaker: BreakerConfig { failures: 10, probe: Duration::from_secs(10) },
            start: StartAt::End,
        }
    }

    /// What each of so many lanes may do that share a sink; at least what a lane needs.
    pub fn share(&self, lanes: usize) -> Self {
        let lanes = lanes.max(1);
        let rate = self
            .rate
            .map(|rate| Rate { interval: rate.interval.saturating_mul(u32::try_from(lanes).unwrap_or(u32::MAX)) });
        Self {
            concurrency: self.concurrency.div_ceil(lanes),
            max_parked: self.max_parked.div_ceil(lanes),
            window_bytes: self.window_bytes.div_ceil(lanes),
            rate,
            ..self.clone()
        }
    }

    /// Reads the `delivery` and `start` keys of a sink. Problems are reported to the section; `concurrency` is the
    /// default.
    pub fn read(sink: &mut Section<'_>, concurrency: usize) -> Self {
        let mut config = Self::new(concurrency);
        config.start = sink.parse("start", StartAt::from_str).unwrap_or(config.start);
        let Some(mut delivery) = sink.table("delivery") else { return config };
        config.concurrency = at_least_one(&mut delivery, "concurrency", MAX_CONCURRENCY).unwrap_or(config.concurrency);
        config.order_by = delivery.parse("order_by", OrderBy::from_str).unwrap_or(config.order_by);
        config.rate = delivery.parse("rate", Rate::from_str);
        config.retry = read_retry(&mut delivery, config.retry);
        config.max_parked = at_least_one(&mut delivery, "max_parked", MAX_PARKED).unwrap_or(config.max_parked);
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
        delivery.finish();
        config
    }
}

/// Reads a number from 1 to `max`.
fn at_least_one(section: &mut Section<'_>, key: &'static str, max: usize) -> Option<usize> {
    let given = section.get::<usize>(key)?;
    if !(1..=max).contains(&given) {
        section.problem(key, format!("`{key}` is {given}; it must be from 1 to {max}"));
    }
    Some(given.clamp(1, max))
}

fn read_retry(delivery: &mut Section<'_>, mut retry: Retry) -> Retry {
    if let Some(max) = at_least_one(delivery, "max_attempts", u32::MAX as usize) {
        retry.max_attempts = u32::try_from(max).ok();
    }
    retry.max_age = duration(delivery, "max_age");
    let schedule = delivery.get::<Vec<String>>("schedule");
    if let Some(mut backoff) = delivery.table("backoff") {
        if let Waits::Backoff { initial, max } = &mut retry.waits {
            *initial = duration(&mut backoff, "initial").unwrap_or(*initial);
            *max = duration(&mut backoff, "max").unwrap_or(*max);
            if max < initial {
                backoff.problem("max", "`max` is shorter than `initial`");
            }
        }
        backoff.finish();
        if schedule.is_some() {
            delivery.problem("schedule", "`schedule` and `backoff` exclude each other");
        }
    }
    if let Some(texts) = schedule {
        let waits: Result<Vec<_>, _> = texts.iter().map(|text| parse_duration(text)).collect();
        match waits {
            Ok(waits) if !waits.is_empty() => retry.waits = Waits::Schedule(waits),
            Ok(_) => delivery.problem("schedule", "`schedule` is empty; give the waits, such as [\"5s\", \"5m\"]"),
            Err(error) => delivery.problem("schedule", error),
        }
    }
    retry
}

fn duration(section: &mut Section<'_>, key: &'static str) -> Option<Duration> {
    section.parse(key, |text| match parse_duration(text) {
        Ok(time) if time.is_zero() => Err(format!("`{key}` is 0; give a time such as \"10s\"")),
        result => result,
    })
}

fn parse_duration(text: &str) -> Result<Duration, String> {
    match humantime::parse_duration(text) {
        Ok(time) if time > MAX_TIME => Err("a time is at most 10 years".to_owned()),
        Ok(time) => Ok(time),
        Err(error) => Err(format!("not a duration such as \"10s\": {error}")),
    }
}

/// A number of attempts in a time, evenly spread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    /// The time from one attempt to the next.
    pub interval: Duration,
}

impl FromStr for Rate {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let message =
            || format!("`rate` is \"{text}\"; give a number per time, such as \"200/s\", \"90/m\" or \"1000/h\"");
        let (number, unit) = text.split_once('/').ok_or_else(message)?;
        let number: u32 = number.trim().parse().map_err(|_| message())?;
        let time = match unit.trim() {
            "s" => 1,
            "m" => 60,
            "h" => 3600,
            _ => return Err(message()),
        };
        let interval = Duration::from_secs(time).checked_div(number).filter(|interval| !interval.is_zero());
        interval.map(|interval| Self { interval }).ok_or_else(message)
    }
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
    /// What the event is ordered by. An empty field is none: unrelated events would wait for each other.
    pub(super) fn value(self, event: &Event) -> Option<&str> {
        match self {
            Self::Field(field) => event.field(field).filter(|value| !value.is_empty()),
            Self::None => None,
        }
    }

    /// What an event is ordered by that is stored like this. One that can't be read is in no order.
    pub fn key(self, record: &Bytes) -> Option<String> {
        let event = Event::decode(record.clone()).ok()?;
        self.value(&event).map(str::to_owned)
    }

    /// Its name in the settings.
    pub fn name(self) -> &'static str {
        match self {
            Self::Field(field) => field.name(),
            Self::None => "none",
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lanes_share_what_a_sink_may_do() {
        let config = Config { rate: Some(Rate { interval: Duration::from_millis(10) }), ..Config::new(30) };
        let share = config.share(12);
        assert_eq!((share.concurrency, share.max_parked), (3, 8_334));
        assert_eq!(share.rate, Some(Rate { interval: Duration::from_millis(120) }));
        assert_eq!(share.window_bytes, (32 << 20) / 12 + 1);
        assert_eq!(config.share(100_000_000).concurrency, 1);
        assert_eq!(config.share(0), config);
    }
}
