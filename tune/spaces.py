"""Search spaces: which training settings a sweep varies, over which distributions, and what each trial draws.

    space:
      optimizer.lr: {loguniform: [0.001, 0.1]}
      model.dropout: {choice: [0.0, 0.1, 0.3]}

The values of trial i are a pure function of (seed, i, setting): more trials extend a sweep and leave the earlier ones
as they are, and another setting in the space leaves the draws of the others.
"""

from __future__ import annotations

import copy
import inspect
import math
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from sceneray.errors import ConfigError, unknown_name

# Draws a value with the generator it is given.
Draw = Callable[[np.random.Generator], Any]

EXAMPLE = "for example {loguniform: [0.001, 0.1]} or {choice: [8, 16]}"


def choice(*options: Any) -> Draw:
    """One of `options`, each as likely."""
    if not options:
        raise ValueError("needs at least one option")
    return lambda random: options[int(random.integers(len(options)))]


def uniform(low: float, high: float) -> Draw:
    """A real number, low ≤ x < high."""
    low, high = _range(low, high)
    return lambda random: float(random.uniform(low, high))


def quniform(low: float, high: float, step: float) -> Draw:
    """One of low, low + step, ... up to high, each as likely."""
    low, high = _range(low, high)
    if not 0 < step <= high - low:
        raise ValueError("step must be above 0 and at most high - low")
    # A hair more: 0.3 / 0.1 is 2.999...
    count = int((high - low) / step * (1 + 1e-9)) + 1
    return lambda random: round(low + step * int(random.integers(count)), 12)


def loguniform(low: float, high: float) -> Draw:
    """A real number, low ≤ x < high, whose logarithm is uniform: for rates and weights."""
    low, high = _range(low, high, above_zero=True)
    return lambda random: math.exp(random.uniform(math.log(low), math.log(high)))


def randint(low: float, high: float) -> Draw:
    """A whole number, low ≤ x < high (high itself is not drawn, as in NumPy and Ray Tune)."""
    first, end = _whole_range(low, high)
    return lambda random: int(random.integers(first, end))


def lograndint(low: float, high: float) -> Draw:
    """A whole number, low ≤ x < high, whose logarithm is uniform."""
    first, end = _whole_range(low, high)
    low, high = _range(first, end, above_zero=True)
    return lambda random: min(end - 1, int(math.exp(random.uniform(math.log(low), math.log(high)))))


SPACES: dict[str, Callable[..., Draw]] = {
    "choice": choice,
    "uniform": uniform,
    "quniform": quniform,
    "loguniform": loguniform,
    "randint": randint,
    "lograndint": lograndint,
}


def read(space: Mapping[str, Any]) -> dict[str, Draw]:
    """Setting (dotted) → its distribution, for the `space` of a settings file.

    Dots and nesting mean the same: `optimizer.lr: ...` and `optimizer: {lr: ...}`, the later one wins. Raises
    ConfigError for an unknown distribution or one whose arguments do not fit.
    """
    if not space:
        raise ConfigError(f"space is empty: name at least one training setting and its distribution, {EXAMPLE}.")
    return {key: distribution(key, spec) for key, spec in _leaves(space)}


def distribution(key: str, spec: Any) -> Draw:
    """What `spec`, such as {uniform: [0, 1]}, says of the setting `key`."""
    where = f"space.{key}"
    if not isinstance(spec, Mapping) or len(spec) != 1:
        raise ConfigError(f"{where} must be one distribution and its arguments, {EXAMPLE}; got {spec!r}.")
    ((name, arguments),) = spec.items()
    if name not in SPACES:
        raise ConfigError(f"{where}: {unknown_name('distribution', str(name), SPACES)}.")
    if not isinstance(arguments, list | tuple):
        raise ConfigError(f"{where}: the arguments of '{name}' must be a list, {EXAMPLE}; got {arguments!r}.")
    function = SPACES[name]
    try:
        inspect.signature(function).bind(*arguments)
        return function(*(arguments if name == "choice" else map(_number, arguments)))
    except (TypeError, ValueError) as error:
        form = ", ".join(inspect.signature(function).parameters)
        raise ConfigError(f"{where}: '{name}' takes [{form}]: {error}; got {list(arguments)}.") from error


def draw(distributions: Mapping[str, Draw], seed: int, index: int) -> dict[str, Any]:
    """The values of trial number `index`: one for each setting."""
    return {
        key: one(np.random.default_rng([seed, index, zlib.crc32(key.encode())])) for key, one in distributions.items()
    }


def placed(tree: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of the settings `tree` with each dotted key of `values` set."""
    result: dict[str, Any] = copy.deepcopy(dict(tree))
    for key, value in values.items():
        *parents, last = key.split(".")
        node = result
        for name in parents:
            child = node.setdefault(name, {})
            if not isinstance(child, dict):
                raise ConfigError(f"space.{key} cannot be searched: '{name}' is a value, not a group of settings.")
            node = child
        node[last] = value
    return result


def _leaves(space: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in space.items():
        # A group of settings holds mappings only; a distribution holds its list of arguments.
        if isinstance(value, Mapping) and value and all(isinstance(inner, Mapping) for inner in value.values()):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _number(value: Any) -> float:
    if isinstance(value, bool):
        raise ValueError(f"{value} is not a number")
    # YAML 1.1 reads 1e-3, without a point, as text.
    number: float = float(value) if isinstance(value, str) else value
    return number


def _range(low: float, high: float, above_zero: bool = False) -> tuple[float, float]:
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError("low must be below high")
    if above_zero and low <= 0:
        raise ValueError("low must be above 0")
    return float(low), float(high)


def _whole_range(low: float, high: float) -> tuple[int, int]:
    low, high = _range(low, high)
    if low != int(low) or high != int(high):
        raise ValueError("low and high must be whole numbers")
    return int(low), int(high)
