//! What a broker's answers mean for a delivery.

use lapin::ErrorKind;
use lapin::protocol::{AMQPErrorKind, AMQPSoftError};

use super::Message;
use super::confirms::{Outcome, Returned};
use super::words::Unsaid;
use crate::sink::DeliveryError;

pub(super) fn judge(outcome: Outcome) -> Result<(), DeliveryError> {
    match outcome {
        Outcome::Accepted => Ok(()),
        Outcome::Nacked => Err(DeliveryError::retry("nack", "the broker could not take charge of the message")),
        Outcome::Unroutable(Returned { code, text }) => {
            Err(DeliveryError::reject("unroutable", format!("no queue takes the message: {code} {text}")))
        }
    }
}

/// What the end of a channel means for the only message that was on it.
///
/// An event that names the place where the relay may not write is hopeless. Where the place is the same for all events,
/// an operator has yet to grant the right, and none of them should be lost for that.
pub(super) fn refused(error: &lapin::Error, message: &Message, unsaid: &Unsaid) -> DeliveryError {
    let ErrorKind::ProtocolError(amqp) = error.kind() else { return lost(&unsaid.describe(error)) };
    let said = amqp.get_message().as_str();
    let text = unsaid.and(message.names_of_event()).describe(error);
    match amqp.kind() {
        AMQPErrorKind::Soft(AMQPSoftError::NOTFOUND) => no_exchange(message),
        AMQPErrorKind::Soft(AMQPSoftError::ACCESSREFUSED) => {
            let is_of_topic = said.contains("access to topic");
            if message.exchange_varies || message.routing_key_varies && is_of_topic {
                DeliveryError::reject(NOT_AUTHORIZED, text)
            } else {
                DeliveryError::retry(NOT_AUTHORIZED, text)
            }
        }
        AMQPErrorKind::Soft(AMQPSoftError::CONTENTTOOLARGE) => too_large(),
        // "message size 200 larger than configured max size 100", in words that differ from version to version.
        AMQPErrorKind::Soft(AMQPSoftError::PRECONDITIONFAILED) if said.contains("message size") => too_large(),
        AMQPErrorKind::Soft(error) => DeliveryError::reject(format!("amqp_{}", error.get_id()), text),
        AMQPErrorKind::Hard(_) => lost(&text),
    }
}

/// Somebody may make it yet.
pub(super) fn no_exchange(message: &Message) -> DeliveryError {
    let error = DeliveryError::retry(NO_EXCHANGE, "the exchange does not exist");
    DeliveryError { is_of_event: message.exchange_varies, ..error }
}

pub(super) fn is_no_exchange(error: &DeliveryError) -> bool {
    error.kind == NO_EXCHANGE
}

const NO_EXCHANGE: &str = "no_exchange";

const NOT_AUTHORIZED: &str = "not_authorized";

fn too_large() -> DeliveryError {
    DeliveryError::reject("message_too_large", "the message is larger than the broker allows")
}

/// What the end of the connection means for all messages on it.
pub(super) fn lost(reason: &str) -> DeliveryError {
    let text = format!("the connection was lost before the broker confirmed: {reason}");
    DeliveryError::retry("connection_lost", text)
}

#[cfg(test)]
mod tests {
    use super::super::words::tests::error;
    use super::*;
    use crate::sink::Verdict;

    #[test]
    fn refusals() {
        fn check(varies: (bool, bool), code: u16, text: &str, expected: (bool, &str)) {
            let message = Message {
                exchange: "5491".to_owned(),
                routing_key: "read.5492".to_owned(),
                exchange_varies: varies.0,
                routing_key_varies: varies.1,
                id: String::new(),
                timestamp: 0,
                headers: Vec::new(),
                body: bytes::Bytes::new(),
            };
            let refused = refused(&error(code, text), &message, &Unsaid::new([]));
            assert_eq!((refused.verdict == Verdict::Reject, &*refused.kind), expected, "{text}");
            assert_eq!(refused.is_of_event, varies.0 && code == 404, "{text}");
            assert!(!varies.0 || !refused.text.contains("5491"), "{refused}");
            assert!(!varies.1 || !refused.text.contains("5492"), "{refused}");
        }
        let exchange = "ACCESS_REFUSED - write access to exchange '5491' in vhost '/' refused for user 'u'";
        check((true, true), 403, exchange, (true, "not_authorized"));
        check((true, false), 403, exchange, (true, "not_authorized"));
        check((false, true), 403, exchange, (false, "not_authorized"));
        check((false, false), 403, exchange, (false, "not_authorized"));
        let topic = "ACCESS_REFUSED - write access to topic 'read.5492' in exchange '5491' in vhost '/' refused";
        check((true, true), 403, topic, (true, "not_authorized"));
        check((false, true), 403, topic, (true, "not_authorized"));
        check((false, false), 403, topic, (false, "not_authorized"));
        check((true, true), 404, "NOT_FOUND - no exchange '5491' in vhost '/'", (false, "no_exchange"));
        check((false, true), 404, "NOT_FOUND - no exchange '5491' in vhost '/'", (false, "no_exchange"));
        let size = "PRECONDITION_FAILED - message size 200 is larger than configured max size 100";
        check((true, true), 406, size, (true, "message_too_large"));
        check((true, true), 406, "PRECONDITION_FAILED - invalid message", (true, "amqp_406"));
        check((true, true), 311, "CONTENT_TOO_LARGE", (true, "message_too_large"));
        check((true, true), 320, "CONNECTION_FORCED - '5491'", (false, "connection_lost"));
    }
}
