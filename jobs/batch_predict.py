"""`sceneray predict` through Ray: thousands of photos, killed and gone on with, a line for each of them at the end."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from jobs.batch_options import Options
from jobs.batch_plan import FOLDER, FORMAT, SUMMARY, VERSION, Done, Part, Plan, Task, begin, make_plan
from jobs.cli import say
from jobs.predict import share_table
from jobs.progress import LOG_EVERY_S, duration
from jobs.ray_session import ray_session
from sceneray import storage
from sceneray.errors import ConfigError, DataError

if TYPE_CHECKING:
    from jobs.batch_pool import Pool
    from sceneray.data.store import ClassInfo

ERRORS_SHOWN, ERRORS_KEPT = 3, 100


def predict_batch(images: Sequence[str], bundle: str, out: str, options: Options) -> dict[str, Any]:
    """Write the masks and the lines of all `images`; what an earlier run finished in `out` stays.

    Returns the summary. Raises DataError where there were photos without a mask, when all others have theirs.
    """
    started = time.monotonic()
    model, classes = _model(bundle)
    task = Task(_shared(out), storage.absolute(bundle), model, options.overlay, options.device)
    plan = make_plan(task, [_shared(image) for image in images], options.part_size)
    kept = begin(plan, options.overwrite, options.retry_errors)
    left = [part for part in plan.parts if part.index not in kept]
    here: list[Done] = []
    facts: dict[str, Any] = {"workers": 0, "deaths": 0, "images_per_second": None}
    if kept:
        say(
            f"keeping {len(kept)} finished parts of {len(plan.parts)}: {_photos(kept.values())} of {plan.photos} photos"
        )
    if left:
        here, facts = _do(plan, left, list(kept.values()), options)
    summary = _summary(plan, list(kept.values()), here, {"seconds": round(time.monotonic() - started, 3), **facts})
    if left or not storage.is_file(storage.join(task.out, SUMMARY)):
        storage.write_json(storage.join(task.out, SUMMARY), summary)
    return _told(summary, [*kept.values(), *here], classes)


def _model(bundle: str) -> tuple[dict[str, str], Sequence[ClassInfo]]:
    """Name, version and digest of the bundle, and its classes, without loading the network."""
    from sceneray import bundle as bundles
    from sceneray.checkpoint import classes_from_json

    committed = bundles.find(bundle)
    about = json.loads(committed.read(bundles.ABOUT))
    model = {"name": str(about["name"]), "version": str(about["version"]), "digest": committed.digest}
    return model, classes_from_json(about["classes"])


def _shared(url: str) -> str:
    if url.startswith("memory://"):
        raise ConfigError(f"workers are other processes, which cannot see {url}: give a path or a bucket's URL.")
    return storage.absolute(url)


def _do(plan: Plan, left: Sequence[Part], kept: Sequence[Done], options: Options) -> tuple[list[Done], dict[str, Any]]:
    """Do the parts that are left; returns them, and what is to be told of the run."""
    from sceneray.devices import usable_cores

    done: list[Done] = []
    with ray_session(options.address, cpus=max(usable_cores(), round(options.low * options.cpus))):
        pool = _pool(plan.task, options)
        try:
            with Bar(plan.photos, kept) as bar:
                pool.note = bar.note
                for result in pool.results(left):
                    done.append(result)
                    bar(result, pool)
        except KeyboardInterrupt:
            say("what is finished stays; the same command goes on from there")
            raise
        rate = round(_photos(done) / max(1e-9, pool.seconds), 2)
    return done, {"workers": pool.most, "deaths": pool.deaths, "images_per_second": rate}


def _pool(task: Task, options: Options) -> Pool:
    """The pool of PredictWorkers. Raises ConfigError where no node of the cluster could ever hold one of them."""
    import ray

    from jobs.batch_pool import AT_ONCE, Pool, room
    from jobs.batch_worker import PredictWorker

    have = ray.cluster_resources()
    cuda = (options.device or "").startswith("cuda")
    gpu = cuda or (options.device is None and have.get("GPU", 0) >= 1)
    needs = {"CPU": options.cpus} | ({"GPU": 1.0} if gpu else {})
    may_grow = options.high is not None and bool(options.address or os.environ.get("RAY_ADDRESS"))
    if not room(needs) and not may_grow:
        raise ConfigError(
            f"a worker needs {options.cpus:g} CPU{' and a GPU' if gpu else ''}, and no node of the cluster has them. "
            "Lower --cpus, choose another --device, or give --workers 1-N with the --address of a cluster that grows."
        )
    kind = ray.remote(num_cpus=options.cpus, num_gpus=needs.get("GPU", 0), max_concurrency=AT_ONCE)(PredictWorker)
    return Pool(task, lambda: kind.remote(task), needs, options.low, options.high, say)


def _photos(done: Iterable[Done]) -> int:
    return sum(part.photos for part in done)


def _summary(plan: Plan, kept: Sequence[Done], here: Sequence[Done], facts: dict[str, Any]) -> dict[str, Any]:
    """predictions.json: all photos' counts, this run's time, and the first errors in the order of the photos."""
    parts = sorted([*kept, *here], key=lambda done: done.index)
    failed = [{"image": row["image"], "error": row["error"]} for done in parts for row in done.failed]
    return {
        "format": FORMAT,
        "version": VERSION,
        "out": plan.task.out,
        "lines": f"{FOLDER}/part-*.jsonl",
        "bundle": plan.task.bundle,
        "model": plan.task.model,
        "photos": plan.photos,
        "photos_sha256": plan.document["photos_sha256"],
        "masks": plan.photos - len(failed),
        "failed": len(failed),
        "parts": len(plan.parts),
        "kept": {"parts": len(kept), "photos": _photos(kept)},
        **facts,
        "errors": failed[:ERRORS_KEPT],
        "errors_left_out": max(0, len(failed) - ERRORS_KEPT),
    }


def _told(summary: dict[str, Any], parts: Sequence[Done], classes: Sequence[ClassInfo]) -> dict[str, Any]:
    """Print the answer, and raise where photos failed."""
    shares: dict[int, tuple[float, int]] = {}
    for found in (item for part in parts for item in part.shares.items()):
        total, images = shares.get(found[0], (0.0, 0))
        shares[found[0]] = (total + found[1][0], images + found[1][1])
    print(share_table(shares, summary["masks"], classes))
    rate = "" if summary["images_per_second"] is None else f", {summary['images_per_second']:.1f} images/s"
    print(f"{summary['masks']} masks in {summary['out']}{rate}; what came of each photo: {summary['lines']}")
    if summary["failed"]:
        first = " | ".join(f"{row['image']}: {row['error']}" for row in summary["errors"][:ERRORS_SHOWN])
        raise DataError(
            f"{summary['failed']} of {summary['photos']} images failed; {SUMMARY} in {summary['out']} tells which. "
            f"--retry-errors tries them again. First: {first}"
        )
    return summary


class Bar:
    """Photos done, images/s, errors and workers, on stderr: a bar in a terminal, a line now and then in a log."""

    def __init__(self, total: int, kept: Sequence[Done]) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.total, self.done = total, _photos(kept)
        self.failed = sum(len(part.failed) for part in kept)
        self.here = 0
        self.shown_at = float("-inf")
        text = TextColumn("{task.description}")
        columns = (TextColumn("predicting"), BarColumn(), MofNCompleteColumn(), text, TimeRemainingColumn())
        self.rich = Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty())
        self.task = self.rich.add_task("starting workers", total=total, completed=self.done)

    def __enter__(self) -> Bar:
        self.rich.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.rich.stop()

    def __call__(self, part: Done, pool: Pool) -> None:
        """Count a part that the pool finished."""
        self.done += part.photos
        self.here += part.photos
        self.failed += len(part.failed)
        rate = self.here / max(1e-9, pool.seconds)
        text = f"{rate:.1f} images/s  {self.failed} errors  {pool.ready} workers"
        if not self.rich.disable:
            self.rich.update(self.task, completed=self.done, description=text)
        elif self.done == self.total or time.monotonic() - self.shown_at >= LOG_EVERY_S:
            self.shown_at = time.monotonic()
            say(f"{self.done}/{self.total} images  {text}  {duration((self.total - self.done) / rate)} left")

    def note(self, text: str) -> None:
        """A line of its own."""
        if self.rich.disable:
            say(text)
        else:
            self.rich.console.print(text, markup=False, highlight=False)
