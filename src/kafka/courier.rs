//! Delivery reports, and who takes them to those who wait.
//!
//! librdkafka reports on a thread of its own. Waking a task of another thread costs a system call, so that those who send much
//! from one thread have a courier there: it is called once for all reports that have come meanwhile, and wakes the others
//! without leaving its thread.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rdkafka::ClientContext;
use rdkafka::config::RDKafkaLogLevel;
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::message::Message as _;
use rdkafka::producer::{DeliveryResult, ProducerContext};
use tokio::sync::{Notify, oneshot};

use super::{Log, Place, code_of};

/// What became of a record: where it is, or why it is nowhere.
pub(super) type Report = Result<Place, Unsent>;

/// A record that was not acknowledged.
pub(super) struct Unsent {
    pub(super) code: RDKafkaErrorCode,
    pub(super) topic: String,
    pub(super) partition: i32,
}

/// Takes reports to the tasks of one thread.
#[derive(Default)]
pub struct Courier {
    reports: Mutex<Vec<(oneshot::Sender<Report>, Report)>>,
    call: Notify,
}

impl Courier {
    /// Takes reports to those who wait for them; runs for ever, on their thread.
    pub async fn run(&self) {
        loop {
            self.call.notified().await;
            for (waiting, report) in std::mem::take(&mut *self.reports()) {
                // Nobody may wait any more.
                drop(waiting.send(report));
            }
        }
    }

    fn take(&self, waiting: oneshot::Sender<Report>, report: Report) {
        let mut reports = self.reports();
        reports.push((waiting, report));
        let is_first = reports.len() == 1;
        drop(reports);
        if is_first {
            self.call.notify_one();
        }
    }

    fn reports(&self) -> MutexGuard<'_, Vec<(oneshot::Sender<Report>, Report)>> {
        self.reports.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Who waits for a report.
pub(super) struct Waiting {
    pub(super) report: oneshot::Sender<Report>,
    pub(super) courier: Option<Arc<Courier>>,
}

/// What a producer says, and the reports on its records.
pub(super) struct Reports(pub(super) Log);

impl ClientContext for Reports {
    fn log(&self, level: RDKafkaLogLevel, facility: &str, message: &str) {
        self.0.log(level, facility, message);
    }

    fn error(&self, error: KafkaError, reason: &str) {
        self.0.error(error, reason);
    }

    fn stats_raw(&self, statistics: &[u8]) {
        self.0.stats_raw(statistics);
    }
}

impl ProducerContext for Reports {
    type DeliveryOpaque = Box<Waiting>;

    fn delivery(&self, result: &DeliveryResult<'_>, waiting: Box<Waiting>) {
        let report = match result {
            Ok(message) => Ok(Place { partition: message.partition(), offset: message.offset() }),
            Err((error, message)) => {
                Err(Unsent { code: code_of(error), topic: message.topic().to_owned(), partition: message.partition() })
            }
        };
        match waiting.courier {
            Some(courier) => courier.take(waiting.report, report),
            // Nobody may wait any more.
            None => drop(waiting.report.send(report)),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use futures_util::FutureExt as _;
    use futures_util::future::try_join_all;
    use rdkafka::ClientConfig;
    use rdkafka::mocking::MockCluster;

    use super::*;
    use crate::kafka::{Producer, Record};

    const PATIENCE: Duration = Duration::from_secs(60);

    #[tokio::test]
    async fn every_report_is_taken_to_who_waits_for_it() {
        let cluster = MockCluster::new(1).unwrap();
        let mut config = ClientConfig::new();
        config.set("bootstrap.servers", cluster.bootstrap_servers());
        let producer = Producer::new(Log::default(), config);
        let courier: Arc<Courier> = Arc::default();
        let begin = |number: i32| {
            let (topic, body) = ("t".to_owned(), Some(number.to_string().into()));
            let record = Record { topic, partition: Some(0), key: None, headers: vec![], body };
            producer.begin(&record, Some(&courier)).unwrap()
        };
        let mut sent: Vec<_> = (0..1000).map(begin).collect();
        // Nobody waits for one of them.
        drop(sent.remove(500));
        let mut arrived = Box::pin(try_join_all(sent.into_iter().map(|sent| producer.arrived(sent))));
        let all_have_come = async {
            while courier.reports().len() < 1000 {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        tokio::time::timeout(PATIENCE, all_have_come).await.expect("reports come to the courier");
        assert!((&mut arrived).now_or_never().is_none(), "nobody has taken them on");
        let places = tokio::select! {
            places = tokio::time::timeout(PATIENCE, arrived) => places.expect("the courier is called").unwrap(),
            () = courier.run() => unreachable!("a courier does not end"),
        };
        let offsets: Vec<_> = places.iter().map(|place| place.offset).collect();
        let expected: Vec<_> = (0..1000).filter(|offset| *offset != 500).collect();
        assert_eq!(offsets, expected);
    }
}
