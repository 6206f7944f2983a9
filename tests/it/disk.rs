//! Disks that are full, fail, or can't be written to; and backlogs that are larger than memory should be.
//!
//! Mounting needs root, and injecting errors needs strace. Where a machine allows neither, the test says so on standard
//! error and checks nothing.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use futures_util::stream::{self, StreamExt as _};
use rustix::process::Signal;

use crate::harness::{Answer, Client, Raw, Receiver, Relay, Reply, Setup, event, eventually, webhook, within};
use crate::ingress::head;

/// A small file system of its own. Unmounted when dropped.
struct Mount(PathBuf);

impl Mount {
    fn tmpfs(at: &Path, options: &str) -> Result<Self, String> {
        Self::new(&["-t", "tmpfs", "-o", options, "tmpfs"], at)
    }

    /// ext4 in a file beside it.
    fn ext4(at: &Path) -> Result<Self, String> {
        let image = at.with_extension("ext4");
        let made = File::create(&image).and_then(|file| file.set_len(12 << 20));
        made.map_err(|error| error.to_string())?;
        run("mkfs.ext4", &["-q", "-F", &image.to_string_lossy()])?;
        Self::new(&["-o", "loop", &image.to_string_lossy()], at)
    }

    fn new(arguments: &[&str], at: &Path) -> Result<Self, String> {
        std::fs::create_dir(at).map_err(|error| error.to_string())?;
        run("mount", &[arguments, &[&at.to_string_lossy()]].concat())?;
        Ok(Self(at.to_owned()))
    }

    /// Uses up what is free, by a file that can be removed.
    fn fill(&self) -> PathBuf {
        let path = self.0.join("filler");
        let mut file = File::create(&path).unwrap();
        let mut chunk = vec![1; 64 << 10];
        while !chunk.is_empty() {
            if file.write_all(&chunk).and_then(|()| file.sync_data()).is_err() {
                chunk.truncate(chunk.len() / 2);
            }
        }
        path
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        // A relay that was killed a moment ago may still be there: detach now, unmount when it is gone.
        drop(run("umount", &["-l", &self.0.to_string_lossy()]));
    }
}

/// From when its lane has ended until the process does, a sink that was down keeps what it has not read: also of segments
/// that are older than `retention`.
#[tokio::test]
async fn what_is_unread_stays_while_the_relay_stops() {
    let downstream = Receiver::accepting().await;
    let setup = Setup::new(&downstream.routes())
        .env("RELAY_JOURNAL__SEGMENT", "64KiB")
        .env("RELAY_JOURNAL__RETENTION", "1s")
        .env("RELAY_INGRESS__BODY_TIMEOUT", "4s");
    let mut relay = setup.start().await;
    assert_eq!(relay.command(&["pause", "http"]).await.code, Some(0));
    let mut ids = Vec::new();
    for hundred in 0..10 {
        let events: Vec<_> = (0..100).map(|number| event(hundred * 100 + number, "sent")).collect();
        ids.extend(relay.post(format!("[{}]", events.join(","))).await.ids());
    }
    // A sender in the middle of a request keeps the relay waiting.
    let mut slow = Raw::connect(relay.address()).await;
    slow.write(head("content-length: 10\r\n") + "{").await;
    let begun = Instant::now();
    relay.signal(Signal::TERM);
    assert_eq!(relay.ended().await.code(), Some(0));
    assert!(begun.elapsed() > Duration::from_secs(3), "it had time to give something up");
    let relay = setup.start().await;
    let received = downstream.wait_for(1000).await;
    let mut received: Vec<_> = received.iter().map(|received| received.id().to_owned()).collect();
    received.sort_unstable();
    ids.sort_unstable();
    assert_eq!(received, ids);
    relay.stop().await;
}

