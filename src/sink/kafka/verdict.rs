//! What librdkafka's and the brokers' errors mean for a delivery.

use std::borrow::Cow;

use rdkafka::error::RDKafkaErrorCode as Code;

use super::super::{DeliveryError, Verdict};
use crate::kafka::SendError;

/// The kind of a missing topic.
pub(super) const UNKNOWN_TOPIC: &str = "unknown_topic";

/// Whether the record may have been refused for the batch it was in: for how large that is, or for another record in it.
pub(super) fn may_be_of_batch(error: SendError) -> bool {
    matches!(
        error,
        SendError::Report(
            Code::MessageSizeTooLarge | Code::MessageBatchTooLarge | Code::InvalidRecord | Code::InvalidDifferentRecord
        )
    )
}

impl From<SendError> for DeliveryError {
    fn from(error: SendError) -> Self {
        match error {
            SendError::Closed => Self::retry("closed", "the sink is closed"),
            SendError::Local(code) | SendError::Report(code) => judge(code),
        }
    }
}

fn judge(code: Code) -> DeliveryError {
    let verdict = if is_hopeless(code) { Verdict::Reject } else { Verdict::Retry { after: None } };
    DeliveryError::new(verdict, kind(code), code.to_string())
}

/// Whether the record itself is at fault, so that sending it again cannot help. Everything else may pass: brokers come
/// back, topics get created, rights granted, certificates replaced.
fn is_hopeless(code: Code) -> bool {
    matches!(
        code,
        Code::MessageSizeTooLarge
            | Code::MessageBatchTooLarge
            | Code::InvalidMessageSize
            | Code::InvalidTopic
            | Code::InvalidRecord
            | Code::UnsupportedForMessageFormat
            | Code::PolicyViolation
    )
}

fn kind(code: Code) -> Cow<'static, str> {
    Cow::Borrowed(match code {
        Code::MessageSizeTooLarge | Code::MessageBatchTooLarge | Code::InvalidMessageSize => "message_too_large",
        Code::InvalidTopic => "invalid_topic",
        Code::InvalidRecord => "invalid_record",
        Code::UnsupportedForMessageFormat => "unsupported_message_format",
        Code::PolicyViolation => "policy_violation",
        Code::MessageTimedOut | Code::RequestTimedOut | Code::OperationTimedOut | Code::TimedOutQueue => "timeout",
        Code::QueueFull => "queue_full",
        Code::UnknownTopic | Code::UnknownTopicOrPartition | Code::UnknownPartition => UNKNOWN_TOPIC,
        Code::NotEnoughReplicas | Code::NotEnoughReplicasAfterAppend | Code::ISRInsufficient => "not_enough_replicas",
        Code::TopicAuthorizationFailed | Code::ClusterAuthorizationFailed => "not_authorized",
        Code::Authentication | Code::SaslAuthenticationFailed => "authentication",
        Code::AllBrokersDown | Code::BrokerTransportFailure | Code::Resolve | Code::SSL => "connect",
        Code::Fatal => "producer_failed",
        Code::PurgeQueue | Code::PurgeInflight => "closed",
        other => return Cow::Owned(format!("kafka_{}", other as i32)),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_has_a_verdict() {
        fn check(code: Code, expected_kind: &str, rejected: bool) {
            let error = judge(code);
            assert_eq!((&*error.kind, error.verdict == Verdict::Reject), (expected_kind, rejected), "{code:?}");
        }
        check(Code::MessageSizeTooLarge, "message_too_large", true);
        check(Code::MessageBatchTooLarge, "message_too_large", true);
        check(Code::InvalidMessageSize, "message_too_large", true);
        check(Code::InvalidTopic, "invalid_topic", true);
        check(Code::InvalidRecord, "invalid_record", true);
        check(Code::UnsupportedForMessageFormat, "unsupported_message_format", true);
        check(Code::PolicyViolation, "policy_violation", true);
        check(Code::InvalidDifferentRecord, "kafka_-138", false);
        check(Code::InvalidMessage, "kafka_2", false);
        check(Code::InvalidTimestamp, "kafka_32", false);
        check(Code::MessageTimedOut, "timeout", false);
        check(Code::RequestTimedOut, "timeout", false);
        check(Code::QueueFull, "queue_full", false);
        check(Code::UnknownTopicOrPartition, "unknown_topic", false);
        check(Code::UnknownTopic, "unknown_topic", false);
        check(Code::NotEnoughReplicas, "not_enough_replicas", false);
        check(Code::NotEnoughReplicasAfterAppend, "not_enough_replicas", false);
        check(Code::TopicAuthorizationFailed, "not_authorized", false);
        check(Code::SaslAuthenticationFailed, "authentication", false);
        check(Code::AllBrokersDown, "connect", false);
        check(Code::LeaderNotAvailable, "kafka_5", false);
        check(Code::NotLeaderForPartition, "kafka_6", false);
        check(Code::KafkaStorageError, "kafka_56", false);
        check(Code::ThrottlingQuotaExceeded, "kafka_89", false);
        check(Code::UnsupportedCompressionType, "kafka_76", false);
        check(Code::OutOfOrderSequenceNumber, "kafka_45", false);
        check(Code::ProducerFenced, "kafka_90", false);
        check(Code::Fatal, "producer_failed", false);
        check(Code::PurgeQueue, "closed", false);
    }

    #[test]
    fn only_a_report_can_mean_the_batch() {
        fn check(error: SendError, expected: bool) {
            assert_eq!(may_be_of_batch(error), expected, "{error:?}");
        }
        check(SendError::Report(Code::MessageSizeTooLarge), true);
        check(SendError::Report(Code::MessageBatchTooLarge), true);
        check(SendError::Report(Code::InvalidRecord), true);
        check(SendError::Report(Code::InvalidDifferentRecord), true);
        check(SendError::Report(Code::InvalidMessageSize), false);
        check(SendError::Local(Code::MessageSizeTooLarge), false);
        check(SendError::Closed, false);
    }
}
