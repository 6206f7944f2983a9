"""Checks what Kubernetes, Compose, systemd and Docker will be given, against their schemas and against the program."""

import contextlib
import copy
import json
import os
import re
import subprocess
import tempfile
import threading
import tomllib
import unittest
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import jsonschema
import kubernetes_validate

from chart import CHART, ROOT, containers, load, pod_of, render
from local import RELAY, certificate, loopback_up

KUBERNETES = ["1.29", "1.37"]
VALUES = sorted((CHART / "ci").glob("*-values.yaml"))
# One of each setting that one kind of journal has and another may not have.
OF_JOURNALS = dict(line.split(" = ", 1) for line in """
ingress.dedup = "10m"
journal.durability = "fsync"
journal.segment = "64MiB"
journal.max_disk = "8GiB"
journal.min_free_disk = "1GiB"
journal.retention = "24h"
journal.brokers = ["kafka:9092"]
journal.prefix = "relay"
journal.partitions = 12
journal.replication = 3
journal.min_insync = 2
journal.key = "message_id"
journal.timeout = "5s"
journal.options = { "session.timeout.ms" = 6000 }
""".strip().splitlines())


def custom_resources():
    """Validators of resources that are not Kubernetes' own, by kind."""
    schemas = {}
    for name in ["HTTPROUTE_SCHEMA", "SERVICEMONITOR_SCHEMA", "PROMETHEUSRULE_SCHEMA"]:
        (definition,) = load(Path(os.environ[name]).read_text())
        for version in definition["spec"]["versions"]:
            group = f"{definition['spec']['group']}/{version['name']}"
            schema = strict(version["schema"]["openAPIV3Schema"])
            schemas[group, definition["spec"]["names"]["kind"]] = jsonschema.Draft202012Validator(schema)
    return schemas


def strict(schema):
    """The schema that refuses what it does not know; a misspelt key is dropped by Kubernetes without a word."""
    if schema.get("type") == "object" and "properties" in schema and "x-kubernetes-preserve-unknown-fields" not in schema:
        schema.setdefault("additionalProperties", False)
    if schema.get("properties", {}).get("metadata") == {"type": "object"}:
        schema["properties"]["metadata"] = {}
    if schema.pop("x-kubernetes-int-or-string", False):
        schema.pop("type", None)
    for inner in schema.get("properties", {}).values():
        strict(inner)
    for key in ["items", "additionalProperties"]:
        if isinstance(schema.get(key), dict):
            strict(schema[key])
    return schema


def settings_of_the_readme():
    """Every setting that README.md has."""
    table = (ROOT / "README.md").read_text().split("## Settings")[1].split("```toml")[0]
    first_columns = (line.split("|")[1] for line in table.splitlines() if line.startswith("| `"))
    return {name for column in first_columns for name in re.findall(r"`([a-z_.\[\]]+)`", column)}


