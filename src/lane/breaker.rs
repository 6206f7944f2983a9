//! The breaker: whether a sink is worth trying. Pure: the caller brings the time.

use std::time::{Duration, Instant};

/// When the breaker opens, and how often it probes then.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BreakerConfig {
    /// After this many failed attempts without a success in between it opens; at least 1.
    pub failures: u32,
    /// How often one delivery is tried while it is open.
    pub probe: Duration,
}

/// For no longer than this a sink is left alone because one delivery was asked to wait: it may be meant alone.
const MAX_ASKED: Duration = Duration::from_secs(60);

/// Counts failures; open, it lets one attempt through at a time.
#[derive(Debug)]
pub(super) struct Breaker {
    config: BreakerConfig,
    state: State,
}

#[derive(Debug, PartialEq, Eq)]
enum State {
    Closed { failures: u32 },
    Open { probe_at: Instant },
    Probing,
}

/// What an attempt's end changed.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Change {
    None,
    Opened,
    Closed,
}

impl Breaker {
    pub(super) fn new(config: BreakerConfig) -> Self {
        Self { config, state: State::Closed { failures: 0 } }
    }

    /// Whether the lane reads on.
    pub(super) fn is_closed(&self) -> bool {
        matches!(self.state, State::Closed { .. })
    }

    /// Whether the last attempt succeeded.
    pub(super) fn is_untroubled(&self) -> bool {
        self.state == State::Closed { failures: 0 }
    }

    /// Whether a probe has begun and not ended.
    pub(super) fn is_probing(&self) -> bool {
        self.state == State::Probing
    }

    /// When the next probe is due, if the breaker is open and none is under way.
    pub(super) fn probe_at(&self) -> Option<Instant> {
        match self.state {
            State::Open { probe_at } => Some(probe_at),
            State::Closed { .. } | State::Probing => None,
        }
    }

    /// Begins a probe if one is due.
    pub(super) fn begin_probe(&mut self, now: Instant) -> bool {
        let due = self.probe_at().is_some_and(|at| at <= now);
        if due {
            self.state = State::Probing;
        }
        due
    }

    /// An attempt reached the sink: it was delivered, or rejected.
    pub(super) fn succeeded(&mut self) -> Change {
        match std::mem::replace(&mut self.state, State::Closed { failures: 0 }) {
            State::Closed { .. } => Change::None,
            State::Open { .. } | State::Probing => Change::Closed,
        }
    }

    /// The sink said that it is gone: no use in trying others.
    pub(super) fn gone(&mut self, now: Instant, of_probe: bool) -> Change {
        match self.state {
            State::Closed { .. } => {
                self.state = self.open(now, Duration::ZERO);
                Change::Opened
            }
            State::Probing | State::Open { .. } => self.failed(now, Duration::ZERO, of_probe),
        }
    }

    /// A probe was begun, and nothing was there to be tried.
    pub(super) fn no_probe(&mut self, now: Instant) {
        if self.state == State::Probing {
            self.state = self.open(now, Duration::ZERO);
        }
    }

    /// A probe was begun, and what was to be tried is given up: others are to be tried at once.
    pub(super) fn probe_anew(&mut self, now: Instant) {
        if self.state == State::Probing {
            self.state = State::Open { probe_at: now };
        }
    }

    fn open(&self, now: Instant, asked: Duration) -> State {
        State::Open { probe_at: now + self.config.probe.max(asked.min(MAX_ASKED)) }
    }

    /// An attempt failed, which was a probe or not; the sink has asked to be left alone for so long.
    pub(super) fn failed(&mut self, now: Instant, asked: Duration, of_probe: bool) -> Change {
        match self.state {
            State::Closed { failures } if failures + 1 < self.config.failures => {
                self.state = State::Closed { failures: failures + 1 };
                Change::None
            }
            State::Closed { .. } => {
                self.state = self.open(now, asked);
                Change::Opened
            }
            State::Probing if of_probe => {
                self.state = self.open(now, asked);
                Change::None
            }
            // One that was under way when the breaker opened.
            State::Probing | State::Open { .. } => Change::None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn opens_probes_and_closes() {
        let (start, second) = (Instant::now(), Duration::from_secs(1));
        let mut breaker = Breaker::new(BreakerConfig { failures: 3, probe: 10 * second });
        let asked = Duration::ZERO;
        assert_eq!(
            [breaker.failed(start, asked, false), breaker.failed(start, asked, false)],
            [Change::None, Change::None]
        );
        assert_eq!(breaker.succeeded(), Change::None);
        assert_eq!(
            [breaker.failed(start, asked, false), breaker.failed(start, asked, false)],
            [Change::None, Change::None]
        );
        assert!(breaker.is_closed() && !breaker.begin_probe(start));
        assert_eq!(breaker.failed(start, asked, false), Change::Opened);
        assert!(!breaker.is_closed());
        assert_eq!(
            breaker.failed(start + second, asked, false),
            Change::None,
            "late failures do not put the probe off"
        );
        assert_eq!(breaker.probe_at(), Some(start + 10 * second));
        assert!(!breaker.begin_probe(start + 9 * second));
        assert!(breaker.begin_probe(start + 10 * second) && breaker.is_probing());
        assert!(!breaker.begin_probe(start + 99 * second), "one at a time");
        assert_eq!(breaker.failed(start + 11 * second, asked, false), Change::None);
        assert!(breaker.is_probing(), "nor do they end the probe");
        assert_eq!(breaker.failed(start + 12 * second, asked, true), Change::None);
        assert_eq!(breaker.probe_at(), Some(start + 22 * second));
        assert!(breaker.begin_probe(start + 22 * second));
        assert_eq!(breaker.failed(start + 22 * second, 30 * second, true), Change::None);
        assert_eq!(breaker.probe_at(), Some(start + 52 * second), "not before the sink wants it");
        assert!(breaker.begin_probe(start + 52 * second));
        assert_eq!(breaker.failed(start + 52 * second, 9999 * second, true), Change::None);
        assert_eq!(breaker.probe_at(), Some(start + 112 * second), "but no longer than that");
        assert!(breaker.begin_probe(start + 112 * second));
        assert_eq!(breaker.succeeded(), Change::Closed);
        assert!(breaker.is_closed() && breaker.is_untroubled());
        assert_eq!([breaker.gone(start, false), breaker.gone(start + second, false)], [Change::Opened, Change::None]);
        assert!(!breaker.begin_probe(start + 9 * second) && breaker.begin_probe(start + 10 * second));
        breaker.no_probe(start + 11 * second);
        assert_eq!(breaker.probe_at(), Some(start + 21 * second));
        assert!(breaker.begin_probe(start + 21 * second));
        breaker.probe_anew(start + 21 * second);
        assert!(breaker.begin_probe(start + 21 * second));
    }
}
