"""`serve deploy serve/config.cluster.yaml` against a real head: refused as shipped, behind HAProxy with keys."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml

from tests.bundles import write_bundle
from tests.callers import BODY, CALLERS, PATIENCE_S, Load, below, replicas, wait_for_replicas
from tests.heads import TOKEN, Head, running_head
from tests.support import POLL_S, ROOT, free_port

pytestmark = pytest.mark.chaos

CODE = os.pathsep.join([str(ROOT / "platform"), str(ROOT)])
FINAL = ("RUNNING", "DEPLOY_FAILED")


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    """A head whose workers find this repository, as the nodes of cluster.yaml do."""
    with running_head(PYTHONPATH=CODE) as one:
        yield one


def shipped(tmp_path: Path) -> tuple[dict[str, Any], str]:
    """The shipped settings on ports that nobody else has, and the URL they give."""
    settings = yaml.safe_load((ROOT / "serve" / "config.cluster.yaml").read_text())
    (application,) = settings["applications"]
    settings["http_options"]["port"] = free_port()
    haproxy = {
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(free_port()),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(free_port()),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(tmp_path / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(tmp_path),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(tmp_path / "server-state"),
    }
    for part in (settings["controller_options"], application):
        part["runtime_env"]["env_vars"] |= haproxy
    return settings, f"http://127.0.0.1:{settings['http_options']['port']}"


def deploy(head: Head, settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """`serve deploy`, and what the dashboard says of the application once that is settled."""
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(settings))
    serve = str(Path(sys.executable).with_name("serve"))
    command = [serve, "deploy", str(file), "--address", head.address]
    done = subprocess.run(
        command, cwd=folder, env=head.environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    deadline = time.monotonic() + 2 * PATIENCE_S
    url, headers = f"{head.address}/api/serve/applications/", {"Authorization": f"Bearer {TOKEN}"}
    while True:
        found = httpx.get(url, headers=headers, timeout=30, trust_env=False).json()["applications"].get("sceneray", {})
        if found.get("status") in FINAL:
            return dict(found)
        assert time.monotonic() < deadline, found
        time.sleep(POLL_S)


def ask(url: str, key: str | None = None) -> int:
    """The status of one request for a mask."""
    headers = {"Content-Type": "image/png"} | ({"Authorization": f"Bearer {key}"} if key else {})
    return httpx.post(f"{url}/v1/segment", content=BODY, headers=headers, timeout=PATIENCE_S).status_code


def test_the_cluster_config_serves_with_keys_alone(head: Head, tmp_path: Path) -> None:
    """As shipped: no endpoint, and the reason in the application's status. With a bundle and a key file: HAProxy before
    replicas that answer who has a key; a kill -9 of a model replica costs nothing, of an ingress replica at most what
    it was working on."""
    settings, url = shipped(tmp_path)
    refused = deploy(head, settings, tmp_path)
    assert refused["status"] == "DEPLOY_FAILED"
    assert "require_keys is set" in refused["message"]
    assert replicas("Segmenter") == []

    keys = ("--file", str(tmp_path / "keys.json"), "--id", "alice")
    made = subprocess.run(
        [sys.executable, "-m", "jobs.keys", "new", *keys],
        cwd=ROOT, env=head.environment | {"PYTHONPATH": CODE}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    key = made.stdout.split()[-1]
    here = {"bundle": write_bundle(str(tmp_path / "bundle")), "api_keys_file": str(tmp_path / "keys.json")}
    settings["applications"][0]["args"] |= here | {"cpus": 0.25, "threads": 1}
    served = deploy(head, settings, tmp_path)
    assert served["status"] == "RUNNING", served["message"]
    assert [name for name in map(psutil.Process.name, below("haproxy")) if name == "haproxy"]
    assert (ask(url), ask(url, "wrong"), ask(url, key)) == (401, 401, 200)

    with Load(url, key) as load:
        victim = replicas("Segmenter")[0]
        os.kill(victim.pid, signal.SIGKILL)
        wait_for_replicas("Segmenter", 2, but=victim.pid)
        load.wait_for(40)
        model_lost = dict(load.failed)
        victim = replicas("Ingress")[0]
        os.kill(victim.pid, signal.SIGKILL)
        wait_for_replicas("Ingress", 2, but=victim.pid)
        load.wait_for(40)
    print(f"\nbehind HAProxy: model replica killed, lost {model_lost}; and ingress replica killed, lost {load.failed} "
          f"beside {load.statuses['200']}; longest {load.longest_s:.1f} s")  # fmt: skip
    assert load.wrong == 0
    assert model_lost == {}
    assert sum(load.failed.values()) <= CALLERS
