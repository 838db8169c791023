"""In a flood images are refused by their headers, and as many are let through as the model answers."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from sceneray.masks import Photo
from serve.api import ApiSettings, create_app
from serve.batching import Overloaded
from serve.refusals import FLOOD, FLOOD_S, SPEED_MEMORY_S, SURPLUS, Refusals
from serve.schemas import Ask, Segmented
from tests.unit.serve.servers import Still
from tests.unit.serve.uploads import Client, encoded


class Full(Still):
    """A backend whose queue has room for images below `limit` pixels."""

    limit = 2000

    async def segment(self, image: Photo, ask: Ask) -> Segmented:
        """The mask of zeros. Raises Overloaded."""
        answer = await super().segment(image, ask)
        if image.shape[0] * image.shape[1] >= self.limit:
            raise Overloaded("the queue is full; try again in 3 s.", 3)
        return answer


def client_of(backend: Full) -> Client:
    """A client of an app over `backend`."""
    return Client(create_app(backend, ApiSettings(access_log=False)))


def status(client: Client, side: int) -> tuple[int, str | None]:
    """Status and Retry-After of a square image."""
    body = encoded(Image.fromarray(np.zeros((side, side, 3), np.uint8)), "PNG")
    answer = client.post("/v1/segment", content=body, headers={"Content-Type": "image/png"})
    return answer.status_code, answer.headers.get("retry-after")


def test_in_a_flood_the_model_is_not_asked_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model refuses a few large images itself, the next ones get its answer at once; a smaller one is answered."""
    backend = Full()
    refusals = Refusals(lambda: 0.0)  # to a clock that stands still, all of it happens within a second
    monkeypatch.setattr("serve.site.Refusals", lambda: refusals)
    with client_of(backend) as client:
        assert [status(client, 50) for _ in range(FLOOD)] == [(429, "3")] * FLOOD
        assert [status(client, 60) for _ in range(5)] == [(429, "3")] * 5
        assert len(backend.asked) == FLOOD
        assert status(client, 40) == (200, None)


def test_a_few_refusals_are_no_flood() -> None:
    """Below a flood the model is asked each time: it may have room again."""
    backend = Full()
    with client_of(backend) as client:
        assert [status(client, 50) for _ in range(FLOOD - 1)] == [(429, "3")] * (FLOOD - 1)
        backend.limit = 10**9
        assert status(client, 50) == (200, None)


def flood(refusals: Refusals, pixels: int = 500) -> None:
    """The model refuses as often as makes a flood."""
    for _ in range(FLOOD):
        refusals.refused(pixels, Overloaded("full", 4))


def passes(refusals: Refusals, pixels: int) -> bool:
    """Whether an image of so many pixels is let through."""
    try:
        refusals.check(pixels)
    except Overloaded:
        return False
    return True


def test_of_several_refusals_the_smallest_counts() -> None:
    """What is smaller than all that was refused is let through, and the last answer is passed on."""
    refusals = Refusals(lambda: 100.0)
    assert passes(refusals, 10**9)  # nobody was refused yet
    flood(refusals)
    refusals.refused(900, Overloaded("full", 5))
    assert passes(refusals, 499)
    with pytest.raises(Overloaded) as refused:
        refusals.check(500)
    assert refused.value.retry_after_s == 5


def test_a_flood_ends_when_nobody_is_refused() -> None:
    """FLOOD_S after the last refusal, the model's or our own, all are let through."""
    now = [100.0]
    refusals = Refusals(lambda: now[0])
    flood(refusals)
    for _ in range(5):
        now[0] += 0.9 * FLOOD_S
        assert not passes(refusals, 500)
        refusals.refused(500, Overloaded("full", 4))
    now[0] += 0.9 * FLOOD_S
    assert not passes(refusals, 500)
    now[0] += FLOOD_S
    assert all(passes(refusals, 500) for _ in range(100))


