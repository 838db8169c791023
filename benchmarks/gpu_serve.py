"""How near the serving core comes to what a GPU can answer: PSPNet-ResNet-50, output stride 8, images of 512×1024.

    python -m benchmarks.gpu_serve [--json] [--quick] [--device cuda|cpu] [--concurrent N] [--variants torch cuda_graph]

Prints a Markdown table and one JSON line; `--json` the line alone. For each batch size and each way to compute there
are two figures. The *limit* is the bare model: scores, upsampling and the class of each pixel, of images that lie on
the device already. *Served* is `serve.segmenter.Segmenter` in this process: photographs in host memory in, masks in
host memory out, batched, asked by twice as many callers as a batch has images, each of whom asks again once answered.
The peer computes as a tutorial does: NCHW, eager, float32. After a warm-up all take turns; medians count. The share of
the peak is that of a large bfloat16 matrix product measured in the same run. A variant that needs more memory than
there is says so and the others go on. Needs neither Ray nor a cluster. `--device cpu --quick` shows that it runs.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import math
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.peers import figures, gpu, networks
from sceneray import bundle, runtimes
from sceneray.config import ModelSettings
from sceneray.data import town
from sceneray.data.store import ClassInfo
from sceneray.masks import Photo
from sceneray.models.pspnet import upscale
from sceneray.predictor import Predictor
from sceneray.runtimes import Precision, Scorer
from serve.batching import Limits, OutOfMemory
from serve.schemas import Rules
from serve.segmenter import Segmenter
from serve.telemetry import Memory

PEER = "eager NCHW"
OURS: dict[str, Precision] = {"torch": "auto", "compile": "auto", "cuda_graph": "auto"}  # runtime → precision
CLASSES = tuple(ClassInfo(number, f"class {number}", (number, number, number)) for number in range(19))
FULL_MEMORY = "out of memory"


@dataclass(frozen=True)
class Size:
    """What is measured."""

    network: ModelSettings
    height: int
    width: int
    batches: tuple[int, ...]
    warm_up: int  # passes; the first ones compile and record
    passes: int  # of the bare model in a repetition
    requests: int  # to the serving core in a repetition, at least
    repetitions: int
    matrix: int  # rows and columns of the product that gives the peak


FULL = Size(ModelSettings(backbone="resnet50"), 512, 1024, (1, 2, 4, 8, 16), 5, 20, 200, 5, 8192)
NARROW = ModelSettings(backbone="resnet18", output_stride=16, head_width=8, aux_width=8, pool_width=4)
QUICK = Size(NARROW, 48, 96, (1, 2), 1, 2, 6, 2, 256)


@dataclass
class Cell:
    """One variant at one batch size, and what was measured of it so far."""

    bare: gpu.Work  # one pass of the bare model
    predictor: Predictor | None = None  # None: the peer, which has no serving core
    segmenter: Segmenter | None = None
    telemetry: Memory = field(default_factory=Memory)
    limits: list[float] = field(default_factory=list)  # images per second, one of each repetition
    served: list[float] = field(default_factory=list)  # likewise
    waits: list[float] = field(default_factory=list)  # seconds, one of each request
    error: str | None = None


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="the serving core on one GPU beside its model alone")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that it runs")
    parser.add_argument("--json", action="store_true", help="print the JSON line alone")
    parser.add_argument("--concurrent", type=int, default=1, help="forward passes at a time in the serving core")
    parser.add_argument("--variants", nargs="+", choices=list(OURS), help="beside the peer; default: all that run here")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        print(
            "gpu_serve: there is no CUDA device here and nothing was measured; --device cpu --quick shows that it runs"
        )
        return
    device = torch.device(args.device)
    names = args.variants or [name for name in OURS if name in runtimes.on(device)]
    if args.variants is None and device.type == "cpu":
        names.remove("compile")  # compiling takes minutes there
    result = measure(QUICK if args.quick else FULL, device, names, args.concurrent)
    if not args.json:
        print(report(result))
    print(json.dumps({**result, "quick": args.quick}))


def measure(size: Size, device: torch.device, names: Sequence[str], concurrent: int = 1) -> dict[str, Any]:
    """Every batch size, one after the other; within one the variants take turns."""
    with tempfile.TemporaryDirectory(prefix="sceneray-bench-") as folder:
        networks.write_random(folder, size.network, CLASSES)
        flops = flops_per_image(folder, size, device)
        # Each has a bundle of its own: the peer changes the memory format of its network.
        peer = networks.tutorial(bundle.load(folder), device)
        predictors = {
            name: Predictor(bundle.load(folder), str(device), runtime=name, precision=OURS[name]) for name in names
        }
    peak = gpu.matmul_flops_per_s(size.matrix, device)
    rows = []
    for batch in size.batches:
        rows += measure_batch(size, batch, device, peer, predictors, concurrent)
    for row in rows:
        if "limit_images_per_s" in row:
            row["share_of_matmul_peak"] = round(row["limit_images_per_s"]["median"] * flops / peak, 4)
    return {
        "benchmark": "gpu_serve",
        "device": gpu.name(device),
        "torch": torch.__version__,
        "model": size.network.model_dump(mode="json"),
        "height": size.height,
        "width": size.width,
        "concurrent_batches": concurrent,
        "precision": {name: predictor.precision for name, predictor in predictors.items()},
        "gflop_per_image": round(flops / 1e9, 2),
        "matmul_tflop_per_s": round(peak / 1e12, 3),
        "rows": rows,
    }


def measure_batch(
    size: Size, batch: int, device: torch.device, peer: Scorer, predictors: Mapping[str, Predictor], concurrent: int
) -> list[dict[str, Any]]:
    """A row for each variant."""
    photos = [town.draw(seed, size.height, size.width)[0] for seed in range(batch)]
    with torch.inference_mode():
        images = torch.from_numpy(np.stack(photos)).to(device)
    cells = {PEER: Cell(bare_model(peer, images))}
    cells |= {name: Cell(bare_model(found.scorer, images), found) for name, found in predictors.items()}
    requests = batch * math.ceil(size.requests / batch)  # whole batches
    with asyncio.Runner() as loop:

        def served(cell: Cell, requests: int) -> tuple[float, list[float]] | None:
            if cell.segmenter is None:
                return None
            return loop.run(closed_loop(cell.segmenter, photos, 2 * batch, requests))

        def prepared(cell: Cell) -> None:
            prepare(cell, size, batch, concurrent)
            served(cell, 2 * batch)

        def turn(cell: Cell) -> None:
            cell.limits.append(batch / gpu.seconds_a_call(cell.bare, device, size.passes))
            if found := served(cell, requests):
                cell.served.append(found[0])
                cell.waits += found[1]

        for cell in cells.values():
            unless_full(cell, prepared)
        for repetition in range(size.repetitions):
            for cell in list(cells.values())[:: -1 if repetition % 2 else 1]:
                unless_full(cell, turn)
    return [{"batch": batch, "variant": name, **row_of(cell, cells[PEER])} for name, cell in cells.items()]


def bare_model(scorer: Scorer, images: Tensor) -> gpu.Work:
    """Class ids uint8 [B, H, W] of `images` (uint8 [B, H, W, 3]) on their device, as work to be timed."""

    @torch.inference_mode()
    def work() -> Tensor:
        # The largest score's place, as argmax has it: on a CPU max is faster (see PSPNet.predict).
        return upscale(scorer(images), images.shape[1:3]).max(dim=1).indices.to(torch.uint8)

    return work


def prepare(cell: Cell, size: Size, batch: int, concurrent: int) -> None:
    """Warm the bare model up, and make a warm serving core of the predictor."""
    for _ in range(size.warm_up):
        cell.bare()
    if cell.predictor is None:
        return
    pixels = batch * size.height * size.width
    limits = Limits(batch, pixels, 4 * pixels, max_wait_s=0.005, workers=concurrent)
    rules = Rules("exact", exact_batch=batch, warm=((size.height, size.width),))
    cell.segmenter = Segmenter(cell.predictor, limits, rules, cell.telemetry)


async def closed_loop(
    segmenter: Segmenter, photos: Sequence[Photo], callers: int, requests: int
) -> tuple[float, list[float]]:
    """Images per second, and the seconds of each of `requests` that `callers` send, each when its last is answered."""
    numbers = iter(range(requests))
    waits: list[float] = []

    async def caller() -> None:
        for number in numbers:
            asked_at = time.perf_counter()
            await segmenter.segment(photos[number % len(photos)])
            waits.append(time.perf_counter() - asked_at)

    started_at = time.perf_counter()
    await asyncio.gather(*(caller() for _ in range(callers)))
    return requests / (time.perf_counter() - started_at), waits


def unless_full(cell: Cell, work: Callable[[Cell], object]) -> None:
    """Do `work` for a cell that fits so far; note where it does not fit any more."""
    if cell.error is not None:
        return
    try:
        work(cell)
    except (torch.OutOfMemoryError, OutOfMemory):
        cell.error = FULL_MEMORY
    if cell.telemetry.values("sceneray_out_of_memory"):  # the serving core halved its batches and went on
        cell.error = FULL_MEMORY
    if cell.error is not None:
        cell.segmenter = None
        gc.collect()
        torch.cuda.empty_cache()


def row_of(cell: Cell, peer: Cell) -> dict[str, Any]:
    """What was measured of a cell, or why there is nothing."""
    if cell.error is not None:
        return {"error": cell.error}
    row: dict[str, Any] = {"limit_images_per_s": figures.spread(cell.limits)}
    if peer.error is None and cell is not peer:
        row["limit_over_peer"] = figures.paired_ratio(cell.limits, peer.limits)
    if cell.served:
        row["served_images_per_s"] = figures.spread(cell.served)
        row["served_over_limit"] = figures.paired_ratio(cell.served, cell.limits)
        p50, p99 = np.percentile(cell.waits, (50, 99))
        row |= {"p50_ms": round(1000 * float(p50), 2), "p99_ms": round(1000 * float(p99), 2)}
        row["images_a_pass"] = round(float(np.mean(cell.telemetry.values("sceneray_batch_images"))), 2)
    return row


def flops_per_image(folder: str, size: Size, device: torch.device) -> float:
    """Floating point operations of the network's forward pass on one image, counted by PyTorch; a multiply and an add
    are two."""
    net = bundle.load(folder).model.to(device)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        net.scores(torch.zeros(1, 3, size.height, size.width, device=device))
    return float(counter.get_total_flops())


def report(result: Mapping[str, Any]) -> str:
    """The result for people, in Markdown: medians, with the least and the most in brackets."""

    def spread(row: Mapping[str, Any], key: str) -> str | None:
        found = row.get(key)
        return (
            found and f"{figures.cell(found['median'])} ({figures.cell(found['least'])}–{figures.cell(found['most'])})"
        )

    rows = [
        (
            row["batch"],
            f"{row['variant']}, {result['precision'].get(row['variant'], 'fp32')}",
            row.get("error") or spread(row, "limit_images_per_s"),
            row.get("share_of_matmul_peak"),
            spread(row, "limit_over_peer"),
            spread(row, "served_images_per_s"),
            spread(row, "served_over_limit"),
            row.get("p50_ms"),
            row.get("p99_ms"),
        )
        for row in result["rows"]
    ]
    columns = (
        "batch", "variant", "limit, images/s", "of the matmul peak", "limit / peer's", "served, images/s",
        "served / limit", "p50, ms", "p99, ms",
    )  # fmt: skip
    head = (
        f"{result['device']}, PyTorch {result['torch']}; images of {result['height']}×{result['width']}, "
        f"{result['gflop_per_image']} GFLOP each; a matrix product runs at {result['matmul_tflop_per_s']} TFLOP/s; "
        f"{result['concurrent_batches']} pass(es) at a time"
    )
    return "\n".join([head, "", figures.markdown(columns, rows)])


if __name__ == "__main__":
    main()
