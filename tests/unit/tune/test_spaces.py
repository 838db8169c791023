"""Search spaces: what they draw, that the draws hang together, and what they refuse."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sceneray.errors import ConfigError
from tune import spaces

SPACE = {
    "optimizer.lr": {"loguniform": [0.001, 0.1]},
    "model.dropout": {"choice": [0.0, 0.1, 0.3]},
    "model.head_width": {"lograndint": [8, 512]},
}


def drawn(space: dict[str, Any], trials: int, seed: int = 0) -> list[dict[str, Any]]:
    """The values of the first trials of a space."""
    read = spaces.read(space)
    return [spaces.draw(read, seed, index) for index in range(trials)]


def test_a_trial_is_a_function_of_seed_and_number() -> None:
    """The same seed draws the same values, another seed others, and every trial its own."""
    assert drawn(SPACE, 5) == drawn(SPACE, 5)
    assert drawn(SPACE, 5) != drawn(SPACE, 5, seed=1)
    assert len({str(values) for values in drawn(SPACE, 20)}) == 20


def test_more_trials_and_more_settings_leave_earlier_draws_alone() -> None:
    """A sweep may grow: its first trials keep their values, and another setting does not move the others."""
    assert drawn(SPACE, 3) == drawn(SPACE, 9)[:3]
    wider = drawn({"seed": {"randint": [0, 99]}, **SPACE}, 3)
    assert [{key: row[key] for key in SPACE} for row in wider] == drawn(SPACE, 3)


@given(st.integers(0, 2**32), st.integers(0, 1000))
def test_every_distribution_stays_in_its_range(seed: int, index: int) -> None:
    """Values lie within their bounds, on their grid, and have the type that the distribution promises."""
    space = {
        "a": {"choice": ["x", [1, 2], None]},
        "b": {"uniform": [-1, 1]},
        "c": {"quniform": [0.1, 0.5, 0.1]},
        "d": {"loguniform": [1e-6, 1e-3]},
        "e": {"randint": [3, 5]},
        "f": {"lograndint": [1, 3]},
    }
    values = spaces.draw(spaces.read(space), seed, index)
    assert values["a"] in ("x", [1, 2], None)
    assert -1 <= values["b"] < 1
    assert values["c"] in (0.1, 0.2, 0.3, 0.4, 0.5)
    assert 1e-6 <= values["d"] < 1e-3
    assert values["e"] in (3, 4)
    assert values["f"] in (1, 2)
    assert isinstance(values["e"], int)


def test_loguniform_spreads_over_orders_of_magnitude() -> None:
    """Half of the draws of loguniform lie below the geometric mean of its bounds."""
    rows = drawn({"x": {"loguniform": [0.001, 0.1]}}, 400)
    below = sum(row["x"] < 0.01 for row in rows)
    assert 160 < below < 240


def test_every_end_of_a_grid_is_drawn() -> None:
    """quniform and randint reach the first and the last value they promise."""
    rows = drawn({"q": {"quniform": [0.1, 0.5, 0.1]}, "r": {"randint": [0, 3]}}, 100)
    assert {row["q"] for row in rows} == {0.1, 0.2, 0.3, 0.4, 0.5}
    assert {row["r"] for row in rows} == {0, 1, 2}


def test_dots_and_nesting_mean_the_same() -> None:
    """A space may be written with dotted keys or nested, as `space.optimizer.lr=...` on the command line makes it."""
    nested = {"optimizer": {"lr": {"loguniform": [0.001, 0.1]}}}
    assert drawn(nested, 3) == drawn({"optimizer.lr": {"loguniform": [0.001, 0.1]}}, 3)
    later = {"optimizer.lr": {"uniform": [0, 1]}, "optimizer": {"lr": {"choice": [7]}}}
    assert drawn(later, 1) == [{"optimizer.lr": 7}]


def test_yaml_numbers_without_a_point_are_numbers() -> None:
    """1e-3 is text in YAML 1.1; a distribution reads it as the number that was meant."""
    assert drawn({"x": {"loguniform": ["1e-3", "1e-1"]}}, 3) == drawn({"x": {"loguniform": [1e-3, 1e-1]}}, 3)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"loguniforn": [1, 2]}, "unknown distribution 'loguniforn': did you mean 'loguniform'?"),
        (0.1, "must be one distribution"),
        ({"uniform": [0, 1], "choice": [1]}, "must be one distribution"),
        ({"uniform": 3}, "must be a list"),
        ({"uniform": [1]}, r"takes \[low, high\]: missing a required argument: 'high'"),
        ({"uniform": [1, 2, 3]}, "too many positional arguments"),
        ({"uniform": [2, 1]}, "low must be below high"),
        ({"uniform": ["a", 1]}, "could not convert"),
        ({"uniform": [True, 2]}, "not a number"),
        ({"loguniform": [0, 1]}, "low must be above 0"),
        ({"randint": [0.5, 3]}, "whole numbers"),
        ({"lograndint": [0, 3]}, "low must be above 0"),
        ({"quniform": [0, 1, 0]}, "step must be above 0"),
        ({"choice": []}, "at least one option"),
    ],
)
def test_a_wrong_distribution_is_named_with_the_rule(spec: Any, message: str) -> None:
    """The error says which setting, which rule and what came."""
    with pytest.raises(ConfigError, match=message) as error:
        spaces.read({"optimizer.lr": spec})
    assert "space.optimizer.lr" in str(error.value)


def test_an_empty_space_is_refused() -> None:
    """There is nothing to search without a space."""
    with pytest.raises(ConfigError, match="space is empty"):
        spaces.read({})


def test_values_are_placed_without_touching_the_tree() -> None:
    """Each dotted key lands in its group; the tree that all trials share stays as it was."""
    tree = {"optimizer": {"lr": 1, "momentum": 0.9}}
    assert spaces.placed(tree, {"optimizer.lr": 2, "loss.name": "x"}) == {
        "optimizer": {"lr": 2, "momentum": 0.9},
        "loss": {"name": "x"},
    }
    assert tree == {"optimizer": {"lr": 1, "momentum": 0.9}}
    with pytest.raises(ConfigError, match="'lr' is a value, not a group"):
        spaces.placed(tree, {"optimizer.lr.deep": 1})
