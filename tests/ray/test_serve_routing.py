"""The router of the model replicas on a real Ray Serve: shapes stay together, a hot one spreads, a kill hangs nobody.

The replicas here answer who they are, which the endpoint's own do not tell.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jobs.ray_session import ray_session
from sceneray.masks import Photo
from serve.settings import ServeArgs
from tests.support import POLL_S

APP = "routing"
REPLICAS = 3
SLACK = 4
PATIENCE_S = 60.0
SHAPES = [(height, 8) for height in range(1, 41)]  # by chance each replica has some


def photo(shape: tuple[int, int]) -> Photo:
    """A black image uint8 [H, W, 3]."""
    return np.zeros((*shape, 3), np.uint8)


def application() -> Any:
    """`Caller` in front of three `Where`, which are routed by shape."""
    from ray import serve

    from serve.shape_router import by_shape

    routed = by_shape(ServeArgs(bundle="none", replicas=REPLICAS, mode="fast", max_batch_size=SLACK))

    @serve.deployment(num_replicas=REPLICAS, max_ongoing_requests=100, ray_actor_options={"num_cpus": 0.1}, **routed)
    class Where:
        async def segment(self, image: Any, gate: str | None = None) -> tuple[str, int]:  # noqa: ARG002 - as the model's
            """This replica and its process, at once or when the folder `gate`, where it leaves a file, has gone."""
            import asyncio
            import tempfile

            if gate is not None:
                tempfile.mkstemp(dir=gate)
                while os.path.exists(gate):
                    await asyncio.sleep(POLL_S)
            return serve.get_replica_context().replica_id.unique_id, os.getpid()

        async def describe(self) -> str:
            """Likewise, asked without an image."""
            return serve.get_replica_context().replica_id.unique_id

        async def image(self, height: int, width: int) -> Any:
            """An image as another deployment's answer."""
            return np.zeros((height, width, 3), np.uint8)

    @serve.deployment(ray_actor_options={"num_cpus": 0.1})
    class Caller:
        def __init__(self, replicas: Any) -> None:
            self._replicas = replicas.options(_by_reference=False)

        async def several(self, images: list[Any], gate: str | None = None) -> list[str]:
            """The replica of each image: all are asked at once, as for one HTTP request with several images."""
            asked = [self._replicas.segment.remote(image, gate) for image in images]
            return [(await answer)[0] for answer in asked]

        async def chained(self, height: int, width: int) -> list[str]:
            """Two replicas that were asked for one image: handed in as an answer, and as an object in Ray's store."""
            import ray

            answer = self._replicas.image.remote(height, width)
            stored = self._replicas.options(_by_reference=True)
            reference = ray.put(np.zeros((height, width, 3), np.uint8))
            return [(await self._replicas.segment.remote(answer))[0], (await stored.segment.remote(reference))[0]]

    return Caller.bind(Where.bind())


@pytest.fixture(scope="module")
def caller() -> Iterator[Any]:
    """A handle of `Caller`, on a private Ray without HTTP."""
    with ray_session(cpus=2):
        from ray import serve

        quiet = {"log_level": "ERROR", "enable_access_log": False}
        serve.start(proxy_location="Disabled", logging_config=quiet)
        try:
            yield serve.run(application(), name=APP, route_prefix=None, logging_config=quiet)
        finally:
            with contextlib.redirect_stdout(None):
                serve.shutdown()


@pytest.fixture
def replicas(caller: Any) -> Any:
    """A handle of the three replicas in this process, with a router of its own."""
    from ray import serve

    return serve.get_deployment_handle("Where", APP).options(_by_reference=False)


def where(replicas: Any, shape: tuple[int, int]) -> tuple[str, int]:
    """The replica that answers for a shape, and its process."""
    answer: tuple[str, int] = replicas.segment.remote(photo(shape)).result(timeout_s=PATIENCE_S)
    return answer


def test_each_shape_is_answered_by_one_replica(caller: Any, replicas: Any) -> None:
    """Forty shapes in turn, five times over, from two processes: each by one replica, and all three have some."""
    seen = defaultdict(set)
    for _ in range(5):
        for shape in SHAPES:
            seen[shape].add(where(replicas, shape)[0])
            seen[shape].update(caller.several.remote([photo(shape)]).result(timeout_s=PATIENCE_S))
    assert all(len(names) == 1 for names in seen.values()), dict(seen)
    assert len(set.union(*seen.values())) == REPLICAS


