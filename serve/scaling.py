"""How many model replicas there should be: a pure function of what they report, and Ray's policy around it.

Up, fast, on the pixels that are queued or on the model: so many replicas that each has at most `target_pixels`. Down,
slowly: only where what the replicas do now would keep fewer of them busy for no more than LOW of their time, for all of
`down_delay_s`, and then only as far as the highest number that was wanted in that time.

Queued pixels alone would flap: where two replicas keep up with a load that is too much for one, their queues are empty,
and one looks enough, until it is alone. The time for which replicas are busy tells how much there is to do however
many share it. Between the two thresholds nothing changes; that band is the hysteresis.

Serve pickles the policy by value and runs it in its controller: this file imports nothing of ours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

LOW = 0.7  # the remaining replicas may be busy for so much of their time, and hold so much of the target, no more

State = dict[str, float]


@dataclass(frozen=True)
class Rule:
    """When the number changes. `zero_delay_s`: time without any request after which the last replica ends."""

    target_pixels: float
    up_delay_s: float = 5.0
    down_delay_s: float = 120.0
    zero_delay_s: float = 600.0


@dataclass(frozen=True)
class Load:
    """What is seen of all replicas together, as means over the look-back time."""

    pixels: float = 0.0  # in queues, on models, and of the requests that no replica has taken yet
    busy: float = 0.0  # replicas' worth of time in forward passes: 1.5 is two replicas at three quarters
    requests: float = 0.0
    running: int = 0  # replicas that report


def wanted(rule: Rule, load: Load, replicas: int) -> int:
    """The number of replicas that the load asks for where `replicas` are there or on their way; without bounds."""
    if load.requests <= 0 and load.pixels <= 0:
        # One that starts is waited for, so that a model that cannot be loaded is noticed even if nobody asks.
        return 0 if load.running else min(1, replicas)
    # A replica without a request of its own would not help.
    most = max(1, math.ceil(load.requests))
    up = min(math.ceil(load.pixels / rule.target_pixels), most)
    if up > replicas:
        return up
    if load.busy > LOW * load.running:
        return max(1, replicas)  # at their limit they hide how much there is to do
    enough = max(1, math.ceil(load.busy / LOW), math.ceil(load.pixels / (LOW * rule.target_pixels)))
    return min(max(1, replicas), enough)


def decide(
    rule: Rule, load: Load, replicas: int, bounds: tuple[int, int], now: float, state: State
) -> tuple[int, State]:
    """(the number of replicas that there should be from `now` on, the state to hand in at the next decision).

    `replicas`: how many there should be at present. `now` in seconds of any clock.
    """
    least, most = bounds
    want = min(most, max(least, wanted(rule, load, replicas)))
    if want == replicas:
        return replicas, {}
    direction = 1.0 if want > replicas else -1.0
    same = state.get("direction") == direction
    since = state["since"] if same else now
    if direction > 0:
        delay_s, goal = rule.up_delay_s, want
    elif replicas > 1:
        goal = max(1, want, int(state["highest"]) if same else 0)
        delay_s = rule.down_delay_s
    else:
        delay_s, goal = rule.zero_delay_s, want
    if now - since >= delay_s:
        return goal, {}
    return replicas, {"direction": direction, "since": since, "highest": float(goal)}


class QueuedPixels:
    """`decide` as an autoscaling policy of Ray Serve, over what SegmenterReplica.record_autoscaling_stats reports."""

    def __init__(self, **rule: float) -> None:
        """Fields of Rule."""
        self._rule = Rule(**rule)

    def __call__(self, ctx: Any) -> tuple[int, dict[str, Any]]:
        """(replicas, state) for Ray's AutoscalingContext. Ray applies no delay of its own where they are set to 0."""
        totals = {name: sum(of.values()) for name, of in (ctx.aggregated_metrics or {}).items()}
        pixels, requests = totals.get("pixels", 0.0), totals.get("requests", 0.0)
        queued = ctx.total_queued_requests or 0.0
        # What waits for a replica to take it is as large as what they have, or last had.
        each = pixels / requests if requests > 0 else ctx.policy_state.get("pixels_each", 0.0)
        load = Load(
            pixels=pixels + queued * each,
            busy=totals.get("busy", 0.0),
            requests=requests + queued,
            running=ctx.current_num_replicas,
        )
        bounds = (ctx.capacity_adjusted_min_replicas, ctx.capacity_adjusted_max_replicas)
        goal, state = decide(self._rule, load, ctx.target_num_replicas, bounds, ctx.current_time, ctx.policy_state)
        return goal, {**state, "pixels_each": each}
