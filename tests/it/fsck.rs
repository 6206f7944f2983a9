//! `engage-relay fsck`: each kind of damage is found, and repaired so that the relay starts and delivers what is left.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::SystemTime;

use rusqlite::Connection;
use serde_json::{Value, json};

use crate::brokers::receiver;
use crate::harness::{Reply, Setup, event, eventually};

/// Where the first record of a segment is, in bytes.
const FIRST_RECORD: u16 = 4096;

fn segments(setup: &Setup) -> Vec<PathBuf> {
    let files =
        fs::read_dir(setup.dir().join("data/journal")).expect("the journal").flatten().map(|entry| entry.path());
    let mut segments: Vec<_> = files.filter(|path| path.extension().is_some_and(|ending| ending == "seg")).collect();
    segments.sort();
    segments
}

fn write(path: &Path, offset: u64, bytes: &[u8]) {
    let file = OpenOptions::new().write(true).open(path).expect("a file to damage");
    file.write_all_at(bytes, offset).expect("it can be written");
}

/// Damages a stopped relay's files, and gives what `fsck --json` says of it before and after a repair. Afterwards a relay
/// starts on them and delivers a new event.
async fn fsck(damage: impl FnOnce(&Setup)) -> (Value, Value) {
    let (server, inbox) = receiver(|_| Reply::Status(200)).await;
    let setup = Setup::new(&server.routes()).env("RELAY_JOURNAL__SEGMENT", "64KiB");
    let relay = setup.start().await;
    let mut posted = Vec::new();
    for number in 0..300 {
        posted.extend(relay.post(event(number, "sent")).await.ids());
    }
    inbox.wait_for_ids("HTTP", posted).await;
    relay.stop().await;
    let clean = setup.run(&["fsck"], "").await;
    let said = clean.stdout.contains("journal: 300 events, up to position 300\n");
    assert!(clean.code == Some(0) && said && !clean.stdout.contains("http has"), "{clean:?}");
    assert!(segments(&setup).len() > 2);

    damage(&setup);
    let files = files(&setup);
    let found = setup.run(&["fsck", "data", "--json"], "").await;
    assert_eq!(self::files(&setup), files, "looking changes nothing");
    let repaired = setup.run(&["fsck", "--repair", "--json"], "").await;
    let parse = |text: &str| serde_json::from_str::<Value>(text).expect("JSON");
    let (before, after) = (parse(&found.stdout), parse(&repaired.stdout));
    assert_eq!(
        (found.code, before["ok"].as_bool()),
        (Some(if before["ok"] == true { 0 } else { 1 }), before["ok"].as_bool())
    );
    assert_eq!((repaired.code, after["ok"].as_bool()), (Some(0), Some(true)), "{repaired:?}");
    assert_eq!(before["journal"]["events"], 300 - lost(&before), "{before}");
    assert_eq!(after["journal"]["events"], before["journal"]["events"], "what is there stays");
    assert_eq!(setup.run(&["fsck"], "").await.code, Some(0));

    let relay = setup.start().await;
    let new = relay.post(event(1000, "sent")).await.ids();
    inbox.wait_for_ids("HTTP", new).await;
    let running = setup.run(&["fsck"], "").await;
    assert!(running.code == Some(1) && running.stderr.contains("another process"), "{running:?}");
    relay.stop().await;
    (before, after)
}

/// Names, content and times of all files.
fn files(setup: &Setup) -> Vec<(PathBuf, SystemTime, Vec<u8>)> {
    let data = setup.dir().join("data");
    let all = [data.clone(), data.join("journal")].into_iter().flat_map(|dir| fs::read_dir(dir).expect("a folder"));
    let file = |path: PathBuf| {
        let modified = fs::metadata(&path).and_then(|file| file.modified()).expect("a time");
        (path.clone(), modified, fs::read(path).unwrap_or_default())
    };
    let mut files: Vec<_> = all.map(|entry| file(entry.expect("an entry").path())).collect();
    files.sort();
    files
}

