"""`sceneray prepare`: write a dataset store, one Ray task a shard; safe to run again."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from jobs.cli import main_of, say
from jobs.ray_session import ray_session
from sceneray.errors import ConfigError

if TYPE_CHECKING:
    from sceneray.data.listing import LayoutOptions
    from sceneray.data.plan import Plan, ShardPlan
    from sceneray.data.store import Store

HELP = "write a dataset store from labelled photographs (or drawn scenes); checks every label"
EXAMPLE = "sceneray prepare folder s3://bucket/photos s3://bucket/store --val 0.1"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument(
        "layout", metavar="LAYOUT", help="folder (images/, labels/, classes.json) or town (drawn scenes)"
    )
    parser.add_argument("urls", nargs="+", metavar="[SOURCE] STORE", help="any path or fsspec URL; town has no SOURCE")
    parser.add_argument("--val", type=float, help="folder without splits: share of photographs for val (default: 0.1)")
    parser.add_argument("--group", metavar="REGEX", help="folder: names whose first group agrees share a split")
    parser.add_argument("--seed", type=int, default=0, help="of the split, or of the drawn town (default: 0)")
    parser.add_argument("--scenes", default="480,96", metavar="TRAIN,VAL", help="town: how many (default: 480,96)")
    parser.add_argument("--size", default="96x128", metavar="HxW", help="town: pixels of a scene (default: 96x128)")
    parser.add_argument("--shard-mb", type=float, default=64, help="most MiB of photographs a shard (default: 64)")
    parser.add_argument("--overwrite", action="store_true", help="replace a store that was made from something else")
    parser.add_argument("--address", help="Ray cluster to use (default: RAY_ADDRESS, else a private Ray here)")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Run the verb; returns what the store holds."""
    from sceneray.data.listing import LayoutOptions

    if len(args.urls) > 2:
        raise ConfigError(f"prepare takes [SOURCE] STORE, got {len(args.urls)}: {' '.join(args.urls)}")
    source = args.urls[0] if len(args.urls) == 2 else None
    train, val = _numbers(args.scenes, ",", "--scenes TRAIN,VAL")
    size = _numbers(args.size, "x", "--size HEIGHTxWIDTH")
    options = LayoutOptions(args.val, args.seed, args.group, train, val, size)
    return prepare(args.layout, source, args.urls[-1], options, args.shard_mb, args.overwrite, args.address)


def prepare(
    layout: str,
    source: str | None,
    store: str,
    options: LayoutOptions,
    shard_mb: float = 64,
    overwrite: bool = False,
    address: str | None = None,
) -> dict[str, Any]:
    """Write the store at `store` and print what it holds."""
    from sceneray.data.plan import begin, commit, current, make_plan

    plan = make_plan(layout, source, store, options, shard_mb)
    ready = None if overwrite else current(plan)
    if ready is not None:
        say(f"{ready.url} is up to date: its plan is the same")
        return _result(ready)
    left = begin(plan, overwrite)
    if len(left) < len(plan.shards):
        say(f"keeping {len(plan.shards) - len(left)} finished shards of {len(plan.shards)}")
    with ray_session(address):
        _write_all(plan, left)
    return _result(commit(plan))


def prepare_town(store: str) -> dict[str, Any]:
    """Write the default town."""
    from sceneray.data.listing import LayoutOptions

    return prepare("town", None, store, LayoutOptions())


def _write_all(plan: Plan, left: Sequence[ShardPlan]) -> None:
    """Write the shards that are left, with a progress bar over samples."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("preparing"), BarColumn(), MofNCompleteColumn(), TextColumn("samples"), TimeRemainingColumn())
    total = sum(len(shard.items) for shard in plan.shards)
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=total, completed=total - sum(len(shard.items) for shard in left))
        for rows in _written(left):
            bar.advance(task, rows)


def _written(left: Sequence[ShardPlan]) -> Iterator[int]:
    """Rows of each shard as Ray tasks finish them; a few more tasks than CPUs are in flight."""
    import ray

    from sceneray.data.plan import write

    task = ray.remote(num_cpus=1)(write)
    most = 2 * max(1, int(ray.cluster_resources().get("CPU", 1)))
    waiting = list(reversed(left))
    flying: list[Any] = []
    try:
        while waiting or flying:
            while waiting and len(flying) < most:
                flying.append(task.remote(waiting.pop()))
            ready, flying = ray.wait(flying, timeout=1.0)
            for reference in ready:
                yield ray.get(reference).rows
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error
    finally:
        for reference in flying:
            ray.cancel(reference)


def _result(store: Store) -> dict[str, Any]:
    rows = {split: store.rows(split) for split in store.splits}
    counted = ", ".join(f"{count} {split}" for split, count in rows.items())
    print(f"{store.url}: {counted}, {len(store.classes)} classes")
    return {"store": store.url, "digest": store.digest, "rows": rows, "classes": [info.name for info in store.classes]}


def _numbers(text: str, separator: str, what: str) -> tuple[int, int]:
    parts = text.split(separator)
    if len(parts) != 2 or not all(part.strip().isdigit() for part in parts):
        raise ConfigError(f"{what} needs two whole numbers, got '{text}'.")
    return int(parts[0]), int(parts[1])


if __name__ == "__main__":
    raise SystemExit(main_of("prepare"))
