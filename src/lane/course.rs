//! The rules that lanes follow, and those before them.
//!
//! Lanes are at different places in the journal when rules change. Each follows the new ones for everything that it has
//! not read yet. That alone would lose events: one that moves from a slow sink to another is read by the slow one's lane
//! under the new rules, when the other's lane has read past it under the old ones. Such an event keeps its old sinks. One
//! that the new rules name no sink for is unrouted, and the first of its old sinks' lanes finds that out.
//!
//! Pure: it knows positions and names, and reads nothing.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::event::Event;
use crate::journal::Position;
use crate::ledger::RulesKept;
use crate::routing::{RouteId, Scratch, SinkId, Table, UNROUTED};

/// So many changes of the rules are remembered for lanes that have not read past them.
const MAX_CHANGES: usize = 1000;

/// The rules, and for events that some lane had read when they came into force, those before.
#[derive(Clone)]
pub struct Course {
    now: Arc<Stage>,
    /// The oldest first.
    earlier: Vec<Arc<Stage>>,
}

/// Rules that came into force.
struct Stage {
    /// Counted on over restarts.
    number: i64,
    table: Arc<Table>,
    /// How far each lane had read by then. What it had not begun with it reads again, and that counts as not read.
    passed: HashMap<String, Position>,
    /// How far the first of them had.
    until: Position,
}

/// A [`Stage`] as text.
#[derive(Serialize, Deserialize)]
struct StoredStage {
    table: String,
    /// In order, so that the same stage has the same text.
    passed: BTreeMap<String, i64>,
    until: i64,
}

/// The route that named the sink for an event.
#[derive(Clone)]
pub(super) enum Route {
    /// One of the rules.
    Of { table: Arc<Table>, id: RouteId },
    /// One whose name was kept, or none.
    Named(Arc<str>),
    /// No rule names a sink for it.
    Nowhere,
}

impl Route {
    pub(super) fn name(&self) -> &str {
        match self {
            Self::Of { table, id } => table.route_name(*id),
            Self::Named(name) => name,
            Self::Nowhere => "-",
        }
    }
}

/// The rules have changed too often for a lane that does not read on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "the rules have changed {MAX_CHANGES} times and a sink still has to deliver events from before that: let it catch up (is it paused, or its destination gone?) before they change again"
)]
pub struct TooManyChanges;

impl Course {
    /// Rules without any before them.
    pub fn new(table: Arc<Table>) -> Self {
        Self::begun(0, table)
    }

    fn begun(number: i64, table: Arc<Table>) -> Self {
        let stage = Stage { number, table, passed: HashMap::new(), until: Position::ZERO };
        Self { now: Arc::new(stage), earlier: Vec::new() }
    }

    /// The course of a former process, from what was kept of it (see [`Course::kept`]), with the rules in force now; `passed`
    /// and `needed` as in [`Course::then`]. Of what can't be used it says why, and begins anew.
    pub fn recalled(
        kept: &[(i64, String)],
        table: Arc<Table>,
        passed: HashMap<String, Position>,
        needed: Position,
    ) -> (Self, Option<String>) {
        let stages = kept.iter().map(|(number, text)| Stage::from_text(*number, text).map(Arc::new));
        let mut stages = match stages.collect::<Result<Vec<_>, _>>() {
            Ok(stages) => stages,
            Err(error) => {
                let number = kept.iter().map(|(number, _)| number + 1).max().unwrap_or(0);
                return (Self::begun(number, table), Some(error));
            }
        };
        let Some(last) = stages.pop() else { return (Self::new(table), None) };
        let number = last.number;
        let before = Self { now: last, earlier: stages };
        if before.table().to_text() == table.to_text() {
            let earlier = before.stages(needed).filter(|stage| stage.number < number).cloned().collect();
            let now = Stage { number, table, passed: before.now.passed.clone(), until: before.now.until };
            return (Self { now: Arc::new(now), earlier }, None);
        }
        match before.then(Arc::clone(&table), passed, needed) {
            Ok(course) => (course, None),
            Err(error) => (Self::begun(number + 1, table), Some(error.to_string())),
        }
    }

    /// What has to be kept of it, so that it can be followed after a restart. To be written before any lane follows it.
    pub fn kept(&self) -> RulesKept {
        let first = self.earlier.first().unwrap_or(&self.now).number;
        RulesKept { first, number: self.now.number, stage: self.now.to_text() }
    }

