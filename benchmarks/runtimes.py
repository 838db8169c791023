"""What a bundle's runtimes take for an image on this machine, beside PyTorch as a tutorial runs it.

    python -m benchmarks.runtimes [--quick] [--json] [--device cpu] [--threads N] [--sizes 360x480 480x640]

Prints a table of milliseconds per image and one JSON line. Every runtime computes the scores of the same images; the
peer is the same network with NCHW images, eager. After a warm-up (which compiles) all take turns, so that each meets
the same machine. The median of the repetitions counts; the least, in brackets, is what a busy machine hides least.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from benchmarks.peers import networks
from benchmarks.peers.figures import cell, markdown
from sceneray import bundle, runtimes
from sceneray.config import ModelSettings
from sceneray.data import town
from sceneray.runtimes import Batch, Scorer

PEER = "eager NCHW"
BATCHES = (1, 4)
WIDE = {
    "mobilenet_v2": ModelSettings(backbone="mobilenet_v2", head_width=128),
    "resnet18": ModelSettings(backbone="resnet18"),
}
NARROW = {"resnet18": ModelSettings(backbone="resnet18", output_stride=16, head_width=8, pool_width=4)}


@dataclass(frozen=True)
class Plan:
    """What is measured: each network at each size and batch, so many times."""

    networks: dict[str, ModelSettings]
    sizes: Sequence[tuple[int, int]]
    names: Sequence[str]
    repetitions: int


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a narrow network, no compiler: shows that it runs")
    parser.add_argument("--json", action="store_true", help="the JSON line alone")
    parser.add_argument("--device", default="cpu", type=torch.device, help="where PyTorch computes: cpu or cuda")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--sizes", nargs="+", default=["360x480", "480x640"], help="height x width")
    parser.add_argument("--networks", nargs="+", default=list(WIDE), choices=list(WIDE))
    parser.add_argument("--repetitions", type=int, default=9)
    args = parser.parse_args()
    names = runtimes.on(args.device)
    sizes = [(int(height), int(width)) for height, width in (size.split("x") for size in args.sizes)]
    plan = Plan({name: WIDE[name] for name in args.networks}, sizes, names, args.repetitions)
    if args.quick:
        plan = Plan(NARROW, [(64, 96)], [name for name in names if name != "compile"], 3)
    torch.set_num_threads(args.threads)
    rows = [row for name in plan.networks for row in measure(plan, name, args.device, args.threads)]
    about = {"benchmark": "runtimes", "device": str(args.device), "threads": args.threads, "torch": torch.__version__}
    if not args.json:
        print(report(rows))
    print(json.dumps({**about, "rows": rows}))


def measure(plan: Plan, network: str, device: torch.device, threads: int) -> list[dict[str, Any]]:
    """One row for each size and batch: milliseconds per image, and seconds until the first answer, by runtime."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        networks.write_random(folder, plan.networks[network], town.CLASSES)
        # Each has a bundle of its own: the peer changes the memory format of its network.
        scorers = {PEER: networks.tutorial(bundle.load(folder), device)}
        for name in plan.names:
            scorers[name] = runtimes.start(name, bundle.load(folder), device, threads)
    for height, width in plan.sizes:
        for count in BATCHES:
            batch = np.stack([town.draw(seed, height, width)[0] for seed in range(count)])
            first = {name: _seconds(scorer, batch, device) for name, scorer in scorers.items()}
            times = _in_turns(scorers, batch, device, plan.repetitions)
            rows.append({
                "network": network, "height": height, "width": width, "batch": count,
                "ms_per_image": {name: round(1000 * statistics.median(ts) / count, 1) for name, ts in times.items()},
                "least_ms_per_image": {name: round(1000 * min(ts) / count, 1) for name, ts in times.items()},
                "first_s": {name: round(seconds, 2) for name, seconds in first.items()},
            })  # fmt: skip
    return rows


def report(rows: Sequence[dict[str, Any]]) -> str:
    """The table: the median of milliseconds per image, and the least in brackets."""
    names = list(rows[0]["ms_per_image"])
    lines = []
    for row in rows:
        median, least = row["ms_per_image"], row["least_ms_per_image"]
        cells = [f"{cell(median[name])} ({cell(least[name])})" for name in names]
        lines.append((row["network"], f"{row['height']}×{row['width']}", row["batch"], *cells))
    return markdown(("network", "size", "batch", *names), lines)


def _in_turns(
    scorers: dict[str, Scorer], batch: Batch, device: torch.device, repetitions: int
) -> dict[str, list[float]]:
    """Seconds of each repetition; every second one goes through the runtimes in turned order."""
    times: dict[str, list[float]] = {name: [] for name in scorers}
    gc.collect()
    for repetition in range(repetitions):
        for name in list(scorers)[:: -1 if repetition % 2 else 1]:
            times[name].append(_seconds(scorers[name], batch, device))
    return times


def _seconds(scorer: Scorer, batch: Batch, device: torch.device) -> float:
    wait = partial(torch.cuda.synchronize, device) if device.type == "cuda" else (lambda: None)
    wait()
    started_at = time.perf_counter()
    scorer(batch)
    wait()
    return time.perf_counter() - started_at


if __name__ == "__main__":
    main()
