"""Reads what sinks have sent, as JSON on standard input, with the reference libraries; prints what they make of it.

A message has `sink` (http, kafka, rabbitmq), `headers`, `properties`, `key`, `body`; `secrets` are those that HTTP
messages are signed with. A wrong signature or a message that is no CloudEvent ends it with an error.
"""

import json
import sys

from cloudevents.core.bindings import amqp, http, kafka
from standardwebhooks.webhooks import Webhook

given = json.load(sys.stdin)
events = []
for message in given["messages"]:
    headers, body = message["headers"], message["body"].encode()
    if message["sink"] == "http":
        for secret in given["secrets"]:
            Webhook(secret).verify(body, headers)
        event = http.from_binary_event(http.HTTPMessage(headers, body))
    elif message["sink"] == "kafka":
        raw = {name: value.encode() for name, value in headers.items()}
        event = kafka.from_binary_event(kafka.KafkaMessage(raw, message["key"].encode(), body))
    else:
        properties = {"content-type": message["properties"]["content_type"]}
        event = amqp.from_binary_event(amqp.AMQPMessage(properties, headers, body))
    time = event.get_time()
    events.append({
        "sink": message["sink"],
        "id": event.get_id(),
        "source": event.get_source(),
        "type": event.get_type(),
        "subject": event.get_subject(),
        "time": None if time is None else int(time.timestamp()),
        "data": event.get_data(),
    })
json.dump(events, sys.stdout)
