"""Alerts and dashboard against running relays: a real Prometheus scrapes them, faults are real, and every alert fires that needs
no long wait. alerts_test.yaml has the waits."""

import json
import os
import re
import subprocess
import tempfile
import unittest
from pathlib import Path
from urllib.parse import urlencode

import yaml

from chart import ROOT, load
from local import RELAY, Receiver, ask, certificate, loopback_up, post, until

MONITORING = ROOT / "deploy/monitoring"
PROMETHEUS = 9099
# What is read from a time series that takes long to make, or takes brokers.
TESTED_WITHOUT_RELAY = {
    "EngageRelayNothingAccepted", "EngageRelayLagGrowing", "EngageRelayLagOld", "EngageRelaySlowDisk",
    "EngageRelayPartitionsUnheld",
}


class Relay:
    """A relay in a folder of its own, with an ingress and an admin port."""

    def __init__(self, folder, name, port, settings, rules):
        self.folder, self.port, self.admin = Path(folder) / name, port, port + 1000
        self.folder.mkdir()
        certificate(self.folder)
        self.settings = f"""
            [ingress]
            listen = "127.0.0.1:{port}"
            auth = {{ tokens = [{{ name = "test", value = "test" }}] }}
            [admin]
            listen = "127.0.0.1:{self.admin}"
            [shutdown]
            delay = "0s"
            grace = "1s"
            [journal]
            min_free_disk = "1MiB"
            {settings}"""
        (self.folder / "relay.toml").write_text(self.settings)
        (self.folder / "routes.toml").write_text(rules)
        self.process = None

    def start(self):
        with open(self.folder / "log", "a") as log:
            self.process = subprocess.Popen([RELAY], cwd=self.folder, stdout=log, stderr=log)
        try:
            until("ready", lambda: (ask(self.admin, "/readyz") or [0])[0] == 200)
        except AssertionError:
            raise AssertionError((self.folder / "log").read_text())

    def stop(self):
        if self.process:
            self.process.terminate()
            self.process.wait(20)


def sink(name, port, **delivery):
    table = ", ".join(f"{key} = {value}" for key, value in delivery.items())
    return f'[sinks.{name}]\ntype = "http"\nurl = "http://127.0.0.1:{port}/"\ndelivery = {{ {table} }}\n'


def route(*sinks, when='{ status = "delivered" }'):
    return f"[[routes]]\nwhen = {when}\nto = {json.dumps(sinks)}\n"


def query(path, **parameters):
    status, text = ask(PROMETHEUS, f"/api/v1/{path}?{urlencode(parameters)}") or (0, "")
    if status != 200:
        raise AssertionError(f"{parameters}: {text}")
    return json.loads(text)["data"]


def is_up(instance):
    return query("query", query=f'relay_ready{{instance="127.0.0.1:{instance.admin}"}}')["result"]


def firing():
    return {alert["labels"]["alertname"] for alert in query("alerts")["alerts"] if alert["state"] == "firing"}


def expressions():
    """Every query of the dashboard, with its variables filled in."""
    dashboard = json.loads((MONITORING / "dashboard.json").read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]
    queries += [annotation["expr"] for annotation in dashboard["annotations"]["list"]]
    return [text.replace("$__rate_interval", "5m").replace("$instance", ".*").replace("$sink", ".*") for text in queries]


