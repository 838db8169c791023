"""Scoring a network on a split: every image once, at its own size."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from sceneray import checkpoint as checkpoints
from sceneray import devices
from sceneray.checkpoint import Checkpoint
from sceneray.data.cache import ShardCache
from sceneray.data.images import decode_image, decode_label
from sceneray.data.store import Split, Store
from sceneray.errors import DataError
from sceneray.metrics import confusion_matrix
from sceneray.models.pspnet import PSPNet

# Images of equal size run together up to this many pixels; a picture above it runs alone.
PIXELS_PER_BATCH = 1_500_000


def evaluate_indices(
    model: PSPNet,
    split: Split,
    indices: Sequence[int],
    num_classes: int,
    ignore_index: int,
    device: torch.device | str = "cpu",
    on_images: Callable[[int], None] | None = None,
) -> np.ndarray:
    """Confusion matrix int64 [C, C] (rows truth, columns prediction) over the images at `indices`.

    Nothing is padded or resized: images of equal size, consecutive in `indices`, share a batch. `on_images` is told
    after every batch how many images were scored. Matrices over disjoint indices add up to that of their union.
    """
    total = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)
    was_training = model.training
    model.eval()
    for images, labels in _batches(split, indices):
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2).to(device)  # NHWC in memory is channels_last
        truth = torch.from_numpy(labels).to(device)
        total += confusion_matrix(model.predict(pixels), truth, num_classes, ignore_index)
        if on_images is not None:
            on_images(len(images))
    model.train(was_training)
    matrix: np.ndarray = total.cpu().numpy()
    return matrix


def evaluate_share(url: str, store_url: str, split: str, rank: int, workers: int) -> np.ndarray:
    """Confusion matrix int64 [C, C] of the checkpoint at `url` over one of `workers` equal shares of a split."""
    device = devices.pick_device()
    if device.type == "cpu":
        torch.set_num_threads(devices.cpu_threads(None, workers))
    saved = checkpoints.load(url)
    store = Store.open(store_url)
    data = store.split(split, ShardCache(saved.settings.data.cache, saved.settings.data.cache_gb))
    model = checkpoints.build(saved).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    indices = rank_indices(len(data), rank, workers)
    with devices.autocast(devices.autocast_dtype(saved.settings.precision, device), device):
        return evaluate_indices(model, data, indices, len(store.classes), store.ignore_index, device)


def check_classes(saved: Checkpoint, store: Store) -> None:
    """Raise DataError where a store's classes are not those the checkpoint was trained on."""
    trained, found = [c.name for c in saved.classes], [c.name for c in store.classes]
    if trained != found:
        differing = next(
            (i for i, (a, b) in enumerate(zip(trained, found, strict=False)) if a != b), min(len(trained), len(found))
        )
        raise DataError(
            f"{store.url} has other classes than {saved.url} was trained on: {len(found)} against {len(trained)}, "
            f"differing from class {differing} on. Give the store it was trained on, or fine-tune with init_from."
        )


def rank_indices(size: int, rank: int, workers: int) -> range:
    """The images of one of `workers` ranks: together every image exactly once, none twice."""
    return range(rank, size, workers)


def _batches(split: Split, indices: Sequence[int]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    images: list[np.ndarray] = []
    labels: list[np.ndarray] = []
    for index in indices:
        sample = split.read(index)
        image, label = decode_image(sample.image), decode_label(sample.label)
        full = images and (len(images) + 1) * label.size > PIXELS_PER_BATCH
        if images and (full or image.shape != images[0].shape):
            yield np.stack(images), np.stack(labels)
            images, labels = [], []
        images.append(image)
        labels.append(label)
    if images:
        yield np.stack(images), np.stack(labels)
