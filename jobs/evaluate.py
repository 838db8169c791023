"""`sceneray evaluate`: score a checkpoint on a split, every image once at its own size."""

from __future__ import annotations

import argparse
from typing import Any

from jobs.cli import main_of, say
from jobs.ray_session import ray_session

HELP = "score a checkpoint on a split: IoU of every class, mIoU, pixel and mean accuracy"
EXAMPLE = "sceneray evaluate runs/town/best --data stores/town --split val"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="RUN/best, RUN/last or a checkpoint folder (any URL)")
    parser.add_argument("--data", metavar="STORE", help="dataset store (default: the one it was trained on)")
    parser.add_argument("--split", default="val", help="split of the store (default: val)")
    parser.add_argument("--workers", type=int, help="processes that share the images (default: one a core, or a GPU)")
    parser.add_argument("--address", help="Ray cluster to use (default: RAY_ADDRESS, else a private Ray here)")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Run the verb; returns the scores."""
    return evaluate(args.checkpoint, args.data, args.split, args.workers, args.address)


def evaluate(
    url: str, store_url: str | None, split: str, workers: int | None = None, address: str | None = None
) -> dict[str, Any]:
    """Score the checkpoint at `url` and print the table."""
    from sceneray import checkpoint, storage
    from sceneray.data.store import Store
    from sceneray.errors import ConfigError
    from sceneray.evaluation import check_classes
    from sceneray.metrics import scores, table

    if workers is not None and workers < 1:
        raise ConfigError(f"--workers must be at least 1, got {workers}.")
    # Resolved once: a pointer that moves meanwhile must not give two workers two networks.
    saved = checkpoint.load(url)
    store = Store.open(storage.absolute(store_url or saved.settings.data.store))
    check_classes(saved, store)
    images = len(store.split(split))
    matrix = _fan_out(saved.url, store.url, split, images, workers, address)
    result = scores(matrix)
    print(table(result, store.classes))
    about = {"checkpoint": saved.url, "checkpoint_digest": saved.digest, "store": store.url, "split": split}
    return {**about, "store_digest": store.digest, "images": images, **result.as_dict(store.classes)}


def _fan_out(url: str, store: str, split: str, images: int, workers: int | None, address: str | None) -> Any:
    """Confusion matrix over the split, from one Ray task a worker."""
    from sceneray.devices import usable_cores

    with ray_session(address, cpus=max(workers or 1, usable_cores())):
        import ray

        from sceneray.evaluation import evaluate_share

        have = ray.cluster_resources()
        gpus = int(have.get("GPU", 0))
        count = min(images, workers or gpus or max(1, int(have.get("CPU", 1))))
        task = ray.remote(num_cpus=1, num_gpus=1 if gpus >= count else 0)(evaluate_share)
        say(f"scoring {images} images of {split} on {count} workers ...")
        pending = [task.remote(url, store, split, rank, count) for rank in range(count)]
        try:
            return sum(ray.get(pending))
        except ray.exceptions.RayTaskError as error:
            raise error.cause from error
        except KeyboardInterrupt:
            for reference in pending:
                ray.cancel(reference, force=True)
            raise


if __name__ == "__main__":
    raise SystemExit(main_of("evaluate"))
