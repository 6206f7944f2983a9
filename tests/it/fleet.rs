//! Replicas of the relay behind a balancer, and what can happen to them and to the brokers that have their journal.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use tokio::process::Child;

use crate::balancer::{haproxy, unused_addresses};
use crate::brokers::OwnBroker;
use crate::harness::{Relay, Setup};

/// How many replicas there are at most.
const REPLICAS: usize = 4;

/// What happens to replicas (from 0) and brokers (from 1).
#[derive(Clone, Copy, Debug)]
pub(crate) enum Fault {
    ReplicaKilled(usize),
    BrokerKilled(usize),
    ScaledIn(&'static [usize]),
    ScaledOut(&'static [usize]),
}

impl Fault {
    /// How many replicas or brokers it ends or adds.
    pub(crate) fn count(self) -> usize {
        match self {
            Self::ReplicaKilled(_) | Self::BrokerKilled(_) => 1,
            Self::ScaledIn(replicas) | Self::ScaledOut(replicas) => replicas.len(),
        }
    }
}

/// Replicas that the balancer knows, whether they run or not.
pub(crate) struct Fleet {
    setups: Vec<Setup>,
    running: BTreeMap<usize, Relay>,
    front: SocketAddr,
    _balancer: Child,
}

impl Fleet {
    /// None of them runs yet. `setup` makes what they have in common.
    pub(crate) fn new(setup: impl Fn() -> Setup) -> Self {
        let [front, unused @ ..] = unused_addresses::<{ 1 + 2 * REPLICAS }>();
        let addresses: Vec<_> = unused.chunks(2).map(|pair| (pair[0], pair[1])).collect();
        let setup = |(ingress, admin): &(SocketAddr, SocketAddr)| {
            setup()
                .env("RELAY_INGRESS__LISTEN", ingress.to_string())
                .env("RELAY_ADMIN__LISTEN", admin.to_string())
                // So that the balancer notices who is going.
                .env("RELAY_SHUTDOWN__DELAY", "3s")
                .env("RELAY_SHUTDOWN__GRACE", "10s")
        };
        let setups: Vec<_> = addresses.iter().map(setup).collect();
        let balancer = haproxy(&setups[0], front, &addresses);
        Self { setups, running: BTreeMap::new(), front, _balancer: balancer }
    }

    /// Where the balancer takes webhooks.
    pub(crate) fn front(&self) -> SocketAddr {
        self.front
    }

    /// Starts a replica, and returns when it takes connections.
    pub(crate) async fn start(&mut self, replica: usize) {
        let relay = self.setups[replica].start().await;
        self.running.insert(replica, relay);
    }

    async fn stop(&mut self, replica: usize) {
        self.running.remove(&replica).expect("it runs").stop().await;
    }

    /// Ends all that run.
    pub(crate) async fn end(self) {
        for relay in self.running.into_values() {
            relay.stop().await;
        }
    }

    /// Lets it happen, and returns when all that is to run runs.
    pub(crate) async fn suffer(&mut self, fault: Fault, kafka: &OwnBroker) {
        match fault {
            Fault::ReplicaKilled(replica) => {
                drop(self.running.remove(&replica).expect("it runs").kill().await);
                self.start(replica).await;
            }
            Fault::BrokerKilled(node) => {
                kafka.kill_node(node).await;
                kafka.start_node_again(node).await;
                kafka.in_sync().await;
            }
            Fault::ScaledIn(replicas) => {
                for replica in replicas {
                    self.stop(*replica).await;
                }
            }
            Fault::ScaledOut(replicas) => {
                for replica in replicas {
                    self.start(*replica).await;
                }
            }
        }
    }
}
