//! Where dead letters are, and how what is sent again gets to its sink: through the ledger of a relay that has its own, or
//! through the journal that relays share.

use std::path::PathBuf;

use bytes::Bytes;

use super::problem::Problem;
use crate::event::Event;
use crate::journal::{AppendError, Position, kafka};
use crate::lane::Controls;
use crate::ledger::shared;
use crate::ledger::{Ledger, LedgerError, Letters as Reader};

/// Where dead letters are. Clones share them.
#[derive(Clone)]
pub enum Letters {
    /// In the ledger of this relay.
    Own {
        /// The ledger.
        ledger: Ledger,
        /// Where it is, to be read.
        file: PathBuf,
    },
    /// In a topic.
    Shared {
        /// A copy of them.
        letters: shared::Letters,
        /// The way back to their sinks.
        appender: kafka::Appender,
    },
}

impl Letters {
    /// Reads them, on a thread for blocking work.
    pub(super) async fn read<T: Send + 'static>(
        &self,
        read: impl FnOnce(&Reader) -> Result<T, LedgerError> + Send + 'static,
    ) -> Result<T, Problem> {
        match self {
            Self::Shared { letters, .. } if !letters.complete().await => Err(Problem::unavailable(
                "the dead letters are still being read from the brokers; try again in a moment, and see the log if it stays so",
            )),
            Self::Shared { .. } | Self::Own { .. } => self.read_so_far(read).await,
        }
    }

    /// The same, though some may not have come from the brokers yet.
    pub(super) async fn read_so_far<T: Send + 'static>(
        &self,
        read: impl FnOnce(&Reader) -> Result<T, LedgerError> + Send + 'static,
    ) -> Result<T, Problem> {
        let letters = self.clone();
        let work = move || match letters {
            Self::Own { file, .. } => Reader::open(&file).and_then(|letters| read(&letters)),
            Self::Shared { letters, .. } => letters.read(read),
        };
        let result = tokio::task::spawn_blocking(work).await;
        result.map_err(Problem::internal)?.map_err(Problem::from)
    }

    /// Discards some; how many there were.
    pub(super) async fn discard(&self, ids: Vec<i64>) -> Result<usize, Problem> {
        Ok(match self {
            Self::Own { ledger, .. } => ledger.discard(ids).await?,
            Self::Shared { letters, .. } => letters.turn().await.discard(ids).await?,
        })
    }

    /// Waits, for a while, until a sink can take more without being kept from reading on.
    pub(super) async fn has_room(&self, lane: &Controls) -> Result<(), Problem> {
        match self {
            Self::Own { .. } => Ok(lane.has_room().await?),
            // It reads them on as it reads everything.
            Self::Shared { .. } => Ok(()),
        }
    }

    /// Sends events to a sink again. Durable on return.
    pub(super) async fn resend(
        &self,
        sink: &str,
        lane: &Controls,
        events: Vec<(Position, Event)>,
    ) -> Result<(), Problem> {
        match self {
            Self::Own { .. } => lane.replay(events).await?,
            Self::Shared { appender, .. } => {
                let records = events.iter().map(|(_, event)| event.record()).collect();
                appender.send_to(sink, records).await?;
            }
        }
        Ok(())
    }

    /// Sends dead letters to a sink again, which they are no more then; how many there were. Durable on return.
    pub(super) async fn exhume(
        &self,
        sink: &str,
        lane: &Controls,
        letters: Vec<(i64, Bytes)>,
    ) -> Result<usize, Problem> {
        Ok(match self {
            Self::Own { .. } => lane.exhume(letters).await?,
            Self::Shared { letters: copy, appender } => {
                let turn = copy.turn().await;
                let (ids, records) = turn.still_there(letters)?.into_iter().unzip();
                // In this order: a crash in between sends them twice, and loses none.
                appender.send_to(sink, records).await?;
                turn.discard(ids).await?
            }
        })
    }
}

impl From<AppendError> for Problem {
    fn from(error: AppendError) -> Self {
        Self::unavailable(format!("{error}; some may be sent nevertheless"))
    }
}
