"""The number of replicas: right for what is seen, steady under a steady load, quick under a sudden one."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.load import LoadMeter
from serve.scaling import LOW, Load, QueuedPixels, Rule, decide, wanted
from serve.settings import ServeArgs

RULE = Rule(target_pixels=100, up_delay_s=5, down_delay_s=60, zero_delay_s=300)
loads = st.builds(
    Load,
    pixels=st.floats(0, 1e6),
    busy=st.floats(0, 20),
    requests=st.floats(0, 1e4),
    running=st.integers(0, 20),
)


@pytest.mark.parametrize(
    ("pixels", "busy", "replicas", "expected"),
    [
        (90, 0.5, 1, 1),  # below the target
        (101, 1.0, 1, 2),  # just above it
        (990, 1.0, 1, 10),  # far above it: in one step
        (150, 1.9, 2, 2),  # both replicas at work
        (50, 1.3, 3, 2),  # 1.3 of 2 is less than LOW
        (50, 1.5, 3, 3),  # 1.5 of 2 is more
        (160, 0.1, 3, 3),  # hardly busy, but two replicas would hold more than LOW of the target
        (130, 0.1, 3, 2),
        (1, 0.01, 5, 1),  # hardly anything is still something
        (0, 0.0, 5, 0),
    ],
)
def test_what_is_wanted(pixels: float, busy: float, replicas: int, expected: int) -> None:
    """More where the pixels are above the target, fewer where fewer would still have time to spare."""
    load = Load(pixels, busy, requests=0 if pixels == 0 else 100, running=replicas)
    assert wanted(RULE, load, replicas) == expected


def test_one_caller_needs_one_replica() -> None:
    """An image far above the target does not start replicas that would have nothing to do."""
    assert wanted(RULE, Load(pixels=5000, busy=1.0, requests=1.0, running=1), 1) == 1
    assert wanted(RULE, Load(pixels=5000, busy=1.0, requests=1.3, running=1), 1) == 2


@given(loads, st.integers(0, 20), st.integers(0, 5), st.integers(5, 20), st.floats(0, 1e9))
def test_the_answer_is_within_the_bounds_or_moves_towards_them(
    load: Load, replicas: int, least: int, most: int, now: float
) -> None:
    """Whatever is seen, nobody leaves the bounds, and without delays they are reached at once, but for zero."""
    goal, _ = decide(RULE, load, min(most, max(least, replicas)), (least, most), now, {})
    assert least <= goal <= most
    at_once = Rule(100, 0, 0, 0)
    goal, _ = decide(at_once, load, replicas, (least, most), now, {})
    assert least <= goal <= max(1, most)


@given(loads, st.integers(1, 20))
def test_the_band_is_wide_enough_to_stay_in(load: Load, replicas: int) -> None:
    """What makes the number fall does not make it rise again at once: the same pixels fit into the fewer replicas."""
    fewer = wanted(RULE, load, replicas)
    if 0 < fewer < replicas:
        assert load.pixels <= LOW * RULE.target_pixels * fewer * 1.000001
        assert load.busy <= LOW * fewer * 1.000001
        assert wanted(RULE, load, fewer) == fewer or load.busy > LOW * load.running


def test_up_waits_for_its_delay_and_a_dip_starts_it_anew() -> None:
    """Too much for five seconds on end brings replicas; a moment of less in between does not count as on end."""
    much, little = Load(500, 1, 50, 1), Load(50, 0.9, 5, 1)
    replicas, state = 1, {}
    for now, load, expected in [
        (0, much, 1),
        (4, much, 1),
        (4.5, little, 1),
        (5, much, 1),
        (9.9, much, 1),
        (10, much, 5),
    ]:
        replicas, state = decide(RULE, load, replicas, (1, 8), now, state)
        assert replicas == expected, now
    assert state == {}


def test_down_goes_to_the_most_that_was_wanted_meanwhile() -> None:
    """After a minute of less the number falls, not to the last moment's wish but to the highest of that minute."""
    replicas, state = 6, {}
    for now, busy in [(0, 0.5), (30, 2.4), (59, 0.1)]:
        replicas, state = decide(RULE, Load(10, busy, 1, 6), replicas, (1, 8), now, state)
        assert replicas == 6
    replicas, state = decide(RULE, Load(10, 0.1, 1, 6), replicas, (1, 8), 60, state)
    assert replicas == 4  # 2.4 busy need 4 at LOW


