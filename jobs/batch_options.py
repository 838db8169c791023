"""What makes a `sceneray predict` a batch, and the options that only a batch has."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from sceneray import storage
from sceneray.config_run import worker_range
from sceneray.errors import ConfigError

NOTES = """\
Some files, or the images directly in a folder: done in this process, or by the endpoint at --url; a mask and an overlay
each, no two of one name. With --workers or --address, or where IMAGE is a folder in a bucket (s3://...), it is a batch
that Ray does: folders with all below them, masks at the same paths below DIR, a line for each photo in
DIR/predictions, a summary in DIR/predictions.json. A batch that was killed goes on with the same command."""
ONLY_IN_A_BATCH = ("cpus", "overlay", "part_size", "overwrite", "retry_errors")


@dataclass(frozen=True)
class Options:
    """How a batch is run. All but `overlay` and `part_size` may be others when it goes on."""

    low: int = 1
    high: int | None = None  # most workers; None: as many as there is room for
    cpus: float = 1
    device: str | None = None
    overlay: bool = False
    part_size: int | None = None
    overwrite: bool = False
    retry_errors: bool = False
    address: str | None = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of a batch."""
    batch = parser.add_argument_group("batches")
    batch.add_argument(
        "--workers", metavar="N|MIN-MAX", help="processes (default: what fits the cluster; 0: no batch, this process)"
    )
    batch.add_argument("--address", help="Ray cluster to use (default: RAY_ADDRESS, else a private Ray here)")
    batch.add_argument("--cpus", type=float, help="CPUs of a worker (default: 1); it has a GPU where there are some")
    batch.add_argument("--overlay", action="store_true", help="write overlays too")
    batch.add_argument(
        "--part-size", type=int, metavar="N", help="photos of a part (default: 8 to 128, by their number)"
    )
    batch.add_argument("--overwrite", action="store_true", help="drop the results of another bundle or other photos")
    batch.add_argument("--retry-errors", action="store_true", help="do the parts again in which photos failed")


def is_batch(args: argparse.Namespace) -> bool:
    """Whether Ray does it. Raises ConfigError where options of a batch stand beside what is none."""
    asked = [name for name in ("workers", "address") if getattr(args, name) is not None]
    given = [name for name in ONLY_IN_A_BATCH if getattr(args, name) not in (None, False)]
    if args.url is not None:
        batch, given = False, [*asked, *given]
    elif args.workers == "0":
        batch, given = False, [*asked[1:], *given]
    else:
        batch = bool(asked) or any(_in_bucket(image) and not storage.is_file(image) for image in args.images)
    if given and not batch:
        names = ", ".join("--" + name.replace("_", "-") for name in given)
        raise ConfigError(f"{names}: for batches alone. Give --bundle and --workers N (or --address) to make it one.")
    return batch


def options_of(args: argparse.Namespace) -> Options:
    """The checked options. Raises ConfigError where one is out of its range."""
    low, high = worker_bounds(args.workers)
    cpus = 1.0 if args.cpus is None else args.cpus
    if cpus <= 0:
        raise ConfigError(f"--cpus must be above 0, got {cpus:g}.")
    if args.part_size is not None and args.part_size < 1:
        raise ConfigError(f"--part-size must be at least 1, got {args.part_size}.")
    return Options(
        low, high, cpus, args.device, args.overlay, args.part_size, args.overwrite, args.retry_errors, args.address
    )


def worker_bounds(workers: str | None) -> tuple[int, int | None]:
    """The fewest and the most workers. Raises ConfigError where `workers` is neither a number nor a range."""
    if workers is None:
        return 1, None
    try:
        low, _, high = str(worker_range(workers)).partition("-")
    except ValueError as error:
        raise ConfigError(f"--{error}.") from error
    return int(low), int(high or low)


def _in_bucket(url: str) -> bool:
    return "://" in url and not storage.is_local(url) and not url.startswith("memory://")
