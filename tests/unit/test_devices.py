"""Where a computation runs, and in which precision."""

from __future__ import annotations

import pytest
import torch

from sceneray import devices


def test_a_cpu_computes_in_float32_unless_told() -> None:
    """auto is float32 on a CPU, where bfloat16 is not repeatable; bf16 is taken when asked for."""
    cpu = torch.device("cpu")
    assert devices.autocast_dtype("auto", cpu) is None
    assert devices.autocast_dtype("fp32", cpu) is None
    assert devices.autocast_dtype("bf16", cpu) is torch.bfloat16


def test_autocast_follows_the_dtype() -> None:
    """Inside the context a product of matrices has the dtype; without one nothing changes."""
    cpu, matrix = torch.device("cpu"), torch.ones(2, 2)
    with devices.autocast(torch.bfloat16, cpu):
        assert (matrix @ matrix).dtype is torch.bfloat16
    with devices.autocast(None, cpu):
        assert (matrix @ matrix).dtype is torch.float32


@pytest.mark.parametrize(("wanted", "workers", "expected"), [(3, 2, 3), (None, 1, 4), (None, 3, 1), (None, 9, 1)])
def test_workers_share_the_cores(
    monkeypatch: pytest.MonkeyPatch, wanted: int | None, workers: int, expected: int
) -> None:
    """Each worker takes an equal share of the cores, at least one, unless told."""
    monkeypatch.setattr(devices, "usable_cores", lambda: 4)
    assert devices.cpu_threads(wanted, workers) == expected


def test_no_gpu_is_used_when_refused() -> None:
    """gpu=False means the CPU, whatever the machine has."""
    assert devices.pick_device(gpu=False) == torch.device("cpu")


def test_peak_memory_is_that_of_this_process() -> None:
    """A process that imported torch has used more than 50 MiB."""
    assert devices.peak_memory(torch.device("cpu")) > 50 * 2**20
