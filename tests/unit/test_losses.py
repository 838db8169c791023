"""Losses: sums and weights that add up over any split of the batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from sceneray.errors import ConfigError, DataError
from sceneray.losses import LOSSES, class_weights

cross_entropy = LOSSES["cross_entropy"]
C, IGNORE = 4, 255


def draw(batch: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(batch, C, 6, 7, generator=generator)
    labels = torch.randint(0, C, (batch, 6, 7), generator=generator).to(torch.uint8)
    labels[torch.rand(labels.shape, generator=generator) < 0.3] = IGNORE
    return logits, labels


@pytest.mark.parametrize("weights", [None, torch.tensor([0.5, 2.0, 0.0, 1.0])])
def test_the_quotient_is_pytorchs_mean(weights: torch.Tensor | None) -> None:
    """loss_sum / weight_sum and its gradient equal F.cross_entropy with reduction="mean" over the labelled pixels."""
    logits, labels = draw()
    logits.requires_grad_()
    loss, weight = cross_entropy(logits, labels, weights, IGNORE)
    expected = F.cross_entropy(logits, labels.long(), weights, ignore_index=IGNORE)
    torch.testing.assert_close(loss / weight, expected)
    ours, theirs = (torch.autograd.grad(value, logits)[0] for value in (loss / weight, expected))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("weights", [None, torch.tensor([0.5, 2.0, 0.0, 1.0])])
def test_sums_add_up_over_parts_of_a_batch(weights: torch.Tensor | None) -> None:
    """The sums over the images of a batch, one by one, are those over the batch."""
    logits, labels = draw()
    whole = cross_entropy(logits, labels, weights, IGNORE)
    parts = [cross_entropy(logits[i : i + 1], labels[i : i + 1], weights, IGNORE) for i in range(3)]
    for index in (0, 1):
        torch.testing.assert_close(sum(part[index] for part in parts), whole[index])


@pytest.mark.parametrize("weights", [None, torch.ones(C)])
def test_a_batch_without_labels_gives_zero(weights: torch.Tensor | None) -> None:
    """Where every pixel is ignored, both sums and all gradients are 0, never NaN."""
    logits, labels = draw()
    logits.requires_grad_()
    loss, weight = cross_entropy(logits, torch.full_like(labels, IGNORE), weights, IGNORE)
    assert (loss.item(), weight.item()) == (0.0, 0.0)
    loss.backward()
    assert logits.grad is not None
    assert not logits.grad.any()


def test_labels_of_either_integer_type_and_any_ignore_index() -> None:
    """uint8 and int64 labels agree, and the ignore index may be a class's own number."""
    logits, labels = draw()
    assert cross_entropy(logits, labels, None, IGNORE) == cross_entropy(logits, labels.long(), None, IGNORE)
    _, weight = cross_entropy(logits, torch.zeros_like(labels), torch.ones(C), 0)
    assert weight == 0


def test_sixteen_bit_logits_are_summed_in_thirty_two() -> None:
    """A sum over many pixels of bfloat16 logits is the float32 sum."""
    logits, labels = torch.zeros(1, C, 300, 300, dtype=torch.bfloat16), torch.zeros(1, 300, 300, dtype=torch.uint8)
    loss, weight = cross_entropy(logits, labels, None, IGNORE)
    torch.testing.assert_close(loss, torch.tensor(90_000 * float(np.log(C))))
    assert (loss.dtype, weight.item()) == (torch.float32, 90_000)


def test_median_frequency_weights() -> None:
    """w = median(f) / f over the present classes: the median class weighs 1, twice its pixels half, an absent one 0."""
    counts = np.array([100, 0, 50, 200], dtype=np.int64)
    weights = class_weights("median_frequency", counts)
    assert weights is not None
    assert weights.tolist() == [1.0, 0.0, 2.0, 0.5]
    assert weights.dtype == torch.float32
    even = class_weights("median_frequency", [100, 300])  # median 200
    assert even is not None
    torch.testing.assert_close(even, torch.tensor([2.0, 2 / 3]))


def test_square_root_weights_are_milder() -> None:
    """sqrt_frequency is the square root of median_frequency."""
    counts = [100, 0, 50, 200]
    full, mild = class_weights("median_frequency", counts), class_weights("sqrt_frequency", counts)
    assert full is not None
    assert mild is not None
    torch.testing.assert_close(mild**2, full)


def test_no_weights_and_bad_ones() -> None:
    """`none` gives None; another kind and a split without labels are refused with the fix."""
    assert class_weights("none", [1, 2]) is None
    with pytest.raises(ConfigError, match="did you mean 'median_frequency'"):
        class_weights("median_freq", [1, 2])
    with pytest.raises(DataError, match="none: check its labels"):
        class_weights("median_frequency", [0, 0])
