"""Scores of a segmentation from one confusion matrix over the whole split.

The conventions (they move mIoU by whole points, so they are part of the number):

- Pixels whose truth is the ignore index count nowhere, whatever was predicted there.
- IoU of a class is TP / (TP + FP + FN) over all images together, not a mean over images.
- mIoU is the mean over the classes that occur in the truth or in a prediction, as mmsegmentation and torchmetrics have
  it. hszhao/semseg counts a class that occurs in neither as 0, so its numbers on such a split are lower.
- Mean accuracy is the mean recall over the classes that occur in the truth.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sceneray.data.store import ClassInfo
from sceneray.errors import DataError


def confusion_matrix(pred: Tensor, label: Tensor, num_classes: int, ignore_index: int) -> Tensor:
    """Pixels by truth (row) and prediction (column): int64 [C, C] on the tensors' device, without waiting for it.

    pred, label: uint8 or int64 of one shape; pred 0..C-1, label 0..C-1 or `ignore_index`. Matrices of parts add up.
    Raises DataError for another value on a CPU; on a GPU, where looking would stall it, such a value is a CUDA assert.
    """
    truth, guess = label.reshape(-1).long(), pred.reshape(-1).long()
    valid = truth != ignore_index
    if truth.device.type == "cpu":
        _check_range(truth[valid], "a label", num_classes)
        _check_range(guess, "a prediction", num_classes)
    # Cell 0 collects the ignored pixels. scatter_add_, because bincount looks at the values first: a stall on a GPU.
    cell = torch.where(valid, truth * num_classes + guess + 1, 0)
    counts = torch.zeros(num_classes**2 + 1, dtype=torch.int64, device=truth.device)
    counts.scatter_add_(0, cell, torch.ones_like(cell))
    return counts[1:].view(num_classes, num_classes)


@dataclass(frozen=True)
class Scores:
    """Scores in 0..1. Per class: None where the score has no meaning (see each)."""

    iou: list[float | None]  # None: neither in the truth nor predicted
    accuracy: list[float | None]  # recall; None: not in the truth
    share: list[float]  # of the truth's pixels
    miou: float
    pixel_accuracy: float
    mean_accuracy: float

    def as_dict(self, classes: Sequence[ClassInfo]) -> dict[str, Any]:
        """Plain JSON values; `classes` in the order of the matrix."""
        rows = zip(classes, self.iou, self.accuracy, self.share, strict=True)
        return {
            "miou": self.miou,
            "pixel_accuracy": self.pixel_accuracy,
            "mean_accuracy": self.mean_accuracy,
            "classes": [
                {"id": info.id, "name": info.name, "iou": iou, "accuracy": accuracy, "share": share}
                for info, iou, accuracy, share in rows
            ],
        }


def scores(matrix: Tensor | np.ndarray) -> Scores:
    """Scores of a confusion matrix int64 [C, C] (rows truth, columns prediction).

    Raises DataError where it holds no pixel.
    """
    counts = matrix.cpu().numpy() if isinstance(matrix, Tensor) else np.asarray(matrix)
    hits, truth, predicted = counts.diagonal(), counts.sum(axis=1), counts.sum(axis=0)
    total = int(truth.sum())
    if total == 0:
        raise DataError("there is nothing to score: every pixel of the truth is ignored. Check the split's labels.")
    iou = _ratios(hits, truth + predicted - hits)
    accuracy = _ratios(hits, truth)
    return Scores(
        iou=iou,
        accuracy=accuracy,
        share=[float(count / total) for count in truth],
        miou=_mean(iou),
        pixel_accuracy=float(hits.sum() / total),
        mean_accuracy=_mean(accuracy),
    )


def table(result: Scores, classes: Sequence[ClassInfo]) -> str:
    """Plain text, one aligned row a class: name, IoU, accuracy, share of the truth's pixels; the means below."""
    header = ("class", "IoU", "accuracy", "share")
    rows = [
        (info.name, _number(iou), _number(accuracy), f"{share:.1%}")
        for info, iou, accuracy, share in zip(classes, result.iou, result.accuracy, result.share, strict=True)
    ]
    mean = ("mean", _number(result.miou), _number(result.mean_accuracy), "")
    widths = [max(len(row[column]) for row in (header, mean, *rows)) for column in range(4)]

    def line(row: tuple[str, ...]) -> str:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        return "  ".join(cells).rstrip()

    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    return "\n".join(
        [line(header), rule, *map(line, rows), rule, line(mean), f"pixel accuracy {_number(result.pixel_accuracy)}"]
    )


def _check_range(values: Tensor, what: str, num_classes: int) -> None:
    if values.numel() and (int(values.min()) < 0 or int(values.max()) >= num_classes):
        wrong = int(values.max()) if int(values.max()) >= num_classes else int(values.min())
        raise DataError(f"{what} must be 0 to {num_classes - 1}, got {wrong}: these are labels of other classes.")


def _ratios(part: np.ndarray, whole: np.ndarray) -> list[float | None]:
    return [float(p / w) if w > 0 else None for p, w in zip(part, whole, strict=True)]


def _mean(values: Sequence[float | None]) -> float:
    known = [value for value in values if value is not None]
    return sum(known) / len(known)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
