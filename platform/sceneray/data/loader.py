"""Batches for one rank, in the run's order, decoded and augmented.

PyTorch's DataLoader does the work; order and randomness come from `sceneray.data.order`, so the number of loader
processes changes speed and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from sceneray.config import AugmentSettings, TrainSettings
from sceneray.data import order
from sceneray.data.images import decode_image, decode_label
from sceneray.data.store import Split
from sceneray.data.transforms import augment


class Batch(NamedTuple):
    """One forward pass of one rank; B samples of the crop's size H×W."""

    images: Tensor  # uint8 [B, 3, H, W], RGB
    labels: Tensor  # uint8 [B, H, W], class ids, ignore_index = ignore
    seeds: Tensor  # int64 [B], dropout seeds
    positions: Tensor  # int64 [B], places in the run's order; -1 for a filler


class Item(NamedTuple):
    """One sample to prepare. A filler keeps a rank busy in a last batch with fewer samples than ranks; its label is
    all ignore, so it adds nothing to the loss."""

    position: int
    filler: bool = False


class TrainingSamples(Dataset[Batch]):
    """Positions of a run to augmented samples (a Batch without its first axis)."""

    def __init__(self, split: Split, samples: order.SampleOrder, settings: AugmentSettings, ignore_index: int) -> None:
        self.split = split
        self.samples = samples
        self.settings = settings
        self.ignore_index = ignore_index

    def __getitem__(self, item: Item) -> Batch:
        sample = self.split.read(self.samples[item.position])
        rng = order.augmentation_rng(self.samples.seed, item.position)
        image, label = augment(decode_image(sample.image), decode_label(sample.label), self.settings, rng)
        if item.filler:
            label = np.full_like(label, self.ignore_index)
        elif self.ignore_index != 255:
            label = np.where(label == 255, np.uint8(self.ignore_index), label)  # padding is always 255
        seed = order.dropout_seed(self.samples.seed, item.position)
        pixels = torch.from_numpy(image.copy()).permute(2, 0, 1)
        position = torch.tensor(-1 if item.filler else item.position)
        return Batch(pixels, torch.from_numpy(label.copy()), torch.tensor(seed), position)


class StepSampler(Sampler[list[Item]]):
    """The items of one rank: `accumulate` lists a step, from step `start` to the run's end."""

    def __init__(
        self, start: int, steps: int, positions: int, settings: TrainSettings, rank: int, workers: int
    ) -> None:
        self.steps = range(start, steps)
        self.positions = positions
        self.batch_size = settings.batch_size
        self.accumulate = settings.accumulate
        self.rank = rank
        self.workers = workers

    def __len__(self) -> int:
        return len(self.steps) * self.accumulate

    def __iter__(self) -> Iterator[list[Item]]:
        for step in self.steps:
            batch = order.step_positions(step, self.batch_size, self.positions)
            mine = order.share(batch, self.rank, self.workers)
            for part in range(self.accumulate):
                positions = order.share(mine, part, self.accumulate)
                yield [Item(p) for p in positions] or [Item(batch[0], filler=True)]


def training_loader(
    split: Split,
    settings: TrainSettings,
    ignore_index: int,
    start: int,
    steps: int,
    rank: int,
    workers: int,
    pin_memory: bool = False,
) -> Iterator[Batch]:
    """Batches of one rank from step `start` on; `settings.accumulate` of them make a step."""
    samples = sample_order(split.shard_rows, settings)
    positions = order.total_positions(samples.size, settings.epochs)
    processes = settings.data.loader_workers
    loader: DataLoader[Batch] = DataLoader(
        TrainingSamples(split, samples, settings.augment, ignore_index),
        batch_sampler=StepSampler(start, steps, positions, settings, rank, workers),
        num_workers=processes,
        # fork would copy file systems' threads and locks in the middle of their work (s3fs forbids it).
        multiprocessing_context="spawn" if processes else None,
        pin_memory=pin_memory,
    )
    return iter(loader)


def sample_order(shard_rows: Sequence[int], settings: TrainSettings) -> order.SampleOrder:
    """The order of a training split under `settings`."""
    return order.SampleOrder(shard_rows, settings.seed, settings.data.order, settings.data.window)