class Monitoring(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        temporary = tempfile.TemporaryDirectory()
        cls.addClassCleanup(temporary.cleanup)
        folder = Path(temporary.name)
        good, bad = Receiver(8000), Receiver(8001)
        bad.status = 400
        for receiver in [good, bad]:
            cls.addClassCleanup(receiver.close)
        away = sink("away", 1, breaker='{ failures = 1, probe = "10m" }')
        cls.busy = Relay(folder, "busy", 8080, "", sink("good", 8000) + sink("bad", 8001) + away + route("good", "bad", "away"))
        # The least that a journal can be: an event that waits for its sink fills it soon.
        cls.full = Relay(folder, "full", 8081, 'segment = "64KiB"\nmax_disk = "128KiB"', away + route("away"))
        tls = '[ingress.tls]\ncert = "tls.crt"\nkey = "tls.key"'
        cls.tls = Relay(folder, "tls", 8082, tls, sink("good", 8000) + route("good"))
        cls.relays = [cls.busy, cls.full, cls.tls]
        for relay in cls.relays:
            cls.addClassCleanup(relay.stop)
            relay.start()
        cls.start_prometheus(folder)

    @classmethod
    def start_prometheus(cls, folder):
        # Without the waits: whether an alert holds for long is what alerts_test.yaml tests.
        (rules,) = load((MONITORING / "alerts.yaml").read_text())
        for group in rules["groups"]:
            for rule in group["rules"]:
                rule.pop("for", None)
        (folder / "alerts.yaml").write_text(yaml.safe_dump(rules))
        targets = [f"127.0.0.1:{relay.admin}" for relay in cls.relays]
        (folder / "prometheus.yml").write_text(yaml.safe_dump({
            "global": {"scrape_interval": "500ms", "scrape_timeout": "500ms", "evaluation_interval": "500ms"},
            "rule_files": ["alerts.yaml"],
            "scrape_configs": [{"job_name": "relay", "static_configs": [{"targets": targets}]}],
        }))
        command = ["prometheus", f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/tsdb"]
        command += [f"--web.listen-address=127.0.0.1:{PROMETHEUS}", "--log.level=error"]
        prometheus = subprocess.Popen(command)
        cls.addClassCleanup(prometheus.wait, 20)
        cls.addClassCleanup(prometheus.terminate)
        until("Prometheus is ready", lambda: (ask(PROMETHEUS, "/-/ready") or [0])[0] == 200)
        until("all are scraped", lambda: all(is_up(relay) for relay in cls.relays))

    def fires(self, alert):
        self.fired.add(alert)
        until(f"{alert} fires", lambda: alert in firing(), 30)

    def test_every_alert(self):
        self.fired = set()
        until("all is quiet", lambda: not firing())

        self.assertEqual(post("test"), 200)
        self.fires("EngageRelayDeadLetters")
        self.fires("EngageRelayBreakerOpen")
        self.assertEqual(post("test", 2, message_status="unknown"), 200)
        self.fires("EngageRelayUnroutedEvents")
        self.assertEqual(post("wrong"), 401)
        self.fires("EngageRelayTurnsSendersAway")
        answer = ask(self.busy.admin, "/api/v1/sinks/good/pause", "POST")
        self.assertEqual(answer[0], 200, answer)
        self.fires("EngageRelaySinkPaused")
        rules = self.busy.folder / "routes.toml"
        rules.write_text(rules.read_text() + "nonsense\n")
        self.fires("EngageRelayReloadFailed")
        self.dashboard_has_data()

        numbers = iter(range(100_000))
        until("full", lambda: post("test", next(numbers), 8081, more="x" * 20_000) == 503)
        for alert in ["EngageRelayRefusesEvents", "EngageRelayNotReady", "EngageRelayJournalNearlyFull"]:
            self.fires(alert)

        certificate(self.tls.folder, days=3)
        self.fires("EngageRelayCertificateExpires")

        self.full.stop()
        self.fires("EngageRelayDown")
        (first, *_) = sorted((self.full.folder / "data/journal").glob("*.seg"))
        damaged = bytearray(first.read_bytes())
        middle = damaged.index(b"x" * 10_000)
        damaged[middle:middle + 8] = b"\0" * 8
        first.write_bytes(damaged)
        self.full.start()
        self.fires("EngageRelayJournalDamaged")
        self.every_metric_is_exported()

        (alerts,) = load((MONITORING / "alerts.yaml").read_text())
        names = {rule["alert"] for group in alerts["groups"] for rule in group["rules"]}
        self.assertEqual(self.fired, names - TESTED_WITHOUT_RELAY)
        tests = (MONITORING / "alerts_test.yaml").read_text()
        runbook = (ROOT / "docs/operations.md").read_text()
        for name in names:
            self.assertIn(f"\"{name}\"", tests)
            self.assertIn(f"### {name}\n", runbook)

    def every_metric_is_exported(self):
        (alerts,) = load((MONITORING / "alerts.yaml").read_text())
        wanted = " ".join([rule["expr"] for group in alerts["groups"] for rule in group["rules"]] + expressions())
        exported = "".join(ask(relay.admin, "/metrics")[1] for relay in self.relays)
        names = set(re.findall(r"\b(?:relay|process)_\w+", wanted))
        self.assertGreater(len(names), 20)
        # A histogram has samples of other names than its own.
        self.assertEqual(names - set(re.findall(r"^(?:# TYPE )?(\w+)", exported, re.M)), set())

    def dashboard_has_data(self):
        """Every query of the dashboard is right, and shows something."""
        for text in expressions():
            with self.subTest(text):
                empty = "relay_routes_loaded" in text  # shows when rules change
                until("data", lambda: query("query", query=text)["result"] or empty, 10)


if __name__ == "__main__":
    loopback_up()
    os.umask(0o022)
    unittest.main()