def test_a_hot_shape_spreads_over_all_replicas(caller: Any, tmp_path: Path) -> None:
    """Thirty images of one shape in one request, none answered before all are sent: each replica holds a share, and
    none is forgotten."""
    gate = tmp_path / "gate"
    gate.mkdir()
    for shape in SHAPES:  # so that the router has heard of all three
        caller.several.remote([photo(shape)]).result(timeout_s=PATIENCE_S)
    answer = caller.several.remote([photo(SHAPES[0])] * 30, str(gate))
    deadline = time.monotonic() + PATIENCE_S
    while (there := len(list(gate.iterdir()))) < 30:
        assert time.monotonic() < deadline, f"{there} of 30 images reached a replica"
        time.sleep(POLL_S)
    gate.rename(tmp_path / "open")
    held = Counter(answer.result(timeout_s=PATIENCE_S))
    print(f"\n30 images at once: {sorted(held.values())}")
    assert held.total() == 30
    assert len(held) == REPLICAS
    assert min(held.values()) >= 5  # of 10: two batches apart would be too far


def test_what_has_no_shape_is_answered_too(caller: Any, replicas: Any) -> None:
    """A call without an image goes anywhere. Images that are another call's answer, named, or in Ray's store are
    answered, with a shape or without."""
    asked = [replicas.describe.remote() for _ in range(30)]
    assert len({answer.result(timeout_s=PATIENCE_S) for answer in asked}) > 1
    assert len(caller.chained.remote(40, 50).result(timeout_s=PATIENCE_S)) == 2
    named = {replicas.segment.remote(image=photo(SHAPES[1])).result(timeout_s=PATIENCE_S) for _ in range(5)}
    assert named == {where(replicas, SHAPES[1])}


def test_the_endpoint_routes_by_shape_where_there_is_a_choice() -> None:
    """With several replicas, or room for several, by the images of one pass; with one there is nothing to route."""
    from serve.app import build
    from serve.shape_router import ShapeRouter, by_shape, pass_size

    def args(**options: Any) -> ServeArgs:
        return ServeArgs(bundle="b", **options)

    assert by_shape(args()) == by_shape(args(max_replicas=1)) == {}
    assert by_shape(args(replicas=0, max_replicas=2)).keys() == {"request_router_config"}
    assert pass_size(args(max_batch_size=16, mode="fast")) == 16
    assert pass_size(args(max_batch_size=16, gpus=1)) == 16
    assert pass_size(args(max_batch_size=16)) == 1
    assert pass_size(args(max_batch_size=16, exact_batch=4)) == 4
    segmenter = build(args(replicas=2))._bound_deployment.init_args[0]._bound_deployment
    config = segmenter._deployment_config.request_router_config
    assert config.request_router_class.rpartition(".")[2] == ShapeRouter.__name__
    assert config.request_router_kwargs == {"slack": 1}


@pytest.mark.chaos
@pytest.mark.slice
def test_a_killed_replica_hangs_nobody(replicas: Any) -> None:
    """kill -9 of a replica under traffic: every request is answered, those that were lost when they are asked again;
    the shapes of the dead go to the living, and three replicas answer in the end."""
    victim, pid = where(replicas, SHAPES[0])
    asked = [(shape, replicas.segment.remote(photo(shape))) for shape in SHAPES * 4]
    os.kill(pid, signal.SIGKILL)
    lost = sum(again(replicas, shape, answer)[1] for shape, answer in asked)
    deadline = time.monotonic() + PATIENCE_S
    names: set[str] = set()
    while victim in names or len(names) < REPLICAS:
        assert time.monotonic() < deadline, f"{names} answer, of which {victim} was killed"
        time.sleep(POLL_S)
        asked = [(shape, replicas.segment.remote(photo(shape))) for shape in SHAPES]
        answers = [again(replicas, shape, answer) for shape, answer in asked]
        names = {name for name, _ in answers}
        lost += sum(times for _, times in answers)
    print(f"\nkilled one of {REPLICAS}: {lost} requests were asked again")
    assert len({where(replicas, SHAPES[0])[0] for _ in range(5)}) == 1


def again(replicas: Any, shape: tuple[int, int], answer: Any) -> tuple[str, int]:
    """(the replica that answers in the end, how often one was lost before), as the endpoint asks."""
    from ray.exceptions import RayActorError

    from serve.app import ATTEMPTS

    for lost in range(ATTEMPTS):
        try:
            return answer.result(timeout_s=PATIENCE_S)[0], lost
        except RayActorError:
            answer = replicas.segment.remote(photo(shape))
    raise AssertionError(f"{ATTEMPTS} replicas were lost over one image")
