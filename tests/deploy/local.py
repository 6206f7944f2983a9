"""What a cluster has and this machine has not: volumes, a read-only root, an HTTP server that takes events."""

import fcntl
import http.client
import json
import os
import re
import shutil
import socket
import struct
import subprocess
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from chart import ROOT

RELAY = os.environ["RELAY_BINARY"]
EVENT = {
    "message_id": "wamid.1", "message_status": "delivered", "event_name": "msg_status", "event_timestamp": "1687548944",
    "channel": {"channel_type": "Whatsapp", "name": "Channel", "sender_id": "5491122223333"},
    "recipient": {"id": "541112341234"},
}


def loopback_up():
    """A new network has a loopback interface, which is down."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        up_and_running = struct.pack("16sh14x", b"lo", 0x1 | 0x40)
        fcntl.ioctl(any_socket, 0x8914, up_and_running)  # SIOCSIFFLAGS


def until(what, found, seconds=20):
    """Waits until `found()` is true, and returns it."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := found():
            return value
        time.sleep(0.05)
    raise AssertionError(f"after {seconds} s: not {what}")


def ask(port, path, method="GET", body=None, headers=None, timeout=5):
    """The status and text of an answer; None while nothing listens."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
    try:
        connection.request(method, path, body, headers or {})
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    except OSError:
        return None
    finally:
        connection.close()


def post(token, number=1, port=8080, **fields):
    """Posts an event; returns the status."""
    event = EVENT | {"message_id": f"wamid.{number}"} | fields
    headers = {"x-auth-token": token, "content-type": "application/json"}
    answer = ask(port, "/webhooks/engage", "POST", json.dumps(event), headers)
    return answer and answer[0]


def certificate(folder, days=30):
    """A certificate of its own, as a Secret of type kubernetes.io/tls has it."""
    folder.mkdir(parents=True, exist_ok=True)
    command = f"openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj /CN=localhost -days {days}"
    files = ["-keyout", folder / "tls.key", "-out", folder / "tls.crt"]
    subprocess.run([*command.split(), *files], check=True, capture_output=True)
    (folder / "ca.crt").write_bytes((folder / "tls.crt").read_bytes())


class Receiver:
    """An HTTP server that takes events, or refuses them with `status`."""

    def __init__(self, port):
        self.status, self.received, receiver = 200, [], self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["content-length"]))
                if receiver.status == 200:
                    receiver.received.append((self.path, dict(self.headers), json.loads(body)))
                self.send_response(receiver.status)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def events(self):
        return [(path, body["message_id"]) for path, _, body in self.received]

    def close(self):
        self.server.shutdown()
        self.server.server_close()


class Image:
    """What the last stage of deploy/Dockerfile says."""

    def __init__(self):
        stage = re.split(r"^FROM .*$", (ROOT / "deploy/Dockerfile").read_text(), flags=re.M)[-1]
        self.entrypoint = json.loads(re.search(r"^ENTRYPOINT (.*)$", stage, re.M)[1])
        self.command = json.loads(re.search(r"^CMD (.*)$", stage, re.M)[1])
        self.workdir = re.search(r"^WORKDIR (.*)$", stage, re.M)[1]
        self.env = dict(pair.split("=", 1) for pair in re.findall(r"^ENV (.*)$", stage, re.M))


class Pod:
    """One container of a pod, run as the kubelet would: its command, environment, files, user and root."""

    def __init__(self, folder, manifests, workload, container, secrets):
        self.folder, self.secrets = Path(folder), secrets
        self.config = {m["metadata"]["name"]: m["data"] for m in manifests if m["kind"] == "ConfigMap"}
        self.spec = workload["spec"]["template"]["spec"]
        every = self.spec.get("initContainers", []) + self.spec["containers"]
        (self.container,) = [one for one in every if one["name"] == container]
        self.image = Image()
        security = self.spec["securityContext"]
        self.user, self.group, self.fs_group = security["runAsUser"], security["runAsGroup"], security["fsGroup"]
        self.folder.chmod(0o755)
        # An unprivileged user could not read it where it is.
        self.binary = shutil.copy(RELAY, self.folder / "engage-relay")
        for claim in workload["spec"].get("volumeClaimTemplates", []):
            self.writable(claim["metadata"]["name"])
        for volume in self.spec["volumes"]:
            if "configMap" in volume:
                self.project(volume["name"], self.config[volume["configMap"]["name"]], 0o644)
            elif "secret" in volume:
                self.project(volume["name"], secrets[volume["secret"]["secretName"]], volume["secret"]["defaultMode"])
            else:
                self.writable(volume["name"])

    def writable(self, volume):
        path = self.folder / "volumes" / volume
        path.mkdir(parents=True, exist_ok=True)
        self.give(path, 0o2775)

    def give(self, path, mode):
        """To root and the pod's group, as the kubelet does. Someone who is not root has them himself."""
        if is_root():
            os.chown(path, 0, self.fs_group)
        path.chmod(mode)

    def project(self, volume, data, mode=0o644):
        """Writes a ConfigMap or a Secret as the kubelet does: into a new folder, to which a link is swapped."""
        path = self.folder / "volumes" / volume
        path.mkdir(parents=True, exist_ok=True)
        version = path / f"..{time.monotonic_ns()}"
        version.mkdir()
        for name, text in data.items():
            (version / name).write_text(text)
            self.give(version / name, mode)
            if not (path / name).is_symlink():
                (path / name).symlink_to(f"..data/{name}")
        (path / "..data_tmp").symlink_to(version.name)
        (path / "..data_tmp").rename(path / "..data")

    def sandbox(self, hosts=""):
        """Everything before the command that runs in the container."""
        (self.folder / "hosts").write_text(f"127.0.0.1 localhost {hosts}\n")
        command = ["bwrap", "--unshare-user", "--unshare-pid", "--unshare-ipc", "--die-with-parent", "--as-pid-1"]
        command += ["--uid", self.user, "--gid", self.group, "--clearenv", "--chdir", self.image.workdir]
        if is_root():
            command = ["setpriv", f"--reuid={self.user}", f"--regid={self.group}", f"--groups={self.fs_group}", *command]
        for path in ["/usr/lib", "/usr/lib64", "/etc/ssl/certs"]:
            command += ["--ro-bind", path, path]
        command += ["--symlink", "usr/lib", "/lib", "--symlink", "usr/lib64", "/lib64", "--proc", "/proc", "--dev", "/dev"]
        command += ["--ro-bind", self.binary, self.image.entrypoint[0], "--ro-bind", self.folder / "hosts", "/etc/hosts"]
        for mount in self.container["volumeMounts"]:
            bind = "--ro-bind" if mount.get("readOnly") else "--bind"
            command += [bind, self.folder / "volumes" / mount["name"], mount["mountPath"]]
        if self.container["securityContext"]["readOnlyRootFilesystem"]:
            command += ["--remount-ro", "/"]
        command += ["--cap-drop", "ALL"]
        for name, value in (self.image.env | self.environment()).items():
            command += ["--setenv", name, value]
        return [str(part) for part in command]

    def environment(self):
        def value(variable):
            if "value" in variable:
                return variable["value"]
            reference = variable["valueFrom"]["secretKeyRef"]
            return self.secrets[reference["name"]][reference["key"]]

        return {variable["name"]: value(variable) for variable in self.container.get("env", [])}

    def start(self):
        """Starts the container; its output goes to a file."""
        end, given = os.pipe()
        command = self.sandbox()
        command[command.index("bwrap") + 1:command.index("bwrap") + 1] = ["--info-fd", str(given)]
        command += self.image.entrypoint + self.container.get("args", self.image.command)
        with open(self.folder / "log", "a") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, pass_fds=[given])
        os.close(given)
        with os.fdopen(end) as info:
            text = info.read()
        if not text:
            raise AssertionError(f"bwrap did not start: {self.logged()}")
        self.pid = json.loads(text)["child-pid"]
        probe = self.container["startupProbe"]
        until("started", lambda: self.probe("startupProbe"), probe["periodSeconds"] * probe["failureThreshold"])

    def execute(self, command, hosts=""):
        """Runs a command in the container, as hooks and `kubectl exec` do."""
        return subprocess.run([*self.sandbox(hosts), *command], capture_output=True, text=True, timeout=60)

    def port(self, name):
        (port,) = [port["containerPort"] for port in self.container["ports"] if port["name"] == name]
        return port

    def probe(self, kind):
        """Whether a probe succeeds, asked as the kubelet does."""
        probe = self.container[kind]
        get = probe["httpGet"]
        answer = ask(self.port(get["port"]), get["path"], timeout=probe.get("timeoutSeconds", 1))
        return answer is not None and 200 <= answer[0] < 400

    def terminate(self):
        os.kill(self.pid, 15)

    def logged(self):
        return (self.folder / "log").read_text()

    def close(self):
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


def is_root():
    """Whether files can be given to others."""
    return os.geteuid() == 0 and Path("/proc/self/uid_map").read_text().split()[2] == "4294967295"
