//! Publishes on one confirm channel, with many messages unconfirmed at once, until the connection or channel ends.
//!
//! A broker that refuses a message closes the channel, and does not say for which. All that were unconfirmed are left over
//! then, for somebody to find out.

use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Wake, Waker};
use std::time::Duration;

use futures_util::stream::{FuturesUnordered, Stream, StreamExt};
use lapin::options::BasicPublishOptions;
use lapin::protocol::{AMQPError, AMQPErrorKind, AMQPHardError};
use lapin::{Channel, Confirmation, ConnectionStatus, ErrorKind, Event};
use tokio::sync::{mpsc, oneshot, watch};
use tracing::{debug, info, warn};

use super::confirms::{Confirms, Returned, Settled};
use super::words::Unsaid;
use super::{Message, short, verdict};
use crate::sink::DeliveryError;

/// Messages without a confirm, also those that no attempt waits for any more. At this bound attempts wait.
const MAX_UNCONFIRMED: usize = 4096;
/// Jobs taken in at once.
const MAX_TAKEN: usize = 256;
/// How long the messages under way may take to learn that the channel has ended.
const LAST_CALL: Duration = Duration::from_secs(1);

/// A message and whom to tell what became of it.
pub(super) struct Job {
    pub(super) message: Message,
    pub(super) reply: oneshot::Sender<Result<(), DeliveryError>>,
}

impl Job {
    /// An attempt that timed out or was dropped has nobody to tell.
    pub(super) fn tell(self, result: Result<(), DeliveryError>) {
        drop(self.reply.send(result));
    }
}

/// What is left when the channel or the connection has ended.
pub(super) struct Ended {
    /// Why it has.
    pub(super) reason: String,
    /// One of these messages was refused, and which is not known; their attempts have not been told anything.
    pub(super) unclear: Vec<Job>,
    /// Nothing is wrong: another connection was asked for.
    pub(super) is_worn: bool,
}

/// What messages are published on.
pub(super) struct Line<'c> {
    pub(super) sink: &'c str,
    pub(super) connection: &'c ConnectionStatus,
    pub(super) channel: &'c Channel,
    pub(super) unsaid: &'c Unsaid,
}

/// Publishes what comes from `jobs` until the channel or the connection ends, or is worn out.
pub(super) async fn run(
    Line { sink, connection, channel, unsaid }: &Line<'_>,
    events: impl Stream<Item = Event>,
    worn: impl Future<Output = ()>,
    jobs: &mut mpsc::Receiver<Job>,
    blocked: &watch::Sender<bool>,
) -> Ended {
    let (mut events, mut worn) = (pin!(events), pin!(worn));
    let mut is_worn = false;
    let mut unconfirmed = FuturesUnordered::new();
    let mut books = Books { connection, unsaid, confirms: Confirms::new(), unclear: Vec::new() };
    let mut taken = Vec::new();
    let mut ended = None;
    while ended.is_none() {
        let room = MAX_UNCONFIRMED.saturating_sub(unconfirmed.len()).min(MAX_TAKEN);
        tokio::select! {
            Some(first) = unconfirmed.next() => {
                let settled = with_all_ready(first, &mut unconfirmed);
                ended = books.settle(settled, unconfirmed.is_empty());
            }
            count = jobs.recv_many(&mut taken, room), if room > 0 => {
                if count == 0 {
                    ended = Some("the sink is closed".to_owned());
                }
                let wanted = taken.drain(..).filter(|job: &Job| !job.reply.is_closed());
                unconfirmed.extend(wanted.map(|job| publish(channel, job)));
            }
            () = &mut worn => {
                is_worn = true;
                ended = Some("it has used up its channels for exchanges that are not there".to_owned());
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
                    ended = Some(unsaid.describe_shared(&error));
                }
                Some(_) => {}
                None => ended = Some("the connection is closed".to_owned()),
            },
        }
    }
    let reason = ended.unwrap_or_default();
    let last_call = async {
        while let Some(first) = unconfirmed.next().await {
            let settled = with_all_ready(first, &mut unconfirmed);
            books.settle(settled, false);
        }
    };
    if tokio::time::timeout(LAST_CALL, last_call).await.is_err() {
        debug!(sink, "some messages were not told that the channel has ended; their attempts notice");
    }
    let Books { mut unclear, confirms, .. } = books;
    for job in confirms.into_unsure() {
        match unclear.is_empty() {
            true => job.tell(Err(verdict::lost(&reason))),
            false => unclear.push(job),
        }
    }
    Ended { reason, unclear, is_worn }
}

type Published = (Job, lapin::Result<Confirmation>);

async fn publish(channel: &Channel, job: Job) -> Published {
    let result = send(channel, &job.message).await;
    (job, result)
}

/// Publishes a message and awaits its confirm.
pub(super) async fn send(channel: &Channel, message: &Message) -> lapin::Result<Confirmation> {
    let options = BasicPublishOptions { mandatory: true, ..Default::default() };
    let Message { exchange, routing_key, body, .. } = message;
    channel.basic_publish(short(exchange), short(routing_key), options, body, message.properties()).await?.await
}

/// What a confirm says: whether the broker has taken charge, and the returned message that came with it.
pub(super) fn read(confirmation: Confirmation) -> (bool, Option<(String, Returned)>) {
    let (ack, taken) = match confirmation {
        Confirmation::Ack(taken) => (true, taken),
        Confirmation::Nack(taken) => (false, taken),
        Confirmation::NotRequested => (false, None),
    };
    let taken = taken.map(|message| {
        let id = message.delivery.properties.message_id().as_ref().map(ToString::to_string);
        let returned = Returned { code: message.reply_code, text: message.reply_text.to_string() };
        (id.unwrap_or_default(), returned)
    });
    (ack, taken)
}

/// What is known of the messages on the channel.
struct Books<'c> {
    connection: &'c ConnectionStatus,
    unsaid: &'c Unsaid,
    confirms: Confirms<Job>,
    unclear: Vec<Job>,
}

impl Books<'_> {
    /// Tells attempts what became of their messages, as far as that is certain. Says why the channel has ended, if it has.
    fn settle(&mut self, published: Vec<Published>, idle: bool) -> Option<String> {
        let mut ended = None;
        let mut settled = Vec::with_capacity(published.len());
        for (job, result) in published {
            match result {
                Ok(confirmation) => {
                    let (ack, taken) = read(confirmation);
                    settled.push(Settled { id: job.message.id.clone(), job, ack, taken });
                }
                Err(error) => {
                    let reason = self.unsaid.describe_shared(&error);
                    match self.connection.connected() || is_for_refusal(&error) {
                        true => self.unclear.push(job),
                        false => job.tell(Err(verdict::lost(&reason))),
                    }
                    ended = Some(reason);
                }
            }
        }
        // A confirm that does not come any more may be the one that would have shown a return.
        let idle = idle && ended.is_none();
        for (job, outcome) in self.confirms.settle(settled, idle) {
            job.tell(verdict::judge(outcome));
        }
        ended
    }
}

/// Whether the channel has ended because a message was refused. Where lapin has still sent others on it, they have taken the
/// connection with them.
fn is_for_refusal(error: &lapin::Error) -> bool {
    let is_stray = |error: &AMQPError| *error.kind() == AMQPErrorKind::Hard(AMQPHardError::CHANNELERROR);
    error.is_amqp_soft_error() || matches!(error.kind(), ErrorKind::ProtocolError(error) if is_stray(error))
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
