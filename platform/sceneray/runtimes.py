"""What computes a bundle's scores: PyTorch, PyTorch compiled, or ONNX Runtime.

Each gives the same function, batch → scores, up to rounding; which is fastest depends on the network and on the
machine (docs/benchmarks.md), so it is measured and not guessed. To add one: a function like those below, and a line in
RUNTIMES.

B batch, C classes, H W the images' height and width, h w the scores': H and W over the output stride, rounded up.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sceneray import onnx_graph
from sceneray.bundle import GRAPH, Bundle
from sceneray.errors import BundleError, ConfigError, unknown_name

Batch = np.ndarray[Any, np.dtype[np.uint8]]
# uint8 [B, H, W, 3] → float32 [B, C, h, w] on the runtime's device, before the last upsampling.
Scorer = Callable[[Batch], Tensor]


def best(bundle: Bundle, device: torch.device) -> str:
    """The runtime to serve a bundle with: ONNX Runtime on a CPU, where the bundle has a graph for it and the package is
    there; it was the fastest for every network measured (docs/benchmarks.md). Else PyTorch.
    """
    usable = device.type == "cpu" and bundle.graph is not None and find_spec("onnxruntime") is not None
    return "onnx" if usable else "torch"


def start(name: str, bundle: Bundle, device: torch.device, threads: int | None = None) -> Scorer:
    """The runtime called `name`, ready to compute.

    `threads`: cores that one batch may use on a CPU; None: as many as PyTorch takes here. Raises ConfigError for an
    unknown name, a device that the runtime does not compute on, or a package that is not installed.
    """
    if name not in RUNTIMES:
        raise ConfigError(unknown_name("runtime", name, RUNTIMES))
    if threads is not None and threads < 1:
        raise ConfigError(f"threads must be at least 1, got {threads}.")
    return RUNTIMES[name](bundle, device, threads)


def eager(bundle: Bundle, device: torch.device, threads: int | None = None) -> Scorer:
    """PyTorch as it is, channels_last. `threads` counts for all of PyTorch in this process."""
    return _on_device(_scores_of(bundle, device, threads), device)


def compiled(bundle: Bundle, device: torch.device, threads: int | None = None) -> Scorer:
    """PyTorch's compiler, with free sizes; on a CPU it needs a C++ compiler beside it.

    It compiles while the first batches run, a minute in all: once for one image, once for several, and again for a
    size that its assumptions exclude. Send such batches before the first real one.
    """
    scores = _scores_of(bundle, device, threads)
    fast = torch.compile(scores, dynamic=True)

    def either(batch: Tensor) -> Tensor:
        # torch 2.14.1 compiles this network to one that answers NaN for two images whose features have a single row.
        return scores(batch) if min(batch.shape[1:3]) <= bundle.min_side else fast(batch)

    return _on_device(either, device)


def onnx(bundle: Bundle, device: torch.device, threads: int | None = None) -> Scorer:
    """ONNX Runtime on the CPU, with the bundle's graph or one written here where the bundle has none.

    Seen on x86-64: an image's scores are the same bits in any batch and with any number of threads. PyTorch's are not.
    """
    if device.type != "cpu":
        raise ConfigError(f"the runtime 'onnx' computes on the CPU, and the device is {device}. Use torch or compile.")
    session = _session(bundle, threads or torch.get_num_threads())

    def scores(batch: Batch) -> Tensor:
        return torch.from_numpy(session.run([onnx_graph.OUTPUT], {onnx_graph.INPUT: batch})[0])

    return scores


def _scores_of(bundle: Bundle, device: torch.device, threads: int | None) -> Callable[[Tensor], Tensor]:
    if threads is not None:
        torch.set_num_threads(threads)
    net = bundle.model.to(device)
    # [B, H, W, 3] in memory is what torch calls channels_last for [B, 3, H, W]: no copy.
    return lambda batch: net.scores(batch.permute(0, 3, 1, 2))


def _on_device(scores: Callable[[Tensor], Tensor], device: torch.device) -> Scorer:
    @torch.inference_mode()
    def on_device(batch: Batch) -> Tensor:
        return scores(torch.from_numpy(batch).to(device))

    return on_device


def _session(bundle: Bundle, threads: int) -> Any:
    """ONNX Runtime's session of the bundle's graph."""
    try:
        import onnxruntime
        from onnxruntime.capi import onnxruntime_pybind11_state as kinds
    except ImportError as error:
        raise ConfigError(
            "the runtime 'onnx' needs the package onnxruntime, which is not installed: pip install 'sceneray[onnx]'."
        ) from error
    onnxruntime.disable_telemetry_events()
    options = onnxruntime.SessionOptions()
    # By default it takes every core of the machine and pins its threads, whatever share of it this process was given.
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # A thread that waits by spinning takes a core from the process beside it.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    graph = bundle.graph or onnx_graph.export(bundle.model)
    refused = (kinds.InvalidProtobuf, kinds.InvalidArgument, kinds.InvalidGraph, kinds.NotImplemented, kinds.Fail)
    try:
        return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    except refused as error:
        raise BundleError(
            f"{GRAPH} of the bundle at {bundle.url} cannot be run: {error} Export the bundle again, or choose another "
            "runtime."
        ) from error


# Called as f(bundle, device, threads).
RUNTIMES: dict[str, Callable[[Bundle, torch.device, int | None], Scorer]] = {
    "torch": eager,
    "compile": compiled,
    "onnx": onnx,
}