def test_zero_is_reached_over_one_and_with_its_own_delay() -> None:
    """Without any request the number falls to one, and after the longer delay to zero, where zero is allowed."""
    seen = []
    replicas, state = 3, {}
    for now in range(0, 500, 5):
        replicas, state = decide(RULE, Load(running=replicas), replicas, (0, 3), now, state)
        seen.append((now, replicas))
    assert [min(now for now, count in seen if count == n) for n in (3, 1, 0)] == [0, 60, 365]
    assert decide(Rule(100, 0, 0, 0), Load(), 1, (1, 3), 0, {})[0] == 1
    assert decide(Rule(100, 0, 0, 0), Load(requests=1), 0, (0, 3), 0, {})[0] == 1


def test_replicas_that_do_not_run_yet_are_not_given_up() -> None:
    """While one of three runs and is at its limit, it hides how much there is to do: the other two are waited for."""
    assert wanted(RULE, Load(pixels=10, busy=0.95, requests=10, running=1), 3) == 3
    assert wanted(RULE, Load(pixels=10, busy=0.4, requests=10, running=1), 3) == 1
    assert wanted(RULE, Load(running=0), 1) == 1
    assert wanted(RULE, Load(running=0), 0) == 0


class Endpoint:
    """Replicas behind one queue, in steps of a second: random arrivals of images of 10 pixels, and a start-up time.

    `per_second`: images that one replica answers. The policy sees means over `look_back` steps.
    """

    sees_work = True

    def __init__(self, rule: Rule, most: int, per_second: float, seed: int, start_s: int, look_back: int = 10) -> None:
        self.rule, self.most, self.per_second = rule, most, per_second
        self.random = np.random.default_rng(seed)
        self.start_s, self.look_back = start_s, look_back
        self.starting: list[int] = []
        self.running, self.target, self.now = 1, 1, 0
        self.queue = 0.0
        self.seen: list[tuple[float, float]] = []
        self.state: dict[str, float] = {}
        self.targets: list[int] = []

    def run(self, seconds: int, rate: float) -> list[int]:
        """The number of replicas wanted in each second of a load of `rate` images a second."""
        before = len(self.targets)
        for _ in range(seconds):
            self.step(rate)
        return self.targets[before:]

    def step(self, rate: float) -> None:
        """One second."""
        self.now += 1
        self.running += sum(at <= self.now for at in self.starting)
        self.starting = [at for at in self.starting if at > self.now]
        self.queue += self.random.poisson(rate)
        done = min(self.queue, self.running * self.per_second)
        pixels = 10 * (self.queue - done / 2)  # what is done in this second is there for half of it
        self.queue -= done
        self.seen = [*self.seen, (pixels, done / self.per_second)][-self.look_back :]
        pixels, busy = np.mean(self.seen, axis=0)
        load = Load(float(pixels), float(busy) * self.sees_work, float(pixels) / 10, self.running)
        target, self.state = decide(self.rule, load, self.target, (1, self.most), self.now, self.state)
        if target > self.target:
            self.starting += [self.now + self.start_s] * (target - self.target)
        elif target < self.target:
            self.running, self.starting = min(self.running, target), self.starting[: max(0, target - self.running)]
        self.target = target
        self.targets.append(target)


@settings(max_examples=40)
@given(
    share=st.floats(0.02, 0.95),
    most=st.integers(2, 8),
    per_second=st.floats(2, 50),
    seed=st.integers(0, 2**32 - 1),
    start_s=st.integers(1, 40),
    down_delay_s=st.sampled_from([60, 120]),
)
def test_a_constant_load_does_not_flap(
    share: float, most: int, per_second: float, seed: int, start_s: int, down_delay_s: int
) -> None:
    """Under one rate of random arrivals, anywhere up to what `most` replicas can do, the number settles: within an hour
    after the first ten minutes nobody is started again after somebody was ended, and the queue does not grow."""
    rule = Rule(target_pixels=10 * 2 * per_second, up_delay_s=5, down_delay_s=down_delay_s)
    endpoint = Endpoint(rule, most, per_second, seed, start_s)
    rate = share * most * per_second
    endpoint.run(600, rate)
    steps = np.diff(endpoint.run(3600, rate))
    downs, ups = np.flatnonzero(steps < 0), np.flatnonzero(steps > 0)
    assert not (len(downs) and len(ups) and downs[0] < ups[-1]), f"down at {downs}, up at {ups}"
    assert endpoint.queue < 20 * per_second * most


