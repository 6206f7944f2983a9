//! Publishes on one confirm channel, with many messages unconfirmed at once, until the connection or channel ends.

use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Wake, Waker};
use std::time::Duration;

use futures_util::stream::{FuturesUnordered, Stream, StreamExt};
use lapin::options::BasicPublishOptions;
use lapin::{Channel, Confirmation, ConnectionStatus, ErrorKind, Event};
use tokio::sync::{mpsc, oneshot, watch};
use tracing::{debug, info, warn};

use super::confirms::{Confirms, Outcome, Returned, Settled};
use super::{Message, short};
use crate::sink::DeliveryError;

/// Messages without a confirm, also those that no attempt waits for any more. At this bound attempts wait.
const MAX_UNCONFIRMED: usize = 4096;
/// Jobs taken in at once.
const MAX_TAKEN: usize = 256;
/// How long the messages under way may take to learn that the connection has ended.
const LAST_CALL: Duration = Duration::from_secs(1);

/// A message and whom to tell what became of it.
pub(super) struct Job {
    pub(super) message: Message,
    pub(super) reply: oneshot::Sender<Result<(), DeliveryError>>,
}

/// Publishes what comes from `jobs` until the connection ends, and says why it did.
pub(super) async fn run(
    sink: &str,
    connection: ConnectionStatus,
    channel: Channel,
    events: impl Stream<Item = Event>,
    mut jobs: mpsc::Receiver<Job>,
    blocked: &watch::Sender<bool>,
) -> String {
    let mut events = pin!(events);
    let mut unconfirmed = FuturesUnordered::new();
    let mut confirms = Confirms::new();
    let mut taken = Vec::new();
    let mut ended = None;
    while ended.is_none() {
        let room = MAX_UNCONFIRMED.saturating_sub(unconfirmed.len()).min(MAX_TAKEN);
        tokio::select! {
            Some(first) = unconfirmed.next() => {
                let settled = with_all_ready(first, &mut unconfirmed);
                ended = settle(&mut confirms, settled, unconfirmed.is_empty());
            }
            count = jobs.recv_many(&mut taken, room), if room > 0 => {
                if count == 0 {
                    ended = Some("the sink is closed".to_owned());
                }
                let wanted = taken.drain(..).filter(|job: &Job| !job.reply.is_closed());
                unconfirmed.extend(wanted.map(|job| publish(&channel, job)));
            }
            event = events.next() => match event {
                Some(Event::ConnectionBlocked(reason)) => {
                    warn!(sink, reason, "the broker blocks publishers");
                    blocked.send_replace(true);
                }
                Some(Event::ConnectionUnblocked) => {
                    info!(sink, "the broker lets publishers go on");
                    blocked.send_replace(false);
                }
                // Other channels, on which exchanges are looked for, may end.
                Some(Event::Error(error)) if !(connection.connected() && channel.status().connected()) => {
                    ended = Some(describe(&error));
                }
                Some(_) => {}
                None => ended = Some("the connection is closed".to_owned()),
            },
        }
    }
    let last_call = async {
        while let Some(first) = unconfirmed.next().await {
            let settled = with_all_ready(first, &mut unconfirmed);
            settle(&mut confirms, settled, unconfirmed.is_empty());
        }
    };
    if tokio::time::timeout(LAST_CALL, last_call).await.is_err() {
        debug!(sink, "some messages were not told that the connection is lost; their attempts notice");
    }
    ended.unwrap_or_default()
}

type Published = (Job, lapin::Result<Confirmation>);

async fn publish(channel: &Channel, job: Job) -> Published {
    let options = BasicPublishOptions { mandatory: true, ..Default::default() };
    let Message { exchange, routing_key, body, .. } = &job.message;
    let properties = job.message.properties();
    let publish = channel.basic_publish(short(exchange), short(routing_key), options, body, properties);
    let result = match publish.await {
        Ok(confirm) => confirm.await,
        Err(error) => Err(error),
    };
    (job, result)
}