/// Connections that use up all descriptors keep others out, and are no reason for the journal to fail.
#[tokio::test]
async fn without_descriptors_the_journal_goes_on() {
    let setup = Setup::new("[sinks.out]\ntype = \"stdout\"\n[[routes]]\nto = [\"out\"]\n")
        .env("RELAY_JOURNAL__SEGMENT", "64KiB")
        .env("RELAY_JOURNAL__MAX_DISK", "1MiB")
        .wrapped(["prlimit", "--nofile=64:128"]);
    let relay = setup.start().await;
    let segments = || std::fs::read_dir(setup.dir().join("data/journal")).unwrap().count();
    let client = Client::http1(relay.address()).await;
    let send = async |from: u32| {
        let events: Vec<_> = (from..from + 100).map(|number| event(number, "sent")).collect();
        let answer = client.send(webhook(format!("[{}]", events.join(",")))).await;
        assert!([200, 503].contains(&answer.status), "{answer:?}");
        answer.status == 200
    };
    // Until old segments have to be used again.
    for number in 0..40 {
        send(10_000 + number * 100).await;
    }
    let before = segments();
    let idle = futures_util::future::join_all((0..200).map(|_| Raw::connect(relay.address()))).await;
    eventually("all to be used up", async || {
        relay.log().iter().any(|line| line.to_string().contains("not be accepted"))
    })
    .await;
    // Enough for several segments.
    for number in 0..20 {
        send(number * 100).await;
    }
    assert!(before > 10 && segments() + 3 > before, "{before} files, and {} now", segments());
    drop(idle);
    eventually("it to accept again", async || send(4000).await).await;
    relay.stop().await;
}

fn run(program: &str, arguments: &[&str]) -> Result<(), String> {
    match Command::new(program).args(arguments).output() {
        Ok(Output { status, .. }) if status.success() => Ok(()),
        Ok(Output { stderr, .. }) => Err(format!("{program}: {}", String::from_utf8_lossy(&stderr).trim())),
        Err(error) => Err(format!("{program}: {error}")),
    }
}

/// What a test needs and a machine may not have.
fn or_skip<T>(test: &str, needed: Result<T, String>) -> Option<T> {
    needed.inspect_err(|why| eprintln!("SKIPPED {test}: not possible on this machine ({why})")).ok()
}

/// A sink that accepts nothing before it is told to.
async fn gated() -> (Receiver, Arc<AtomicBool>, String) {
    let open = Arc::new(AtomicBool::new(false));
    let gate = Arc::clone(&open);
    let receiver = Receiver::start(move |_| Reply::Status(if gate.load(Ordering::SeqCst) { 200 } else { 503 })).await;
    let delivery = "delivery = { backoff = { initial = \"20ms\", max = \"100ms\" }, breaker = { failures = 3, probe = \"100ms\" } }";
    let routes = receiver.routes().replace("timeout = \"2s\"", delivery);
    (receiver, open, routes)
}

fn arrived(receiver: &Receiver) -> BTreeSet<String> {
    receiver.received().iter().map(|received| received.id().to_owned()).collect()
}

fn padded(number: u32, len: usize) -> String {
    event(number, "sent").replacen('{', &format!("{{\"pad\":\"{}\",", "x".repeat(len)), 1)
}

/// Posts until something else than 200 comes, which is returned.
async fn post_until_refused(
    relay: &Relay,
    numbers: std::ops::Range<u32>,
    len: usize,
    accepted: &mut BTreeSet<String>,
) -> Answer {
    let client = Client::http1(relay.address()).await;
    for number in numbers {
        let answer = client.send(webhook(padded(number, len))).await;
        if answer.status != 200 {
            return answer;
        }
        accepted.extend(answer.ids());
    }
    panic!("all {} were accepted", accepted.len());
}

