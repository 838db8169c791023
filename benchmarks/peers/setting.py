"""What every loop of `benchmarks.train` trains on: one drawn store, one network, one crop, one batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sceneray import config
from sceneray.config import TrainSettings
from sceneray.data import plan as plans
from sceneray.data.listing import LayoutOptions


@dataclass(frozen=True)
class Size:
    """How much is measured. `steps` steps are timed after `skip` steps that warm up."""

    repetitions: int
    skip: int
    steps: int
    side: int  # of the square crop, and the shorter side of a scene; pixels
    scenes: int
    batch: int
    model: str  # of the timed loops
    saved_model: str  # of the run whose saving is measured
    saved_side: int
    save_every_s: float
    save_for_s: float


FULL = Size(
    repetitions=5,
    skip=3,
    steps=14,
    side=288,
    scenes=96,
    batch=4,
    model="{backbone: mobilenet_v2, head_width: 128, aux_width: 64}",
    saved_model="{backbone: resnet50}",
    saved_side=96,
    save_every_s=30,
    save_for_s=105,
)
QUICK = Size(
    repetitions=1,
    skip=1,
    steps=4,
    side=64,
    scenes=16,
    batch=4,
    model="{backbone: mobilenet_v2, head_width: 16, aux_width: 16, pool_width: 8}",
    saved_model="{backbone: resnet18, head_width: 16, aux_width: 16, pool_width: 8}",
    saved_side=64,
    save_every_s=1,
    save_for_s=5,
)


def write_store(url: str, size: Size) -> str:
    """Draw the scenes (4:3, the shorter side is the crop's) and write them as a store; returns `url`."""
    return town_store(url, size.scenes, 2, (size.side, size.side * 4 // 3))


def town_store(url: str, train: int, val: int, scene: tuple[int, int]) -> str:
    """A store of drawn scenes of (height, width) pixels, written by this process alone; returns `url`."""
    options = LayoutOptions(train_scenes=train, val_scenes=val, size=scene)
    plan = plans.make_plan("town", None, url, options, shard_mb=64)
    for shard in plans.begin(plan):
        plans.write(shard)
    plans.commit(plan)
    return url


def timed_settings(
    size: Size, folder: Path, run: str, workers: int, threads: int, loader_workers: int
) -> TrainSettings:
    """Settings of one timed run: `skip` + `steps` steps, a row for each, and one small evaluation after the last."""
    total = size.skip + size.steps
    return _load(
        folder,
        {
            "run": folder / "runs" / run,
            "data.loader_workers": loader_workers,
            "model": size.model,
            "augment.crop": f"[{size.side}, {size.side}]",
            "batch_size": size.batch,
            "epochs": total * size.batch / size.scenes,
            "workers": workers,
            "threads": threads,
        },
    )


def saving_settings(size: Size, folder: Path, run: str, threads: int) -> TrainSettings:
    """Settings of the run whose saving is measured: small steps of a large network, ended from outside."""
    return _load(
        folder,
        {
            "run": run,
            "model": size.saved_model,
            "augment.crop": f"[{size.saved_side}, {size.saved_side}]",
            "batch_size": 2,
            "epochs": 10**6,
            "workers": 1,
            "threads": threads,
            "save.every_s": size.save_every_s,
            "optimizer.lr": 1e-4,
        },
    )


def _load(folder: Path, values: Mapping[str, object]) -> TrainSettings:
    # One evaluation, at the end: eval_every is beyond every run.
    common = {
        "data.store": folder / "store",
        "data.cache": folder / "cache",
        "augment.scale": "[0.5, 2.0]",
        "augment.transforms": "[scale_crop, flip]",
        "eval_every": 10**9,
        "precision": "fp32",
        "channels_last": "true",
        "resources.gpu": "false",
        "log": "{every_steps: 1, contact_sheet: 0, tensorboard: true}",
    }
    return config.load(TrainSettings, None, [f"{key}={value}" for key, value in {**common, **values}.items()])
