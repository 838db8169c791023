"""What the ranks of a step agreed on, read back without making the device wait."""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor

GPU_LAG = 2


class Votes:
    """The totals of steps, on their way from the device to the host.

    On a GPU the host works ahead of the device: totals are read GPU_LAG steps late, when their copy has long arrived.
    The lag is the same on every rank, so all of them act on the same step's votes. On a CPU there is nothing to wait
    for.
    """

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.lag = GPU_LAG if self.on_gpu else 0
        self._under_way: deque[tuple[Tensor, torch.cuda.Event | None]] = deque()

    def put(self, totals: Tensor) -> None:
        """Totals of the step just launched, float64 [4] on the device."""
        if not self.on_gpu:
            self._under_way.append((totals, None))
            return
        host = torch.empty(totals.shape, dtype=totals.dtype, pin_memory=True)
        host.copy_(totals, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        self._under_way.append((host, arrived))

    def take(self, everything: bool = False) -> list[Tensor]:
        """Totals not taken yet, oldest first, on the host: those older than the lag, or all of them."""
        taken = []
        while len(self._under_way) > (0 if everything else self.lag):
            totals, arrived = self._under_way.popleft()
            if arrived is not None:
                arrived.synchronize()
            taken.append(totals)
        return taken
