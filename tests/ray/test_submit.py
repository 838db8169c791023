"""`sceneray submit` against a real `ray start --head` with token authentication on this machine.

The head runs in a folder of its own and knows nothing of this repository: what a job imports was shipped with it.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import httpx
import pytest

from sceneray import config
from sceneray.config import TrainSettings
from sceneray.data.store import Store
from tests.heads import TOKEN, Head, client_environment, running_head
from tests.stores import tiny_settings
from tests.support import free_port

GO_ON = 75


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    """A head that knows nothing of this repository."""
    with running_head() as one:
        yield one


def submit_command(head: Head, *words: str) -> list[str]:
    """`sceneray submit WORDS --address HEAD`."""
    return [sys.executable, "-m", "jobs.submit", *words, "--address", head.address]


def submit(
    head: Head, cwd: Path, *words: str, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """`sceneray submit WORDS --address HEAD`, run in `cwd` to its end."""
    return subprocess.run(
        submit_command(head, *words),
        cwd=cwd, env=env or head.environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


def wait_for_file(path: Path, process: subprocess.Popen[str]) -> None:
    """Return once `path` exists; fails where the process ends before."""
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None:
        if path.exists():
            return
        time.sleep(0.1)  # between two polls of the condition
    raise AssertionError(f"{path} did not appear, the command's exit code is {process.poll()}")


JOB = """
import json, os
from jobs.ray_session import ray_session
import sceneray, jobs, tune, serve

def seen():
    import sceneray.config, jobs.cli, tune.spaces
    files = [module.__file__ for module in (sceneray.config, jobs.cli, tune.spaces)]
    return {"files": files, "region": os.environ.get("AWS_REGION"), "secret": os.environ.get("AWS_SECRET_ACCESS_KEY")}

with ray_session():
    import ray
    worker = ray.get(ray.remote(seen).remote())
    connected = ray.get_runtime_context().gcs_address
    modules = [module.__file__ for module in (sceneray, jobs, tune, serve)]
    print("SEEN " + json.dumps({"driver": seen(), "worker": worker, "cwd": os.listdir("."), "modules": modules,
                                "asked": os.environ["RAY_ADDRESS"], "connected": connected}))
"""

CLIENT = """
import asyncio, sys
from jobs import submit
address, folder = sys.argv[1:]
client = submit.connect(address)
job = client.submit_job(entrypoint="python job.py", runtime_env=submit.runtime_env(folder, submit.forwarded()))
submit.follow_to_end(client, job, address)
"""


def test_a_job_runs_the_code_that_was_shipped(head: Head, tmp_path: Path) -> None:
    """Driver and workers import all four packages from what the job took along, and join the cluster they run on.

    Nothing else travels: not the submitter's folder, and no variable that is not in the list.
    """
    (tmp_path / "job.py").write_text(JOB)
    done = subprocess.run(
        [sys.executable, "-c", CLIENT, head.address, str(tmp_path)],
        cwd=tmp_path, env=head.environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    seen = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("SEEN "))[5:])
    files = [*seen["modules"], *seen["driver"]["files"], *seen["worker"]["files"]]
    assert len(files) == 10
    assert all("/runtime_resources/py_modules_files/" in file for file in files), files
    assert seen["connected"] == seen["asked"]
    assert seen["cwd"] == ["job.py"]
    for where in ("driver", "worker"):
        assert (seen[where]["region"], seen[where]["secret"]) == ("eu-north-1", None)


def test_a_training_job_is_stopped_by_ctrl_c_and_goes_on(head: Head, tmp_path: Path) -> None:
    """Submitted, prepare writes a store and train trains on it; Ctrl-C stops the job after it has saved; the same
    command finishes it."""
    store, run = tmp_path / "store", tmp_path / "runs/one"
    prepared = submit(head, tmp_path, "prepare", "town", "store", "--scenes", "12,4", "--size=48x64")
    assert prepared.returncode == 0, prepared.stdout + prepared.stderr
    assert Store.open(str(store)).rows("train") == 12
    settings = tiny_settings("store", "runs/one", "epochs=20", "log.contact_sheet=0")
    (tmp_path / "mine.yaml").write_text(config.dump(settings))
    words = ["train", "mine.yaml", "seed=3"]
    process = subprocess.Popen(
        submit_command(head, *words),
        cwd=tmp_path, env=head.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        wait_for_file(run / "last", process)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == GO_ON, out + err
    assert "is stopped. What it saved stays" in err
    assert "stopped at step" in out, "the job itself says that it saved"
    assert not (run / "result.json").exists()
    done = submit(head, tmp_path, *words, "--json", "answer.json")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "best val mIoU" in done.stdout
    assert json.loads((tmp_path / "answer.json").read_text())["status"] == "SUCCEEDED"
    assert json.loads((run / "result.json").read_text())["step"] == 60
    resolved = config.load(TrainSettings, str(run / "config.yaml"))
    assert (resolved.seed, resolved.data.store) == (3, str(store))


def test_a_job_that_fails_fails_the_command(head: Head, tmp_path: Path) -> None:
    """The verb's own sentence comes through the log, and the exit code is not 0."""
    done = submit(head, tmp_path, "export", "runs/none/best", "bundles/b")
    assert done.returncode == 1
    assert f"no committed checkpoint at {tmp_path}/runs/none/best" in done.stdout
    assert "ended as FAILED" in done.stderr
    assert "Traceback" not in done.stderr


def test_no_wait_returns_the_id_of_the_job(head: Head, tmp_path: Path) -> None:
    """With --no-wait the command ends once the job is accepted, and prints the job's id alone."""
    done = submit(head, tmp_path, "evaluate", "runs/none/best", "--no-wait")
    assert done.returncode == 0, done.stderr
    (job,) = done.stdout.split()
    headers = {"Authorization": f"Bearer {TOKEN}"}
    answer = httpx.get(f"{head.address}/api/jobs/{job}", headers=headers, timeout=30, trust_env=False).json()
    assert answer["entrypoint"] == f"python -m jobs evaluate {tmp_path}/runs/none/best"


@pytest.mark.parametrize("token", ["0" * 40, None])
def test_a_wrong_or_missing_token_is_a_sentence(head: Head, tmp_path: Path, token: str | None) -> None:
    """Without the cluster's token nothing is submitted, and the message says where the token goes."""
    environment = {key: value for key, value in head.environment.items() if not key.startswith("RAY_AUTH")}
    if token is not None:
        environment["RAY_AUTH_TOKEN"] = token
    done = submit(head, tmp_path, "export", "a", "b", env=environment)
    assert done.returncode == 1
    assert "asks for a token" in done.stderr
    assert "~/.ray/auth_token" in done.stderr
    assert "Traceback" not in done.stderr


def test_nobody_at_the_address_is_a_sentence(tmp_path: Path) -> None:
    """Where no job server answers, the message names the address and the tunnel."""
    head = Head(f"http://127.0.0.1:{free_port()}", client_environment(tmp_path), tmp_path)
    done = submit(head, tmp_path, "export", "a", "b")
    assert done.returncode == 1
    assert f"no job server answers at {head.address}" in done.stderr
    assert "Traceback" not in done.stderr
