use std::collections::HashSet;
use std::os::unix::fs::FileExt as _;

use bytes::Bytes;

use super::*;
use crate::journal::kafka::number_of;

fn at(position: i64) -> Position {
    Position::from_stored(position)
}

fn progress(cursor: i64, ahead: &[i64]) -> Progress {
    Progress { cursor: at(cursor), ahead: ahead.iter().copied().map(at).collect() }
}

fn dead(position: i64, status: &str) -> Change {
    Change::Bury(Box::new(letter(position, status)))
}

fn letter(position: i64, status: &str) -> DeadLetter {
    DeadLetter {
        position: at(position),
        event_id: format!("evt_{position}"),
        status: Some(status.into()),
        key: Some("k".into()),
        route: "all".into(),
        reason: Reason::Rejected,
        error_kind: "http_400".into(),
        error: "bad request".into(),
        attempts: 1,
        first_failed_at: None,
        record: Bytes::from_static(b"record"),
    }
}

fn park(position: i64, key: Option<&str>, due_at: Millis) -> Change {
    Change::Park(Box::new(Parked {
        key: key.map(Into::into),
        position: at(position),
        event_id: format!("evt_{position}"),
        status: None,
        route: "all".into(),
        attempts: 1,
        since: 0,
        first_failed_at: Some(due_at - 10),
        due_at,
        asked_until: None,
        error_kind: "timeout".into(),
        error: "too slow".into(),
        record: Bytes::from_static(b"record"),
    }))
}

async fn due(ledger: &Ledger, now: Millis, except: &[i64]) -> (Vec<i64>, Option<Millis>) {
    let except: HashSet<_> = except.iter().copied().collect();
    wanted(ledger, Wanted { now, horizon: 1_000_000, asked_horizon: 5_000_000, limit: 10, which: Which::Due, except })
        .await
}

async fn wanted(ledger: &Ledger, wanted: Wanted) -> (Vec<i64>, Option<Millis>) {
    let due = ledger.due("crm", wanted).await.unwrap();
    (due.rows.iter().map(|row| row.position).collect(), due.next)
}

/// The same, which the destination wants to wait with.
fn asked(parked: Change, asked_until: Millis) -> Change {
    let Change::Park(parked) = parked else { panic!("not parked: {parked:?}") };
    Change::Park(Box::new(Parked { asked_until: Some(asked_until), ..*parked }))
}

#[tokio::test]
async fn progress_and_dead_letters_survive_reopening() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("ledger.sqlite");
    let Opened { ledger, progress: found, thread, .. } = Ledger::open(&path).unwrap();
    assert!(found.is_empty());
    ledger.settle("crm", Some(progress(5, &[7, 9])), vec![dead(3, "read"), dead(4, "sent")]).await.unwrap();
    ledger.settle("ops", Some(progress(2, &[])), vec![]).await.unwrap();
    ledger.settle("crm", Some(progress(9, &[12, 4_000_000_000])), vec![dead(4, "sent")]).await.unwrap();
    drop(ledger);
    thread.join().unwrap();
    let letters = Letters::open(&path).unwrap();
    assert_eq!(letters.count(&Filter::default()).unwrap(), 2, "the one that died twice counts once");
    let sent = Filter { status: Some("sent".into()), sink: Some("crm".into()), ..Filter::default() };
    assert_eq!(letters.list(&sent, 10).unwrap().len(), 1);
    let found = Ledger::open(&path).unwrap().progress;
    assert_eq!(found["crm"], progress(9, &[12, 4_000_000_000]));
    assert_eq!(found["ops"], progress(2, &[]));
}

/// Or else an event that comes after the journal has lost its end would be taken for one that is known.
#[tokio::test]
async fn the_floor_is_above_every_position_that_is_known() {
    let check = async |cursor: Progress, change: Option<Change>, expected| {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ledger.sqlite");
        let Opened { ledger, thread, floor, .. } = Ledger::open(&path).unwrap();
        assert_eq!(floor, Position::ZERO);
        ledger.settle("ops", Some(progress(2, &[])), Vec::new()).await.unwrap();
        ledger.settle("crm", Some(cursor), change.into_iter().collect()).await.unwrap();
        ledger.close();
        thread.join().unwrap();
        assert_eq!(check::check(&path, |_| true).unwrap().floor, at(expected));
        assert_eq!(Ledger::open(&path).unwrap().floor, at(expected));
    };
    check(progress(5, &[]), None, 5).await;
    check(progress(5, &[7, 9]), None, 10).await;
    check(progress(5, &[7, 9]), Some(park(12, None, 0)), 13).await;
    check(progress(5, &[7, 9]), Some(dead(20, "sent")), 21).await;
}