    /// New rules after these; `passed`: how far each lane has read by these, or where it begins if it is new. Nobody reads
    /// anything before `needed` again.
    ///
    /// # Errors
    ///
    /// [`TooManyChanges`].
    pub fn then(
        &self,
        table: Arc<Table>,
        passed: HashMap<String, Position>,
        needed: Position,
    ) -> Result<Self, TooManyChanges> {
        let until = passed.values().max().copied().unwrap_or(Position::ZERO);
        let now = Arc::new(Stage { number: self.now.number + 1, table, passed, until });
        if until <= needed {
            return Ok(Self { now, earlier: Vec::new() });
        }
        let earlier: Vec<_> = self.stages(needed).cloned().collect();
        if earlier.len() > MAX_CHANGES { Err(TooManyChanges) } else { Ok(Self { now, earlier }) }
    }

    /// The rules in force.
    pub fn table(&self) -> &Arc<Table> {
        &self.now.table
    }

    /// The route that brings an event to a sink, `id` in the rules in force; if it does.
    pub(super) fn route_to(
        &self,
        position: Position,
        event: &Event,
        sink: &str,
        id: Option<SinkId>,
        scratch: &mut Scratch,
    ) -> Option<Route> {
        if self.now.until <= position {
            let route = self.table().route_to(event, id?, scratch)?;
            return Some(Route::Of { table: Arc::clone(self.table()), id: route });
        }
        let holders = self.holders(position, event, scratch);
        holders.into_iter().find(|(holder, _)| *holder == sink).map(|(_, route)| route)
    }

    /// Whether an event is one of those that no route matches.
    pub(super) fn is_unrouted(&self, position: Position, event: &Event, scratch: &mut Scratch) -> bool {
        if self.now.until <= position {
            return self.table().matches(event, scratch).is_empty();
        }
        self.holders(position, event, scratch).iter().any(|(holder, _)| *holder == UNROUTED)
    }

    /// What decides about an event, the oldest first: the last rules that came into force before any lane had read it, and
    /// all after them.
    fn stages(&self, position: Position) -> impl Iterator<Item = &Arc<Stage>> {
        let all = self.earlier.iter().chain([&self.now]);
        let first = match self.now.until <= position {
            true => self.earlier.len(),
            false => self.earlier.iter().rposition(|stage| stage.until <= position).unwrap_or(0),
        };
        all.skip(first)
    }

    /// The sinks that have or will have taken an event, with their routes.
    fn holders(&self, position: Position, event: &Event, scratch: &mut Scratch) -> Vec<(&str, Route)> {
        let mut stages = self.stages(position);
        let first = stages.next().map(|stage| stage.named(event, scratch)).unwrap_or_default();
        stages.fold(first, |holders, stage| stage.holders(position, stage.named(event, scratch), holders))
    }
}

impl Stage {
    fn to_text(&self) -> String {
        let passed = self.passed.iter().map(|(lane, position)| (lane.clone(), position.to_stored())).collect();
        let stored = StoredStage { table: self.table.to_text(), passed, until: self.until.to_stored() };
        // Nothing in it can fail.
        serde_json::to_string(&stored).unwrap_or_default()
    }

    fn from_text(number: i64, text: &str) -> Result<Self, String> {
        let StoredStage { table, passed, until } = serde_json::from_str(text).map_err(|error| error.to_string())?;
        let passed = passed.into_iter().map(|(lane, position)| (lane, Position::from_stored(position))).collect();
        Ok(Self { number, table: Arc::new(Table::from_text(&table)?), passed, until: Position::from_stored(until) })
    }

    /// The sinks that the rules name for an event.
    fn named(&self, event: &Event, scratch: &mut Scratch) -> Vec<(&str, Route)> {
        let sinks = self.table.sinks();
        let named = self.table.matches(event, scratch).iter().filter_map(|found| {
            let route = Route::Of { table: Arc::clone(&self.table), id: found.route };
            Some((sinks.get(found.sink.0)?.as_str(), route))
        });
        let mut named: Vec<_> = named.collect();
        if named.is_empty() {
            named.push((UNROUTED, Route::Nowhere));
        }
        named
    }

