"""CUDA graphs: a forward pass of one shape, recorded once and then launched as a whole.

A small batch leaves a GPU waiting for Python, which launches its kernels one by one; a graph launches them at once. It
works on memory of its own, so images are copied in and scores out. How to record (a few passes on a side stream first,
one memory pool for graphs that never run at the same time) is as PyTorch's notes on CUDA semantics say.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")
Scores = Callable[[Tensor], Tensor]

MOST = 16  # graphs; each holds its scores and its share of one memory pool
PATIENCE = 256  # batches for which a graph is kept though none is of its shape
WARM_UP = 3  # passes before recording, in which libraries choose kernels and take their memory

# One graph is recorded at a time in a process: PyTorch asks for it, and a replica may prepare a second model.
_recording = threading.Lock()


class Slots(Generic[K, V]):
    """At most `most` values by key. The least recently used one makes room, but only after `patience` look-ups in which
    nobody wanted it: with more keys in turn than slots, each would else drive out the next one needed."""

    def __init__(self, most: int, patience: int) -> None:
        self._most, self._patience = most, patience
        self._values: dict[K, V] = {}  # the least recently used first
        self._used_at: dict[K, int] = {}
        self._now = 0

    def __len__(self) -> int:
        return len(self._values)

    def get(self, key: K) -> V | None:
        """The value of `key`, now the most recently used; None where there is none."""
        self._now += 1
        if key not in self._values:
            return None
        self._used_at[key] = self._now
        value = self._values[key] = self._values.pop(key)
        return value

    def make_room(self) -> bool:
        """Whether one more value may be put in; the one whose patience is over is dropped for it."""
        if len(self) < self._most:
            return True
        oldest = next(iter(self._values))
        if self._now - self._used_at[oldest] <= self._patience:
            return False
        del self._values[oldest], self._used_at[oldest]
        return True

    def put(self, key: K, value: V) -> None:
        """Keep `value`; `make_room` was asked before."""
        self._values[key], self._used_at[key] = value, self._now


@dataclass(frozen=True)
class Graph:
    """A recorded pass: `replay` reads `images` and writes `scores`."""

    recorded: torch.cuda.CUDAGraph
    images: Tensor
    scores: Tensor


class GraphedScores:
    """A function of tensors, replayed where a graph of the batch's shape is there; else recorded, or run as it is.

    Threads may share it as long as all compute on one stream, which they do unless they choose others.
    """

    def __init__(self, scores: Scores, device: torch.device, most: int = MOST, patience: int = PATIENCE) -> None:
        """`scores` computes on `device`, a CUDA device, from a batch there."""
        self._scores, self._device = scores, device
        self._graphs: Slots[tuple[int, ...], Graph] = Slots(most, patience)
        self._stream = torch.cuda.Stream(device)  # one for all: libraries keep a workspace for each stream
        self._pool = torch.cuda.graph_pool_handle()
        self._lock = threading.Lock()  # from the copy in to the copy out nobody else may replay

    @torch.inference_mode()
    def __call__(self, batch: Tensor) -> Tensor:
        """The scores of `batch` (on the device, or in host memory). Raises torch.OutOfMemoryError."""
        shape = tuple(batch.shape)
        with self._lock:
            graph = self._graphs.get(shape)
            if graph is None and self._graphs.make_room():
                graph = self._record(batch)
                self._graphs.put(shape, graph)
            if graph is not None:
                graph.images.copy_(batch)
                graph.recorded.replay()
                return graph.scores.clone()
        return self._scores(batch.to(self._device))

    def _record(self, batch: Tensor) -> Graph:
        images = batch.to(self._device, copy=True)
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            for _ in range(WARM_UP):
                self._scores(images)
        current.wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        # thread_local: other threads may allocate memory meanwhile, as another model's passes do.
        recording = torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local")
        with _recording, recording:
            scores = self._scores(images)
        return Graph(graph, images, scores)