#[tokio::test]
async fn keys_go_one_after_the_other() {
    let dir = tempfile::tempdir().unwrap();
    let Opened { ledger, .. } = Ledger::open(&dir.path().join("ledger.sqlite")).unwrap();
    let changes = vec![park(1, Some("a"), 50), park(2, Some("a"), 10), park(3, Some("b"), 20), park(4, None, 90)];
    ledger.settle("crm", None, changes).await.unwrap();
    assert_eq!(due(&ledger, 0, &[]).await, (vec![], Some(20)));
    assert_eq!(due(&ledger, 20, &[]).await, (vec![3], Some(50)));
    assert_eq!(due(&ledger, 60, &[]).await, (vec![3, 1, 2], Some(90)), "what waits behind is due with its head");
    assert_eq!(due(&ledger, 60, &[3, 1, 2]).await, (vec![], Some(90)));
    ledger.settle("crm", None, vec![Change::Unpark { id: 1 }]).await.unwrap();
    let (rows, _) = due(&ledger, Millis::MAX / 2, &[]).await;
    assert_eq!(rows, [3, 4, 2], "the next of the key is due at once");
    let mut keys = ledger.parked_keys("crm").await.unwrap();
    keys.sort();
    assert_eq!(keys, [(None, 1), (Some("a".into()), 1), (Some("b".into()), 1)]);
}

/// By another `order_by` what was parked apart may belong together: then in the order of the journal.
#[tokio::test]
async fn what_is_parked_is_ordered_by_something_else() {
    let dir = tempfile::tempdir().unwrap();
    let Opened { ledger, .. } = Ledger::open(&dir.path().join("ledger.sqlite")).unwrap();
    let changes = vec![park(3, Some("c"), 10), park(1, Some("a"), 90), park(2, Some("c"), 20)];
    ledger.settle("crm", Some(progress(4, &[])), changes).await.unwrap();
    let order = async |order_by, key: &'static str| {
        ledger.order_parked("crm", order_by, move |_| Some(key.to_owned())).await.unwrap();
        ledger.parked_keys("crm").await.unwrap()
    };
    assert_eq!(order("sender_id", "x").await, [(Some("x".into()), 3)]);
    assert_eq!(due(&ledger, 89, &[]).await, (vec![], Some(90)), "the first holds up the others");
    assert_eq!(due(&ledger, 90, &[]).await.0, [1, 2, 3]);
    assert_eq!(order("sender_id", "y").await, [(Some("x".into()), 3)], "the order is the same");
    ledger.settle("crm", Some(progress(5, &[])), vec![]).await.unwrap();
    assert_eq!(order("sender_id", "y").await, [(Some("x".into()), 3)], "still");
    assert_eq!(order("message_id", "y").await, [(Some("y".into()), 3)]);
}

#[tokio::test]
async fn what_was_due_before_the_clock_jumped_back_is_due() {
    let dir = tempfile::tempdir().unwrap();
    let Opened { ledger, .. } = Ledger::open(&dir.path().join("ledger.sqlite")).unwrap();
    ledger.settle("crm", None, vec![park(1, None, 1_000_000), park(2, None, 1_000_001)]).await.unwrap();
    assert_eq!(due(&ledger, 0, &[]).await.0, [2]);
    assert_eq!(due(&ledger, 0, &[2]).await.0, Vec::<i64>::new());
    let changes = vec![asked(park(3, None, 1_000_001), 1_000_001), asked(park(4, None, 5_000_001), 5_000_001)];
    ledger.settle("crm", None, changes).await.unwrap();
    assert_eq!(due(&ledger, 0, &[]).await.0, [2, 4], "a destination may ask for more");
}

#[tokio::test]
async fn what_a_destination_wants_to_wait_with_waits() {
    let dir = tempfile::tempdir().unwrap();
    let Opened { ledger, .. } = Ledger::open(&dir.path().join("ledger.sqlite")).unwrap();
    let changes = vec![park(1, None, 500), asked(park(2, None, 300), 300), asked(park(3, None, 900), 200)];
    ledger.settle("crm", None, changes).await.unwrap();
    let probe = async |now, which, except: &[i64]| {
        let except = except.iter().copied().collect();
        wanted(&ledger, Wanted { now, horizon: 1_000_000, asked_horizon: 5_000_000, limit: 1, which, except }).await
    };
    assert_eq!(probe(100, Which::Unasked, &[]).await.0, [1]);
    assert_eq!(probe(100, Which::Unasked, &[1]).await, (vec![], Some(300)), "there are some, and not to probe with");
    assert_eq!(probe(200, Which::Unasked, &[1]).await.0, [3]);
    assert_eq!(probe(100, Which::Any, &[1]).await.0, [2]);

    let postpone = Change::Postpone {
        id: 2,
        attempts: 1,
        first_failed_at: 290,
        due_at: 300,
        asked_until: None,
        error_kind: "http_503".into(),
        error: "503".into(),
    };
    ledger.settle("crm", None, vec![postpone, Change::Hasten { since: 0, due_at: 100 }]).await.unwrap();
    assert_eq!(due(&ledger, 100, &[]).await, (vec![1], Some(200)));
    assert_eq!(due(&ledger, 200, &[1]).await, (vec![3], Some(300)));
    assert_eq!(due(&ledger, 300, &[1]).await.0, [3, 2]);
}

