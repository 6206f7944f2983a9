//! Posts events for as long as a test wants, also while the relay is killed and started again, and remembers which were
//! acknowledged and when.

use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use serde_json::Value;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::timeout;

use crate::brokers::{Arrived, Inbox};
use crate::harness::{self, DEADLINE, PATH, within};

/// How long a sender pauses that got no answer.
const PAUSE: Duration = Duration::from_millis(20);
/// The statuses of every message, in order.
const STATUSES: [&str; 3] = ["sent", "delivered", "read"];

/// An event that got a 200.
#[derive(Clone, Debug)]
pub(crate) struct Acked {
    pub(crate) id: String,
    pub(crate) posted: Instant,
}

/// What was posted so far.
#[derive(Clone, Debug, Default)]
pub(crate) struct Posted {
    /// In the order of the answers.
    pub(crate) acked: Vec<Acked>,
    /// Every body, with the event's id if it got a 200.
    pub(crate) bodies: HashMap<Bytes, Option<String>>,
    /// Ids of each message's events, in the order in which they were posted: each after the answer to the one before.
    pub(crate) orders: HashMap<String, Vec<String>>,
}

/// Senders that post one message after the other, each message's statuses in order. Ends with this value.
pub(crate) struct Load {
    address: watch::Sender<Option<SocketAddr>>,
    posted: watch::Sender<Posted>,
    stopped: watch::Sender<bool>,
    senders: JoinSet<()>,
}

impl Load {
    /// So many senders, each of which waits so long between its posts. They begin when they are told an address.
    pub(crate) fn new(senders: u32, pause: Duration) -> Self {
        let (address, posted, stopped) =
            (watch::Sender::new(None), watch::Sender::new(Posted::default()), watch::Sender::new(false));
        let mut load = Self { address, posted, stopped, senders: JoinSet::new() };
        for number in 0..senders {
            let sender = Sender {
                client: Client::builder(TokioExecutor::new()).build_http(),
                address: load.address.subscribe(),
                posted: load.posted.clone(),
                stopped: load.stopped.subscribe(),
                pause,
            };
            load.senders.spawn(sender.run(number * 1_000_000));
        }
        load
    }

    /// Where the relay is now, or that it is nowhere.
    pub(crate) fn to(&self, address: Option<SocketAddr>) {
        self.address.send_replace(address);
    }

    /// How many events have been acknowledged.
    pub(crate) fn count(&self) -> usize {
        self.posted.borrow().acked.len()
    }

    /// Waits for so many more acknowledged events, and gives them.
    pub(crate) async fn more(&self, count: usize) -> Vec<Acked> {
        let from = self.count();
        let mut posted = self.posted.subscribe();
        let enough = posted.wait_for(|posted| posted.acked.len() >= from + count);
        match timeout(DEADLINE, enough).await {
            Ok(posted) => posted.expect("the sender is ours").acked[from..].to_vec(),
            Err(_elapsed) => {
                panic!("waited {DEADLINE:?} for {count} acknowledged events; there were {}", self.count() - from)
            }
        }
    }

    /// Ends the senders after their last answers, and gives all that was posted.
    pub(crate) async fn stop(mut self) -> Posted {
        self.stopped.send_replace(true);
        let ended = async {
            while let Some(ended) = self.senders.join_next().await {
                ended.expect("a sender ends well");
            }
        };
        within("the senders to end", ended).await;
        self.posted.borrow().clone()
    }
}

struct Sender {
    client: Client<HttpConnector, Full<Bytes>>,
    address: watch::Receiver<Option<SocketAddr>>,
    posted: watch::Sender<Posted>,
    stopped: watch::Receiver<bool>,
    pause: Duration,
}

