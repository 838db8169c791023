"""kill -9 on training workers at the moments that hurt most, over and over: nothing is lost, and no bit differs."""

from __future__ import annotations

import itertools
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from sceneray import checkpoint, config, runlog, storage
from tests.commands import command_line, descendants, same_bits
from tests.fault_proxy import FaultProxy, at_endpoint
from tests.stores import tiny_settings
from tests.support import S3

pytestmark = pytest.mark.chaos
MOMENTS = ("step", "upload", "manifest", "report")
LIMIT_S = 300.0


@pytest.fixture(scope="module")
def proxy(weed_server: S3) -> Iterator[FaultProxy]:
    """A proxy before a real S3 server that keeps a request back when it is told."""
    with FaultProxy(weed_server.environment["AWS_ENDPOINT_URL"]) as proxy, at_endpoint(proxy.endpoint):
        yield proxy


@pytest.fixture(scope="module")
def here(proxy: FaultProxy) -> Iterator[None]:
    """One private Ray, whose workers reach S3 through the proxy."""
    from jobs.ray_session import ray_session

    assert proxy.endpoint == os.environ["AWS_ENDPOINT_URL"]
    with ray_session(cpus=2):
        yield


def settings_of(store: str, run: str, epochs: int) -> config.TrainSettings:
    """Two workers, 6 steps an epoch, a checkpoint every 10 steps and an evaluation every 24."""
    often = (
        "workers=2",
        f"epochs={epochs}",
        "eval_every=4",
        "save={every_steps: 10, keep: 100}",
        "augment.crop=[96, 128]",
    )
    log = "log={every_steps: 1, contact_sheet: 0, tensorboard: false}"
    return tiny_settings(store, run, *often, log, "resources={gpu: false, max_failures: -1}")


class Killer:
    """Watches a run's progress from beside it and kills one of its workers at each of `moments`, in turn."""

    def __init__(self, run: str, proxy: FaultProxy, moments: list[str], seed: int) -> None:
        self.run = run
        self.proxy = proxy
        self.moments = moments
        self.rng = random.Random(seed)
        self.steps: list[tuple[float, int]] = []  # (when, step) of every row of training seen
        self.reports: list[float] = []
        self.kills: list[dict[str, Any]] = []
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._work, daemon=True)

    def see(self, row: dict[str, Any]) -> None:
        """A row of progress, as the driver gets it."""
        if row["kind"] == "train":
            self.steps.append((time.monotonic(), row["step"]))
        elif row["kind"] == "val":
            self.reports.append(time.monotonic())

    def _work(self) -> None:
        try:
            for number, moment in enumerate(self.moments, start=1):
                self._until(lambda wanted=number: len(runlog.attempts(self.run)) == wanted and self._trains())
                getattr(self, moment)()
        except BaseException as error:  # noqa: BLE001  raised in the test
            self.error = error

    def _until(self, condition: Callable[[], Any]) -> None:
        deadline = time.monotonic() + LIMIT_S
        while not condition():
            assert time.monotonic() < deadline, "waited in vain"
            time.sleep(0.02)

    def _trains(self) -> bool:
        """True once a step has come since the last kill."""
        after = self.kills[-1]["at"] + 2 if self.kills else 0.0
        return bool(self.steps) and self.steps[-1][0] > after

    def step(self) -> None:
        """In the middle of a step, some steps after the last checkpoint."""
        wanted = self.rng.randint(4, 7)
        self._until(lambda: self.steps[-1][1] % 10 >= wanted)
        self._kill("step")

    def upload(self) -> None:
        """While weights are on their way to the store."""
        self._kill_at("upload", lambda path: path.endswith((".safetensors",)))

    def manifest(self) -> None:
        """Everything is uploaded but the manifest, which would make it exist."""
        self._kill_at("manifest", lambda path: path.endswith("manifest.json"))

    def report(self) -> None:
        """Right after an evaluation was reported."""
        seen = len(self.reports)
        self._until(lambda: len(self.reports) > seen)
        self._kill("report")
        assert self.kills[-1]["at"] - self.reports[seen] < 2

    def _kill_at(self, moment: str, wanted: Callable[[str], bool]) -> None:
        inside = storage.basename(self.run)
        with self.proxy.hold(
            lambda r: r.method == "PUT" and inside in r.path and wanted(r.path.partition("?")[0])
        ) as hold:
            assert hold.arrived.wait(LIMIT_S)
            hold.drop = True
            self._kill(moment)

    def _kill(self, moment: str) -> None:
        workers = [pid for pid in descendants(os.getpid()) if "RayTrainWorker" in command_line(pid)]
        victim = self.rng.choice(workers) if moment in ("step", "report") else None
        for pid in [victim] if victim else workers:  # the saving one is among them
            os.kill(pid, signal.SIGKILL)
        self.kills.append({"moment": moment, "at": time.monotonic(), "step": self.steps[-1][1]})