/// Posts until it is accepted again.
async fn post_until_accepted(relay: &Relay, number: u32, accepted: &mut BTreeSet<String>) {
    let post = async {
        loop {
            let answer = relay.post(event(number, "sent")).await;
            if answer.status == 200 {
                return accepted.extend(answer.ids());
            }
            assert_eq!(answer.status, 503, "{answer:?}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    within("an event to be accepted again", post).await;
}

/// A disk that somebody else fills and frees again.
async fn a_full_disk(mount: &Mount, min_free: &str) {
    let (receiver, open, routes) = gated().await;
    let setup = Setup::new(&routes)
        .env("RELAY_DATA_DIR", mount.0.join("data").to_string_lossy())
        .env("RELAY_JOURNAL__SEGMENT", "256KiB")
        .env("RELAY_JOURNAL__MIN_FREE_DISK", min_free);
    let relay = setup.start().await;
    let mut accepted = BTreeSet::new();
    accepted.extend(relay.post(event(0, "sent")).await.ids());
    let filler = mount.fill();
    let refused = post_until_refused(&relay, 1..2000, 20_000, &mut accepted).await;
    assert_eq!((refused.status, refused.header("retry-after")), (503, "5"), "{refused:?}");
    std::fs::remove_file(&filler).unwrap();
    post_until_accepted(&relay, 3000, &mut accepted).await;
    // Again, and this time it is killed before there is room again.
    mount.fill();
    post_until_refused(&relay, 4000..6000, 20_000, &mut accepted).await;
    relay.kill().await;
    std::fs::remove_file(&filler).unwrap();
    open.store(true, Ordering::SeqCst);
    let relay = setup.start().await;
    eventually("all that was accepted", async || arrived(&receiver).is_superset(&accepted)).await;
    assert_eq!(arrived(&receiver), accepted, "what was refused was not stored");
    post_until_accepted(&relay, 7000, &mut accepted).await;
    relay.stop().await;
}

#[tokio::test]
async fn a_full_tmpfs() {
    let dir = tempfile::tempdir().unwrap();
    for (name, min_free) in [("exactly", "0B"), ("before", "1MiB")] {
        let Some(mount) = or_skip("a_full_tmpfs", Mount::tmpfs(&dir.path().join(name), "size=8m")) else { return };
        a_full_disk(&mount, min_free).await;
    }
}

#[tokio::test]
async fn a_full_ext4() {
    let dir = tempfile::tempdir().unwrap();
    let Some(mount) = or_skip("a_full_ext4", Mount::ext4(&dir.path().join("disk"))) else { return };
    a_full_disk(&mount, "0B").await;
}

/// A disk that the journal fills by itself: it can be started, empties the backlog, and takes events again.
#[tokio::test]
async fn a_disk_that_the_journal_itself_fills() {
    let dir = tempfile::tempdir().unwrap();
    let mount = Mount::tmpfs(&dir.path().join("disk"), "size=8m");
    let Some(mount) = or_skip("a_disk_that_the_journal_itself_fills", mount) else { return };
    let (receiver, open, routes) = gated().await;
    let setup = Setup::new(&routes)
        .env("RELAY_DATA_DIR", mount.0.join("data").to_string_lossy())
        .env("RELAY_JOURNAL__SEGMENT", "1MiB")
        .env("RELAY_JOURNAL__MIN_FREE_DISK", "1MiB");
    let relay = setup.start().await;
    let mut accepted = BTreeSet::new();
    let refused = post_until_refused(&relay, 0..1000, 50_000, &mut accepted).await;
    assert_eq!(refused.status, 503, "{refused:?}");
    relay.kill().await;
    let relay = setup.start().await;
    open.store(true, Ordering::SeqCst);
    eventually("all that was accepted", async || arrived(&receiver).is_superset(&accepted)).await;
    post_until_accepted(&relay, 2000, &mut accepted).await;
    relay.stop().await;
}

/// The journal's files were made ready before the disk was full; the ledger has to grow.
#[tokio::test]
async fn a_relay_whose_ledger_cannot_be_written_can_be_stopped() {
    let dir = tempfile::tempdir().unwrap();
    let mount = Mount::tmpfs(&dir.path().join("disk"), "size=8m");
    let test = "a_relay_whose_ledger_cannot_be_written_can_be_stopped";
    let Some(mount) = or_skip(test, mount) else { return };
    let setup = Setup::new("")
        .env("RELAY_DATA_DIR", mount.0.join("data").to_string_lossy())
        .env("RELAY_JOURNAL__SEGMENT", "1MiB")
        .env("RELAY_JOURNAL__MIN_FREE_DISK", "0B")
        .env("RELAY_SHUTDOWN__GRACE", "3s");
    let mut relay = setup.start().await;
    let mut unrouted: BTreeSet<_> = relay.post(event(0, "sent")).await.ids().into_iter().collect();
    let spare = |entry: std::fs::DirEntry| entry.path().extension().is_some_and(|ending| ending == "spare");
    eventually("a spare file", async || mount.0.join("data/journal").read_dir().unwrap().flatten().any(spare)).await;
    let filler = mount.fill();
    for number in 1..4 {
        unrouted.extend(relay.post(padded(number, 50_000)).await.ids());
    }
    let message = "what no route matches can't be written; trying again";
    eventually("the ledger to fail", async || !relay.logged(message).is_empty()).await;
    let since = Instant::now();
    relay.signal(Signal::TERM);
    assert_eq!(relay.ended().await.code(), Some(0), "{:#?}", relay.log());
    let took = since.elapsed();
    assert!(took < Duration::from_secs(10), "it took {took:?} to end");

    std::fs::remove_file(&filler).unwrap();
    let relay = setup.start().await;
    eventually("all that no route matched to be dead letters", async || {
        let letters = relay.get("/api/v1/dead-letters?sink=unrouted").await;
        let letters = letters["dead_letters"].as_array().unwrap();
        letters.iter().map(|letter| letter["event_id"].as_str().unwrap().to_owned()).collect::<BTreeSet<_>>()
            == unrouted
    })
    .await;
    relay.stop().await;
}

#[tokio::test]
async fn a_data_directory_that_cannot_be_written() {
    let dir = tempfile::tempdir().unwrap();
    let mount = Mount::tmpfs(&dir.path().join("disk"), "ro,size=1m");
    let Some(mount) = or_skip("a_data_directory_that_cannot_be_written", mount) else { return };
    let data = mount.0.join("data").to_string_lossy().into_owned();
    let done = Setup::new(&gated().await.2).env("RELAY_DATA_DIR", &data).run(&["run"], "").await;
    assert_eq!(done.code, Some(1), "{done:?}");
    assert!(done.stderr.contains(&data) && done.stderr.contains("Read-only"), "{done:?}");
}

#[tokio::test]
async fn after_a_failed_sync_nothing_is_acknowledged() {
    let works = run("strace", &["-qq", "-o", "/dev/null", "-e", "trace=fdatasync", "true"]);
    if or_skip("after_a_failed_sync_nothing_is_acknowledged", works).is_none() {
        return;
    }
    let (receiver, open, routes) = gated().await;
    let setup = Setup::new(&routes).env("RELAY_JOURNAL__SEGMENT", "1MiB");
    let inject = [
        "strace",
        "-D",
        "-f",
        "-qq",
        "-o",
        "strace.log",
        "-e",
        "trace=fdatasync",
        "-e",
        "inject=fdatasync:error=EIO:when=20+",
    ];
    let mut relay = setup.clone().wrapped(inject).start().await;
    let mut accepted = BTreeSet::new();
    let mut failed = false;
    for number in 0..200 {
        let Some(answer) = try_post(&relay, number).await else { break };
        match answer.status {
            200 => assert!(!failed, "{answer:?} after a failed sync"),
            status => {
                assert_eq!(status, 503);
                failed = true;
                continue;
            }
        }
        accepted.extend(answer.ids());
    }
    assert_eq!(relay.ended().await.code(), Some(1), "{:#?}", relay.log());
    assert!((5..200).contains(&accepted.len()), "{} were accepted", accepted.len());
    let injected = std::fs::read_to_string(setup.dir().join("strace.log")).unwrap();
    assert!(injected.contains("(INJECTED)"), "{injected}");
    let stopping = relay.logged("stopping");
    assert!(
        stopping.iter().any(|line| line["error"].as_str().is_some_and(|error| error.contains("journal failed"))),
        "{stopping:?}"
    );
    open.store(true, Ordering::SeqCst);
    let relay = setup.start().await;
    eventually("all that was accepted", async || arrived(&receiver).is_superset(&accepted)).await;
    relay.stop().await;
}

/// The answer, if there is one: the relay may be gone.
async fn try_post(relay: &Relay, number: u32) -> Option<Answer> {
    Client::try_http1(relay.address()).await?.try_send(webhook(event(number, "sent"))).await.ok()
}

/// The most memory that a relay may take for a backlog, in bytes: it does not grow with it.
const BACKLOG_MEMORY: u64 = 100 << 20;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_backlog_is_read_in_bounded_memory() {
    const EVENTS: u32 = 1200;
    const EACH: usize = 250_000;
    let seen = Arc::new(Mutex::new(BTreeSet::new()));
    let (ids, bytes) = (Arc::clone(&seen), Arc::new(AtomicUsize::new(0)));
    let (open, total) = (Arc::new(AtomicBool::new(false)), Arc::clone(&bytes));
    let gate = Arc::clone(&open);
    let receiver = Receiver::start_without_memory(move |received| {
        if received.uri.path() == "/dead" || !gate.load(Ordering::SeqCst) {
            return Reply::Status(503);
        }
        if ids.lock().unwrap_or_else(PoisonError::into_inner).insert(received.id().to_owned()) {
            total.fetch_add(received.body.len(), Ordering::SeqCst);
        }
        // Slower than the journal is read.
        Reply::After(Duration::from_millis(200), 200)
    })
    .await;
    let routes = format!(
        "[sinks.http]\ntype = \"http\"\nurl = \"{}\"\n[sinks.dead]\ntype = \"http\"\nurl = \"{}\"\n\
         [[routes]]\nname = \"all\"\nto = [\"http\", \"dead\"]\n",
        receiver.url("/"),
        receiver.url("/dead")
    );
    let setup = Setup::new(&routes).env("RELAY_JOURNAL__DURABILITY", "os");
    let relay = setup.start().await;
    let clients: Vec<_> = stream::iter(0..8).then(|_| Client::http1(relay.address())).collect().await;
    let posts = stream::iter(0..EVENTS).map(|number| {
        let client = clients[number as usize % clients.len()].clone();
        async move { client.send(webhook(padded(number, EACH))).await.ids().remove(0) }
    });
    let accepted: BTreeSet<_> = posts.buffer_unordered(8).collect().await;
    assert_eq!(accepted.len(), EVENTS as usize);
    let taking = peak_memory(&relay);
    relay.kill().await;
    open.store(true, Ordering::SeqCst);
    let relay = setup.start().await;
    eventually("the whole backlog", async || {
        seen.lock().unwrap_or_else(PoisonError::into_inner).len() == accepted.len()
    })
    .await;
    let reading = peak_memory(&relay);
    eprintln!(
        "backlog of {} MB: {} MB of memory while it came in, {} MB while it was read",
        EACH * EVENTS as usize / 1_000_000,
        taking >> 20,
        reading >> 20
    );
    assert_eq!(*seen.lock().unwrap_or_else(PoisonError::into_inner), accepted);
    assert!(bytes.load(Ordering::SeqCst) > EACH * EVENTS as usize);
    assert!(taking < BACKLOG_MEMORY && reading < BACKLOG_MEMORY, "{taking} and {reading} bytes");
}

/// The most that the process ever had in memory, in bytes.
fn peak_memory(relay: &Relay) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", relay.pid().as_raw_nonzero())).unwrap();
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    peak.trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10
}
