"""What training under Ray Train costs beside a bare PyTorch loop, torchrun, and torchvision's segmentation loop.

    python -m benchmarks.train [--quick] [--json] [--parts one,two,reference,saving] [--repetitions N]

Prints a table and one JSON line; `--json` the line alone. All loops take the same store, network, crop, batch and
number of threads, one after the other in every repetition, in turned order every second time; a ratio is that of two
loops of one repetition. docs/benchmarks.md says what each part claims and what limits it. No result is judged here.

    one        images/s with 1 worker under Ray Train over those of a bare loop in one process; Ray's share of the CPU
    two        the same with 2 workers, over torchrun with 2 processes and DistributedDataParallel
    reference  1 worker with 1 loader process over torchvision's loop with 1, as shipped and with channels_last
    saving     how long a save every 30 s of a PSPNet-ResNet-50 to an S3 server holds the loop; how long a save takes
               that the loop waits for
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.peers import figures, runs
from benchmarks.peers.daemons import DaemonWatch
from benchmarks.peers.setting import FULL, QUICK, Size, saving_settings, timed_settings, write_store

PARTS: dict[str, tuple[str, ...]] = {
    "one": ("bare", "ray 1"),
    "two": ("torchrun 2", "ray 2"),
    "reference": ("torchvision", "torchvision channels_last", "ray 1 loader 1"),
    "saving": (),
}
RATIOS = {
    "ray_over_bare": ("ray 1", "bare"),
    "ray_over_torchrun": ("ray 2", "torchrun 2"),
    "ray_over_torchvision": ("ray 1 loader 1", "torchvision"),
    "ray_over_torchvision_channels_last": ("ray 1 loader 1", "torchvision channels_last"),
}
QUICK_PARTS = "one,reference"  # within a minute; the others must be named
SHORTEST_STEP_S = 0.3
Measured = dict[str, list[dict[str, Any]]]  # by loop: one record a repetition


def main() -> None:
    """Measure and print."""
    args = _parser().parse_args()
    size = QUICK if args.quick else FULL
    size = replace(size, repetitions=args.repetitions or size.repetitions)
    parts = (args.parts or (QUICK_PARTS if args.quick else ",".join(PARTS))).split(",")
    unknown = [part for part in parts if part not in PARTS]
    if unknown:
        raise SystemExit(f"no part is called {', '.join(unknown)}; the parts are {', '.join(PARTS)}")
    runs.prepare_environment()
    started_at = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="sceneray-bench-") as name:
        folder = Path(name)
        say("drawing the scenes")
        write_store(str(folder / "store"), size)
        names = [loop for part in parts for loop in PARTS[part]]
        measured = measure(names, size, folder, args.threads) if names else {}
        saved = measure_saving(size, folder, args.threads) if "saving" in parts else None
    result = {
        "benchmark": "train",
        "quick": args.quick,
        **about(size, args.threads),
        **summary(measured, size, args.threads),
        "saving": saved,
        "seconds": round(time.perf_counter() - started_at, 1),
    }
    if not args.json:
        print(report(result))
    print(json.dumps(result))


def measure(names: list[str], size: Size, folder: Path, threads: int) -> Measured:
    """Run every loop once a repetition, with one Ray session up throughout."""
    from jobs.ray_session import ray_session
    from sceneray.devices import usable_cores

    measured: Measured = {name: [] for name in names}
    with ray_session(cpus=max(2, usable_cores())), DaemonWatch() as watch:
        for repetition in range(size.repetitions):
            # Turned every second time: what drifts with time does not always meet the same loop.
            for name in names if repetition % 2 == 0 else reversed(names):
                found = _loop(name)(size, folder, f"{name.replace(' ', '-')}-{repetition}", threads)
                ends = found["ends"]
                record = {
                    "images_per_s": figures.images_per_second(ends, size.skip, size.batch),
                    "data_wait_share": _data_wait(found, size.skip),
                    "ray_share": watch.share(ends[size.skip - 1], ends[-1]),
                }
                measured[name].append(record)
                say(f"repetition {repetition + 1} of {size.repetitions}: {name}, {record['images_per_s']:.2f} images/s")
    return measured


def measure_saving(size: Size, folder: Path, threads: int) -> dict[str, Any]:
    """Share of the time between the first and the last step that the loop was held by saves to an S3 server."""
    say(f"saving every {size.save_every_s:g} s for {size.save_for_s:g} s")
    try:
        with runs.s3_server(folder / "s3") as (bucket, server):
            settings = saving_settings(size, folder, f"{bucket}/run", threads)
            found = runs.saving(settings, folder, size.save_for_s, server)
    except ImportError as error:
        return {"stall_share": None, "reason": f"the S3 server needs the dev extra: {error}"}
    return saving_summary(found, size.save_every_s)


def saving_summary(found: Mapping[str, Any], every_s: float) -> dict[str, Any]:
    """The stall of a saving run, as a share of its time; without the field in its rows, the reason.

    `blocking_save_s` is what one save takes where the loop waits for it.
    """
    rows, seconds = found["rows"][1:], found["ends"][-1] - found["ends"][0]
    share = figures.share_of(rows, "checkpoint_stall_s", seconds)
    if share is None:
        return {"stall_share": None, "reason": "the rows of this version have no checkpoint_stall_s"}
    stalls = sorted((row["checkpoint_stall_s"] for row in rows), reverse=True)
    return {
        "every_s": every_s,
        "seconds": round(seconds, 1),
        "steps": len(rows),
        "stall_share": round(share, 5),
        "rows_with_a_stall": sum(stall > 0 for stall in stalls),
        "longest_stall_s": round(stalls[0], 4),
        "blocking_save_s": round(statistics.median(found["blocking_s"]), 3),
    }


def summary(measured: Measured, size: Size, threads: int) -> dict[str, Any]:
    """Medians of every loop and the ratios between those that were measured."""
    loops = {name: loop_summary(records, size) for name, records in measured.items()}
    ratios = {
        key: figures.paired_ratio(*([record["images_per_s"] for record in measured[name]] for name in pair))
        for key, pair in RATIOS.items()
        if all(name in measured for name in pair)
    }
    short = [name for name, found in loops.items() if found["step_s"] < SHORTEST_STEP_S]
    notes = [f"steps shorter than {SHORTEST_STEP_S} s, too short to quote: {', '.join(short)}"] if short else []
    if any("data_wait_share" in found and found["data_wait_share"] is None for found in loops.values()):
        notes.append("no data wait under Ray: the rows of this version have no data_wait_s")
    if any("2" in name for name in measured) and (os.cpu_count() or 1) < 2 * threads:
        notes.append("two workers share fewer cores than they have threads")
    return {"loops": loops, "ratios": ratios, "notes": notes}


def loop_summary(records: list[dict[str, Any]], size: Size) -> dict[str, Any]:
    """Medians over the repetitions of one loop; `runs` are its rates in order."""
    rates = [record["images_per_s"] for record in records]
    groups = sorted({group for record in records for group in record["ray_share"]})
    shares = {g: statistics.median(record["ray_share"].get(g, 0.0) for record in records) for g in groups}
    wait = figures.median_or_none([record["data_wait_share"] for record in records])
    return {
        "images_per_s": round(statistics.median(rates), 3),
        "step_s": round(size.batch / statistics.median(rates), 3),
        "data_wait_share": None if wait is None else round(wait, 4),
        "ray_cpu_share": round(sum(shares.values()), 4),
        "ray_cpu_share_by_process": {group: round(share, 4) for group, share in shares.items() if share >= 0.0005},
        "runs": [round(rate, 3) for rate in rates],
    }


def report(result: Mapping[str, Any]) -> str:
    """The result for people, in Markdown."""
    loops = [
        (name, found["images_per_s"], found["step_s"], found["data_wait_share"], found["ray_cpu_share"])
        for name, found in result["loops"].items()
    ]
    columns = ("loop", "images/s", "s a step", "waits for data", "Ray's share of the CPU")
    blocks = [figures.markdown(columns, loops)] if loops else []
    ratios = [(key.replace("_", " "), r["median"], r["least"], r["most"]) for key, r in result["ratios"].items()]
    blocks += [figures.markdown(("ratio", "median", "least", "most"), ratios)] if ratios else []
    if result["saving"] is not None:
        blocks.append(figures.markdown(("saving", "value"), list(result["saving"].items())))
    return "\n\n".join([*blocks, *result["notes"]]) + "\n"


def about(size: Size, threads: int) -> dict[str, Any]:
    """What was measured, and where."""
    import torch

    from benchmarks.peers.loops import REFERENCE

    return {
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "torch": torch.__version__,
        "threads": threads,
        "model": size.model,
        "crop": size.side,
        "batch": size.batch,
        "repetitions": size.repetitions,
        "steps_timed": size.steps,
        "reference": REFERENCE,
    }


def say(text: str) -> None:
    """A line of progress on stderr."""
    print(text, file=sys.stderr, flush=True)


def _loop(name: str) -> Callable[[Size, Path, str, int], dict[str, Any]]:
    """How to run a loop: f(size, folder, name of the run, threads) → its "ends" and "waits" or "rows"."""
    kind, _, count = name.partition(" ")
    loaders = 1 if kind == "torchvision" or name.endswith("loader 1") else 0
    workers = int(count[0]) if kind in ("ray", "torchrun") else 1
    child = {"bare": "bare", "torchrun": "bare", "torchvision": "_".join(["reference", count]).rstrip("_")}

    def run(size: Size, folder: Path, title: str, threads: int) -> dict[str, Any]:
        settings = timed_settings(size, folder, title, workers, threads, loaders)
        if kind == "ray":
            return runs.under_ray(settings)
        return runs.in_process(child[kind], settings, folder, workers)

    return run


def _data_wait(found: Mapping[str, Any], skip: int) -> float | None:
    """Share of the timed window that a loop waited for its loader."""
    seconds = figures.window_seconds(found["ends"], skip)
    if "waits" in found:
        return float(sum(found["waits"][skip:])) / seconds
    return figures.share_of(found["rows"][skip:], "data_wait_s", seconds)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="training under Ray Train beside its peers")
    parser.add_argument("--quick", action="store_true", help="tiny sizes and one repetition: shows that it runs")
    parser.add_argument("--json", action="store_true", help="print the JSON line alone")
    parser.add_argument("--parts", help=f"which of {','.join(PARTS)} (default: all; with --quick {QUICK_PARTS})")
    parser.add_argument("--repetitions", type=int, help="default: 5, or 1 with --quick")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of every training process (default: 1)")
    return parser


if __name__ == "__main__":
    main()
