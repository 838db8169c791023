"""Where an image goes: shapes stay together, nobody is overloaded for it, and replicas come and go with little fuss."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from serve.routing import PATIENCE, order
from tests.support import ROOT

names = st.text("abcdefgh0123456789", min_size=1, max_size=8)
shapes = st.tuples(st.integers(1, 9000), st.integers(1, 9000))
loads = st.dictionaries(names, st.integers(0, 200), min_size=1, max_size=12)
slacks = st.integers(0, 64)
FOUR = ("a", "b", "c", "d")
MANY = [(height, width) for height in range(100, 140) for width in range(200, 250)]


@given(shapes, loads, slacks)
def test_every_replica_comes_exactly_once(shape: tuple[int, int], loads: dict[str, int], slack: int) -> None:
    """The order is one of all replicas, so that there is always a next one to ask."""
    assert sorted(order(shape, loads, slack)) == sorted(loads)


@given(shapes, loads, slacks)
def test_the_order_does_not_depend_on_how_replicas_are_listed(
    shape: tuple[int, int], loads: dict[str, int], slack: int
) -> None:
    """Two routers that know the same replicas choose the same, whoever they heard of first."""
    assert order(shape, loads, slack) == order(shape, dict(reversed(loads.items())), slack)


@given(shapes, loads, slacks)
def test_the_first_is_never_much_busier_than_the_least_loaded(
    shape: tuple[int, int], loads: dict[str, int], slack: int
) -> None:
    """It holds at most `slack` requests more, and nothing waits behind others while a replica is idle."""
    first, least = order(shape, loads, slack)[0], min(loads.values())
    assert loads[first] <= least + slack
    assert loads[first] <= (1 + PATIENCE) * least


@given(shapes, loads, slacks)
def test_replicas_past_the_bound_come_last_and_by_load(
    shape: tuple[int, int], loads: dict[str, int], slack: int
) -> None:
    """Where no replica within the bound takes the image, the least loaded of the others is asked first."""
    least = min(loads.values())
    bound = least + min(slack, PATIENCE * least)
    past = [loads[name] > bound for name in order(shape, loads, slack)]
    assert past == sorted(past)
    rest = [loads[name] for name in order(shape, loads, slack) if loads[name] > bound]
    assert rest == sorted(rest)


@given(shapes, loads, slacks, st.integers(0, 200))
def test_with_equal_loads_a_shape_has_one_replica(
    shape: tuple[int, int], loads: dict[str, int], slack: int, load: int
) -> None:
    """However high the load and large the slack, replicas that are equally busy are in the shape's own order."""
    assert order(shape, dict.fromkeys(loads, load), slack) == order(shape, dict.fromkeys(loads, 0), 0)


@given(st.lists(shapes, max_size=20), st.sets(names, min_size=2, max_size=12))
def test_a_replica_that_goes_moves_only_its_own_shapes(shapes: list[tuple[int, int]], replicas: set[str]) -> None:
    """A shape that was elsewhere stays where it was, and the order of the others is as before."""
    gone = min(replicas)
    for shape in shapes:
        before = order(shape, dict.fromkeys(replicas, 0), 8)
        after = order(shape, dict.fromkeys(replicas - {gone}, 0), 8)
        assert after == [name for name in before if name != gone]


def test_shapes_are_spread_evenly() -> None:
    """2000 shapes that differ by little: each of four replicas has its quarter, give or take a fifth."""
    held = Counter(order(shape, dict.fromkeys(FOUR, 0), 8)[0] for shape in MANY)
    assert all(0.8 * len(MANY) / 4 < held[name] < 1.2 * len(MANY) / 4 for name in FOUR), held


def test_a_hot_shape_fills_every_replica() -> None:
    """100 requests of one shape that none is answered of: no replica holds more than a batch above another."""
    held = dict.fromkeys(FOUR, 0)
    for _ in range(100):
        held[order((480, 640), held, 8)[0]] += 1
    assert max(held.values()) - min(held.values()) <= 8 + 1  # the one that was just sent


def test_shapes_stay_together_under_load() -> None:
    """With every replica at work, a shape goes to its own one until that is a batch ahead."""
    held = dict.fromkeys(FOUR, 10)
    own = order((480, 640), held, 8)[0]
    held[own] += 8
    assert order((480, 640), held, 8)[0] == own
    held[own] += 1
    assert order((480, 640), held, 8)[0] != own


def test_no_replica_is_no_answer() -> None:
    """Where no replica runs there is none to choose."""
    assert order((480, 640), {}, 8) == []


def test_every_process_agrees() -> None:
    """HTTP replicas in processes with other hash seeds choose alike."""
    code = (
        "import json; from serve.routing import order; "
        "print(json.dumps([order((side, 640), dict.fromkeys('abcdefgh', 0), 8) for side in range(50)]))"
    )
    answers = set()
    for seed in ("1", "2"):
        env = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)}
        answers.add(subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, check=True).stdout)
    assert len(answers) == 1
    assert json.loads(answers.pop())[7] == order((7, 640), dict.fromkeys("abcdefgh", 0), 8)