fn lost(report: &Value) -> u64 {
    let findings = report["journal"]["findings"].as_array().expect("a list");
    findings.iter().filter_map(|finding| finding["lost_events"].as_u64()).sum()
}

fn kinds(report: &Value) -> Vec<&str> {
    let findings = report["journal"]["findings"].as_array().expect("a list");
    findings.iter().map(|finding| finding["kind"].as_str().expect("text")).collect()
}

#[tokio::test]
async fn damage_to_the_journal_is_found_and_repaired() {
    let (before, _) = fsck(|setup| write(&segments(setup)[0], u64::from(FIRST_RECORD) + 2000, b"damage")).await;
    assert_eq!(kinds(&before), ["damaged"]);
    assert!(before["journal"]["findings"][0]["lost_events"].as_u64() >= Some(1), "{before}");

    let (before, after) = fsck(|setup| write(&segments(setup)[1], 0, &[0; 40])).await;
    assert_eq!(kinds(&before), ["header"]);
    assert!(
        after["repaired"][0].as_str().is_some_and(|done| done.ends_with("what was damaged is in data/quarantine")),
        "{after}"
    );

    let (before, after) = fsck(|setup| write(&segments(setup)[1], 0, &[0; FIRST_RECORD as usize])).await;
    assert_eq!(kinds(&before), ["segment", "missing"]);
    assert!(after["repaired"][0].as_str().is_some_and(|done| done.contains("quarantine")), "{after}");

    let (before, after) = fsck(|setup| fs::remove_file(&segments(setup)[1]).expect("it goes")).await;
    assert_eq!(kinds(&before), ["missing"]);
    assert_eq!(after["repaired"], json!(["journal: 1 repaired"]), "nothing is left of it");

    // The last is gone, and sinks have read it: that there was more is known from the ledger.
    let (before, _) = fsck(|setup| fs::remove_file(segments(setup).pop().expect("the last")).expect("it goes")).await;
    assert_eq!(kinds(&before), ["missing"]);

    let (before, _) = fsck(|setup| drop(setup.file("data/journal/notes.txt", "mine"))).await;
    assert_eq!((kinds(&before), &before["ok"]), (vec!["foreign"], &json!(true)));
}

/// What a crash in the middle of a write leaves: the last record is not all there. Nobody got a 200 for that one.
#[tokio::test]
async fn a_torn_tail_is_cut_off_and_what_is_before_it_is_delivered() {
    let (server, inbox) = receiver(|_| Reply::Status(200)).await;
    let setup = Setup::new(&server.routes()).env("RELAY_JOURNAL__SEGMENT", "64KiB");
    let relay = setup.start().await;
    let delivered = relay.post(event(0, "sent")).await.ids();
    inbox.wait_for_ids("HTTP", delivered.clone()).await;
    assert_eq!(relay.command(&["pause", "http"]).await.code, Some(0));
    let mut posted = Vec::new();
    for number in 1..6 {
        posted.extend(relay.post(event(number, "sent")).await.ids());
    }
    relay.kill().await;
    let last = segments(&setup).pop().expect("the last");
    let bytes = fs::read(&last).expect("a segment");
    let end = bytes.iter().rposition(|byte| *byte != 0).expect("records");
    let file = OpenOptions::new().write(true).open(&last).expect("a file to damage");
    file.set_len(u64::try_from(end).expect("it is small") - 100).expect("it can be cut");
    let torn = posted.pop().expect("five were posted");

    let before = files(&setup);
    let unfinished = before.iter().find(|(path, ..)| path.ends_with("ledger.sqlite-wal"));
    assert!(unfinished.is_some_and(|(_, _, content)| !content.is_empty()), "the ledger was not closed");
    let found = setup.run(&["fsck", "--json"], "").await;
    assert_eq!(files(&setup), before, "looking changes nothing");
    let report: Value = serde_json::from_str(&found.stdout).expect("JSON");
    assert_eq!((found.code, kinds(&report)), (Some(1), vec!["torn_tail"]), "{report}");
    assert_eq!(report["journal"]["findings"][0]["lost_events"], 0, "{report}");
    assert_eq!(report["ledger"]["cursors"]["http"], 1, "what was written last counts");
    let repaired = setup.run(&["fsck", "--repair"], "").await;
    assert_eq!(repaired.code, Some(0), "{repaired:?}");

    let relay = setup.start().await;
    posted.extend(relay.post(event(6, "sent")).await.ids());
    let arrived = inbox.wait_for_ids("HTTP", posted.clone()).await;
    relay.stop().await;
    assert!(arrived.all.iter().all(|arrival| arrival.id() != torn), "{arrived:?}");
}