/// Tells attempts what became of their messages, as far as that is certain. Says why the channel has ended, if it has.
fn settle(confirms: &mut Confirms<Job>, published: Vec<Published>, idle: bool) -> Option<String> {
    let mut ended = None;
    let mut settled = Vec::with_capacity(published.len());
    for (job, result) in published {
        let (ack, taken) = match result {
            Ok(Confirmation::Ack(taken)) => (true, taken),
            Ok(Confirmation::Nack(taken)) => (false, taken),
            Ok(Confirmation::NotRequested) => (false, None),
            Err(error) => {
                ended = Some(describe(&error));
                let size = job.message.body.len();
                answer(job, Err(failure(&error, size)));
                continue;
            }
        };
        let taken = taken.map(|message| {
            let id = message.delivery.properties.message_id().as_ref().map(ToString::to_string);
            let returned = Returned { code: message.reply_code, text: message.reply_text.to_string() };
            (id.unwrap_or_default(), returned)
        });
        settled.push(Settled { id: job.message.id.clone(), job, ack, taken });
    }
    for (job, outcome) in confirms.settle(settled, idle) {
        answer(job, judge(outcome));
    }
    ended
}

/// An attempt that timed out or was dropped has nobody to tell.
fn answer(job: Job, result: Result<(), DeliveryError>) {
    drop(job.reply.send(result));
}

fn judge(outcome: Outcome) -> Result<(), DeliveryError> {
    match outcome {
        Outcome::Accepted => Ok(()),
        Outcome::Nacked => Err(DeliveryError::retry("nack", "the broker could not take charge of the message")),
        Outcome::Unroutable(Returned { code, text }) => {
            Err(DeliveryError::reject("unroutable", format!("no queue takes the message: {code} {text}")))
        }
    }
}

/// What the end of the channel means for a message of `size` bytes that was under way.
fn failure(error: &lapin::Error, size: usize) -> DeliveryError {
    if max_message_size(error).is_some_and(|max| size > max) {
        return DeliveryError::reject("message_too_large", "the message is larger than the broker allows");
    }
    let text = format!("the connection was lost before the broker confirmed: {}", describe(error));
    DeliveryError::retry("connection_lost", text)
}

/// The broker's limit, where it closed the channel because one of the messages was larger: 406 "message size 200
/// larger than configured max size 100", in words that differ from version to version.
fn max_message_size(error: &lapin::Error) -> Option<usize> {
    let ErrorKind::ProtocolError(error) = error.kind() else { return None };
    let text = error.get_message().to_string();
    let text = text.contains("message size").then_some(text)?;
    text.rsplit(|c: char| !c.is_ascii_digit()).find_map(|number| number.parse().ok())
}

/// The code that the broker closed the channel or connection with.
pub(super) fn reply_code(error: &lapin::Error) -> Option<u16> {
    match error.kind() {
        ErrorKind::ProtocolError(error) => Some(error.get_id()),
        _ => None,
    }
}

/// An error in words. What a broker says about a channel may quote the message's routing key, and is left out.
pub(super) fn describe(error: &lapin::Error) -> String {
    match error.kind() {
        ErrorKind::ProtocolError(amqp) if error.is_amqp_soft_error() => {
            format!("the broker closed the channel: {} {:?}", amqp.get_id(), amqp.kind())
        }
        ErrorKind::ProtocolError(amqp) => {
            format!("the broker closed the connection: {} {}", amqp.get_id(), amqp.get_message())
        }
        ErrorKind::IOError(error) => error.to_string(),
        _ => error.to_string(),
    }
}

/// All that is ready by now, in any order. A stream that is pending without having asked to be polled again has no more:
/// everything that was settled before something of this is in it too.
fn with_all_ready<S: Stream + Unpin>(first: S::Item, stream: &mut S) -> Vec<S::Item> {
    let woken = Arc::new(Woken::default());
    let waker = Waker::from(Arc::clone(&woken));
    let mut ready = vec![first];
    loop {
        woken.0.store(false, Ordering::SeqCst);
        match stream.poll_next_unpin(&mut Context::from_waker(&waker)) {
            Poll::Ready(Some(item)) => ready.push(item),
            Poll::Pending if woken.0.load(Ordering::SeqCst) => {}
            Poll::Pending | Poll::Ready(None) => return ready,
        }
    }
}

#[derive(Default)]
struct Woken(AtomicBool);

impl Wake for Woken {
    fn wake(self: Arc<Self>) {
        self.0.store(true, Ordering::SeqCst);
    }
}
