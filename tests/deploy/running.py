"""Runs the relay by the chart's settings, as near to a cluster as it gets: its command, environment and files, as an unprivileged
user, with a read-only root."""

import os
import tempfile
import time
import unittest
from pathlib import Path

import yaml

from chart import ROOT, load, render
from local import Pod, Receiver, ask, is_root, loopback_up, post, until

ROUTES = """
[sinks.crm]
type = "http"
url = "http://127.0.0.1:8000/{path}"
headers = {{ authorization = "Bearer ${{CRM_TOKEN}}" }}
signing_secret = "${{file:/run/secrets/crm/signing}}"
delivery = {{ backoff = {{ initial = "200ms", max = "1s" }} }}

[[routes]]
name = "everything"
to = ["crm"]
"""
VALUES = {
    "auth": {"existingSecret": "tokens"},
    "replicas": 1,
    "routes": ROUTES.format(path="before"),
    "settings": {"journal": {"segment": "1MiB", "max_disk": "64MiB", "min_free_disk": "1MiB"}},
    "shutdown": {"drain": 2, "delay": 2, "grace": 5},
    "env": [{"name": "CRM_TOKEN", "valueFrom": {"secretKeyRef": {"name": "crm", "key": "token"}}}],
    "secretFiles": ["crm"],
}
SECRETS = {
    "tokens": {"ingress-token": "first", "admin-token": "operator"},
    "crm": {"token": "for-the-crm", "signing": "whsec_c2VjcmV0LXNlY3JldC1zZWNyZXQtc2VjcmV0"},
    "engage-relay": {"ingress-token": "first", "admin-token": "operator"},
}