class Manifests(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.custom = custom_resources()
        cls.rendered = {values.name: render("-f", values) for values in VALUES}
        kubernetes = ROOT / "deploy/kubernetes"
        cls.all = {**cls.rendered, **{path.name: load(path.read_text()) for path in kubernetes.glob("*.yaml")}}

    def pods(self):
        """Each workload, with the file that it is in and its pod."""
        every = ((name, manifest) for name, manifests in self.all.items() for manifest in manifests)
        return [(name, manifest, pod_of(manifest)) for name, manifest in every if pod_of(manifest)]

    def validate(self, manifest, versions):
        kind = manifest["apiVersion"], manifest["kind"]
        if kind in self.custom:
            self.custom[kind].validate(manifest)
            return
        for version in versions:
            kubernetes_validate.validate(manifest, version, strict=True)

    def test_kubernetes_takes_them(self):
        seen = set()
        for name, manifests in self.all.items():
            for manifest in manifests:
                seen.add(manifest["kind"])
                with self.subTest(name, kind=manifest["kind"]):
                    self.validate(manifest, KUBERNETES)
        expected = "StatefulSet Deployment Service ConfigMap ServiceAccount PodDisruptionBudget HorizontalPodAutoscaler"
        expected += " NetworkPolicy Ingress HTTPRoute ServiceMonitor PrometheusRule Job PersistentVolumeClaim"
        self.assertEqual(seen, set(expected.split()))

    def test_a_misspelt_key_is_refused(self):
        for manifest in self.all["everything-values.yaml"]:
            wrong = copy.deepcopy(manifest)
            wrong["spec" if "spec" in wrong else "metadata"]["misspelt"] = True
            refused = jsonschema.ValidationError, kubernetes_validate.ValidationError
            with self.subTest(manifest["kind"]), self.assertRaises(refused):
                self.validate(wrong, KUBERNETES[-1:])

    def test_pods_are_restricted(self):
        """As the restricted Pod Security Standard has it, and with a root that is read-only."""
        for _, _, pod in self.pods():
            security = pod["securityContext"]
            self.assertTrue(security["runAsNonRoot"])
            self.assertEqual(security["seccompProfile"], {"type": "RuntimeDefault"})
            self.assertIs(pod["automountServiceAccountToken"], False)
            self.assertLessEqual({kind for volume in pod["volumes"] for kind in volume if kind != "name"},
                                 {"configMap", "secret", "emptyDir", "persistentVolumeClaim"})
            for container in containers(pod):
                self.assertEqual(container["securityContext"], {
                    "allowPrivilegeEscalation": False,
                    "readOnlyRootFilesystem": True,
                    "capabilities": {"drop": ["ALL"]},
                })
                self.assertIn("memory", container["resources"]["limits"])

    def test_mounts_have_volumes(self):
        for _, manifest, pod in self.pods():
            claims = manifest["spec"].get("volumeClaimTemplates", [])
            volumes = {volume["name"] for volume in pod["volumes"]} | {claim["metadata"]["name"] for claim in claims}
            mounts = [mount for container in containers(pod) for mount in container.get("volumeMounts", [])]
            self.assertEqual({mount["name"] for mount in mounts}, volumes)

    def test_commands_can_read_what_the_settings_name(self):
        for file, manifest, pod in self.pods():
            (settings,) = [m["data"]["relay.toml"] for m in self.all[file] if "relay.toml" in m.get("data", {})]
            for container in containers(pod):
                if "engage-relay/engage-relay" not in container["image"]:
                    continue
                folders = {mount["mountPath"] for mount in container["volumeMounts"]}
                for path in re.findall(r"(/run/secrets/[^/]+)/|(/etc/engage-relay)", settings):
                    with self.subTest(file, kind=manifest["kind"]):
                        self.assertIn("".join(path), folders)

    def test_selectors_match_pods_of_this_release_only(self):
        for name, manifests in self.rendered.items():
            pods = [m["spec"]["template"]["metadata"]["labels"] for m in manifests if m["kind"] in ("StatefulSet", "Deployment")]
            jobs = [m["spec"]["template"]["metadata"]["labels"] for m in manifests if m["kind"] == "Job"]
            services = [m["spec"]["selector"] for m in manifests if m["kind"] == "Service"]
            self.assertEqual((len(pods), len(services)), (1, 2), name)
            for selector in services:
                self.assertLessEqual(selector.items(), pods[0].items())
                self.assertTrue(all(not selector.items() <= job.items() for job in jobs), "a job would get webhooks")

    def test_the_relay_takes_its_settings_and_rules(self):
        for name, manifests in self.all.items():
            for data in (m["data"] for m in manifests if m["kind"] == "ConfigMap" and "relay.toml" in m["data"]):
                with self.subTest(file=name):
                    check(data["relay.toml"], data["routes.toml"])

    def test_compose(self):
        folder = ROOT / "deploy/compose/relay"
        check((folder / "relay.toml").read_text(), (folder / "routes.toml").read_text())
        (compose,) = load((ROOT / "deploy/compose.yaml").read_text())
        jsonschema.Draft7Validator(json.loads(Path(os.environ["COMPOSE_SCHEMA"]).read_text())).validate(compose)
        for service in compose["services"].values():
            for volume in service.get("volumes", []):
                source = volume.split(":")[0]
                if source.startswith("."):
                    self.assertTrue((ROOT / "deploy" / source).exists(), source)
                else:
                    self.assertIn(source, compose["volumes"])
            for port in service.get("ports", []):
                self.assertTrue(port.startswith("127.0.0.1:"), port)

    def test_times_to_stop_suffice(self):
        for file, manifest, pod in self.pods():
            if manifest["kind"] == "Job":
                continue
            (settings,) = [m["data"]["relay.toml"] for m in self.all[file] if "relay.toml" in m.get("data", {})]
            shutdown = {"delay": "5s", "grace": "20s"} | tomllib.loads(settings).get("shutdown", {})
            needed = sum(int(time.rstrip("s")) for time in shutdown.values())
            hooks = re.findall(r"'--timeout=(\d+)s'", str([c.get("lifecycle") for c in containers(pod)]))
            with self.subTest(file):
                self.assertGreaterEqual(pod["terminationGracePeriodSeconds"], needed + sum(map(int, hooks)) + 5)
        unit = (ROOT / "deploy/systemd/engage-relay.service").read_text()
        self.assertGreaterEqual(int(re.search(r"^TimeoutStopSec=(\d+)$", unit, re.M)[1]), 5 + 20 + 5)

    def test_the_chart_refuses(self):
        secret = ["--set", "auth.existingSecret=s"]
        for values, complaint in [
            ([], "auth.existingSecret"),
            ([*secret, "--set", "auth.tokens=null"], "auth.tokens"),
            ([*secret, "--set", "settings.journal.kind=tape"], "'disk', 'kafka'"),
            ([*secret, "--set", "settings.journal.kind=kafka"], "settings.journal.brokers"),
            ([*secret, "--set", "persistence.enabled=false"], "acceptLossOfEvents"),
            ([*secret, "--set", "replica=3"], "replica"),
            ([*secret, "--set", "settings.ingress.listen=0.0.0.0:1"], "listen"),
            ([*secret, "--set", "settings.ingress.max_conections=1"], "max_conections"),
        ]:
            with self.subTest(complaint), self.assertRaisesRegex(RuntimeError, complaint):
                render(*values)

    def test_the_chart_refuses_the_same_of_a_journal_as_the_relay(self):
        journal = json.loads((CHART / "values.schema.json").read_text())["properties"]["settings"]["properties"]["journal"]
        self.assertEqual({name for name in OF_JOURNALS if name.startswith("journal.")},
                         {f"journal.{name}" for name in journal["properties"]} - {"journal.kind"})
        rules = (ROOT / "routes.toml").read_text()
        for kind, needed in [("disk", []), ("kafka", ["journal.brokers"])]:
            by_chart, by_relay = set(), set()
            for name in OF_JOURNALS:
                lines = {given: OF_JOURNALS[given] for given in [*needed, name]} | {"journal.kind": f'"{kind}"'}
                settings = "".join(f"{name} = {value}\n" for name, value in lines.items())
                try:
                    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as values:
                        json.dump({"auth": {"existingSecret": "s"}, "settings": tomllib.loads(settings)}, values)
                        values.flush()
                        render("-f", values.name)
                except RuntimeError as refused:
                    self.assertIn(f"settings.{name}", str(refused))
                    by_chart.add(name)
                try:
                    check(f'{settings}ingress.auth.tokens = [{{ name = "aivo", value = "secret" }}]', rules)
                except AssertionError as refused:
                    self.assertIn(name, str(refused))
                    by_relay.add(name)
            with self.subTest(kind):
                self.assertEqual(by_chart, by_relay)
                self.assertEqual("journal.max_disk" in by_relay, kind == "kafka")
                self.assertEqual("journal.brokers" in by_relay, kind == "disk")

    def test_a_journal_on_kafka_needs_no_volumes(self):
        manifests = {manifest["kind"]: manifest for manifest in self.rendered["kafka-values.yaml"]}
        self.assertLessEqual({"Deployment", "HorizontalPodAutoscaler", "PodDisruptionBudget"}, manifests.keys())
        self.assertEqual(manifests.keys() & {"StatefulSet", "Job"}, set())
        deployment = manifests["Deployment"]["spec"]
        self.assertEqual(deployment["strategy"]["rollingUpdate"], {"maxSurge": 1, "maxUnavailable": 0})
        pod = deployment["template"]["spec"]
        (container,) = pod["containers"]
        # What can be written to, for SQLite.
        self.assertEqual([volume for volume in pod["volumes"] if not {"configMap", "secret"} & volume.keys()],
                         [{"name": "tmp", "emptyDir": {}}])
        self.assertEqual([mount for mount in container["volumeMounts"] if not mount.get("readOnly")],
                         [{"name": "tmp", "mountPath": "/tmp"}])
        # Nothing waits for deliveries that others make.
        self.assertNotIn("lifecycle", container)
        self.assertEqual(pod["terminationGracePeriodSeconds"], 5 + 20 + 10)

        (values,) = load((CHART / "ci/kafka-values.yaml").read_text())
        settings = tomllib.loads(manifests["ConfigMap"]["data"]["relay.toml"])
        self.assertEqual(settings["journal"], values["settings"]["journal"])
        self.assertNotIn("data_dir", settings)
        self.assertEqual([token["name"] for token in settings["ingress"]["auth"]["tokens"]], ["aivo"])

    def test_the_autoscaler_takes_no_volume_out_of_use(self):
        def scaled(file):
            (scaler,) = [m["spec"] for m in self.rendered[file] if m["kind"] == "HorizontalPodAutoscaler"]
            (workload,) = [m for m in self.rendered[file] if m["kind"] == scaler["scaleTargetRef"]["kind"]]
            self.assertNotIn("replicas", workload["spec"])
            return workload["kind"], scaler.get("behavior")

        self.assertEqual(scaled("everything-values.yaml"), ("StatefulSet", {"scaleDown": {"selectPolicy": "Disabled"}}))
        for file in ["kafka-values.yaml", "without-volumes-values.yaml"]:
            self.assertEqual(scaled(file), ("Deployment", None))

    def test_autoscaling_begins_with_the_replicas_that_there_are(self):
        with cluster(replicas=4) as url:
            for values in [], ["settings.journal.kind=kafka", "settings.journal.brokers={kafka:9092}"]:
                values = ["auth.existingSecret=s", "autoscaling.enabled=true", *values]
                values = [argument for value in values for argument in ("--set", value)]
                manifests = render("--dry-run=server", "--kube-apiserver", url, *values)
                (workload,) = [m for m in manifests if m["kind"] in ("StatefulSet", "Deployment")]
                self.assertEqual(workload["spec"]["replicas"], 4)

    def test_removing_replicas_asks_them_first(self):
        def asked(*values):
            jobs = [m for m in render("--set", "auth.existingSecret=s", *values) if m["kind"] == "Job"]
            return {
                job["metadata"]["annotations"]["helm.sh/hook"]: [replica["name"] for replica in pod_of(job)["containers"]]
                for job in jobs
            }

        all_of_them = {"pre-delete": ["replica-0", "replica-1"]}
        self.assertEqual(asked(), all_of_them)
        with cluster(replicas=4) as url:
            server = "--dry-run=server", "--kube-apiserver", url
            self.assertEqual(asked(*server), all_of_them | {"pre-upgrade": ["replica-2", "replica-3"]})
        with cluster(replicas=2) as url:
            server = "--dry-run=server", "--kube-apiserver", url
            self.assertEqual(asked(*server), all_of_them)
            # Their volumes go out of use altogether.
            for values in [["settings.journal.kind=kafka", "settings.journal.brokers={kafka:9092}"],
                           ["persistence.enabled=false", "acceptLossOfEvents=true", "autoscaling.enabled=true"]]:
                values = [argument for value in values for argument in ("--set", value)]
                self.assertEqual(asked(*server, *values), {"pre-upgrade": ["replica-0", "replica-1"]})
                self.assertEqual(asked(*values), {})

    def test_the_chart_offers_every_setting(self):
        """But those that it sets itself."""
        schema = json.loads((CHART / "values.schema.json").read_text())["properties"]["settings"]["properties"]
        offered = {f"{table}.{key}" for table, keys in schema.items() for key in keys["properties"]}
        own = {"data_dir", "routes", "ingress.listen", "ingress.auth", "ingress.tls", "admin.listen", "admin.token",
               "admin.tls", "shutdown.delay", "shutdown.grace"}
        settings = {".".join(name.split(".")[:2]) for name in settings_of_the_readme()}
        self.assertEqual(offered, settings - own)

    def test_rolling_out_rules_restarts_nothing_but_settings_do(self):
        def annotations(*values):
            manifests = render("--set", "auth.existingSecret=s", *values)
            (workload,) = [m for m in manifests if m["kind"] == "StatefulSet"]
            return workload["spec"]["template"]["metadata"]["annotations"]

        before = annotations()
        self.assertEqual(annotations("--set", "routes=# other"), before)
        self.assertNotEqual(annotations("--set", "settings.journal.max_disk=7GiB"), before)

    def test_the_image(self):
        dockerfile = (ROOT / "deploy/Dockerfile").read_text()
        toolchain = tomllib.loads((ROOT / "rust-toolchain.toml").read_text())["toolchain"]["channel"]
        self.assertIn(f"FROM rust:{toolchain}-", dockerfile)
        self.assertIn(f"RUSTUP_TOOLCHAIN={toolchain}\n", dockerfile)
        kept = re.findall(r"^!(.+)$", (ROOT / ".dockerignore").read_text(), re.M)
        for sources in re.findall(r"^COPY (?!--)(.+) \S+$", dockerfile, re.M):
            for source in sources.split():
                self.assertTrue((ROOT / source).exists() and source in kept, source)
        version = tomllib.loads((ROOT / "Cargo.toml").read_text())["package"]["version"]
        (chart,) = load((CHART / "Chart.yaml").read_text())
        self.assertEqual(chart["appVersion"], version)
        images = re.findall(r"engage-relay/engage-relay:(\S+)", (ROOT / "deploy/kubernetes/sidecar.yaml").read_text())
        self.assertEqual(images, [version])

    def test_completions_and_manual(self):
        commands = re.findall(r"^  (\w[\w-]+) ", run("--help").split("Commands:")[1].split("Options:")[0], re.M)
        self.assertIn("dead-letters", commands)
        script = run("completions", "bash")
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)
        for shell in ["bash", "zsh", "fish"]:
            self.assertIn("dead-letters", run("completions", shell))
        with tempfile.TemporaryDirectory() as folder:
            run("man", folder)
            pages = {path.stem for path in Path(folder).glob("*.1")}
            self.assertLessEqual({"engage-relay", *(f"engage-relay-{name}" for name in commands if name != "help")}, pages)

    def test_systemd(self):
        unit = (ROOT / "deploy/systemd/engage-relay.service").read_text()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "engage-relay.service"
            path.write_text(unit.replace("/usr/local/bin/engage-relay", RELAY))
            for command in [["verify", path], ["security", "--offline=true", "--threshold=20", "--no-pager", path]]:
                done = subprocess.run(["systemd-analyze", *command], capture_output=True, text=True)
                self.assertEqual(done.returncode, 0, done.stdout + done.stderr)


