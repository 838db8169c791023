"""Costs: what an attempt costs, what of it was spent twice, and that no sum is odd."""

from __future__ import annotations

import dataclasses
import math
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sceneray import costs
from sceneray.errors import ConfigError
from sceneray.status import Status


def attempt(number: int, from_step: int, step: int, seconds: float, **others: Any) -> Status:
    """The status of one attempt on nodes for 3.6 an hour: 0.001 a second."""
    about: dict[str, Any] = {
        "state": "running", "steps": 1000, "epoch": step / 100, "epochs": 10.0, "miou": None, "workers": 1,
        "started_at": "2026-11-22T03:00:00+00:00", "updated_at": "2026-11-22T03:00:00+00:00", "price_per_hour": 3.6,
    }  # fmt: skip
    return Status(attempt=number, from_step=from_step, step=step, seconds=seconds, **{**about, **others})


@st.composite
def histories(draw: st.DrawFn) -> list[Status]:
    """Attempts at one run, each from a step that some earlier one had reached."""
    attempts: list[Status] = []
    for number in range(1, draw(st.integers(0, 5)) + 1):
        reached = max((one.step for one in attempts), default=0)
        from_step = draw(st.integers(0, reached))
        step = from_step + draw(st.integers(0, 50))
        seconds = draw(st.floats(0, 1e5))
        first = draw(st.floats(0, seconds)) if step > from_step else None
        saved = draw(st.none() | st.integers(from_step + 1, step)) if step > from_step else None
        saved_after = draw(st.floats(first or 0.0, seconds)) if saved is not None else None
        price = draw(st.floats(0, 100))
        others = {"first_step_after_s": first, "saved_step": saved, "saved_after_s": saved_after}
        attempts.append(attempt(number, from_step, step, seconds, price_per_hour=price, **others))
    return attempts


def test_nodes_are_priced_by_their_type() -> None:
    """A type has its own price, or the default one; without any table nothing costs."""
    table = {"gpu_spot": 1.2, "default": 0.5}
    assert costs.price_per_hour({"gpu_spot": 2, "cpu": 3}, table) == pytest.approx(3.9)
    assert costs.price_per_hour({"gpu_spot": 2}, {"gpu_spot": 1.2}) == pytest.approx(2.4)
    assert costs.price_per_hour({"cpu": 3}, {}) == 0
    assert costs.price_per_hour({}, table) == 0


def test_a_type_without_a_price_is_named() -> None:
    """Where neither the type nor a default has a price, ConfigError names the types and those there are."""
    with pytest.raises(ConfigError, match=r"without a price: cpu, tpu\. It has: gpu_spot"):
        costs.price_per_hour({"tpu": 1, "gpu_spot": 1, "cpu": 1}, {"gpu_spot": 1.2})
    assert costs.price_per_hour({"tpu": 0, "gpu_spot": 1}, {"gpu_spot": 1.2}) == 1.2  # none of it is running


def test_a_run_without_restarts_wastes_nothing() -> None:
    """One attempt costs its time, start-up included, and nothing of it is wasted."""
    account = costs.account([attempt(1, 0, 500, 1000, first_step_after_s=60, saved_step=500, saved_after_s=990)])
    assert account.cost == pytest.approx(1.0)
    assert account.seconds == 1000
    assert account.cost_per_epoch == pytest.approx(0.2)
    assert (account.wasted_cost, account.wasted_seconds, account.redone_steps, account.restarts) == (0, 0, 0, 0)


def test_what_follows_the_snapshot_is_wasted() -> None:
    """A successor that goes on from the newest checkpoint wastes what came after its snapshot, and its own start-up."""
    account = costs.account(
        [
            attempt(1, 0, 500, 1000, first_step_after_s=60, saved_step=450, saved_after_s=900),
            attempt(2, 450, 900, 800, first_step_after_s=50),
        ]
    )
    assert account.wasted_seconds == 100 + 50
    assert account.wasted_cost == pytest.approx(0.15)
    assert (account.redone_steps, account.restarts) == (50, 1)
    assert account.cost == pytest.approx(1.8)


def test_between_snapshots_time_goes_by_steps() -> None:
    """A successor that goes on from an older checkpoint finds its time by steps, from the first to the last."""
    first = attempt(1, 0, 101, 1060, first_step_after_s=60, saved_step=80, saved_after_s=900)
    # 100 steps in 1000 s after the first: step 51 ended at 560 s.
    assert costs.account([first, attempt(2, 51, 51, 0)]).wasted_seconds == pytest.approx(500)


