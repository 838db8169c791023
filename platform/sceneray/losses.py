"""Losses over pixels, as a sum and the weight it is a sum of.

B batch, C classes, H W height and width. A loss returns (loss_sum, weight_sum) of the pixels it was given; the caller
divides by the weight sum of the *global* batch, so that the mean does not depend on how a batch was split.

To add one: a function with the signature of `cross_entropy`, and a line in `LOSSES`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sceneray.errors import ConfigError, DataError, unknown_name

Loss = Callable[[Tensor, Tensor, Tensor | None, int], tuple[Tensor, Tensor]]


def cross_entropy(
    logits: Tensor, labels: Tensor, class_weights: Tensor | None, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """Softmax cross entropy of every pixel whose label is not `ignore_index`.

    logits: float [B, C, H, W]; labels: uint8 or int64 [B, H, W], 0..C-1 or `ignore_index`; class_weights: float [C].
    Returns two float32 scalars: Σ w[label] · -log p[label], and Σ w[label] (w = 1 without class_weights). Where all
    pixels are ignored both are 0, and so is every gradient. Computed in 32 bits whatever the logits' type.
    """
    target = labels.long()
    # Summed by hand: with reduction="sum" the CUDA kernel adds in an order that changes from run to run.
    losses = F.cross_entropy(logits.float(), target, weight=class_weights, ignore_index=ignore_index, reduction="none")
    valid = target != ignore_index
    if class_weights is None:
        return losses.sum(), valid.sum().float()
    weights = class_weights.float()[torch.where(valid, target, 0)]
    return losses.sum(), (weights * valid).sum()


LOSSES: dict[str, Loss] = {"cross_entropy": cross_entropy}


def class_weights(kind: str, pixel_counts: Sequence[int] | np.ndarray) -> Tensor | None:
    """Weights float32 [C] against class imbalance, from each class's pixels in the training split; None for `none`.

    - `median_frequency`: median(f) / f[c], with f the share of labelled pixels, as SegNet was trained (Badrinarayanan
      et al., TPAMI 2017, after Eigen & Fergus, ICCV 2015). Theirs counts only the images a class occurs in; a store
      knows the counts of a split, so a class that is rare because few images have it weighs more here.
    - `sqrt_frequency`: the square root of that; on strongly skewed data the milder choice.

    A class without pixels gets 0 (no label asks for it) and has no part in the median. Raises DataError where no pixel
    is labelled, ConfigError for another kind.
    """
    if kind == "none":
        return None
    powers = {"median_frequency": 1.0, "sqrt_frequency": 0.5}
    if kind not in powers:
        raise ConfigError(unknown_name("class weights", kind, ["none", *powers]))
    counts = torch.as_tensor(np.asarray(pixel_counts), dtype=torch.float64)
    present = counts > 0
    if not present.any():
        raise DataError("class weights need labelled pixels, and the training split has none: check its labels.")
    # quantile, because torch's median takes the lower of the two middle values.
    median = torch.quantile(counts[present], 0.5)
    weights = torch.where(present, (median / counts.clamp(min=1)) ** powers[kind], 0.0)
    return weights.float()
