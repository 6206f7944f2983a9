//! Which message a confirm and a returned message belong to.
//!
//! lapin hands a returned message to whichever confirm the broker sends next, which need not be its own: confirms
//! come out of order, and one frame can confirm many. What it does guarantee is this. Returned messages queue up in
//! the order they came; every confirm that is settled takes the first one from the queue; and the broker sends a
//! message's return before its confirm. So when a confirm finds the queue empty, every message that was returned
//! before has been taken by a confirm settled before: then it is certain which of the settled messages were returned.
//! A confirm that took another message's return has to wait for such a moment, or for its own return to turn up.
//!
//! Returned messages are recognised by their message id. Where two messages under way have the same one, it is the
//! same event.

use std::collections::HashMap;

/// A message that the broker gave back because no queue wanted it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Returned {
    pub(super) code: u16,
    pub(super) text: String,
}

/// What the broker said about one message: acknowledged or not, and the return that came with it.
#[derive(Debug)]
pub(super) struct Settled<J> {
    pub(super) job: J,
    /// The job's message id.
    pub(super) id: String,
    /// Negative confirms are certain at once.
    pub(super) ack: bool,
    /// The returned message that this confirm took from the queue, and its id.
    pub(super) taken: Option<(String, Returned)>,
}

/// What became of a message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// A queue has it.
    Accepted,
    /// The broker could not take charge of it.
    Nacked,
    /// No queue wanted it.
    Unroutable(Returned),
}

/// Sorts confirms of one channel.
#[derive(Debug)]
pub(super) struct Confirms<J> {
    /// Returned messages whose own confirm is still to come.
    returned: HashMap<String, Vec<Returned>>,
    /// Confirmed messages that may have been returned.
    unsure: Vec<(String, J)>,
}

impl<J> Confirms<J> {
    pub(super) fn new() -> Self {
        Self { returned: HashMap::new(), unsure: Vec::new() }
    }

    /// Takes in confirms and gives the outcomes that are certain now. `settled` holds **all** confirms that were
    /// settled up to some moment and not given before; `idle` means that no message is under way any more.
    pub(super) fn settle(&mut self, settled: Vec<Settled<J>>, idle: bool) -> Vec<(J, Outcome)> {
        let queue_was_empty = idle || settled.iter().any(|settled| settled.taken.is_none());
        let earlier = std::mem::take(&mut self.unsure).into_iter();
        let mut acked: Vec<_> = earlier.map(|(id, job)| (id, job, queue_was_empty)).collect();
        let mut outcomes = Vec::with_capacity(settled.len());
        for Settled { job, id, ack, taken } in settled {
            let certain = idle || taken.is_none();
            if let Some((id, returned)) = taken {
                self.returned.entry(id).or_default().push(returned);
            }
            match ack {
                true => acked.push((id, job, certain)),
                false => outcomes.push((job, Outcome::Nacked)),
            }
        }
        for (id, job, certain) in acked {
            match self.take_returned(&id) {
                Some(returned) => outcomes.push((job, Outcome::Unroutable(returned))),
                None if certain => outcomes.push((job, Outcome::Accepted)),
                None => self.unsure.push((id, job)),
            }
        }
        if idle {
            self.returned.clear();
        }
        outcomes
    }

    /// Confirmed messages that may have been returned, where no more confirms come.
    pub(super) fn into_unsure(self) -> impl Iterator<Item = J> {
        self.unsure.into_iter().map(|(_id, job)| job)
    }

    fn take_returned(&mut self, id: &str) -> Option<Returned> {
        let returns = self.returned.get_mut(id)?;
        let returned = returns.pop();
        if returns.is_empty() {
            self.returned.remove(id);
        }
        returned
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use proptest::prelude::*;

    use super::*;

    fn returned(id: usize) -> Returned {
        Returned { code: 312, text: format!("NO_ROUTE {id}") }
    }

    fn settled(job: usize, taken: Option<usize>) -> Settled<usize> {
        Settled { job, id: job.to_string(), ack: true, taken: taken.map(|id| (id.to_string(), returned(id))) }
    }

    #[test]
    fn one_by_one() {
        let mut confirms = Confirms::new();
        let mut check = |batch: Vec<Settled<usize>>, idle, expected: &[(usize, Outcome)]| {
            assert_eq!(confirms.settle(batch, idle), expected);
        };
        let unroutable = |id| Outcome::Unroutable(returned(id));
        check(vec![settled(1, None)], false, &[(1, Outcome::Accepted)]);
        check(vec![settled(2, Some(2))], false, &[(2, unroutable(2))]);
        // 3 is confirmed with the return of 4, whose own confirm comes later.
        check(vec![settled(3, Some(4))], false, &[]);
        check(vec![settled(4, None)], false, &[(3, Outcome::Accepted), (4, unroutable(4))]);
        // Each has the other's return.
        check(vec![settled(5, Some(6))], false, &[]);
        check(vec![settled(6, Some(5))], false, &[(5, unroutable(5)), (6, unroutable(6))]);
        // Nothing else comes.
        check(vec![settled(7, Some(8))], false, &[]);
        check(vec![settled(8, Some(9))], false, &[(8, unroutable(8))]);
        check(vec![settled(9, Some(10))], true, &[(7, Outcome::Accepted), (9, unroutable(9))]);
        check(vec![Settled { ack: false, ..settled(11, None) }], false, &[(11, Outcome::Nacked)]);
    }

    proptest! {
        /// A model of the broker and of lapin's queue: every message is returned or not, then confirmed, in any order.
        #[test]
        fn every_message_gets_its_own_outcome(
            routed in prop::collection::vec(any::<bool>(), 1..40),
            picks in prop::collection::vec(any::<(prop::sample::Index, bool, bool)>(), 120),
        ) {
            let mut to_return: Vec<usize> = (0..routed.len()).filter(|job| !routed[*job]).collect();
            let mut to_confirm: Vec<usize> = (0..routed.len()).collect();
            let mut queue = VecDeque::new();
            let mut batch = Vec::new();
            let mut confirms = Confirms::new();
            let mut outcomes = Vec::new();
            let mut picks = picks.into_iter().cycle();
            while !to_confirm.is_empty() {
                let (pick, returns, observe) = picks.next().unwrap();
                if returns && !to_return.is_empty() {
                    queue.push_back(to_return.remove(pick.index(to_return.len())));
                }
                let ready: Vec<_> = to_confirm.iter().copied().filter(|job| !to_return.contains(job)).collect();
                if !ready.is_empty() {
                    let job = ready[pick.index(ready.len())];
                    to_confirm.retain(|other| *other != job);
                    batch.push(settled(job, queue.pop_front()));
                }
                if observe {
                    batch.reverse();
                    outcomes.extend(confirms.settle(std::mem::take(&mut batch), to_confirm.is_empty()));
                }
            }
            outcomes.extend(confirms.settle(batch, true));
            outcomes.sort_by_key(|(job, _)| *job);
            let expected: Vec<_> = routed.iter().enumerate().map(|(job, routed)| match routed {
                true => (job, Outcome::Accepted),
                false => (job, Outcome::Unroutable(returned(job))),
            }).collect();
            prop_assert_eq!(outcomes, expected);
            prop_assert!(confirms.returned.is_empty());
        }
    }
}