@pytest.mark.parametrize("others", [{"first_step_after_s": 60.0}, {}], ids=["steps lost", "no step done"])
def test_an_attempt_that_saved_nothing_is_wasted_whole(others: dict[str, float]) -> None:
    """Where the next one starts where this one did, all its time is wasted, its start-up counted once."""
    statuses = [
        attempt(1, 0, 40, 400, first_step_after_s=50, saved_step=40, saved_after_s=400),
        attempt(2, 40, 60 if others else 40, 300, **others),
        attempt(3, 40, 90, 500, first_step_after_s=70),
    ]
    assert [costs.wasted_seconds(statuses, index) for index in range(3)] == [0, 300, 70]


def test_going_back_further_wastes_the_earlier_ones_too() -> None:
    """Where a checkpoint turned out damaged, what the attempts before had done past the restart is lost as well."""
    statuses = [
        attempt(1, 0, 100, 1000, first_step_after_s=10, saved_step=100, saved_after_s=1000),
        attempt(2, 100, 120, 200, first_step_after_s=10, saved_step=120, saved_after_s=200),
        attempt(3, 0, 50, 500, first_step_after_s=10),
    ]
    account = costs.account(statuses)
    assert account.wasted_seconds == 1000 + 200 + 10
    assert account.redone_steps == 120


def test_the_budget_counts_earlier_attempts_and_this_one() -> None:
    """Cost so far is the sum of the earlier attempts and the present one's seconds at its own price."""
    assert costs.cost_so_far([], 3600, 2.0) == 2.0
    assert costs.cost_so_far([attempt(1, 0, 10, 1000), attempt(2, 5, 10, 500)], 1800, 2.0) == pytest.approx(2.5)


def test_nothing_costs_nothing() -> None:
    """A run without attempts has an account of zeros, and no cost an epoch."""
    assert costs.account([]) == costs.Account(0, 0, 0, 0, 0, 0, None)


@given(histories())
def test_waste_is_a_part_of_the_whole(statuses: list[Status]) -> None:
    """Wasted time and cost are never negative and never more than there was, for each attempt and in sum."""
    account = costs.account(statuses)
    for index, status in enumerate(statuses):
        assert 0 <= costs.wasted_seconds(statuses, index) <= status.seconds
    assert 0 <= account.wasted_seconds <= account.seconds * (1 + 1e-9)
    assert 0 <= account.wasted_cost <= account.cost * (1 + 1e-9)
    assert account.redone_steps >= 0
    assert account.restarts == max(0, len(statuses) - 1)


@given(histories(), st.integers(0, 5))
def test_costs_add_up(statuses: list[Status], cut: int) -> None:
    """The cost of a run is that of its first attempts plus that of the others, and is what the budget check sums."""
    whole = costs.account(statuses)
    parts = [costs.account(statuses[:cut]), costs.account(statuses[cut:])]
    assert math.isclose(whole.cost, sum(part.cost for part in parts), abs_tol=1e-9)
    assert math.isclose(whole.seconds, sum(part.seconds for part in parts), abs_tol=1e-9)
    if statuses:
        last = statuses[-1]
        assert math.isclose(whole.cost, costs.cost_so_far(statuses[:-1], last.seconds, last.price_per_hour))


@given(histories(), st.floats(0, 10))
def test_costs_follow_the_price(statuses: list[Status], factor: float) -> None:
    """Other prices change costs alone, in proportion."""
    dearer = [dataclasses.replace(one, price_per_hour=one.price_per_hour * factor) for one in statuses]
    before, after = costs.account(statuses), costs.account(dearer)
    assert math.isclose(after.cost, before.cost * factor, rel_tol=1e-6, abs_tol=1e-9)
    assert math.isclose(after.wasted_cost, before.wasted_cost * factor, rel_tol=1e-6, abs_tol=1e-9)
    assert after.wasted_seconds == before.wasted_seconds


@given(histories())
def test_steps_are_done_once_or_redone(statuses: list[Status]) -> None:
    """Steps trained over all attempts are those of the final history plus those that were redone."""
    trained = sum(one.step - one.from_step for one in statuses)
    last = statuses[-1].step if statuses else 0
    redone = costs.account(statuses).redone_steps
    assert redone >= trained - last
    if all(before.step >= after.from_step for before, after in pairwise(statuses)):
        assert redone == trained - last
