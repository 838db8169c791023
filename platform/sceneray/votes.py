"""What the ranks of a step agreed on, read back without making the device wait."""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor

GPU_LAG = 2
Queue = deque[tuple[Tensor, torch.cuda.Event | None]]


class Votes:
    """The totals of steps, on their way from the device to the host.

    On a GPU the host works ahead of the device: totals are read GPU_LAG steps late, when their copy has long arrived.
    The lag is the same on every rank, so all of them act on the same step's votes. On a CPU there is nothing to wait
    for.
    """

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.lag = GPU_LAG if self.on_gpu else 0
        self._ballots: Queue = deque()  # not decided on yet
        self._rows: Queue = deque()  # not logged yet

    def put(self, totals: Tensor) -> None:
        """Totals of the step just launched, float64 [4] on the device."""
        entry: tuple[Tensor, torch.cuda.Event | None] = (totals, None)
        if self.on_gpu:
            host = torch.empty(totals.shape, dtype=totals.dtype, pin_memory=True)
            host.copy_(totals, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
            entry = (host, arrived)
        self._ballots.append(entry)
        self._rows.append(entry)

    def decided(self) -> list[Tensor]:
        """Totals to decide on now, each once, oldest first: the same ones on every rank, whatever was logged so far."""
        return _taken(self._ballots, self.lag)

    def rows(self) -> list[Tensor]:
        """Totals of all steps since the last call, oldest first; waits for the device."""
        return _taken(self._rows, 0)


def _taken(queue: Queue, leave: int) -> list[Tensor]:
    taken = []
    while len(queue) > leave:
        totals, arrived = queue.popleft()
        if arrived is not None:
            arrived.synchronize()
        taken.append(totals)
    return taken
