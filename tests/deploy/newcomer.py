"""The README's first steps, command by command, as someone takes them who has just cloned the repository. Only building is left out:
what `cargo run --release` would run is there already."""

import os
import re
import shutil
import signal
import subprocess
import tempfile
import unittest
from pathlib import Path

from chart import ROOT
from local import RELAY, ask, loopback_up, until

CARGO = """#!/bin/sh
[ "$*" = "run --release" ] || { echo "unexpected: cargo $*" >&2; exit 1; }
exec target/release/engage-relay
"""


def section(title):
    return (ROOT / "README.md").read_text().split(f"\n## {title}\n")[1].split("\n## ")[0]


def blocks(text, language):
    """The code blocks in a language, without the indentation that lists give them."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^ *```$", text, re.M | re.S)
    return [re.sub(rf"^{indentation}", "", block, flags=re.M) for indentation, block in found]


class Newcomer(unittest.TestCase):
    def setUp(self):
        temporary = tempfile.TemporaryDirectory()
        self.addCleanup(temporary.cleanup)
        self.clone = Path(temporary.name)
        shutil.copy(ROOT / "routes.toml", self.clone)
        (self.clone / "target/release").mkdir(parents=True)
        (self.clone / "target/release/engage-relay").symlink_to(RELAY)
        (self.clone / "bin").mkdir()
        (self.clone / "bin/cargo").write_text(CARGO)
        (self.clone / "bin/cargo").chmod(0o755)
        self.env = {"PATH": f"{self.clone}/bin:{os.environ['PATH']}", "HOME": str(self.clone)}

    def serve(self, command, **variables):
        out = open(self.clone / "out", "a")
        relay = subprocess.Popen(["sh", "-c", f"exec {command}"], cwd=self.clone, stdout=out, stderr=out, env=self.env | variables)

        self.addCleanup(self.stop, relay)
        self.addCleanup(out.close)
        until("ready", lambda: (ask(9090, "/readyz") or [0])[0] == 200)
        return relay

    def stop(self, relay):
        """As someone does who sits at the terminal."""
        relay.send_signal(signal.SIGINT)
        relay.wait(60)

    def does(self, command):
        done = subprocess.run(["sh", "-e"], input=command, cwd=self.clone, env=self.env, capture_output=True, text=True, timeout=60)
        self.assertEqual(done.returncode, 0, f"{command}\n{done.stdout}{done.stderr}")
        return done.stdout

    def shown(self):
        return (self.clone / "out").read_text()

    def test_try_it_and_add_a_sink(self):
        try_it = section("Try it")
        serve, send, tests = blocks(try_it, "sh")
        self.assertEqual(tests, "scripts/test\n")
        relay = self.serve(serve)
        answer = self.does(send)
        self.assertIn("200 OK", answer)
        (event,) = re.findall(r'"(evt_\w{26})"', answer)
        until("printed", lambda: event in self.shown())
        more = re.search(r"`(target/release/engage-relay send [^`]+)`", try_it)[1]
        self.assertIn("1000", self.does(more))
        until("all are printed", lambda: self.shown().count("evt_") >= 1001)

        add = section("Add a sink")
        (rules,) = blocks(add, "toml")
        with open(self.clone / "routes.toml", "a") as routes:
            routes.write(rules)
        check, explain = blocks(add, "sh")
        self.does(check)
        explained = self.does(explain)
        self.assertIn("https://crm.example.com/whatsapp/54911", explained)
        self.assertNotIn("secret", explained)
        self.stop(relay)
        self.serve(serve, CRM_TOKEN="secret")
        self.assertIn('"crm"', ask(9090, "/api/v1/status")[1])

    def test_operating_it(self):
        self.serve("cargo run --release")
        (requests, *_) = [block for block in blocks(section("Operating it"), "sh") if "/api/v1/" in block]
        for command in requests.splitlines():
            # Without --fail curl is content with any answer.
            self.does(command.replace("curl ", "curl --fail --silent --show-error "))

    def test_the_settings_are_right(self):
        for settings in blocks(section("Settings"), "toml"):
            (self.clone / "relay.toml").write_text(re.sub(r"\$\{file:[^}]+\}", "secret", settings))
            self.does("target/release/engage-relay check")


if __name__ == "__main__":
    loopback_up()
    unittest.main()
