//! Relays behind a real balancer, which looks at their readiness once a second, restarted one after the other under load.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rustix::process::Signal;

use crate::balancer::{haproxy, unused_addresses};
use crate::harness::{Client, Receiver, Relay, Setup, event, eventually, webhook, within};

/// Posts one event after the other, until told to end or one is not accepted; the ids, and what went wrong.
async fn send(sender: u32, front: SocketAddr, going: Arc<AtomicBool>) -> (Vec<String>, Option<String>) {
    let client = Client::http1(front).await;
    let (mut ids, mut number) = (Vec::new(), sender * 1_000_000);
    while going.load(Ordering::Relaxed) {
        number += 1;
        match client.try_send(webhook(event(number, "sent"))).await {
            Ok(answer) if answer.status == 200 => ids.extend(answer.ids()),
            Ok(answer) => return (ids, Some(format!("{answer:?}"))),
            Err(error) => return (ids, Some(error.to_string())),
        }
    }
    (ids, None)
}

#[tokio::test]
async fn a_rolling_restart_fails_no_request() {
    let receiver = Receiver::accepting().await;
    let [front, unused @ ..] = unused_addresses::<5>();
    let addresses: Vec<_> = unused.chunks(2).map(|pair| (pair[0], pair[1])).collect();
    let setups: Vec<_> = addresses
        .iter()
        .map(|(ingress, admin)| {
            Setup::new(&receiver.routes())
                .env("RELAY_INGRESS__LISTEN", ingress.to_string())
                .env("RELAY_ADMIN__LISTEN", admin.to_string())
                .env("RELAY_SHUTDOWN__DELAY", "3s")
        })
        .collect();
    let mut relays: Vec<Relay> = Vec::new();
    for setup in &setups {
        relays.push(setup.start().await);
    }
    let balancer = haproxy(&setups[0], front, &addresses);
    let answers = within("the balancer to answer", async {
        loop {
            if let Some(client) = Client::try_http1(front).await
                && let Ok(answer) = client.try_send(webhook(event(0, "sent"))).await
                && answer.status == 200
            {
                return answer.ids().len();
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    })
    .await;
    assert_eq!(answers, 1);
    let going = Arc::new(AtomicBool::new(true));
    let senders: Vec<_> = (0..8).map(|sender| tokio::spawn(send(sender, front, Arc::clone(&going)))).collect();
    for (index, setup) in setups.iter().enumerate() {
        // Load on both, before one goes.
        let end = |status: &serde_json::Value| status["journal"]["end"].as_i64().unwrap();
        let busy = end(&relays[index].get("/api/v1/status").await);
        relays[index].status_is("the relay takes requests", |status| end(status) > busy).await;
        relays[index].signal(Signal::TERM);
        assert_eq!(relays[index].ended().await.code(), Some(0));
        relays[index] = setup.start().await;
        // The balancer has to find it before the next one goes.
        tokio::time::sleep(Duration::from_secs(3)).await;
    }
    going.store(false, Ordering::Relaxed);
    let mut sent = Vec::new();
    for sender in senders {
        let (ids, failed) = within("a sender to end", sender).await.unwrap();
        assert_eq!(failed, None);
        sent.extend(ids);
    }
    assert!(sent.len() > 1000, "{}", sent.len());
    eventually("everything is delivered", async || {
        let arrived: std::collections::HashSet<_> =
            receiver.received().iter().map(|received| received.id().to_owned()).collect();
        sent.iter().all(|id| arrived.contains(id))
    })
    .await;
    for relay in relays {
        relay.stop().await;
    }
    drop(balancer);
}
