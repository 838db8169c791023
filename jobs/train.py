"""`sceneray train`: train a PSPNet with Ray Train, or go on with a run that was interrupted."""

from __future__ import annotations

import argparse
import math
from typing import Any

from jobs.cli import main_of, say
from jobs.progress import LiveLine, duration
from jobs.ray_session import ray_session
from sceneray import config
from sceneray.config import TrainSettings

HELP = "train a PSPNet on a dataset store; the same command again goes on where it stopped"
EXAMPLE = "sceneray train jobs/configs/town.yaml run=runs/town data.store=stores/town"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("config", metavar="CONFIG.yaml", help="settings file (path or URL)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that win over the file")
    parser.add_argument(
        "--dry-run", action="store_true", help="check data, rights, placement and one step; write nothing"
    )
    parser.add_argument("--address", help="Ray cluster to use (default: RAY_ADDRESS, else a private Ray here)")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Run the verb; returns RUN/result.json, or the findings of a dry run."""
    settings = config.load(TrainSettings, args.config, args.overrides)
    return train(settings, args.address, args.dry_run)


def train(settings: TrainSettings, address: str | None = None, check_only: bool = False) -> dict[str, Any]:
    """Train `settings.run` and print where its result is."""
    from sceneray.devices import usable_cores

    needed = math.ceil(settings.min_workers * settings.resources.cpus)
    with ray_session(address, cpus=max(needed, usable_cores())):
        from sceneray.ray_train import launch

        with LiveLine() as line:
            result = launch(settings, line, check_only)
    if check_only:
        print(_findings(result))
    else:
        say(f"pictures: {result['run']}/pictures")
        print(f"best val mIoU {result['miou']:.4f} at step {result['best']['step']}: {result['run']}/best")
    return result


def _findings(result: dict[str, Any]) -> str:
    seconds, memory = result["seconds_per_step"], result["peak_memory_bytes"] / 2**20
    return (
        f"checked: {result['train_images']} train and {result['val_images']} val images; {result['workers']} workers "
        f"on {result['device']}, {memory:.0f} MiB each; {seconds:.2f} s a step, so {result['steps']} steps take about "
        f"{duration(result['estimated_seconds'])}, evaluation aside"
    )


if __name__ == "__main__":
    raise SystemExit(main_of("train"))
