"""Timing work on a device, and how fast it multiplies and copies: what a network's speed is held against."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable

import torch

Work = Callable[[], object]


def mean_seconds(work: Work, device: torch.device, warm_up: int, calls: int, repetitions: int) -> list[float]:
    """Seconds a call, one mean of `calls` for each repetition, after `warm_up` calls."""
    for _ in range(warm_up):
        work()
    return [seconds_a_call(work, device, calls) for _ in range(repetitions)]


def seconds_a_call(work: Work, device: torch.device, calls: int) -> float:
    """Seconds a call, the mean of `calls` between two moments at which the device has nothing left to do."""
    wait(device)
    started_at = time.perf_counter()
    for _ in range(calls):
        work()
    wait(device)
    return (time.perf_counter() - started_at) / calls


def matmul_flops_per_s(side: int, device: torch.device) -> float:
    """Operations per second of a square matrix product: bfloat16 on a GPU, float32 on a CPU; the median of some."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    return 2 * side**3 / _median_seconds(lambda: a @ b, device)


def copy_bytes_per_s(side: int, device: torch.device) -> float:
    """Bytes read and written per second by a copy on the device, of side × side × 8 floats."""
    source = torch.zeros(8, side, side, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _median_seconds(lambda: target.copy_(source), device)


def wait(device: torch.device) -> None:
    """Wait until the device has done everything it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def release(device: torch.device) -> None:
    """Free what the variant before held, and start counting memory anew."""
    gc.collect()
    if device.type == "cuda":
        torch.compiler.reset()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def name(device: torch.device) -> str:
    """What the device is called."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def _median_seconds(work: Work, device: torch.device) -> float:
    return statistics.median(mean_seconds(work, device, warm_up=3, calls=10, repetitions=5))
