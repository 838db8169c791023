"""What computes a bundle's scores: PyTorch, PyTorch compiled, PyTorch in CUDA graphs, or ONNX Runtime.

Each gives the same function, batch → scores, up to rounding; which is fastest depends on the network and on the
machine (docs/benchmarks.md), so it is measured and not guessed. To add one: a function like those below, and a line in
RUNTIMES.

B batch, C classes, H W the images' height and width, h w the scores': H and W over the output stride, rounded up.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from sceneray import devices, onnx_graph
from sceneray.bundle import GRAPH, Bundle
from sceneray.cuda_graphs import GraphedScores
from sceneray.errors import BundleError, ConfigError, unknown_name
from sceneray.models.pspnet import PSPNet

log = logging.getLogger(__name__)

# uint8 [B, H, W, 3] in host memory; PyTorch's runtimes take a tensor that lies on the device, too.
Batch = np.ndarray[Any, np.dtype[np.uint8]] | Tensor
# Batch → float32 [B, C, h, w] on the runtime's device, before the last upsampling.
Scorer = Callable[[Batch], Tensor]
# As in training: auto is bf16 on GPUs that compute in it, else fp32.
Precision = Literal["auto", "fp32", "bf16"]


@dataclass(frozen=True)
class Way:
    """How a runtime computes."""

    device: torch.device
    threads: int | None = None  # of a CPU; None: as many as PyTorch takes here
    dtype: torch.dtype | None = None  # of the convolutions; None: float32


def best(bundle: Bundle, device: torch.device) -> str:
    """The runtime to serve a bundle with: ONNX Runtime on a CPU, where the bundle has a graph for it and the package is
    there; it was the fastest for every network measured (docs/benchmarks.md). Else PyTorch.
    """
    usable = device.type == "cpu" and bundle.graph is not None and find_spec("onnxruntime") is not None
    return "onnx" if usable else "torch"


def on(device: torch.device) -> list[str]:
    """The runtimes that compute on such a device."""
    return [name for name in RUNTIMES if ONLY_ON.get(name, device.type) == device.type]


def start(
    name: str,
    bundle: Bundle,
    device: torch.device,
    threads: int | None = None,
    precision: Precision = "fp32",
) -> Scorer:
    """The runtime called `name`, ready to compute.

    `threads`: cores that one batch may use on a CPU; None: as many as PyTorch takes here. `precision`: of the
    convolutions; the scores are float32 in any. Raises ConfigError for an unknown name or precision, a device that the
    runtime does not compute on, or a package that is not installed.
    """
    if name not in RUNTIMES:
        raise ConfigError(unknown_name("runtime", name, RUNTIMES))
    if threads is not None and threads < 1:
        raise ConfigError(f"threads must be at least 1, got {threads}.")
    if name not in on(device):
        raise ConfigError(
            f"the runtime '{name}' computes on {PLACES[ONLY_ON[name]]}, and the device is {device}. Use "
            f"{' or '.join(on(device))}."
        )
    dtype = dtype_of(precision, device)
    if name == "onnx" and dtype is not None:
        raise ConfigError(f"the runtime 'onnx' computes in fp32, got precision '{precision}'. Use auto or fp32.")
    log.info("%s is computed by %s on %s in %s", bundle.url, name, device, dtype or torch.float32)
    return RUNTIMES[name](bundle, Way(device, threads, dtype))


def dtype_of(precision: str, device: torch.device) -> torch.dtype | None:
    """What `precision` means on `device`: bfloat16, or None for float32. Raises ConfigError for an unknown word."""
    if precision not in get_args(Precision):
        raise ConfigError(unknown_name("precision", precision, get_args(Precision)))
    return devices.autocast_dtype(precision, device)


def eager(bundle: Bundle, way: Way) -> Scorer:
    """PyTorch as it is, channels_last. `threads` counts for all of PyTorch in this process."""
    return _on_device(_scores_of(bundle, way), way.device)


def compiled(bundle: Bundle, way: Way) -> Scorer:
    """PyTorch's compiler, with free sizes; on a CPU it needs a C++ compiler beside it.

    It compiles while the first batches run, a minute in all: once for one image, once for several, and again for a
    size that its assumptions exclude. Send such batches before the first real one.
    """
    scores = _scores_of(bundle, way)
    fast = torch.compile(scores, dynamic=True)

    def either(batch: Tensor) -> Tensor:
        # torch 2.14.1 compiles this network to one that answers NaN for two images whose features have a single row.
        return scores(batch) if min(batch.shape[1:3]) <= bundle.min_side else fast(batch)

    return _on_device(either, way.device)


def graphed(bundle: Bundle, way: Way) -> Scorer:
    """PyTorch as it is, its launches recorded once for each shape of a batch: see `sceneray.cuda_graphs`.

    The first batch of a shape records, which takes a few passes. Shapes beyond those that it keeps run as with `torch`.
    """
    fast = GraphedScores(_scores_of(bundle, way), way.device)
    return lambda batch: fast(torch.as_tensor(batch))


def onnx(bundle: Bundle, way: Way) -> Scorer:
    """ONNX Runtime on the CPU, with the bundle's graph or one written here where the bundle has none.

    Seen on x86-64: an image's scores are the same bits in any batch and with any number of threads. PyTorch's are not.
    """
    session = _session(bundle, way.threads or torch.get_num_threads())

    def scores(batch: Batch) -> Tensor:
        return torch.from_numpy(session.run([onnx_graph.OUTPUT], {onnx_graph.INPUT: np.asarray(batch)})[0])

    return scores


def _scores_of(bundle: Bundle, way: Way) -> Callable[[Tensor], Tensor]:
    if way.threads is not None:
        torch.set_num_threads(way.threads)
    net = _narrowed(bundle.model, way.dtype).to(way.device)

    def scores(batch: Tensor) -> Tensor:
        with devices.autocast(way.dtype, way.device):
            # [B, H, W, 3] in memory is what torch calls channels_last for [B, 3, H, W]: no copy.
            return net.scores(batch.permute(0, 3, 1, 2)).float()

    return scores


def _narrowed(net: PSPNet, dtype: torch.dtype | None) -> PSPNet:
    """A copy whose convolutions have their weights in `dtype`, as autocast would round them anew in every pass; the
    network itself for None. All else stays float32."""
    if dtype is None:
        return net
    net = copy.deepcopy(net)  # the bundle's weights may serve others
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            module.to(dtype)
    return net


def _on_device(scores: Callable[[Tensor], Tensor], device: torch.device) -> Scorer:
    @torch.inference_mode()
    def on_device(batch: Batch) -> Tensor:
        return scores(torch.as_tensor(batch).to(device))

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


RUNTIMES: dict[str, Callable[[Bundle, Way], Scorer]] = {
    "torch": eager,
    "compile": compiled,
    "cuda_graph": graphed,
    "onnx": onnx,
}
ONLY_ON = {"onnx": "cpu", "cuda_graph": "cuda"}  # runtimes that compute on one type of device
PLACES = {"cpu": "the CPU", "cuda": "a CUDA device"}