    /// The sinks that take an event which these rules name sinks for, and that was others' before.
    fn holders<'r>(
        &self,
        position: Position,
        named: Vec<(&'r str, Route)>,
        before: Vec<(&'r str, Route)>,
    ) -> Vec<(&'r str, Route)> {
        let contains = |holders: &[(&str, Route)], sink: &str| holders.iter().any(|(holder, _)| *holder == sink);
        let has_passed = |sink: &str| self.passed.get(sink).is_some_and(|passed| *passed > position);
        let (missed, mut holders): (Vec<_>, Vec<_>) =
            named.into_iter().partition(|(sink, _)| has_passed(sink) && !contains(&before, sink));
        if missed.iter().any(|(sink, _)| *sink == UNROUTED) {
            let (has, others) = before.into_iter().partition(|(sink, _)| has_passed(sink));
            return self.unrouted(has, others);
        }
        for (sink, route) in before {
            let stays = has_passed(sink) || !missed.is_empty();
            if stays && !contains(&holders, sink) {
                holders.push((sink, route));
            }
        }
        holders
    }

    /// Who has an event that is nobody's any more and was these sinks' before: those that have read it, or, if none of them is
    /// still there, also the first of the others that is. That one finds out.
    fn unrouted<'r>(&self, mut has: Vec<(&'r str, Route)>, others: Vec<(&'r str, Route)>) -> Vec<(&'r str, Route)> {
        let is_there = |(sink, _): &(&str, Route)| self.table.sink(sink).is_some();
        if !has.iter().any(is_there) {
            has.extend(others.into_iter().find(is_there).map(|(sink, _)| (sink, Route::Nowhere)));
        }
        has
    }
}

#[cfg(test)]
mod tests {
    use rand::rngs::SmallRng;
    use rand::{Rng as _, SeedableRng as _};

    use super::*;
    use crate::document::Environment;
    use crate::event;
    use crate::rules::Rules;

    /// Rules by which every event goes to these sinks; for none it is unrouted.
    fn table(to: &[&str]) -> Arc<Table> {
        let sinks = "[sinks.a]\ntype = \"stdout\"\n[sinks.b]\ntype = \"stdout\"\n[sinks.c]\ntype = \"stdout\"\n";
        let route = if to.is_empty() { String::new() } else { format!("[[routes]]\nto = {to:?}\n") };
        Rules::compile("routes.toml", &format!("{sinks}{route}"), &Environment).unwrap().0.table
    }

    fn at(position: i64) -> Position {
        Position::from_stored(position)
    }

    /// New rules, of lanes that do not go back.
    fn then(course: &Course, table: Arc<Table>, passed: HashMap<String, Position>) -> Course {
        let needed = passed.values().min().copied().unwrap();
        course.then(table, passed, needed).unwrap()
    }

    fn passed(lanes: &[(&str, i64)]) -> HashMap<String, Position> {
        lanes.iter().map(|(name, position)| ((*name).to_owned(), at(*position))).collect()
    }