def test_without_the_time_at_work_the_number_would_flap() -> None:
    """The rule on queued pixels alone, which this is not, starts and ends the same replica over and over."""

    class Blind(Endpoint):
        sees_work = False

    def ups(kind: type[Endpoint]) -> int:
        endpoint = kind(Rule(400, 5, 60), 4, 20, seed=1, start_s=10)
        endpoint.run(600, 30)
        return int((np.diff(endpoint.run(7200, 30)) > 0).sum())

    assert ups(Endpoint) == 0
    assert ups(Blind) > 10


def test_a_jump_is_answered_within_the_look_back_and_the_delay() -> None:
    """Ten times the load has its replicas ordered within 20 s, and half an hour after it is over there is one again."""
    endpoint = Endpoint(Rule(400, 5, 120), 8, 20, seed=3, start_s=15)
    assert set(endpoint.run(600, 10)) == {1}
    jump = endpoint.run(600, 100)
    assert next(second for second, count in enumerate(jump) if count >= 5) <= 20
    assert jump[-1] >= 6
    assert endpoint.run(1800, 10)[-1] == 1


def context(**changes: Any) -> SimpleNamespace:
    """What Ray hands to a policy, as far as it is read."""
    fields: dict[str, Any] = {
        "aggregated_metrics": {
            "pixels": {"a": 300.0, "b": 100.0},
            "requests": {"a": 3.0, "b": 1.0},
            "busy": {"a": 1.0},
        },
        "total_queued_requests": 0.0,
        "current_num_replicas": 2,
        "target_num_replicas": 2,
        "capacity_adjusted_min_replicas": 1,
        "capacity_adjusted_max_replicas": 9,
        "current_time": 1000.0,
        "policy_state": {},
    }
    return SimpleNamespace(**fields | changes)


def test_the_policy_counts_what_no_replica_has_taken_yet() -> None:
    """Requests that wait at the ingress count with the mean size of those in the replicas, or of those seen last."""
    policy = QueuedPixels(target_pixels=200, up_delay_s=0)
    assert policy(context())[0] == 2
    goal, state = policy(context(total_queued_requests=4.0))
    assert (goal, state["pixels_each"]) == (4, 100.0)
    empty = context(aggregated_metrics={}, total_queued_requests=4.0, policy_state=state, current_num_replicas=0)
    assert policy(empty)[0] == 2
    assert policy(context(aggregated_metrics=None))[0] == 2  # idle; less only after the delay


def test_zero_replicas_need_a_most() -> None:
    """replicas=0 alone would serve nobody, and is refused; with max_replicas it is an endpoint that may sleep."""
    with pytest.raises(ValueError, match="max_replicas"):
        ServeArgs(bundle="b", replicas=0)
    assert ServeArgs(bundle="b", replicas=0, max_replicas=2).replicas == 0


def test_the_meter_is_exact_between_any_two_looks() -> None:
    """Means of what was held, however short and however often somebody else looks."""
    now = [0.0]
    meter = LoadMeter(lambda: now[0])
    mine, other = meter.reader(), meter.reader()
    with meter.holding("pixels", 100):
        now[0] = 1.0
        assert other() == {"pixels": 100.0}
        with meter.holding("pixels", 300), meter.holding("requests"):
            now[0] = 2.0
    now[0] = 4.0
    assert mine() == {"pixels": (100 + 400) / 4, "requests": 1 / 4}
    assert other() == {"pixels": 400 / 3, "requests": 1 / 3}
    now[0] = 5.0
    assert mine() == {"pixels": 0.0, "requests": 0.0}
    with meter.holding("pixels", 7):
        assert mine() == {"pixels": 7.0, "requests": 0.0}  # no time has passed: what is inside now


def test_the_meter_lets_go_of_what_fails() -> None:
    """A request that ends in an error is not inside any more."""
    meter = LoadMeter()
    with pytest.raises(RuntimeError), meter.holding("pixels", 5):
        raise RuntimeError
    assert meter.inside["pixels"] == 0