def test_a_model_that_never_answered_is_asked_again() -> None:
    """Though no speed is known, one image passes every FLOOD_S, so that its answer can tell."""
    now = [100.0]
    refusals = Refusals(lambda: now[0])
    flood(refusals)
    through = 0
    for _ in range(int(100 * 10 * FLOOD_S)):
        now[0] += 1 / 100
        through += passes(refusals, 500)
    assert 5 <= through <= 10


class Model:
    """A queue of `room` images before a model that answers `speed` a second, on a clock of its own."""

    def __init__(self, room: int, speed: float) -> None:
        self.now, self.room, self.speed = 100.0, room, speed
        self.refusals = Refusals(lambda: self.now)
        self.waiting = self.work = 0.0
        self.late = self.early = self.answers = 0

    def run(self, seconds: float, rate: float) -> tuple[int, int, int]:
        """Answers, refusals by the model and refusals before it, in so many seconds of `rate` images a second."""
        self.late = self.early = self.answers = 0
        step, arrived = 1 / 1000, 0.0
        for _ in range(int(seconds / step)):
            self.now += step
            self.work = self.work + self.speed * step if self.waiting else 0.0
            while self.work >= 1 and self.waiting:
                self.work, self.waiting, self.answers = self.work - 1, self.waiting - 1, self.answers + 1
                self.refusals.answered(1000)
            arrived += rate * step
            while arrived >= 1:
                arrived -= 1
                if not passes(self.refusals, 1000):
                    self.early += 1
                elif self.waiting < self.room:
                    self.waiting += 1
                else:
                    self.late += 1
                    self.refusals.refused(1000, Overloaded("full", 4))
        return self.answers, self.late, self.early


@pytest.mark.parametrize("speed", [5, 20, 80])
def test_a_flood_keeps_the_model_busy_and_is_refused_early(speed: int) -> None:
    """At ten times its speed the model is never idle, and of the refusals one in a hundred comes from the model. One
    that becomes three times as fast is used at that speed within seconds. What it can answer is not refused."""
    model = Model(room=8 * speed, speed=speed)
    assert model.run(5, speed / 2) == (pytest.approx(2.5 * speed, abs=2), 0, 0)
    model.run(20, 10 * speed)
    answers, late, early = model.run(60, 10 * speed)
    assert answers >= 0.99 * 60 * speed
    assert late <= 0.01 * (late + early)
    model.speed *= 3
    model.run(15, 10 * speed)
    answers, late, early = model.run(30, 10 * speed)
    assert answers >= 0.95 * 30 * 3 * speed
    model.run(15, 2 * speed)
    assert model.run(30, 2 * speed) == (pytest.approx(60 * speed, rel=0.02), 0, 0)


def test_as_much_is_let_through_as_is_answered() -> None:
    """Beside a model that answers 20 images of 1000 pixels a second, a flood of 200 a second lets a few more than 20
    a second through, whatever their size; an image larger than all of that comes through as well."""
    now = [100.0]
    refusals = Refusals(lambda: now[0])
    for _ in range(int(20 * 6 * SPEED_MEMORY_S)):  # until the speed is known
        now[0] += 1 / 20
        refusals.answered(1000)
    through = 0
    for step in range(200 * 30):
        now[0] += 1 / 200
        if step % 10 == 0:
            refusals.answered(1000)
        if step % 100 == 0:
            flood(refusals)
        through += passes(refusals, 1000)
    assert 20 * 30 <= through <= 20 * 30 * (SURPLUS + 0.05)
    now[0] += 0.5
    flood(refusals)
    assert passes(refusals, 10**7)
    assert not passes(refusals, 500)


def test_refusals_long_ago_are_no_flood() -> None:
    """As many refusals, spread over more than a second, are none."""
    now = [100.0]
    refusals = Refusals(lambda: now[0])
    for _ in range(3 * FLOOD):
        now[0] += 1.01 / (FLOOD - 1)
        refusals.refused(500, Overloaded("full", 4))
        assert passes(refusals, 10**9)