    /// `-a` where the lane of a finds that the event has no sink any more.
    #[track_caller]
    fn check(course: &Course, position: i64, expected: &[&str]) {
        let event = event::sample(br#"{"message_id":"m"}"#, "t").unwrap().remove(0);
        let mut scratch = Scratch::default();
        let mut found: Vec<_> = [("a", "-a"), ("b", "-b"), ("c", "-c")]
            .into_iter()
            .filter_map(|(sink, nowhere)| {
                let id = course.table().sink(sink);
                let route = course.route_to(at(position), &event, sink, id, &mut scratch)?;
                Some(if matches!(route, Route::Nowhere) { nowhere } else { sink })
            })
            .collect();
        if course.is_unrouted(at(position), &event, &mut scratch) {
            found.push(UNROUTED);
        }
        assert_eq!(found, expected, "at {position}");
    }

    #[test]
    fn what_was_not_read_follows_the_new_rules() {
        let old = Course::new(table(&["a", "b"]));
        let new = then(&old, table(&["b"]), passed(&[("a", 10), ("b", 20), ("c", 20), (UNROUTED, 20)]));
        // The lane of b has it by the old rules.
        check(&new, 15, &["b"]);
        check(&new, 25, &["b"]);
    }

    #[test]
    fn an_event_keeps_its_old_sink_where_its_new_one_has_read_past_it() {
        let old = Course::new(table(&["a"]));
        let new = then(&old, table(&["b"]), passed(&[("a", 10), ("b", 20), ("c", 15), (UNROUTED, 20)]));
        check(&new, 10, &["a"]);
        check(&new, 19, &["a"]);
        check(&new, 20, &["b"]);
        let newer = then(&new, table(&["c"]), passed(&[("a", 12), ("b", 25), ("c", 17), (UNROUTED, 25)]));
        // c will read it; a need not deliver it.
        check(&newer, 18, &["c"]);
        // c has read past it, and so had b: it stays where it was.
        check(&newer, 14, &["a"]);
        // b has it already.
        check(&newer, 22, &["b", "c"]);
        check(&newer, 25, &["c"]);
    }

    #[test]
    fn a_new_sink_that_begins_at_the_end_takes_nothing_from_others() {
        let old = Course::new(table(&["a"]));
        let new = then(&old, table(&["c"]), passed(&[("a", 10), ("c", 30), (UNROUTED, 28)]));
        check(&new, 29, &["a"]);
        check(&new, 30, &["c"]);
    }

    /// Rules do not make a sink have what it has read past, however often they name it.
    #[test]
    fn rules_that_change_back_and_forth_while_a_sink_is_slow() {
        let mut course = Course::new(table(&["a"]));
        for (to, b) in [("b", 20), ("b", 30), ("a", 40), ("b", 50)] {
            course = then(&course, table(&[to]), passed(&[("a", 10), ("b", b), (UNROUTED, b)]));
        }
        check(&course, 15, &["a"]);
        // Between the first change and the second, all went to b.
        check(&course, 25, &["b"]);
        check(&course, 35, &["b"]);
        // It was to go to a when b read it, and is to go to b, which has read past it.
        check(&course, 45, &["a"]);
        check(&course, 50, &["b"]);
    }

    /// The lane of a ends because its sink has changed: what it had read and not delivered, the next one reads again.
    #[test]
    fn a_lane_that_goes_back_finds_the_rules_of_its_time() {
        let old = Course::new(table(&["a"]));
        let lanes = |position| passed(&[("a", 20), ("b", position), (UNROUTED, position)]);
        let new = old.then(table(&["b"]), lanes(20), at(10)).unwrap();
        let newer = new.then(table(&["b"]), lanes(30), at(10)).unwrap();
        check(&newer, 15, &["a"]);
        check(&newer, 25, &["b"]);
        // The next one has read a part of it again.
        let newest = newer.then(table(&["b"]), passed(&[("a", 16), ("b", 30), (UNROUTED, 30)]), at(12)).unwrap();
        check(&newest, 14, &["a"]);
        check(&newest, 18, &["a"]);
        check(&newest, 25, &["b"]);
    }

    #[test]
    fn unrouted_is_a_sink_too() {
        let old = Course::new(table(&["a"]));
        let new = then(&old, table(&[]), passed(&[("a", 10), ("b", 10), ("c", 10), (UNROUTED, 20)]));
        check(&new, 9, &["a"]);
        check(&new, 15, &["-a"]);
        check(&new, 20, &[UNROUTED]);
        let elsewhere = then(&new, table(&["b"]), passed(&[("a", 12), ("b", 30), ("c", 30), (UNROUTED, 30)]));
        check(&elsewhere, 11, &["-a"]);
        check(&elsewhere, 15, &["-a"]);
        let back = then(&new, table(&["a"]), passed(&[("a", 10), ("b", 30), ("c", 30), (UNROUTED, 30)]));
        check(&back, 15, &["a"]);
        check(&back, 29, &["a", UNROUTED]);
    }

    #[test]
    fn what_has_no_sink_any_more_is_found_out_once() {
        let old = Course::new(table(&["a", "b", "c"]));
        let new = then(&old, table(&[]), passed(&[("a", 10), ("b", 12), ("c", 10), (UNROUTED, 20)]));
        // b has it, and that is enough.
        check(&new, 11, &["b"]);
        check(&new, 15, &["-a"]);
        let again = then(&new, table(&["c"]), passed(&[("a", 15), ("b", 20), ("c", 15), (UNROUTED, 20)]));
        check(&again, 15, &["c"]);
        check(&again, 14, &["-a"]);
        // What is under way to a sink that is gone may not arrive.
        let rules = "[sinks.a]\ntype = \"stdout\"\n";
        let gone = Rules::compile("routes.toml", rules, &Environment).unwrap().0.table;
        let new = then(&old, gone, passed(&[("a", 10), ("b", 12), (UNROUTED, 20)]));
        check(&new, 11, &["-a", "b"]);
    }

    #[test]
    fn only_as_many_changes_are_remembered_as_somebody_needs() {
        let lanes = |position| passed(&[("a", position), ("b", position), ("c", position), (UNROUTED, position)]);
        let mut course = Course::new(table(&["a"]));
        for position in 0..10 {
            course = then(&course, table(&["a"]), lanes(position));
        }
        assert_eq!(course.earlier.len(), 0);
        let slow = |position| passed(&[("a", 5), ("b", position)]);
        for position in 10..10 + i64::try_from(MAX_CHANGES).unwrap() {
            course = then(&course, table(&["b"]), slow(position));
        }
        assert_eq!(course.earlier.len(), MAX_CHANGES);
        check(&course, 9, &["a"]);
        assert_eq!(course.then(table(&["b"]), slow(2000), at(5)).err(), Some(TooManyChanges));
        // It has caught up.
        assert_eq!(then(&course, table(&["b"]), passed(&[("a", 1005), ("b", 2000)])).earlier.len(), 5);
    }

    const EVENTS: usize = 40;

    /// A lane that reads, and has delivered what is before its cursor.
    struct Reading {
        name: &'static str,
        cursor: usize,
        read_to: usize,
        taken: [bool; EVENTS],
    }

    impl Reading {
        fn read(&mut self, course: &Course, count: usize) {
            let event = event::sample(br#"{"message_id":"m"}"#, "t").unwrap().remove(0);
            let mut scratch = Scratch::default();
            for position in (self.read_to..EVENTS).take(count) {
                let at = place(position);
                self.taken[position] = match self.name {
                    UNROUTED => course.is_unrouted(at, &event, &mut scratch),
                    sink => course.route_to(at, &event, sink, course.table().sink(sink), &mut scratch).is_some(),
                };
                self.read_to = position + 1;
            }
        }

        /// Another begins where this one had delivered all.
        fn go_back(&mut self) {
            self.taken[self.cursor..].fill(false);
            self.read_to = self.cursor;
        }
    }

    /// As the ledger does it.
    fn keep(kept: &mut Vec<(i64, String)>, rules: RulesKept) {
        kept.retain(|(number, _)| *number >= rules.first && *number != rules.number);
        kept.push((rules.number, rules.stage));
    }

    #[test]
    fn what_was_kept_and_cannot_be_read_is_said() {
        let (course, problem) = Course::recalled(&[(7, "{}".to_owned())], table(&["a"]), passed(&[("a", 1)]), at(1));
        assert!(problem.is_some());
        check(&course, 0, &["a"]);
        assert_eq!((course.kept().first, course.kept().number), (8, 8));
    }

    fn place(position: usize) -> Position {
        at(i64::try_from(position).unwrap())
    }

    /// Lanes that read on and are replaced as they like while rules change: each event is taken by somebody, and by just
    /// those that the last rules name if no lane had read it when they came into force.
    #[test]
    fn whatever_happens_every_event_is_taken() {
        let sets: [&[&str]; 6] = [&["a"], &["b"], &["c"], &["a", "b"], &["b", "c"], &[]];
        let tables = sets.map(table);
        for seed in 0..500 {
            let mut random = SmallRng::seed_from_u64(seed);
            let lane = |name| Reading { name, cursor: 0, read_to: 0, taken: [false; EVENTS] };
            let mut lanes = ["a", "b", "c", UNROUTED].map(lane);
            let (mut course, mut last) = (Course::new(Arc::clone(&tables[0])), 0);
            let mut kept = Vec::new();
            keep(&mut kept, course.kept());
            for _ in 0..random.random_range(5..80) {
                let lane = &mut lanes[random.random_range(0..4)];
                match random.random_range(0..7) {
                    0 => {
                        last = random.random_range(0..sets.len());
                        // Lanes put down what they have not begun with.
                        lanes.iter_mut().filter(|_| random.random()).for_each(Reading::go_back);
                        let passed = lanes.iter().map(|lane| (lane.name.to_owned(), place(lane.read_to))).collect();
                        let needed = lanes.iter().map(|lane| place(lane.cursor)).min().unwrap();
                        course = course.then(Arc::clone(&tables[last]), passed, needed).unwrap();
                        keep(&mut kept, course.kept());
                    }
                    1 => lane.go_back(),
                    6 => {
                        // A restart, perhaps with other rules.
                        lanes.iter_mut().for_each(Reading::go_back);
                        last = if random.random() { last } else { random.random_range(0..sets.len()) };
                        let passed = lanes.iter().map(|lane| (lane.name.to_owned(), place(lane.read_to))).collect();
                        let needed = lanes.iter().map(|lane| place(lane.cursor)).min().unwrap();
                        let (recalled, problem) = Course::recalled(&kept, Arc::clone(&tables[last]), passed, needed);
                        assert_eq!(problem, None);
                        course = recalled;
                        keep(&mut kept, course.kept());
                    }
                    2 => lane.cursor = random.random_range(lane.cursor..=lane.read_to),
                    _ => lane.read(&course, random.random_range(1..8)),
                }
            }
            lanes.iter_mut().for_each(|lane| lane.read(&course, EVENTS));
            for position in 0..EVENTS {
                let takers: Vec<_> = lanes.iter().filter(|lane| lane.taken[position]).map(|lane| lane.name).collect();
                assert!(!takers.is_empty(), "seed {seed}: nobody takes {position}");
                if course.now.until <= place(position) {
                    let wanted = if sets[last].is_empty() { &[UNROUTED] } else { sets[last] };
                    assert_eq!(takers, wanted, "seed {seed}: {position}");
                }
            }
        }
    }
}