#[tokio::test]
async fn dead_letters_are_exhumed_in_order() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("ledger.sqlite");
    let Opened { ledger, .. } = Ledger::open(&path).unwrap();
    ledger.settle("old", None, vec![dead(1, "sent"), dead(2, "read"), dead(3, "read")]).await.unwrap();
    let exhume = |id| Change::Exhume { id, key: Some("k".into()), due_at: 5 };
    let exhumed = ledger.settle("crm", None, vec![exhume(1), exhume(99), exhume(1), exhume(2)]).await.unwrap();
    assert_eq!(exhumed, HashSet::from([1, 2]), "others were gone");
    assert_eq!(ledger.settle("ops", None, vec![exhume(2)]).await.unwrap(), HashSet::new());
    assert_eq!(due(&ledger, 5, &[]).await.0, [1, 2]);
    let letters = Letters::open(&path).unwrap();
    assert_eq!(letters.counts().unwrap(), HashMap::from([("old".to_owned(), 1)]));
    assert_eq!(ledger.discard(vec![3, 4]).await.unwrap(), 1);
    assert!(letters.get(3).unwrap().is_none());
    assert_eq!(ledger.close_lane("crm").await.unwrap(), 2);
    let gone = Filter { reason: Some("sink_removed".into()), ..Filter::default() };
    assert_eq!(letters.count(&gone).unwrap(), 2);
}

/// Numbers of relays that share a journal grow in each of its partitions by itself.
#[test]
fn dead_letters_are_those_up_to_an_end_of_each_partition() {
    let mut connection = Connection::open("").unwrap();
    schema::prepare(&mut connection, "".as_ref()).unwrap();
    let id = |partition, offset| number_of(partition, offset).to_stored();
    let die = |connection: &Connection, partition, offset| {
        let sink = format!("of-{partition}");
        changes::bury(connection, Some(id(partition, offset)), &sink, &letter(offset, "sent"), 1).unwrap();
    };
    for (partition, offset) in [(0, 5), (0, 7), (2, 1)] {
        die(&connection, partition, offset);
    }
    let all = Filter::default();
    let letters = Letters::of(connection);
    let ends = letters.ends(&all).unwrap();
    assert_eq!(ends, [id(0, 7), id(2, 1)]);
    assert_eq!(letters.ends(&Filter { up_to: Some(id(0, 6)), ..all.clone() }).unwrap(), [id(0, 5)]);
    for (partition, offset) in [(0, 8), (1, 0), (2, 2)] {
        die(letters.connection(), partition, offset);
    }
    let list = |filter: &Filter| letters.list(filter, 9).unwrap().iter().map(|letter| letter.id).collect::<Vec<_>>();
    let filter = Filter { ends: Some(ends), ..all };
    assert_eq!(list(&filter), [id(0, 5), id(0, 7), id(2, 1)]);
    assert_eq!(list(&Filter { after: Some(id(0, 5)), ..filter }), [id(0, 7), id(2, 1)]);
    assert_eq!(list(&Filter { ends: Some(Vec::new()), ..Filter::default() }), Vec::<i64>::new());
}

/// Overwrites the page of the file that holds `text`.
fn damage_page_with(path: &Path, text: &str) {
    let bytes = std::fs::read(path).unwrap();
    let at = bytes.windows(text.len()).position(|found| found == text.as_bytes()).unwrap();
    damage_page(path, at / PAGE);
}

fn damage_root(path: &Path, name: &str) {
    let sql = "SELECT rootpage FROM sqlite_schema WHERE name = ?1";
    let root: i64 = Connection::open(path).unwrap().query_row(sql, [name], |row| row.get(0)).unwrap();
    damage_page(path, usize::try_from(root).unwrap() - 1);
}

const PAGE: usize = 4096;

fn damage_page(path: &Path, page: usize) {
    let file = OpenOptions::new().write(true).open(path).unwrap();
    file.write_all_at(&[0xA5; PAGE], (page * PAGE) as u64).unwrap();
}

