"""One short run of each loop: ours under Ray Train, a peer's in processes of its own, ours saving to an S3 server."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.peers.rows import train_rows
from sceneray import config
from sceneray.config import TrainSettings

ROOT = Path(__file__).resolve().parents[2]
LONGEST_S = 900


def prepare_environment() -> None:
    """What Ray and every child must find in the environment; before ray is imported.

    Ray starts its workers at nice 15, so that on a busy machine they yield to everything else, the peers' loops and
    Ray's daemons included. That is a choice of priority and not a cost of the loop: here all loops run at nice 0.
    """
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112  Ray's own spelling
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT / "platform"), str(ROOT)])


def under_ray(settings: TrainSettings) -> dict[str, Any]:
    """Train on the Ray session that is up; the run's rows and their times. What the verb prints is kept back."""
    from jobs.train import train

    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            train(settings)
    except BaseException:
        print(said.getvalue(), file=sys.stderr)
        raise
    return train_rows(settings.run)


def in_process(kind: str, settings: TrainSettings, folder: Path, processes: int = 1) -> dict[str, Any]:
    """One peer's loop in a process of its own, or under torchrun with several; what it returned."""
    return _child(kind, settings, folder, processes, {}, [])


def saving(settings: TrainSettings, folder: Path, seconds: float, server: Mapping[str, str]) -> dict[str, Any]:
    """Our loop for some seconds in a process of its own that reaches the S3 server; its rows and their times."""
    return _child("saving", settings, folder, 1, server, [str(seconds)])


@contextlib.contextmanager
def s3_server(folder: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """A real S3 server (SeaweedFS, from the dev extra): the URL of an empty bucket, and the environment to reach it."""
    s3fs = importlib.import_module("s3fs")
    support = importlib.import_module("tests.support")
    folder.mkdir()
    with support.seaweed(folder) as server:
        about = server.environment
        s3fs.S3FileSystem(
            endpoint_url=server.endpoint, key=about["AWS_ACCESS_KEY_ID"], secret=about["AWS_SECRET_ACCESS_KEY"]
        ).mkdir(server.bucket)
        yield server.url(), about


def _child(
    kind: str, settings: TrainSettings, folder: Path, processes: int, extra: Mapping[str, str], rest: list[str]
) -> dict[str, Any]:
    about, out = folder / "settings.yaml", folder / "out.json"
    about.write_text(config.dump(settings))
    out.unlink(missing_ok=True)
    start = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    command = [sys.executable, *start, "-m", "benchmarks.peers.child", kind, str(about), str(out), *rest]
    environment = {**os.environ, **extra, "OMP_NUM_THREADS": str(settings.threads)}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=LONGEST_S, check=False
    )
    if done.returncode != 0 or not out.exists():
        raise SystemExit(f"the loop '{kind}' ended with {done.returncode}:\n{done.stderr[-4000:]}")
    found: dict[str, Any] = json.loads(out.read_text())
    return found