def run(*arguments):
    return subprocess.run([RELAY, *arguments], capture_output=True, text=True, check=True).stdout


@contextlib.contextmanager
def cluster(replicas):
    """As much of a Kubernetes API as the chart asks: how many replicas there are."""
    kinds = {"statefulsets": "StatefulSet", "deployments": "Deployment"}
    resources = [
        {"name": name, "singularName": "", "namespaced": True, "kind": kind, "verbs": ["get"]}
        for name, kind in kinds.items()
    ]
    answers = {
        f"/apis/apps/v1/namespaces/default/{name}/engage-relay":
            {"apiVersion": "apps/v1", "kind": kind, "spec": {"replicas": replicas}}
        for name, kind in kinds.items()
    }
    answers["/apis/apps/v1"] = {"kind": "APIResourceList", "groupVersion": "apps/v1", "resources": resources}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            body = json.dumps(answers[self.path.split("?")[0]]).encode()
            self.send_response(200)
            self.send_header("content-type", "application/json")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def check(settings, rules):
    """engage-relay check, with every secret that they name."""
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        for path in set(re.findall(r"\$\{file:([^}]+)\}", settings + rules)):
            secret = folder / path.lstrip("/")
            secret.parent.mkdir(parents=True, exist_ok=True)
            secret.write_text("whsec_c2VjcmV0LXNlY3JldC1zZWNyZXQtc2VjcmV0")
        certificate(folder / "run/secrets/tls")
        within = {name: re.sub(r"(/run/secrets|/etc/engage-relay)/", rf"{folder}\1/", text)
                  for name, text in [("relay.toml", settings), ("etc/engage-relay/routes.toml", rules)]}
        for name, text in within.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)
        variables = {name: "x" for name in re.findall(r"\$\{([A-Z_]+)\}", settings + rules)}
        command = [RELAY, "check", "--config", folder / "relay.toml", "--routes", folder / "etc/engage-relay/routes.toml"]
        done = subprocess.run(command, env=variables, cwd=folder, capture_output=True, text=True)
        if done.returncode:
            raise AssertionError(done.stdout + done.stderr)


if __name__ == "__main__":
    loopback_up()
    unittest.main()