/// A delivery that was parked is lost with its row, unless the journal is read again from before it.
#[tokio::test]
async fn cursors_are_kept_only_if_all_that_they_have_passed_is_saved() {
    const ROWS: i64 = 120;
    let check = async |what: &str, damage: fn(&Path), cursors, parked: bool, dead_letters: bool| {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ledger.sqlite");
        let Opened { ledger, thread, .. } = Ledger::open(&path).unwrap();
        let changes = (0..ROWS).flat_map(|at| [park(at, Some("k"), 10), dead(1000 + at, "sent")]).collect();
        ledger.settle("crm", Some(progress(2000, &[])), changes).await.unwrap();
        ledger.close();
        thread.join().unwrap();
        damage(&path);
        assert!(!check::check(&path, |_| true).unwrap().problems.is_empty(), "{what}");
        let saved = check::salvage(&path, &dir.path().join("quarantine")).unwrap();
        let all = (saved.cursors, saved.parked.is_all(), saved.dead_letters.is_all());
        assert_eq!(all, (cursors, parked, dead_letters), "{what}: {saved:?}");
        for table in [saved.parked, saved.dead_letters] {
            assert_eq!(table.of, Some(ROWS as u64), "{what}: an index says how many there were");
        }
        let report = check::check(&path, |_| true).unwrap();
        assert_eq!(
            (report.problems, report.parked, report.dead_letters),
            (vec![], saved.parked.rows, saved.dead_letters.rows)
        );
        assert_eq!(Ledger::open(&path).unwrap().progress.len(), usize::from(cursors), "{what}");
    };
    check("all parked rows", |path| damage_root(path, "parked"), false, false, true).await;
    check("some parked rows", |path| damage_page_with(path, "evt_60"), false, false, true).await;
    check("only the index of parked rows", |path| damage_root(path, "parked_by_key"), true, true, true).await;
    check("some dead letters", |path| damage_page_with(path, "evt_1060"), true, true, false).await;
    check("the cursors", |path| damage_root(path, "cursors"), false, true, true).await;
}

#[tokio::test]
async fn events_that_cannot_be_read_become_dead_letters() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("ledger.sqlite");
    let Opened { ledger, thread, .. } = Ledger::open(&path).unwrap();
    let changes = vec![park(1, Some("k"), 10), park(2, Some("k"), 10), dead(3, "sent"), dead(4, "sent")];
    ledger.settle("crm", Some(progress(5, &[])), changes).await.unwrap();
    ledger.close();
    thread.join().unwrap();
    let set = "UPDATE parked SET record = x'626164' WHERE position = 1; UPDATE dead_letters SET record = x'626164' WHERE position = 3";
    Connection::open(&path).unwrap().execute_batch(set).unwrap();
    let is_event = |record: Bytes| record != "bad";
    let report = check::check(&path, is_event).unwrap();
    let row = |table| format!("row 1 of {table} holds no event that can be read");
    assert_eq!((report.problems, report.unreadable), (vec![], vec![row("parked"), row("dead_letters")]));
    assert_eq!(check::bury_unreadable(&path, is_event).unwrap(), 2);
    let report = check::check(&path, is_event).unwrap();
    assert_eq!((report.unreadable, report.parked, report.dead_letters), (vec![], 1, 3));
    let Opened { ledger, .. } = Ledger::open(&path).unwrap();
    assert_eq!(due(&ledger, now(), &[]).await.0, [2], "what waited behind it may go");
}

#[test]
fn the_ledger_of_an_older_version_is_as_good() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("ledger.sqlite");
    let older = Connection::open(&path).unwrap();
    older.execute_batch(schema::STEPS[0]).unwrap();
    older.pragma_update(None, "user_version", 1).unwrap();
    let rows = "INSERT INTO cursors VALUES ('crm', 5, 0);
                INSERT INTO dead_letters VALUES (7, 'crm', 9, 'evt_9', 'all', 'rejected', 'http_400', 'bad', 1, 0, x'00')";
    older.execute_batch(rows).unwrap();
    drop(older);
    let before = std::fs::read(&path).unwrap();
    let check = || {
        let report = check::check(&path, |_| true).unwrap();
        assert_eq!(report.problems, Vec::<String>::new());
        assert_eq!((report.cursors, report.floor, report.dead_letters), (vec![("crm".to_owned(), at(5))], at(10), 1));
    };
    check();
    assert_eq!(std::fs::read(&path).unwrap(), before, "looking changes nothing");
    assert_eq!(check::raise_cursors(&path, at(3)).unwrap(), []);
    check();
    assert_eq!(Ledger::open(&path).unwrap().progress["crm"], progress(5, &[]));
}

#[test]
fn a_newer_schema_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("ledger.sqlite");
    drop(Ledger::open(&path).unwrap());
    Connection::open(&path).unwrap().pragma_update(None, "user_version", schema::VERSION + 1).unwrap();
    assert!(matches!(Ledger::open(&path), Err(LedgerError::NewerVersion { version: 5, .. })));
    assert!(matches!(check::check(&path, |_| true), Err(LedgerError::NewerVersion { version: 5, .. })));
}
