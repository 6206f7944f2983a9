"""What the checks of deploy/ share: the repository's files, and the chart, rendered."""

import os
import subprocess
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "deploy/helm/engage-relay"
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def load(text):
    """The documents in YAML."""
    return [document for document in yaml.load_all(text, Loader=LOADER) if document]


def render(*arguments):
    """The chart's manifests, hooks included."""
    command = [os.environ["HELM_BINARY"], "template", "engage-relay", CHART, "--kube-version", "1.34", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return load(done.stdout)


def pod_of(manifest):
    """The pod that a manifest starts, if any."""
    return manifest.get("spec", {}).get("template", {}).get("spec")


def containers(pod):
    return pod.get("initContainers", []) + pod["containers"]