#[tokio::test]
async fn damage_to_the_ledger_is_found_and_what_is_left_is_saved() {
    let (before, after) = fsck(|setup| write(&setup.dir().join("data/ledger.sqlite"), 0, &[0xA5; 8192])).await;
    assert!(before["ledger"]["problems"][0].as_str().is_some(), "{before}");
    assert!(after["repaired"][0].as_str().is_some_and(|done| done.contains("no cursors")), "{after}");

    let (before, _) = fsck(|setup| {
        fs::remove_file(setup.dir().join("data/ledger.sqlite")).expect("it goes");
    })
    .await;
    assert_eq!(before["ledger"]["problems"], json!(["ledger.sqlite is missing"]));

    let (before, _) = fsck(|setup| {
        fs::write(setup.dir().join("data/ledger.sqlite"), "").expect("it can be emptied");
    })
    .await;
    assert_eq!(before["ledger"]["problems"], json!(["ledger.sqlite is empty"]));
}

/// Overwrites the first page of a table of a stopped relay's ledger.
fn damage_table(setup: &Setup, table: &str) {
    let ledger = setup.dir().join("data/ledger.sqlite");
    let sql = "SELECT 4096 * (rootpage - 1) FROM sqlite_schema WHERE name = ?1";
    let connection = Connection::open(&ledger).expect("a ledger");
    let offset: u32 = connection.query_row(sql, [table], |row| row.get(0)).expect("a table");
    drop(connection);
    write(&ledger, offset.into(), &[0xA5; 4096]);
}

async fn fsck_json(setup: &Setup, arguments: &[&str]) -> (Option<i32>, Value) {
    let done = setup.run(&[&["fsck", "--json"], arguments].concat(), "").await;
    let report = serde_json::from_str(&done.stdout);
    (done.code, report.unwrap_or_else(|error| panic!("{error}: {done:?}")))
}

#[tokio::test]
async fn what_was_parked_is_delivered_although_the_table_is_damaged() {
    const EVENTS: u32 = 50;
    let up = Arc::new(AtomicBool::new(false));
    let is_up = Arc::clone(&up);
    let (server, inbox) = receiver(move |_| Reply::Status(if is_up.load(Ordering::SeqCst) { 200 } else { 503 })).await;
    let delivery = "delivery = { backoff = { initial = \"1h\", max = \"1h\" }, breaker = { failures = 1000 } }";
    let setup = Setup::new(&server.routes().replace("timeout = \"2s\"", delivery));
    let relay = setup.start().await;
    let mut posted = Vec::new();
    for number in 0..EVENTS {
        posted.extend(relay.post(event(number, "sent")).await.ids());
    }
    relay.sink_is("http", "everything to be parked", |sink| sink["parked"] == EVENTS).await;
    relay.stop().await;
    damage_table(&setup, "parked");
    let (code, report) = fsck_json(&setup, &["--repair"]).await;
    assert_eq!((code, &report["ok"], &report["ledger"]["cursors"]), (Some(0), &json!(true), &json!({})), "{report}");
    let lost = "ledger: 50 of the parked deliveries; those that the journal still keeps are delivered again";
    assert_eq!(report["lost"], json!([lost]));
    up.store(true, Ordering::SeqCst);
    let relay = setup.start().await;
    inbox.wait_for_ids("HTTP", posted).await;
    relay.stop().await;
}

