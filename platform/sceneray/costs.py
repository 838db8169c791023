"""What a run cost, and what of it was spent twice. Nothing here reads or writes.

An attempt costs its seconds times the price of its nodes. Wasted is what nothing came of: an attempt's time after the
snapshot that its successors went on from, and the start-up of every attempt but the first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from sceneray.errors import ConfigError
from sceneray.status import Status

DEFAULT = "default"  # the price of node types that the table does not name
_HOUR_S = 3600.0


@dataclass(frozen=True)
class Account:
    """The sum over the attempts of a run. Costs are in the currency of the prices."""

    cost: float
    seconds: float
    wasted_cost: float
    wasted_seconds: float
    redone_steps: int  # steps that were trained more than once
    restarts: int
    cost_per_epoch: float | None  # None before the first step


def price_per_hour(nodes: Mapping[str, int], table: Mapping[str, float]) -> float:
    """What `nodes` (type → how many) cost in an hour by `table` (type, or 'default', → price); 0 without a table.

    Raises ConfigError that names the types without a price.
    """
    if not table:
        return 0.0
    unpriced = sorted(kind for kind, count in nodes.items() if count and kind not in table)
    if unpriced and DEFAULT not in table:
        raise ConfigError(
            f"cost.price_per_hour must price every node type, or '{DEFAULT}' for the others; without a price: "
            f"{', '.join(unpriced)}. It has: {', '.join(sorted(table))}."
        )
    return float(sum(count * table.get(kind, table.get(DEFAULT, 0.0)) for kind, count in nodes.items()))


def cost_of(seconds: float, price: float) -> float:
    """The cost of `seconds` on nodes that cost `price` in an hour."""
    return seconds / _HOUR_S * price


def cost_so_far(earlier: Sequence[Status], current_seconds: float, current_price: float) -> float:
    """Cost of the `earlier` attempts and of the present one, which is not among them."""
    return sum(cost_of(status.seconds, status.price_per_hour) for status in earlier) + cost_of(
        current_seconds, current_price
    )


def account(statuses: Sequence[Status]) -> Account:
    """The account of a run from the statuses of its attempts, first to last."""
    wasted = [wasted_seconds(statuses, index) for index in range(len(statuses))]
    cost = cost_so_far(statuses, 0.0, 0.0)
    epochs = statuses[-1].epoch if statuses else 0.0
    return Account(
        cost=cost,
        seconds=sum(status.seconds for status in statuses),
        wasted_cost=sum(cost_of(s, status.price_per_hour) for s, status in zip(wasted, statuses, strict=True)),
        wasted_seconds=sum(wasted),
        redone_steps=sum(max(0, status.step - after.from_step) for status, after in pairwise(statuses)),
        restarts=max(0, len(statuses) - 1),
        cost_per_epoch=cost / epochs if epochs > 0 else None,
    )


def wasted_seconds(statuses: Sequence[Status], index: int) -> float:
    """Seconds of one attempt that nothing came of: from 0 to all of them."""
    status = statuses[index]
    startup = 0.0
    if index > 0:  # before a first step, all there is of an attempt is start-up
        startup = status.seconds if status.first_step_after_s is None else status.first_step_after_s
    # Where a successor's checkpoint was damaged, a later one goes back further: the lowest of them counts.
    went_on_from = min((later.from_step for later in statuses[index + 1 :]), default=None)
    lost = 0.0 if went_on_from is None else status.seconds - _kept_until(status, went_on_from)
    return min(status.seconds, startup + lost)


def _kept_until(status: Status, step: int) -> float:
    """The age of an attempt when it had done what is left of it: its work up to `step`."""
    if step == status.saved_step and status.saved_after_s is not None:
        return min(status.saved_after_s, status.seconds)
    first_s, first = status.first_step_after_s, status.from_step + 1
    if step < first or first_s is None:
        return 0.0
    if step >= status.step:
        return status.seconds
    first_s = min(first_s, status.seconds)
    return first_s + (step - first) / (status.step - first) * (status.seconds - first_s)
