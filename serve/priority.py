"""Who goes first where HTTP and a model share the CPU: short work before long work."""

from __future__ import annotations

import gc
import os
import sys
import threading

# Requests leave no cycles (tests/unit/serve/test_deadlines.py), so there is hardly anything to collect; yet to look for
# it among 200 requests that wait stopped the process for 0.1 to 0.25 s, every five in a flood (measured). Python's own
# number is 700.
SELDOM = 100_000


def step_back(nice: int) -> None:
    """Lower the priority of the calling thread, and of those it starts, by `nice` (0 to 19): whoever else wants the CPU
    goes first. Linux alone has a priority for each thread; elsewhere nothing changes."""
    if nice and sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), nice)


def collect_garbage_seldom() -> None:
    """For a process that answers HTTP: look for cycles after SELDOM new objects."""
    gc.set_threshold(SELDOM, *gc.get_threshold()[1:])
