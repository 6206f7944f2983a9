//! The ingress over real sockets: every answer, every limit.

use crate::harness::{Receiver, Setup, event};

#[tokio::test]
async fn an_event_arrives() {
    let receiver = Receiver::accepting().await;
    let relay = Setup::new(&receiver.routes()).start().await;
    let answer = relay.post(event(1, "sent")).await;
    let received = receiver.wait_for(1).await;
    assert_eq!(received[0].id(), answer.ids()[0]);
    assert_eq!(received[0].body, event(1, "sent"));
    relay.stop().await;
}
