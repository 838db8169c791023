"""`sceneray demo`: the whole line on drawn street scenes, in some minutes on a laptop."""

from __future__ import annotations

import argparse
import shutil
import time
from pathlib import Path
from typing import Any

from jobs.cli import main_of, say
from sceneray.errors import ConfigError, ServingError

HELP = "the whole line on drawn street scenes: prepare, train, evaluate, export, serve, segment"
EXAMPLE = "sceneray demo"

MARKER = ".sceneray-demo"
HELD_OUT_SCENE = 7
PHOTO_SIZE = (144, 192)  # height, width of the scene that the endpoint is asked about


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("folder", nargs="?", default="demo", help="where everything goes (default: demo)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="training settings that win over town.yaml")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Run the verb; returns where everything is and the mIoU reached."""
    folder = _fresh_folder(Path(args.folder))
    started_at = time.monotonic()
    from jobs.ray_session import ray_session

    with ray_session():
        result = _line(folder, args.overrides)
    result["seconds"] = round(time.monotonic() - started_at, 1)
    print(_summary(result))
    return result


def _line(folder: Path, overrides: list[str]) -> dict[str, Any]:
    """Every step, in one Ray session. What each needs is imported when its turn comes."""
    from jobs.evaluate import evaluate
    from jobs.prepare import prepare_town
    from jobs.serve import serving
    from jobs.train import train
    from sceneray import config
    from sceneray.config import TrainSettings
    from sceneray.export import export

    store, run_folder, bundle = (str(folder / name) for name in ("store", "run", "bundle"))
    _step(1, "prepare: draw street scenes with exact labels into a dataset store")
    prepare_town(store)
    _step(2, "train: a PSPNet on two workers under Ray Train")
    settings_file = str(Path(__file__).with_name("configs") / "town.yaml")
    settings = config.load(TrainSettings, settings_file, [f"run={run_folder}", f"data.store={store}", *overrides])
    trained = train(settings)
    _step(3, "evaluate: every val scene once, at its own size")
    scores = evaluate(f"{run_folder}/best", store, "val")
    _step(4, "export: a bundle that can be deployed")
    export(f"{run_folder}/best", bundle, "town", "1")
    _step(5, "serve: ask the endpoint about a scene that is in no split")
    with serving(bundle, port=0, api_keys=()) as url:
        answer = _ask(url, folder)
    return {
        "miou": scores["miou"],
        "pixel_accuracy": scores["pixel_accuracy"],
        "images_per_second": trained["images_per_second"],
        "run": run_folder,
        "store": store,
        "bundle": bundle,
        **answer,
    }


def _ask(url: str, folder: Path) -> dict[str, Any]:
    """Send a held-out scene to the endpoint; save photo, mask and overlay."""
    import httpx
    import numpy as np

    from sceneray.data import town
    from sceneray.data.images import decode_label, encode_jpeg

    photo, truth = town.draw(town.scene_seed(0, "held_out", HELD_OUT_SCENE), *PHOTO_SIZE)
    jpeg = encode_jpeg(photo, 95)
    paths = {name: folder / file for name, file in _FILES.items()}
    paths["photo"].write_bytes(jpeg)
    with httpx.Client(base_url=url, timeout=60) as client:
        for name, query in (("mask", ""), ("overlay", "?format=overlay")):
            answer = client.post(f"/v1/segment{query}", content=jpeg, headers={"content-type": "image/jpeg"})
            if answer.status_code != 200:
                raise ServingError(f"the endpoint answered {answer.status_code}: {answer.text}")
            paths[name].write_bytes(answer.content)
    mask = decode_label(paths["mask"].read_bytes())
    accuracy = float(np.mean(mask == truth))
    return {name: str(path) for name, path in paths.items()} | {"held_out_accuracy": accuracy}


_FILES = {"photo": "scene.jpg", "mask": "scene.mask.png", "overlay": "scene.overlay.jpg"}


def _fresh_folder(folder: Path) -> Path:
    """An empty folder; one that an earlier demo made is emptied, any other is left alone."""
    folder = folder.resolve()
    if folder.exists() and any(folder.iterdir()):
        if not (folder / MARKER).exists():
            raise ConfigError(f"{folder} is not empty and no demo made it: give another folder, sceneray demo FOLDER.")
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARKER).touch()
    return folder


def _step(number: int, text: str) -> None:
    say(f"\n[{number}/5] {text}")


def _summary(result: dict[str, Any]) -> str:
    rows = {
        "val mIoU": f"{result['miou']:.3f} (pixel accuracy {result['pixel_accuracy']:.3f})",
        "held-out scene": f"{result['held_out_accuracy']:.1%} of its pixels right",
        "photo, mask, overlay": f"{result['photo']}\n{'':24}{result['mask']}\n{'':24}{result['overlay']}",
        "curves, contact sheet": f"{result['run']}/pictures",
        "run": result["run"],
        "bundle": f"{result['bundle']}   (sceneray serve {result['bundle']})",
        "took": f"{result['seconds'] / 60:.1f} minutes",
    }
    return "\n" + "\n".join(f"{name:<24}{value}" for name, value in rows.items())


if __name__ == "__main__":
    raise SystemExit(main_of("demo"))
