"""How far colour and place alone go on town, and how far a network goes that sees shape and context.

    python -m benchmarks.town_difficulty [--seed 0] [--checkpoint RUN/best] [--skip-network]

Prints one JSON line: the mIoU of a classifier that sees one pixel at a time (its RGB, x and y), and that of the network
of jobs/configs/town.yaml, trained here (some minutes) unless --checkpoint names one. Both are measured on the same val
scenes. The classifier is gradient-boosted trees, fitted on pixels as they occur and on as many pixels of each class;
the stronger of the two counts. Town is made so that it stays at or below 0.35.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from sceneray import checkpoint, config, metrics
from sceneray.config import TrainSettings
from sceneray.data import plan as plans
from sceneray.data import town
from sceneray.data.listing import LayoutOptions
from sceneray.training import Runtime, fit

CONFIG = Path(__file__).resolve().parent.parent / "jobs" / "configs" / "town.yaml"
OPTIONS = LayoutOptions()
PIXELS = 120_000  # fitted on; twice as many change the score by less than 0.01
LIMIT = 0.35

Float = NDArray[np.float32]
Labels = NDArray[np.uint8]


def pixel_classifier_miou(
    seed: int, train_scenes: int, val_scenes: int, height: int, width: int, pixels: int = PIXELS
) -> float:
    """mIoU on val scenes of the stronger per-pixel classifier fitted on `pixels` of the train scenes of town `seed`."""
    from sklearn.ensemble import HistGradientBoostingClassifier

    train_x, train_y = _pixels(seed, "train", train_scenes, height, width)
    val_x, val_y = _pixels(seed, "val", val_scenes, height, width)
    rng = np.random.default_rng(seed)
    reached = []
    for balanced in (False, True):
        rows = _sample(rng, train_y, pixels, balanced)
        model = HistGradientBoostingClassifier(max_iter=150, max_leaf_nodes=63, random_state=seed)
        model.fit(train_x[rows], train_y[rows])
        reached.append(_miou(model.predict(val_x), val_y))
    return max(reached)


def network_miou(seed: int, folder: Path) -> float:
    """Train the network of jobs/configs/town.yaml in this process on the town `seed`; mIoU of its best checkpoint."""
    store = str(folder / "store")
    plan = plans.make_plan("town", None, store, LayoutOptions(seed=seed), shard_mb=64)
    for shard in plans.begin(plan):
        plans.write(shard)
    plans.commit(plan)
    run = str(folder / "run")
    settings = config.load(TrainSettings, str(CONFIG), [f"run={run}", f"data.store={store}", "workers=1"])
    fit(settings, Runtime())
    return checkpoint_miou(f"{run}/best", seed)


def checkpoint_miou(url: str, seed: int) -> float:
    """mIoU of a checkpoint on the default val scenes of the town `seed`."""
    saved = checkpoint.load(url)
    model = checkpoint.build(saved)
    matrix = np.zeros((len(town.CLASSES),) * 2, np.int64)
    for index in range(OPTIONS.val_scenes):
        image, label = town.draw(town.scene_seed(seed, "val", index), *OPTIONS.size)
        mask = model.predict(torch.from_numpy(image).permute(2, 0, 1)[None])[0]
        matrix += _confusion(mask, torch.from_numpy(label))
    return metrics.scores(matrix).miou


def _pixels(seed: int, split: str, scenes: int, height: int, width: int) -> tuple[Float, Labels]:
    """Features [pixels, 5] (red, green, blue, x, y) and classes [pixels] of the first scenes of a split."""
    rows, columns = np.mgrid[0:height, 0:width].astype(np.float32)
    features, labels = [], []
    for index in range(scenes):
        image, label = town.draw(town.scene_seed(seed, split, index), height, width)
        features.append(np.dstack([image, columns, rows]).reshape(-1, 5).astype(np.float32))
        labels.append(label.ravel())
    return np.concatenate(features), np.concatenate(labels)


def _sample(rng: np.random.Generator, labels: Labels, pixels: int, balanced: bool) -> NDArray[np.int64]:
    if not balanced:
        return rng.choice(len(labels), size=min(pixels, len(labels)), replace=False)
    share = pixels // len(town.CLASSES)
    return np.concatenate([rng.choice(np.flatnonzero(labels == c), size=share) for c in np.unique(labels)])


def _miou(predicted: Labels, truth: Labels) -> float:
    return metrics.scores(_confusion(torch.from_numpy(predicted), torch.from_numpy(truth))).miou


def _confusion(predicted: torch.Tensor, truth: torch.Tensor) -> NDArray[np.int64]:
    matrix: NDArray[np.int64] = metrics.confusion_matrix(predicted, truth, len(town.CLASSES), 255).numpy()
    return matrix


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="colour and place against shape and context, on town")
    parser.add_argument("--seed", type=int, default=0, help="of the town")
    parser.add_argument("--train-scenes", type=int, default=200, help="the pixel classifier is fitted on")
    parser.add_argument("--checkpoint", help="a network trained on the town of this seed; default: train one")
    parser.add_argument("--skip-network", action="store_true", help="measure the pixel classifier alone")
    args = parser.parse_args()
    started_at = time.perf_counter()
    pixel = pixel_classifier_miou(args.seed, args.train_scenes, OPTIONS.val_scenes, *OPTIONS.size)
    result = {"benchmark": "town_difficulty", "pixel_classifier_miou": round(pixel, 4), "limit": LIMIT}
    if not args.skip_network:
        with tempfile.TemporaryDirectory(prefix="sceneray-bench-") as folder:
            url = args.checkpoint
            network = network_miou(args.seed, Path(folder)) if url is None else checkpoint_miou(url, args.seed)
        result |= {"network_miou": round(network, 4), "network_above_pixels": round(network - pixel, 4)}
    print(json.dumps({**result, "seconds": round(time.perf_counter() - started_at, 1)}))


if __name__ == "__main__":
    main()
