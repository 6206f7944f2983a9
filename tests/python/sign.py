"""Signs `body`, given as JSON on standard input, by each of `secrets`; prints the headers of each.

`scheme` is standard-webhooks, for which there is a reference library, or hub-sha256, done as GitHub's documentation does.
"""

import datetime
import hashlib
import hmac
import json
import sys

from standardwebhooks.webhooks import Webhook

given = json.load(sys.stdin)
now = datetime.datetime.now(tz=datetime.timezone.utc)
signed = []
for secret in given["secrets"]:
    if given["scheme"] == "standard-webhooks":
        signed.append({
            "webhook-id": "msg_1",
            "webhook-timestamp": str(int(now.timestamp())),
            "webhook-signature": Webhook(secret).sign("msg_1", now, given["body"]),
        })
    else:
        digest = hmac.new(secret.encode(), given["body"].encode(), hashlib.sha256).hexdigest()
        signed.append({"x-hub-signature-256": f"sha256={digest}"})
json.dump(signed, sys.stdout)