impl Sender {
    async fn run(mut self, first: u32) {
        let mut stopped = self.stopped.clone();
        for message in first.. {
            for status in STATUSES {
                if *self.stopped.borrow() {
                    return;
                }
                let address = tokio::select! {
                    address = self.address.wait_for(Option::is_some) => address.ok().and_then(|address| *address),
                    _ = stopped.wait_for(|stopped| *stopped) => return,
                };
                let Some(address) = address else { return };
                if !self.post(address, message, status).await {
                    // Nobody knows whether it was stored. The next message, so that no event is posted twice.
                    tokio::time::sleep(PAUSE).await;
                    break;
                }
                tokio::time::sleep(self.pause).await;
            }
        }
    }

    async fn post(&self, address: SocketAddr, message: u32, status: &str) -> bool {
        let body = Bytes::from(harness::event(message, status));
        self.posted.send_modify(|posted| drop(posted.bodies.insert(body.clone(), None)));
        let posted_at = Instant::now();
        let mut request = harness::webhook(body.clone());
        *request.uri_mut() = format!("http://{address}{PATH}").parse().expect("a URL");
        request.headers_mut().remove("host");
        let exchange = async {
            let response = self.client.request(request).await.ok().filter(|response| response.status() == 200)?;
            let answer: Value = serde_json::from_slice(&response.into_body().collect().await.ok()?.to_bytes()).ok()?;
            Some(answer["ids"][0].as_str()?.to_owned())
        };
        let Some(id) = within("an answer or an error", exchange).await else { return false };
        self.posted.send_modify(|posted| {
            let message = format!("wamid.{message:08}");
            posted.acked.push(Acked { id: id.clone(), posted: posted_at });
            posted.orders.entry(message).or_default().push(id.clone());
            posted.bodies.insert(body, Some(id));
        });
        true
    }
}

impl Posted {
    /// The acknowledged events' ids.
    pub(crate) fn ids(&self) -> impl Iterator<Item = String> {
        self.acked.iter().map(|acked| acked.id.clone())
    }

    /// Checks what has arrived at a sink that takes all: everything that got a 200, nothing else but what may have been
    /// stored before a lost answer, bodies as they were posted, and each message's events in order.
    pub(crate) fn check(&self, what: &str, arrived: &Arrived) {
        for acked in &self.acked {
            assert!(arrived.ids.contains_key(&acked.id), "{what}: {} got a 200 and has not arrived", acked.id);
        }
        for arrival in &arrived.all {
            let posted = self.bodies.get(&arrival.body);
            let id = posted.unwrap_or_else(|| panic!("{what}: nobody has posted {:?}", arrival.body));
            assert!(id.as_deref().is_none_or(|id| id == arrival.id()), "{what}: {arrival:?} should have the id {id:?}");
        }
        let orders = arrived.orders();
        for (message, expected) in &self.orders {
            let posted: HashSet<&String> = expected.iter().collect();
            let order: Vec<_> = orders[message].iter().filter(|id| posted.contains(id)).collect();
            assert_eq!(order, expected.iter().collect::<Vec<_>>(), "{what}: {message} has arrived in another order");
        }
    }
}

/// Waits until these events have arrived at the inbox, and gives how long that took from the post: the median, and the
/// longest of the fastest 99 %.
pub(crate) async fn latencies(what: &str, events: &[Acked], inbox: &Inbox) -> (Duration, Duration) {
    let arrived = inbox.wait_for_ids(what, events.iter().map(|acked| acked.id.clone())).await;
    let mut at: HashMap<&str, Instant> = HashMap::new();
    for arrival in arrived.all.iter().rev() {
        at.insert(arrival.id(), arrival.at);
    }
    let mut latencies: Vec<_> =
        events.iter().map(|acked| at[&*acked.id].saturating_duration_since(acked.posted)).collect();
    latencies.sort();
    let at = |share: usize| latencies[(latencies.len() * share / 100).min(latencies.len() - 1)];
    let (median, p99) = (at(50), at(99));
    eprintln!("{what}: from post to arrival median {median:.1?}, p99 {p99:.1?} ({} events)", events.len());
    (median, p99)
}
