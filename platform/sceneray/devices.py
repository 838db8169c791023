"""Where a computation runs and in which precision, decided by what the hardware can do, not by its name."""

from __future__ import annotations

import contextlib
import os
import platform
from typing import Any

import torch


def pick_device(gpu: bool | None = None, index: int = 0) -> torch.device:
    """The device to use: CUDA where there is one and `gpu` is not False, else the CPU."""
    if gpu is False or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", index)


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """The dtype for mixed precision, or None for plain float32.

    `auto` takes bfloat16 on CUDA devices that compute in it, and float32 on every CPU: even with AVX-512 BF16, PyTorch
    2.14's bfloat16 convolutions on channels_last tensors gave other sums from one run to the next, and sometimes NaN.
    """
    if precision == "fp32":
        return None
    if precision in ("bf16", "fp16"):
        return torch.bfloat16 if precision == "bf16" else torch.float16
    exact = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if exact else None


def set_determinism(on: bool, device: torch.device) -> None:
    """On a GPU: only kernels that repeat bit for bit, or the fastest ones, found by trying. CPUs need nothing."""
    if device.type != "cuda":
        return
    if on:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS asks for, read at its first use
    torch.use_deterministic_algorithms(on)
    torch.backends.cudnn.deterministic = on
    torch.backends.cudnn.benchmark = not on  # every crop has the same size: the search pays once


def autocast(dtype: torch.dtype | None, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """The autocast context for `dtype`; does nothing for None."""
    if dtype is None:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=dtype)


def cpu_threads(wanted: int | None, workers_here: int) -> int:
    """CPU threads for one worker: as told, else an equal share of the cores this process may use."""
    if wanted is not None:
        return wanted
    return max(1, usable_cores() // max(1, workers_here))


def usable_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def peak_memory(device: torch.device) -> int:
    """The most memory used so far, in bytes: of the CUDA device, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024
