"""How much of a GPU a training step uses: PSPNet-ResNet-50, output stride 8, 713×713, batch 16, one GPU.

    python -m benchmarks.gpu_train [--json] [--quick] [--device cuda|cpu]

Prints a Markdown table and one JSON line; `--json` the line alone. Each variant takes the same network and batches,
which lie in pinned host memory, so that a step is measured and no decoder. Ours is `train_step`: channels_last,
bfloat16, fused optimizer, with and without torch.compile. The peer does what torchvision's segmentation script does a
step (see benchmarks/peers/loops.py): NCHW, eager, the loss read every step, in float32 and with its float16 AMP. The
share of the peak is that of a large bfloat16 matrix product measured in the same run. A variant that needs more memory
than there is says so and the others go on. Needs neither Ray nor a cluster. On a CPU `--device cpu --quick` shows that
it runs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.peers import figures, gpu
from benchmarks.peers.loops import REFERENCE, ReferenceNet, reference_loss
from benchmarks.peers.setting import town_store
from sceneray import config
from sceneray.config import TrainSettings
from sceneray.data.loader import Batch, training_loader
from sceneray.models.pspnet import MEAN, STD, build_model
from sceneray.steps import Data, Runtime, create_state, train_step


@dataclass(frozen=True)
class Size:
    """What is measured: `repetitions` times `steps` steps, after `warm_up` steps."""

    model: str
    crop: int  # pixels, both sides
    batch: int
    batches: int  # different ones, taken in turn
    warm_up: int
    steps: int
    repetitions: int
    matrix: int  # rows and columns of the product that gives the peak


FULL = Size("{backbone: resnet50, output_stride: 8}", 713, 16, 2, 5, 10, 5, 8192)
QUICK = Size("{backbone: resnet18, head_width: 16, aux_width: 16, pool_width: 8}", 64, 2, 2, 1, 1, 2, 256)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="a training step on one GPU beside the plain reference style")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that it runs")
    parser.add_argument("--json", action="store_true", help="print the JSON line alone")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        print(
            "gpu_train: there is no CUDA device here and nothing was measured; --device cpu --quick shows that it runs"
        )
        return
    result = measure(QUICK if args.quick else FULL, torch.device(args.device))
    if not args.json:
        print(report(result))
    print(json.dumps({**result, "quick": args.quick}))


def measure(size: Size, device: torch.device) -> dict[str, Any]:
    """Every variant, one after the other: two networks of this size do not fit side by side."""
    with tempfile.TemporaryDirectory(prefix="sceneray-bench-") as name:
        settings, data, batches = prepare(size, Path(name), device)
        peak = gpu.matmul_flops_per_s(size.matrix, device)
        bandwidth = gpu.copy_bytes_per_s(size.matrix, device)
        flops = flops_per_image(settings, data, batches[0], device)
        makers: dict[str, Callable[[], gpu.Work]] = {
            "sceneray": lambda: our_step(settings, data, batches),
            "sceneray, compiled": lambda: our_step(settings.model_copy(update={"compile": True}), data, batches),
            "reference, fp32": lambda: reference_step(settings, data, batches, device, amp=False),
            "reference, AMP": lambda: reference_step(settings, data, batches, device, amp=True),
            # The first once more: how far the machine drifted meanwhile.
            "sceneray, again": lambda: our_step(settings, data, batches),
        }
        if device.type == "cpu":  # compiling takes minutes there, and the reference's AMP is CUDA's
            makers = {key: make for key, make in makers.items() if key not in ("sceneray, compiled", "reference, AMP")}
        variants = {key: run_variant(make, size, device, flops, peak) for key, make in makers.items()}
    return {
        "benchmark": "gpu_train",
        "device": gpu.name(device),
        "torch": torch.__version__,
        "model": size.model,
        "crop": size.crop,
        "batch": size.batch,
        "gflop_per_image": round(flops / 1e9, 2),
        "matmul_tflop_per_s": round(peak / 1e12, 3),
        "copy_gb_per_s": round(bandwidth / 1e9, 1),
        "reference": REFERENCE,
        "variants": variants,
        "ratios": ratios(variants),
    }


def prepare(size: Size, folder: Path, device: torch.device) -> tuple[TrainSettings, Data, list[Batch]]:
    """Settings, an open store of drawn scenes, and batches of it in host memory (pinned where a GPU reads them)."""
    scenes = size.batch * size.batches
    values = {
        "run": folder / "run",
        "data.store": town_store(str(folder / "store"), scenes, 1, (size.crop, size.crop)),
        "data.cache": folder / "cache",
        "model": size.model,
        "augment.crop": f"[{size.crop}, {size.crop}]",
        "batch_size": size.batch,
        # The rate falls over a run; this one is longer than what is measured.
        "epochs": 10**4,
        "workers": 1,
        "precision": "bf16" if device.type == "cuda" else "fp32",
        "resources.gpu": str(device.type == "cuda").lower(),
    }
    settings = config.load(TrainSettings, None, [f"{key}={value}" for key, value in values.items()])
    data = Data.open(settings)
    loader = training_loader(data.train, settings, data.store.ignore_index, 0, size.batches, 0, 1)
    batches = [Batch(*(pinned(tensor, device) for tensor in batch)) for batch in loader]
    return settings, data, batches


def our_step(settings: TrainSettings, data: Data, batches: list[Batch]) -> gpu.Work:
    """A step of our loop, on the next batch."""
    state = create_state(settings, Runtime(), data)
    following = cycle(batches)
    return lambda: train_step(state, [next(following)])


def reference_step(
    settings: TrainSettings, data: Data, batches: list[Batch], device: torch.device, amp: bool
) -> gpu.Work:
    """A step of torchvision's loop: normalised float batches, which its loader's processes would have made."""
    torch.backends.cudnn.benchmark = True
    torch.manual_seed(settings.seed)
    model = ReferenceNet(build_model(settings.model, len(data.store.classes))).to(device).train()
    recipe = settings.optimizer
    optimizer = torch.optim.SGD(
        model.parameters(), lr=recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay
    )
    scaler = torch.amp.GradScaler(device.type, enabled=amp)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
    following = cycle(
        (pinned((batch.images - mean) / std, device), pinned(batch.labels.long(), device)) for batch in batches
    )

    def step() -> float:
        images, labels = (tensor.to(device) for tensor in next(following))
        with torch.autocast(device.type, dtype=torch.float16) if amp else nullcontext():
            loss = reference_loss(model(images), labels)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        return loss.item()

    return step


def run_variant(
    make: Callable[[], gpu.Work], size: Size, device: torch.device, flops: float, peak: float
) -> dict[str, Any]:
    """Images per second (the median), share of the peak, memory; {"error": ...} where the variant did not fit."""
    gpu.release(device)
    try:
        seconds = gpu.mean_seconds(make(), device, size.warm_up, size.steps, size.repetitions)
    except torch.OutOfMemoryError:
        return {"error": "out of memory"}
    rate = size.batch / statistics.median(seconds)
    memory = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None
    return {
        "images_per_s": round(rate, 2),
        "step_ms": round(1000 * statistics.median(seconds), 2),
        "step_ms_least": round(1000 * min(seconds), 2),
        "step_ms_most": round(1000 * max(seconds), 2),
        "share_of_matmul_peak": round(rate * flops / peak, 4),
        "peak_memory_gib": None if memory is None else round(memory, 2),
    }


def flops_per_image(settings: TrainSettings, data: Data, batch: Batch, device: torch.device) -> float:
    """Floating point operations of a forward and a backward pass, counted by PyTorch on two images; a multiply and an
    add are two."""
    model = build_model(settings.model, len(data.store.classes)).to(device).train()
    images, labels, seeds = (tensor[:2].to(device) for tensor in (batch.images, batch.labels.long(), batch.seeds))
    with FlopCounterMode(display=False) as counter:
        logits = model(images, seeds)
        reference_loss({"out": logits.main, "aux": logits.aux}, labels).backward()
    return float(counter.get_total_flops()) / 2


def ratios(variants: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Images per second of each of our variants over each reference that ran."""
    return {
        f"{ours} / {theirs}": round(variants[ours]["images_per_s"] / variants[theirs]["images_per_s"], 3)
        for ours in ("sceneray", "sceneray, compiled")
        for theirs in ("reference, fp32", "reference, AMP")
        if all("images_per_s" in variants.get(name, {}) for name in (ours, theirs))
    }


def report(result: Mapping[str, Any]) -> str:
    """The result for people, in Markdown."""
    fields = ("step_ms", "share_of_matmul_peak", "peak_memory_gib")
    rows = [
        (name, found.get("images_per_s", found.get("error")), *(found.get(field) for field in fields))
        for name, found in result["variants"].items()
    ]
    columns = ("variant", "images/s", "ms a step", "share of the matmul peak", "peak memory, GiB")
    head = (
        f"{result['device']}, PyTorch {result['torch']}; crop {result['crop']}, batch {result['batch']}, "
        f"{result['gflop_per_image']} GFLOP an image; a matrix product runs at {result['matmul_tflop_per_s']} TFLOP/s, "
        f"a copy at {result['copy_gb_per_s']} GB/s"
    )
    compared = [f"{name}: {ratio}" for name, ratio in result["ratios"].items()]
    return "\n".join([head, "", figures.markdown(columns, rows), "", *compared])


def pinned(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor in memory that a GPU copies from by itself."""
    return tensor.pin_memory() if device.type == "cuda" else tensor


if __name__ == "__main__":
    main()
