//! Dead letters that go back to their sinks, or to where the rules now send their events.

use std::collections::{HashMap, HashSet};

use bytes::Bytes;

use crate::admin::Operated;
use crate::admin::problem::Problem;
use crate::event::Event;
use crate::journal::Position;
use crate::ledger::{Letter, Letters};
use crate::routing::{Scratch, UNROUTED};

/// Dead letters on their way to lanes.
#[derive(Default)]
pub(super) struct Batch {
    /// By sink.
    lanes: HashMap<String, Load>,
    /// How many are no sink's of the rules.
    pub(super) skipped: u64,
}

/// What one lane gets: letters that end here, and events of letters that end elsewhere, with their numbers.
#[derive(Default)]
struct Load {
    letters: Vec<(i64, Bytes)>,
    events: Vec<(i64, Position, Event)>,
}

impl Batch {
    pub(super) fn new(operated: &Operated, letters: Vec<Letter>, to: Option<&str>) -> Result<Self, Problem> {
        let (mut batch, mut scratch) = (Self::default(), Scratch::default());
        if let Some(to) = to {
            operated.lane(to)?;
        }
        for letter in letters {
            let targets = match (to, &*letter.sink) {
                (Some(to), _) => vec![to.to_owned()],
                (None, UNROUTED) => routed(operated, &letter, &mut scratch),
                (None, sink) => operated.lane(sink).map(|_| sink.to_owned()).into_iter().collect(),
            };
            let Some((last, others)) = targets.split_last() else {
                batch.skipped += 1;
                continue;
            };
            for other in others {
                if let Ok(event) = Event::decode(letter.record.clone()) {
                    let position = Position::from_stored(letter.position);
                    batch.lanes.entry(other.clone()).or_default().events.push((letter.id, position, event));
                }
            }
            batch.lanes.entry(last.clone()).or_default().letters.push((letter.id, letter.record));
        }
        Ok(batch)
    }

    /// Gives them to their lanes; how many there still were. A letter that goes to several sinks is gone when the last has
    /// it: until then no other request may give it to the first.
    pub(super) async fn send(mut self, operated: &Operated) -> Result<u64, Problem> {
        for sink in self.lanes.keys() {
            operated.letters.has_room(&operated.lane(sink)?).await?;
        }
        let _turn = operated.replaying.lock().await;
        let there = self.still_there(operated).await?;
        for (sink, load) in &mut self.lanes {
            let events = std::mem::take(&mut load.events).into_iter().filter(|(id, ..)| there.contains(id));
            let events: Vec<_> = events.map(|(_, position, event)| (position, event)).collect();
            if !events.is_empty() {
                operated.letters.resend(sink, &operated.lane(sink)?, events).await?;
            }
        }
        let mut sent = 0;
        for (sink, Load { letters, .. }) in self.lanes {
            if !letters.is_empty() {
                sent += operated.letters.exhume(&sink, &operated.lane(&sink)?, letters).await? as u64;
            }
        }
        Ok(sent)
    }

    /// Which of the letters that go to several sinks nobody else has replayed or discarded meanwhile.
    async fn still_there(&self, operated: &Operated) -> Result<HashSet<i64>, Problem> {
        let events = self.lanes.values().flat_map(|load| &load.events);
        let ids: HashSet<_> = events.map(|(id, ..)| *id).collect();
        if ids.is_empty() {
            return Ok(ids);
        }
        let read = |letters: &Letters| {
            let there = ids.into_iter().map(|id| Ok(letters.get(id)?.map(|_| id)));
            there.filter_map(Result::transpose).collect()
        };
        operated.letters.read(read).await
    }
}

/// Where the rules now send an event that no route matched.
fn routed(operated: &Operated, letter: &Letter, scratch: &mut Scratch) -> Vec<String> {
    let Ok(event) = Event::decode(letter.record.clone()) else { return Vec::new() };
    let table = operated.table();
    let found = table.matches(&event, scratch).iter();
    found.filter_map(|found| table.sinks().get(found.sink.0).cloned()).collect()
}
