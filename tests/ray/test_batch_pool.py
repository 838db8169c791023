"""The pool of a batch with real Ray actors that really die: no photo is lost, and none keeps the batch from its end."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jobs.batch_plan import Part, Plan, Row, Task, begin, make_plan
from jobs.batch_worker import PredictWorker
from jobs.ray_session import ray_session
from sceneray.errors import BundleError, ScenerayError
from sceneray.predictor import Predictor
from tests.batches import check_masks, draw, lines
from tests.bundles import write_bundle


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The bundle whose answers are known."""
    return write_bundle(str(tmp_path_factory.mktemp("bundle")))


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """A Ray with two CPUs."""
    with ray_session(cpus=2):
        yield


def batch(tmp_path: Path, bundle: str, count: int) -> Plan:
    """The plan of a batch of `count` photos, in parts of four, begun."""
    draw(tmp_path / "in", count)
    info = Predictor.load(bundle, "cpu").info
    model = {key: info[key] for key in ("name", "version", "digest")}
    plan = make_plan(Task(str(tmp_path / "out"), bundle, model), [str(tmp_path / "in")], 4)
    begin(plan)
    return plan


def results(plan: Plan, kind: type[PredictWorker], low: int = 1, high: int | None = 2) -> tuple[Any, list[Any]]:
    """Do a whole plan with workers of a kind; the pool and what came of the parts."""
    import ray

    from jobs.batch_pool import AT_ONCE, Pool

    actor = ray.remote(num_cpus=1, max_concurrency=AT_ONCE)(kind)
    pool = Pool(plan.task, lambda: actor.remote(plan.task), {"CPU": 1.0}, low, high, print)
    return pool, list(pool.results(plan.parts))


def test_a_photo_that_kills_workers(cluster: None, bundle: str, tmp_path: Path) -> None:
    """A photo at which every process dies is an error line; every other photo of its part, and of all, has a mask."""

    class Deadly(PredictWorker):
        def rows(self, photos: Any) -> list[Row]:
            if any(photo.name.endswith("0006") for photo in photos):
                os.kill(os.getpid(), signal.SIGKILL)
            return super().rows(photos)

    plan = batch(tmp_path, bundle, 16)
    pool, done = results(plan, Deadly)
    assert sorted(part.index for part in done) == [0, 1, 2, 3]
    rows = lines(str(tmp_path / "out"))
    assert [row["image"] for row in rows] == [photo.url for part in plan.parts for photo in part.photos]
    (dead,) = [row for row in rows if "error" in row]
    assert dead["image"].endswith("0006.png")
    assert "2 workers ended while they had this photo" in dead["error"]
    check_masks(str(tmp_path / "out"), [row for row in rows if row is not dead], bundle)
    assert pool.deaths >= 4
    assert begin(plan) == {part.index: part for part in done}


def test_a_workers_death_costs_no_photo(cluster: None, bundle: str, tmp_path: Path) -> None:
    """A worker that dies once, in the middle of a part: another one does the part, without an error."""
    died = tmp_path / "died"

    class Mortal(PredictWorker):
        def rows(self, photos: Any) -> list[Row]:
            rows = super().rows(photos)
            if not died.exists():
                died.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return rows

    pool, done = results(batch(tmp_path, bundle, 16), Mortal)
    assert pool.deaths == 1
    assert sum(part.photos for part in done) == 16
    assert not any(part.failed for part in done)


def test_the_pool_grows_while_there_is_room(cluster: None, bundle: str, tmp_path: Path) -> None:
    """From one worker to as many as the two CPUs hold, though nobody said how many."""
    seen = tmp_path / "seen"
    seen.mkdir()

    class Patient(PredictWorker):
        def start(self) -> None:
            super().start()
            (seen / str(os.getpid())).touch()

        def part(self, part: Part) -> Any:
            deadline = time.monotonic() + 120
            while len(list(seen.iterdir())) < 2:
                assert time.monotonic() < deadline, "no second worker came"
                time.sleep(0.05)
            return super().part(part)

    pool, done = results(batch(tmp_path, bundle, 24), Patient, 1, None)
    assert pool.most == 2
    assert len(list(seen.iterdir())) == 2
    assert len(done) == 6


def test_workers_that_cannot_start(cluster: None, bundle: str, tmp_path: Path) -> None:
    """Workers that die while they load end the batch after three, one that finds a damaged bundle ends it at once."""

    class Stillborn(PredictWorker):
        def start(self) -> None:
            os.kill(os.getpid(), signal.SIGKILL)

    plan = batch(tmp_path, bundle, 4)
    with pytest.raises(ScenerayError, match="3 workers in a row ended while they loaded the bundle"):
        results(plan, Stillborn)
    replaced = Plan(Task(plan.task.out, write_bundle(str(tmp_path / "b"), "8"), plan.task.model), plan.parts, {})
    with pytest.raises(BundleError, match="was replaced while the batch ran"):
        results(replaced, PredictWorker)
