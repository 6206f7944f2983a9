//! How far the partitions go: asked of the brokers about once a second.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rdkafka::config::FromClientConfigAndContext;
use rdkafka::consumer::{BaseConsumer, Consumer as _};
use tokio::sync::watch;
use tracing::debug;

use super::{Config, OpenError};
use crate::journal::Position;
use crate::kafka::Log;

const INTERVAL: Duration = Duration::from_secs(1);
const TIMEOUT: Duration = Duration::from_secs(5);

/// The partitions' ends. Clones share them; the last one to go ends the asking.
#[derive(Clone)]
pub struct Ends(Arc<Watched>);

struct Watched {
    ends: Arc<Vec<watch::Sender<Position>>>,
    stopped: Arc<AtomicBool>,
}

impl Ends {
    pub(super) fn watch(config: &Config, partitions: i32) -> Result<Self, OpenError> {
        let mut client = config.consumer(&config.group("ends"));
        client.set("isolation.level", "read_uncommitted");
        let consumer = BaseConsumer::from_config_and_context(&client, Log::default())?;
        let ends: Arc<Vec<_>> = Arc::new((0..partitions).map(|_| watch::Sender::new(Position::ZERO)).collect());
        let stopped = Arc::new(AtomicBool::new(false));
        let watched = Watched { ends: Arc::clone(&ends), stopped: Arc::clone(&stopped) };
        let topic = config.events();
        let ask = move || {
            while !stopped.load(Ordering::Relaxed) {
                for (partition, end) in (0..).zip(&*ends) {
                    match consumer.fetch_watermarks(&topic, partition, TIMEOUT) {
                        Ok((_, high)) => advance(end, Position::from_stored(high)),
                        Err(error) => debug!(partition, %error, "the end of a partition is not known"),
                    }
                }
                // Callbacks, and the log.
                drop(consumer.poll(Duration::ZERO));
                std::thread::sleep(INTERVAL);
            }
        };
        let spawned = std::thread::Builder::new().name("kafka-ends".to_owned()).spawn(ask);
        spawned.map_err(|error| rdkafka::error::KafkaError::ClientCreation(error.to_string()))?;
        Ok(Self(Arc::new(watched)))
    }

    /// How many partitions there are.
    pub fn partitions(&self) -> usize {
        self.0.ends.len()
    }

    pub(super) fn count(&self) -> i32 {
        i32::try_from(self.partitions()).unwrap_or(i32::MAX)
    }

    /// All ends together: how many entries there ever were.
    pub fn total(&self) -> u64 {
        self.0.ends.iter().map(|end| end.borrow().0).sum()
    }

    /// A partition's end, as far as is known.
    pub fn of(&self, partition: i32) -> Option<&watch::Sender<Position>> {
        self.0.ends.get(usize::try_from(partition).ok()?)
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        self.stopped.store(true, Ordering::Relaxed);
    }
}

/// An end does not go back.
pub(super) fn advance(end: &watch::Sender<Position>, to: Position) {
    end.send_if_modified(|end| {
        let further = to > *end;
        if further {
            *end = to;
        }
        further
    });
}
