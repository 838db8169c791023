"""How far colour and place alone go on town: mIoU of a per-pixel classifier on RGB, x and y.

    python -m benchmarks.town_difficulty [--seed 0] [--train-scenes 200] [--val-scenes 80]

Prints one JSON line. Gradient-boosted trees see each pixel alone, so what they miss needs shape and context. Fitted on
pixels as they occur and on as many pixels of each class; the stronger of the two counts.
"""

from __future__ import annotations

import argparse
import json
import time

import numpy as np
from numpy.typing import NDArray

from sceneray.data import town

PIXELS = 120_000  # fitted on; more changes the score by less than 0.01
LIMIT = 0.35


def pixel_classifier_miou(seed: int, train_scenes: int, val_scenes: int, height: int, width: int) -> float:
    """mIoU on val scenes of the stronger per-pixel classifier fitted on train scenes of the town `seed`."""
    from sklearn.ensemble import HistGradientBoostingClassifier

    train_x, train_y = _pixels(seed, "train", train_scenes, height, width)
    val_x, val_y = _pixels(seed, "val", val_scenes, height, width)
    rng = np.random.default_rng(seed)
    reached = []
    for balanced in (False, True):
        rows = _sample(rng, train_y, balanced)
        model = HistGradientBoostingClassifier(max_iter=150, max_leaf_nodes=63, random_state=seed)
        model.fit(train_x[rows], train_y[rows])
        reached.append(_miou(val_y, model.predict(val_x)))
    return max(reached)


def _pixels(
    seed: int, split: str, scenes: int, height: int, width: int
) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """Features [pixels, 5] (red, green, blue, x, y) and classes [pixels] of the first scenes of a split."""
    rows, columns = np.mgrid[0:height, 0:width].astype(np.float32)
    features, labels = [], []
    for index in range(scenes):
        image, label = town.draw(town.scene_seed(seed, split, index), height, width)
        features.append(np.dstack([image, columns, rows]).reshape(-1, 5).astype(np.float32))
        labels.append(label.ravel())
    return np.concatenate(features), np.concatenate(labels)


def _sample(rng: np.random.Generator, labels: NDArray[np.uint8], balanced: bool) -> NDArray[np.int64]:
    if not balanced:
        return rng.choice(len(labels), size=min(PIXELS, len(labels)), replace=False)
    share = PIXELS // len(town.CLASSES)
    return np.concatenate([rng.choice(np.flatnonzero(labels == c), size=share) for c in np.unique(labels)])


def _miou(truth: NDArray[np.uint8], predicted: NDArray[np.uint8]) -> float:
    classes = len(town.CLASSES)
    matrix = np.bincount(truth.astype(np.int64) * classes + predicted, minlength=classes**2).reshape(classes, classes)
    union = matrix.sum(axis=0) + matrix.sum(axis=1) - matrix.diagonal()
    return float(np.mean(matrix.diagonal()[union > 0] / union[union > 0]))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="mIoU of a per-pixel classifier on town")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train-scenes", type=int, default=200)
    parser.add_argument("--val-scenes", type=int, default=80)
    args = parser.parse_args()
    started_at = time.perf_counter()
    miou = pixel_classifier_miou(args.seed, args.train_scenes, args.val_scenes, 96, 128)
    result = {
        "benchmark": "town_difficulty",
        "pixel_classifier_miou": round(miou, 4),
        "limit": LIMIT,
        "seconds": round(time.perf_counter() - started_at, 1),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
