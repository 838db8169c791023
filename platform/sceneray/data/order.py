"""Which sample comes when: a pure function of (seed, position), the same for any number of workers.

Position p belongs to epoch p // N, where N is the number of training samples; inside an epoch every sample comes
exactly once. Step s of a run takes the positions [s·B, (s+1)·B) for the global batch size B: batches run on over epoch
ends, so only a run's last batch can be smaller. To resume, one integer is enough.

Random bits come from Philox (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), which is
counter-based: any epoch or sample is reached directly. Raw bits are used where the order depends on them, since NumPy
promises those, not `Generator.permutation`, to stay the same between its versions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

# Disjoint counter ranges of one Philox key, so that an epoch's order and a sample's augmentation share no bits.
_AUGMENT, _ORDER, _DROPOUT, _SHARDS = 0, 1, 2, 3


def _philox(seed: int, index: int, purpose: int) -> np.random.Philox:
    return np.random.Philox(key=np.array([seed, index], np.uint64), counter=np.array([0, 0, 0, purpose], np.uint64))


def permutation(seed: int, index: int, n: int, purpose: int = _ORDER) -> np.ndarray:
    """A permutation of range(n), int64 [n], from (seed, index)."""
    return np.argsort(_philox(seed, index, purpose).random_raw(n), kind="stable")


def augmentation_rng(seed: int, position: int) -> np.random.Generator:
    """The generator that augments the sample at `position`."""
    return np.random.Generator(_philox(seed, position, _AUGMENT))


def dropout_seed(seed: int, position: int) -> int:
    """The seed, in [0, 2^63), of the dropout masks for the sample at `position`."""
    return int(_philox(seed, position, _DROPOUT).random_raw()) >> 1


def global_order(shard_rows: Sequence[int], seed: int, epoch: int) -> np.ndarray:
    """All samples of one epoch in random order, int64 [N]."""
    return permutation(seed, epoch, sum(shard_rows))


def block_order(shard_rows: Sequence[int], seed: int, epoch: int, window: int) -> np.ndarray:
    """Shards in random order, samples shuffled inside windows of that sequence, int64 [N].

    A node then needs only the few shards around its window on disk.
    """
    starts = np.cumsum([0, *shard_rows])
    shards = permutation(seed, epoch, len(shard_rows), _SHARDS)
    sequence = np.concatenate([np.arange(starts[s], starts[s + 1]) for s in shards])
    keys = _philox(seed, epoch, _ORDER).random_raw(len(sequence))
    windows = np.arange(len(sequence)) // window
    # lexsort is stable: by window first, by random key inside it.
    return sequence[np.lexsort((keys, windows))]


class SampleOrder:
    """Positions to sample indices for one split; keeps the epoch it used last."""

    def __init__(self, shard_rows: Sequence[int], seed: int, kind: str = "global", window: int = 4096) -> None:
        self.shard_rows = tuple(shard_rows)
        self.size = sum(shard_rows)
        self.seed = seed
        self.kind = kind
        self.window = window
        self._epoch: tuple[int, np.ndarray] | None = None

    def epoch(self, epoch: int) -> np.ndarray:
        """The sample indices of one epoch in their order, int64 [N]."""
        if self._epoch is None or self._epoch[0] != epoch:
            if self.kind == "global":
                order = global_order(self.shard_rows, self.seed, epoch)
            else:
                order = block_order(self.shard_rows, self.seed, epoch, self.window)
            self._epoch = (epoch, order)
        return self._epoch[1]

    def __getitem__(self, position: int) -> int:
        return int(self.epoch(position // self.size)[position % self.size])


def total_positions(size: int, epochs: float) -> int:
    """How many samples a run of `epochs` passes over `size` samples uses, at least one."""
    return max(1, round(size * epochs))


def total_steps(positions: int, batch_size: int) -> int:
    """How many steps a run of `positions` samples takes."""
    return math.ceil(positions / batch_size)


def step_positions(step: int, batch_size: int, positions: int) -> range:
    """The positions of step `step` (from 0); shorter than `batch_size` only for the run's last."""
    return range(step * batch_size, min((step + 1) * batch_size, positions))


def share(batch: range, rank: int, workers: int) -> range:
    """The part of a global batch that one of `workers` ranks takes: contiguous, sizes differ by one at most."""
    small, extra = divmod(len(batch), workers)
    start = rank * small + min(rank, extra)
    return batch[start : start + small + (rank < extra)]


def evaluation_steps(size: int, batch_size: int, positions: int, every: int) -> list[int]:
    """Numbers of finished steps after which to evaluate: where each `every`-th epoch ends, and the run's end."""
    end = total_steps(positions, batch_size)
    epochs = range(every, positions // size + 1, every)
    return sorted({math.ceil(epoch * size / batch_size) for epoch in epochs} | {end})
