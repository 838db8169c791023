"""Photographs of many sizes at once through the whole endpoint: what batching may change, and what it may not."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

from jobs.serve import serving
from sceneray.data import town
from sceneray.data.images import decode_label
from sceneray.masks import Mask, Photo
from sceneray.models.pspnet import upscale
from sceneray.predictor import Predictor
from tests.bundles import write_lively_bundle
from tests.unit.serve.uploads import encoded

SIZES = [(side, side + extra) for side in (56, 64, 81, 96) for extra in (0, 13, 32)]
AT_ONCE = 32


def ask(client: httpx.Client, image: Photo) -> tuple[bytes, int]:
    """The answer's bytes, and how many images shared its forward pass."""
    body = encoded(Image.fromarray(image), "PNG")
    answer = client.post("/v1/segment", content=body, headers={"Content-Type": "image/png"})
    assert answer.status_code == 200, answer.text
    return answer.content, int(answer.headers["x-batch-size"])


def close_calls(predictor: Predictor, image: Photo) -> tuple[Mask, Mask]:
    """The single answer, and where its two best scores lie within 1e-4 of the scores' standard deviation."""
    scores = upscale(predictor.scores([image]), image.shape[:2])[0]
    best = scores.topk(2, dim=0).values
    tie: Mask = ((best[0] - best[1]) < 1e-4 * scores.std()).numpy()
    mask: Mask = scores.argmax(dim=0).numpy().astype(np.uint8)
    return mask, tie


@pytest.mark.chaos
@pytest.mark.parametrize("count", [pytest.param(48, marks=pytest.mark.slice), 200])
@pytest.mark.parametrize("mode", ["exact", "fast"])
def test_photos_of_twelve_sizes_at_once_are_answered_as_alone(tmp_path: Path, mode: str, count: int) -> None:
    """Exact: the same bytes, 32 at a time as one at a time. Fast: only pixels between two classes may differ."""
    url = write_lively_bundle(str(tmp_path / "bundle"))
    chance = np.random.default_rng(count)
    images = [town.draw(seed, *SIZES[chance.integers(len(SIZES))])[0] for seed in range(count)]
    options = {"mode": mode, "exact_batch": 4, "max_batch_size": 4, "batch_wait_ms": 50, "access_log": False}
    with serving(url, **options) as base, httpx.Client(base_url=base, timeout=120) as client:
        with ThreadPoolExecutor(AT_ONCE) as pool:
            together = list(pool.map(lambda image: ask(client, image), images))
        alone = [ask(client, image) for image in images]
    sizes = [size for _, size in together]
    assert max(sizes) > 1
    if mode == "exact":
        assert [body for body, _ in together] == [body for body, _ in alone]
    predictor = Predictor.load(url, "cpu")
    differing = pixels = 0
    for image, (body, _) in zip(images, together, strict=True):
        single, tie = close_calls(predictor, image)
        differs = decode_label(body) != single
        assert not (differs & ~tie).any()
        differing, pixels = differing + int(differs.sum()), pixels + single.size
    assert differing <= max(1, pixels // 10**6)
    told = f"{mode}: {count} photos of {len(SIZES)} sizes, {AT_ONCE} at a time, {np.mean(sizes):.2f} to a pass"
    print(f"\n{told}; {differing} of {pixels} pixels differ from the predictor's single answer")