class Running(unittest.TestCase):
    def setUp(self):
        temporary = tempfile.TemporaryDirectory()
        self.addCleanup(temporary.cleanup)
        self.folder = Path(temporary.name)
        self.folder.chmod(0o755)

    def receiver(self):
        receiver = Receiver(8000)
        self.addCleanup(receiver.close)
        return receiver

    def start(self, pod):
        """Whatever goes wrong later, the log is shown."""
        def show():
            pod.close()
            outcome = self._outcome.result
            if any(test is self for test, _ in outcome.failures + outcome.errors):
                print(pod.logged())

        pod.start()
        self.addCleanup(show)
        until("ready", lambda: pod.probe("readinessProbe"))
        self.assertTrue(pod.probe("livenessProbe"))

    def chart(self):
        values = self.folder / "values.yaml"
        values.write_text(yaml.safe_dump(VALUES))
        manifests = render("-f", values)
        (workload,) = [m for m in manifests if m["kind"] == "StatefulSet"]
        return manifests, Pod(self.folder, manifests, workload, "relay", SECRETS)

    def test_the_chart(self):
        receiver = self.receiver()
        manifests, pod = self.chart()
        self.start(pod)
        self.is_confined(pod)

        # An event comes in and goes out, with the secrets that the pod has.
        self.assertEqual(post("wrong"), 401)
        self.assertEqual(post("first", 1), 200)
        until("delivered", lambda: receiver.events() == [("/before", "wamid.1")])
        headers = receiver.received[0][1]
        self.assertEqual(headers["authorization"], "Bearer for-the-crm")
        self.assertTrue(headers["webhook-signature"].startswith("v1,"))

        # A ConfigMap changes, and a Secret.
        config = pod.config["engage-relay"]
        pod.project("config", config | {"routes.toml": ROUTES.format(path="after")})
        until("reloaded", lambda: applied() == 1)
        self.assertEqual(post("first", 2), 200)
        until("delivered elsewhere", lambda: receiver.events()[1:] == [("/after", "wamid.2")])
        pod.project("auth", SECRETS["tokens"] | {"ingress-token": "second"}, 0o440)
        until("the new token is taken", lambda: post("second", 3) == 200)
        self.assertEqual(post("first", 3), 401)
        until("delivered", lambda: len(receiver.received) == 3)

        # The hooks let nobody take it away while the receiver is away.
        receiver.status = 503
        self.assertEqual(post("second", 4), 200)
        pre_stop = pod.container["lifecycle"]["preStop"]["exec"]["command"]
        asked = time.monotonic()
        done = pod.execute(pre_stop)
        self.assertEqual(done.returncode, 1, done)
        self.assertIn("not drained", done.stdout)
        (job,) = [m for m in manifests if m["metadata"].get("annotations", {}).get("helm.sh/hook") == "pre-delete"]
        (ask_replica,) = job["spec"]["template"]["spec"]["containers"]
        arguments = [argument.replace("300s", "1s") for argument in ask_replica["args"]]
        hook = [*pod.image.entrypoint, *arguments]
        host = "engage-relay-0.engage-relay-pods"
        self.assertIn(f"--admin=http://{host}:9090", arguments)
        done = pod.execute(hook, host)
        self.assertEqual((done.returncode, "not drained" in done.stdout), (1, True), done)

        # It ends within the time that it is given, and accepts until then, though it says that it is not ready.
        stopped = time.monotonic()
        pod.terminate()
        until("not ready", lambda: not pod.probe("readinessProbe"), 1)
        self.assertEqual(post("second", 5), 200)
        grace = pod.spec["terminationGracePeriodSeconds"] - VALUES["shutdown"]["drain"]
        self.assertEqual(pod.process.wait(grace), 0, pod.logged())
        self.assertLess(stopped - asked + VALUES["shutdown"]["grace"], pod.spec["terminationGracePeriodSeconds"])

        # Its volume has what was not delivered; nothing was delivered twice.
        receiver.status = 200
        pod.start()
        until("the rest is delivered", lambda: len(receiver.received) == 5)
        self.assertEqual(sorted(name for _, name in receiver.events()), [f"wamid.{n}" for n in range(1, 6)])
        for command in [pre_stop, hook]:
            done = pod.execute(command, host)
            self.assertEqual(done.returncode, 0, done)
        pod.terminate()
        self.assertEqual(pod.process.wait(grace), 0)

    def is_confined(self, pod):
        status = dict(line.split(":\t", 1) for line in Path(f"/proc/{pod.pid}/status").read_text().splitlines())
        if is_root():
            self.assertEqual(status["Uid"].split(), ["65532"] * 4)
        self.assertEqual(int(status["CapEff"], 16) | int(status["CapBnd"], 16), 0)
        self.assertEqual(status["NoNewPrivs"], "1")
        mounts = [line.split() for line in Path(f"/proc/{pod.pid}/mountinfo").read_text().splitlines()]
        writable = {mount[4] for mount in mounts if mount[5].split(",")[0] == "rw" and not mount[4].startswith(("/dev", "/proc"))}
        self.assertEqual(writable, {"/var/lib/engage-relay", "/tmp"})
        self.assertEqual([mount[5].split(",")[0] for mount in mounts if mount[4] == "/"], ["ro"])

    def test_the_sidecar(self):
        receiver = self.receiver()
        manifests = load((ROOT / "deploy/kubernetes/sidecar.yaml").read_text())
        (workload,) = [m for m in manifests if m["kind"] == "Deployment"]
        pod = Pod(self.folder, manifests, workload, "relay", SECRETS)
        self.start(pod)
        self.is_confined(pod)
        (service,) = [m for m in manifests if m["kind"] == "Service"]
        # Not by its name, and also while the application is not ready.
        self.assertEqual(service["spec"]["ports"][0]["targetPort"], pod.port("webhooks"))
        self.assertTrue(service["spec"]["publishNotReadyAddresses"])
        self.assertEqual(post("first"), 200)
        until("delivered", lambda: receiver.events() == [("/whatsapp/5491122223333", "wamid.1")])
        pod.terminate()
        self.assertEqual(pod.process.wait(pod.spec["terminationGracePeriodSeconds"]), 0)


def applied():
    _, text = ask(9090, "/metrics")
    return next(float(line.split()[1]) for line in text.splitlines() if line.startswith('relay_reloads_total{outcome="applied"}'))


if __name__ == "__main__":
    loopback_up()
    os.umask(0o022)
    unittest.main()
