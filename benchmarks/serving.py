"""What batching of equal shapes gains on this machine, and what each form of answer costs to encode.

    python -m benchmarks.serving [--images 48] [--callers 16]

Prints one JSON line. The same images of two shapes, from as many callers at once, go to one model replica that batches
them and to one that answers them one by one (max_batch_size 1); the masks must be the same. On a CPU the gain is small;
on a GPU it is what pays. The encoder's peer is Pillow's default compression of the same palette PNG. `formats` has the
milliseconds (the best of some) and KiB of every form of answer to a drawn 1080p scene.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from PIL import Image, ImageFilter

from sceneray import bundle
from sceneray.config import ModelSettings
from sceneray.data import town
from sceneray.masks import Mask, Photo, colour_table, indexed_png
from sceneray.models.pspnet import build_model
from sceneray.predictor import Predictor
from serve.answers import FORMATS, INCLUDES, Wish
from serve.batching import Limits
from serve.schemas import Answered, ModelCard
from serve.segmenter import Segmenter

SHAPES = ((240, 320), (256, 256))
REPEATS = 5


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=48)
    parser.add_argument("--callers", type=int, default=16)
    args = parser.parse_args()
    images = [town.draw(index, *SHAPES[index % 2])[0] for index in range(args.images)]
    predictor = _predictor()
    predictor.predict(images[:2])  # warm
    photo, mask = town.draw(0, 1080, 1920)
    single_s, alone, _ = asyncio.run(_answer(predictor, images, args.callers, batch=1))
    batched_s, together, mean_batch = asyncio.run(_answer(predictor, images, args.callers, batch=8))
    result = {
        "benchmark": "serving",
        "threads": torch.get_num_threads(),
        "images_per_s_batched": round(len(images) / batched_s, 2),
        "images_per_s_one_by_one": round(len(images) / single_s, 2),
        "batched_over_one_by_one": round(single_s / batched_s, 2),
        "mean_batch": round(mean_batch, 2),
        "equal_masks": all(np.array_equal(a, b) for a, b in zip(alone, together, strict=True)),
        **_encoding(mask),
        "formats": _formats(photo, mask),
    }
    print(json.dumps(result))


async def _answer(
    predictor: Predictor, images: Sequence[Photo], callers: int, batch: int
) -> tuple[float, list[Mask], float]:
    """Seconds, masks and mean batch size of `images` sent by `callers` that each wait for one answer at a time."""
    limits = Limits(max_items=batch, max_cost=2**22, max_queued_cost=2**26, max_wait_s=0.01)
    segmenter = Segmenter(predictor, limits)
    room = asyncio.Semaphore(callers)

    async def one(image: Photo) -> tuple[Mask, int]:
        async with room:
            answer = await segmenter.segment(image)
        return answer.mask, answer.batch_size

    started_at = time.perf_counter()
    answers = await asyncio.gather(*(one(image) for image in images))
    seconds = time.perf_counter() - started_at
    return seconds, [mask for mask, _ in answers], float(np.mean([size for _, size in answers]))


def _predictor() -> Predictor:
    """A MobileNetV2 PSPNet with random weights: how fast it is does not depend on what it learned."""
    torch.manual_seed(0)
    settings = ModelSettings(backbone="mobilenet_v2", head_width=128)
    model = build_model(settings, len(town.CLASSES), load_weights=False)
    with tempfile.TemporaryDirectory() as folder:
        bundle.write(folder, model, settings, town.CLASSES, 255, {"name": "benchmark", "version": "0"})
        return Predictor.load(folder)


def _encoding(mask: Mask) -> dict[str, float]:
    """Milliseconds (the best of some) and bytes of a 1080p mask, ours and with Pillow's default level."""
    picture = Image.fromarray(mask)
    picture.putpalette(colour_table(town.CLASSES).tobytes())

    def default() -> bytes:
        out = io.BytesIO()
        picture.save(out, "PNG")
        return out.getvalue()

    ours_s, ours = _best(lambda: indexed_png(mask, town.CLASSES))
    default_s, theirs = _best(default)
    return {
        "png_ms": round(1000 * ours_s, 1),
        "png_ms_default": round(1000 * default_s, 1),
        "png_default_over_ours": round(default_s / ours_s, 2),
        "png_kib": round(len(ours) / 1024, 1),
        "png_kib_default": round(len(theirs) / 1024, 1),
    }


def _formats(photo: Photo, mask: Mask) -> dict[str, dict[str, float]]:
    """Milliseconds and KiB of each format, media type and part of JSON."""
    answered = Answered(photo, mask, ModelCard("benchmark", "0", "", town.CLASSES), _confidence(mask))
    wishes = {
        f"{name} {kind.partition('/')[2]}": (form, Wish(kind))
        for name, form in FORMATS.items()
        for kind in form.media_types
    }
    for part in INCLUDES:
        wishes[f"json include={part}"] = FORMATS["json"], Wish("application/json", frozenset({part}))
    table = {}
    for name, (form, wish) in wishes.items():
        seconds, body = _best(partial(form.render, answered, wish))
        table[name] = {"ms": round(1000 * seconds, 1), "kib": round(len(body) / 1024, 1)}
    return table


def _confidence(mask: Mask) -> Mask:
    """A map that falls off towards the edges between classes, as a network's does: uint8 [H, W]."""
    edges = np.zeros(mask.shape, np.uint8)
    edges[:, 1:] |= mask[:, 1:] != mask[:, :-1]
    edges[1:] |= mask[1:] != mask[:-1]
    doubt = np.asarray(Image.fromarray(255 * edges).filter(ImageFilter.GaussianBlur(6)))
    return 255 - doubt


def _best(work: Callable[[], bytes]) -> tuple[float, bytes]:
    times, data = [], b""
    for _ in range(REPEATS):
        started_at = time.perf_counter()
        data = work()
        times.append(time.perf_counter() - started_at)
    return min(times), data


if __name__ == "__main__":
    main()
