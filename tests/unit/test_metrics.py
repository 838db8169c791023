"""Scores: against torchmetrics, by hand, and independent of how the images were batched."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

from sceneray.data.store import ClassInfo
from sceneray.errors import DataError
from sceneray.metrics import confusion_matrix, scores, table

IGNORE = 255
CLASSES = (ClassInfo(0, "road", (1, 2, 3)), ClassInfo(1, "pedestrian", (4, 5, 6)), ClassInfo(2, "sky", (7, 8, 9)))


@st.composite
def masks(draw: st.DrawFn) -> tuple[int, Tensor, Tensor]:
    """(classes, prediction, truth): uint8 [B, H, W], some classes absent, some pixels ignored, at least one not."""
    classes = draw(st.integers(2, 12))
    shape = draw(st.tuples(st.integers(1, 4), st.integers(1, 9), st.integers(1, 9)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    used = draw(st.integers(1, classes))  # classes from `used` on are absent, unless predicted
    truth = torch.randint(0, used, shape, generator=generator).to(torch.uint8)
    pred = torch.randint(0, draw(st.integers(1, classes)), shape, generator=generator).to(torch.uint8)
    right = torch.rand(shape, generator=generator) < draw(st.floats(0, 1))
    ignored = torch.rand(shape, generator=generator) < draw(st.floats(0, 0.9))
    ignored.view(-1)[0] = False
    return classes, torch.where(right, truth, pred), truth.masked_fill(ignored, IGNORE)


@given(masks())
def test_agrees_with_torchmetrics(drawn: tuple[int, Tensor, Tensor]) -> None:
    """Per-class IoU and recall, mIoU and pixel accuracy agree with torchmetrics to 1e-6, ignored pixels and all."""
    classes, pred, truth = drawn
    result = scores(confusion_matrix(pred, truth, classes, IGNORE))

    def reference(metric: type, average: str) -> Tensor:
        return metric(classes, average=average, ignore_index=IGNORE)(pred.long(), truth.long())

    iou = reference(MulticlassJaccardIndex, "none")
    assert [value or 0.0 for value in result.iou] == pytest.approx(iou.tolist(), abs=1e-6)
    assert result.miou == pytest.approx(reference(MulticlassJaccardIndex, "macro").item(), abs=1e-6)
    assert result.pixel_accuracy == pytest.approx(reference(MulticlassAccuracy, "micro").item(), abs=1e-6)
    recall = reference(MulticlassAccuracy, "none")
    assert [value or 0.0 for value in result.accuracy] == pytest.approx(recall.tolist(), abs=1e-6)


@given(masks(), st.randoms(use_true_random=False))
def test_any_split_into_batches_gives_the_same_matrix(drawn: tuple[int, Tensor, Tensor], random: object) -> None:
    """Matrices of the images, in any order and one by one, add up to the matrix of the batch."""
    classes, pred, truth = drawn
    order = list(range(len(pred)))
    random.shuffle(order)  # type: ignore[attr-defined]
    parts = [confusion_matrix(pred[i], truth[i], classes, IGNORE) for i in order]
    whole = confusion_matrix(pred, truth, classes, IGNORE)
    assert torch.equal(torch.stack(parts).sum(0), whole)
    assert whole.sum() == (truth != IGNORE).sum()


def test_rows_are_truth_and_columns_prediction() -> None:
    """A pixel of truth 0 predicted as 2 is counted in row 0, column 2; an ignored one nowhere."""
    truth = torch.tensor([[0, 1, IGNORE]], dtype=torch.uint8)
    pred = torch.tensor([[2, 1, 0]], dtype=torch.uint8)
    matrix = confusion_matrix(pred, truth, 3, IGNORE)
    assert matrix.dtype == torch.int64
    assert matrix.tolist() == [[0, 0, 1], [0, 1, 0], [0, 0, 0]]


def test_the_ignore_index_may_be_a_class() -> None:
    """With class 0 ignored, truth 0 counts nowhere, and predicting 0 elsewhere still is an error."""
    matrix = confusion_matrix(torch.tensor([0, 0, 1]), torch.tensor([0, 1, 1]), 2, ignore_index=0)
    assert matrix.tolist() == [[0, 0], [1, 1]]


@pytest.mark.parametrize(
    ("pred", "truth", "message"),
    [([0], [3], "a label must be 0 to 2, got 3"), ([3], [0], "a prediction must be 0 to 2, got 3")],
)
def test_values_outside_the_classes_are_refused(pred: list[int], truth: list[int], message: str) -> None:
    """A label or a prediction beyond the classes is named, not counted somewhere."""
    with pytest.raises(DataError, match=message):
        confusion_matrix(torch.tensor(pred), torch.tensor(truth), 3, IGNORE)


MATRIX = torch.tensor([[6, 2, 0], [1, 1, 0], [0, 0, 0]])


def test_scores_by_hand() -> None:
    """IoU 6/9 and 1/4, recall 6/8 and 1/2, 7 of 10 pixels right; the class in neither has none and moves no mean."""
    result = scores(MATRIX)
    assert result.iou == [6 / 9, 1 / 4, None]
    assert result.accuracy == [6 / 8, 1 / 2, None]
    assert result.share == [0.8, 0.2, 0.0]
    assert result.miou == pytest.approx((6 / 9 + 1 / 4) / 2)
    assert result.mean_accuracy == pytest.approx((6 / 8 + 1 / 2) / 2)
    assert result.pixel_accuracy == pytest.approx(0.7)
    assert scores(MATRIX.numpy().astype(np.int64)) == result


def test_a_class_only_predicted_counts_as_zero() -> None:
    """A class that is predicted but never true has IoU 0 in the mean, and no recall."""
    result = scores(torch.tensor([[3, 1], [0, 0]]))
    assert result.iou == [3 / 4, 0.0]
    assert result.accuracy == [3 / 4, None]
    assert result.miou == pytest.approx(3 / 8)


def test_nothing_to_score_is_refused() -> None:
    """A matrix without pixels has no score, and the error says where to look."""
    with pytest.raises(DataError, match="every pixel of the truth is ignored"):
        scores(torch.zeros(3, 3, dtype=torch.int64))


def test_as_dict_is_plain_json() -> None:
    """The scores survive JSON, each class by name."""
    value = scores(MATRIX).as_dict(CLASSES)
    assert json.loads(json.dumps(value, allow_nan=False)) == value
    assert value["classes"][1] == {"id": 1, "name": "pedestrian", "iou": 0.25, "accuracy": 0.5, "share": 0.2}
    assert value["classes"][2]["iou"] is None


def test_the_table_is_aligned() -> None:
    """One row a class, columns in line, a dash where there is no score."""
    assert table(scores(MATRIX), CLASSES).splitlines() == [
        "class          IoU  accuracy  share",
        "-----------------------------------",
        "road        0.6667    0.7500  80.0%",
        "pedestrian  0.2500    0.5000  20.0%",
        "sky              -         -   0.0%",
        "-----------------------------------",
        "mean        0.4583    0.6250",
        "pixel accuracy 0.7000",
    ]