def run_with_kills(settings: config.TrainSettings, proxy: FaultProxy, moments: list[str], seed: int) -> Killer:
    """Train with kills at `moments`; checks that the run ended right and that each kill cost something."""
    from sceneray.ray_train import launch

    run = settings.run
    killer = Killer(run, proxy, moments, seed)
    killer.thread.start()
    result = launch(settings, killer.see)
    killer.thread.join(LIMIT_S)
    if killer.error is not None:
        raise killer.error
    assert result["state"] == "finished"
    assert len(killer.kills) == len(moments)
    starts = [record["from_step"] for record in runlog.attempts(run)]
    assert len(starts) == len(moments) + 1
    for kill, start in zip(killer.kills, starts[1:], strict=True):
        kill["redone"] = max(0, kill["step"] - start)
        assert kill["redone"] > 0 or kill["moment"] in ("upload", "manifest"), f"a kill that cost nothing: {kill}"
    return killer


def check_and_tell(clean: str, run: str, kills: list[dict[str, Any]]) -> None:
    """Equal bits, every committed checkpoint whole; prints one line."""
    assert same_bits(clean, run)
    whole = 0
    for name in checkpoint.names(run):
        if storage.open_committed(storage.join(run, name)) is not None:
            checkpoint.load(storage.join(run, name))
            whole += 1
    counts = {moment: sum(kill["moment"] == moment for kill in kills) for moment in MOMENTS}
    redone = sum(kill["redone"] for kill in kills)
    print(
        f"\n{len(kills)} kills {counts}, {redone} steps redone, {whole} committed checkpoints verified and 0 failed, "
        "final weights bit-identical"
    )


def undisturbed(store: str, run: str, epochs: int) -> str:
    """The run that nobody touches."""
    from sceneray.ray_train import launch

    launch(settings_of(store, run, epochs), lambda _: None)
    return run


@pytest.mark.slice
def test_one_kill_at_each_moment(store: str, weed_server: S3, proxy: FaultProxy, here: None) -> None:
    """One kill inside a step, one inside an upload, one before the manifest, one right after a report."""
    clean = undisturbed(store, weed_server.url("clean-slice"), epochs=12)
    settings = settings_of(store, weed_server.url("slice"), epochs=12)
    killer = run_with_kills(settings, proxy, list(MOMENTS), 0)
    check_and_tell(clean, settings.run, killer.kills)


def test_many_kills(store: str, weed_server: S3, proxy: FaultProxy, here: None) -> None:
    """Four runs with six kills each, at each moment at least five: same bits, nothing damaged."""
    clean = undisturbed(store, weed_server.url("clean"), epochs=36)
    moments = list(itertools.islice(itertools.cycle(MOMENTS), 24))
    kills: list[dict[str, Any]] = []
    for seed in range(4):
        mine = moments[6 * seed : 6 * seed + 6]
        random.Random(seed).shuffle(mine)
        settings = settings_of(store, weed_server.url(f"kills-{seed}"), epochs=36)
        killer = run_with_kills(settings, proxy, mine, seed)
        check_and_tell(clean, settings.run, killer.kills)
        kills += killer.kills
    assert all(sum(kill["moment"] == moment for kill in kills) >= 5 for moment in MOMENTS)
    print(f"{len(kills)} kills in all, {sum(kill['redone'] for kill in kills)} steps redone")