#[tokio::test]
async fn a_damaged_page_of_dead_letters_is_noticed_when_one_is_written() {
    let setup = Setup::new("").env("RELAY_SHUTDOWN__GRACE", "1s");
    let relay = setup.start().await;
    relay.post(event(0, "sent")).await;
    relay.status_is("a dead letter", |status| status["dead_letters"]["unrouted"] == 1).await;
    relay.stop().await;
    damage_table(&setup, "dead_letters");
    let relay = setup.start().await;
    let accepted = relay.post(event(1, "sent")).await;
    assert_eq!(accepted.status, 200, "{accepted:?}");
    let message = "the ledger is damaged: stop the relay and run `engage-relay fsck --repair`";
    eventually("an ERROR", async || relay.logged(message).iter().any(|line| line["level"] == "ERROR")).await;
    relay.stop().await;
    let (code, report) = fsck_json(&setup, &["--repair"]).await;
    let lost = "ledger: 1 of the dead letters; `engage-relay replay` sends again what the journal still keeps";
    assert_eq!((code, &report["lost"]), (Some(0), &json!([lost])), "{report}");
    let relay = setup.start().await;
    relay.status_is("the other to be written", |status| status["dead_letters"]["unrouted"] == 1).await;
    relay.stop().await;
}

/// A relay was stopped before its sink has read anything, and `damage` is done to its journal.
async fn unread(damage: impl Fn(&[PathBuf])) -> Setup {
    let (server, _) = receiver(|_| Reply::Status(200)).await;
    let setup = Setup::new(&server.routes()).env("RELAY_JOURNAL__SEGMENT", "64KiB");
    let relay = setup.start().await;
    assert_eq!(relay.command(&["pause", "http"]).await.code, Some(0));
    for number in 0..300 {
        relay.post(event(number, "sent")).await;
    }
    relay.stop().await;
    damage(&segments(&setup));
    setup
}

/// Or else somebody would take the volume for empty.
#[tokio::test]
async fn what_is_not_delivered_yet_is_told() {
    let setup = unread(|_| {}).await;
    let (code, found) = fsck_json(&setup, &[]).await;
    assert_eq!((code, &found["ledger"]["unread"]["http"]), (Some(0), &json!(300)), "{found}");
    let text = setup.run(&["fsck"], "").await.stdout;
    assert!(text.contains("\n  http has 300 events to read yet: "), "{text}");
}

#[tokio::test]
async fn events_that_are_missing_at_the_beginning_are_told_once() {
    let first = |files: &[PathBuf]| fs::remove_file(&files[0]).expect("it goes");
    let all = |files: &[PathBuf]| files.iter().for_each(|file| fs::remove_file(file).expect("it goes"));
    for damage in [&first as &dyn Fn(&[PathBuf]), &all] {
        let setup = unread(damage).await;
        let (code, found) = fsck_json(&setup, &[]).await;
        assert_eq!((code, kinds(&found)), (Some(1), vec!["missing"]), "{found}");
        let gone = lost(&found);
        assert_eq!(found["journal"]["oldest"], gone, "{found}");
        let relay = setup.start().await;
        let logged = relay.logged("events are lost from the journal");
        assert_eq!((&logged[0]["first"], &logged[0]["lost"]), (&json!(0), &json!(gone)), "{logged:?}");
        let of_sink = relay.logged("events that the sink had not read are gone from the journal");
        assert_eq!((of_sink.len(), &of_sink[0]["sink"], &of_sink[0]["lost"]), (1, &json!("http"), &json!(gone)));
        relay.stop().await;
        assert_eq!(fsck_json(&setup, &[]).await.0, Some(0));

        let setup = unread(damage).await;
        // Without any file it is known only how far others have read, which need not be the end.
        let gone = lost(&fsck_json(&setup, &[]).await.1);
        let (code, repaired) = fsck_json(&setup, &["--repair"]).await;
        let said = format!("journal: {gone} events from position 0");
        assert_eq!((code, &repaired["ok"], &repaired["lost"]), (Some(0), &json!(true), &json!([said])), "{repaired}");
        let sink = format!(
            "ledger: http begins at the oldest event that is kept; it had not read {gone} events from position 0"
        );
        assert_eq!(repaired["repaired"], json!(["journal: 1 repaired", sink]));
        let relay = setup.start().await;
        assert_eq!(relay.logged("events are lost from the journal"), Vec::<Value>::new());
        relay.stop().await;
    }
}

