//! `engage-relay fsck`: each kind of damage is found, and repaired so that the relay starts and delivers what is left.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use serde_json::{Value, json};

use crate::brokers::receiver;
use crate::harness::{Reply, Setup, event};

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
    assert!(clean.code == Some(0) && said, "{clean:?}");
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