/// The disk answers with errors, from the first record on: as far as strace can make it.
#[tokio::test]
async fn a_file_that_the_disk_cannot_read_is_named() {
    let works = Command::new("strace").args(["-qq", "-o", "/dev/null", "-e", "trace=pread64", "true"]).output();
    if !works.is_ok_and(|done| done.status.success()) {
        return eprintln!("SKIPPED a_file_that_the_disk_cannot_read_is_named: there is no strace on this machine");
    }
    let setup = unread(|_| {}).await;
    let (first, name) = (segments(&setup).remove(0), "data/journal/00000000000000000000.seg");
    let failing = |when: &str| {
        let inject = format!("inject=pread64:error=EIO:when={when}");
        let path = first.to_string_lossy();
        let strace =
            ["strace", "-D", "-f", "-qq", "-o", "strace.log", "-P", &path, "-e", "trace=pread64", "-e", &inject];
        setup.clone().wrapped(strace)
    };
    for command in [&["run"][..], &["fsck"]] {
        let done = failing("3+").run(command, "").await;
        let expected = format!(
            "{name} can't be read; if its disk has lost that, `engage-relay fsck --repair` goes on without it: at offset 4096"
        );
        assert!(done.code == Some(1) && done.stderr.contains(&expected), "{done:?}");
    }
    // Looking fails, and of the blocks the second, with the first records.
    let (code, repaired) = fsck_json(&failing("3..5+2"), &["--repair"]).await;
    assert_eq!((code, &repaired["ok"]), (Some(0), &json!(true)), "{repaired}");
    let blank = format!("journal: 4096 bytes of {name} that could not be read are zeros now");
    assert_eq!(repaired["repaired"][0], json!(blank));
    assert!(repaired["lost"][0].as_str().is_some_and(|lost| lost.ends_with("from position 0")), "{repaired}");
    assert!(repaired["journal"]["events"].as_u64() > Some(280), "{repaired}");
}

#[tokio::test]
async fn the_ledger_of_a_newer_version_is_refused() {
    let setup = Setup::new("");
    setup.start().await.stop().await;
    let ledger = setup.dir().join("data/ledger.sqlite");
    Connection::open(&ledger).and_then(|ledger| ledger.pragma_update(None, "user_version", 99)).expect("a ledger");
    let before = fs::read(&ledger).expect("a ledger");
    for command in [&["run"][..], &["fsck"], &["fsck", "--repair"]] {
        let done = setup.run(command, "").await;
        assert!(done.code == Some(1) && done.stderr.contains("run the newer one"), "{done:?}");
    }
    assert_eq!(fs::read(&ledger).expect("a ledger"), before);
}

#[tokio::test]
async fn a_directory_in_a_file_s_place_is_named() {
    let setup = Setup::new("");
    let name = "data/journal/00000000000000000007.seg";
    fs::create_dir_all(setup.dir().join(name)).expect("it can be made");
    for command in ["run", "fsck"] {
        let done = setup.run(&[command], "").await;
        let expected = format!("{name} is a directory, where the journal has a file: move it elsewhere");
        assert!(done.code == Some(1) && done.stderr.contains(&expected), "{done:?}");
    }
}

#[tokio::test]
async fn what_is_no_data_directory_is_refused() {
    let setup = Setup::new("");
    let done = setup.run(&["fsck", "/usr"], "").await;
    assert!(done.code == Some(1) && done.stderr.contains("is not the data directory of a relay"), "{done:?}");
}
