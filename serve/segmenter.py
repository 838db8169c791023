"""One model replica: a bundle's predictor behind a batcher of equal shapes. Nothing of Ray."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from sceneray.masks import Mask, Photo
from sceneray.predictor import Predictor
from serve.batching import KeyedBatcher, Limits
from serve.schemas import Ask, ModelCard, Segmented


class Segmenter:
    """Answers images one by one and runs them together where their shapes agree."""

    def __init__(self, predictor: Predictor, limits: Limits) -> None:
        """`limits` in pixels. The predictor runs in `limits.workers` threads, never on the event loop."""
        self._predictor = predictor
        info = predictor.info
        self._card = ModelCard(info["name"], info["version"], info["digest"], predictor.classes)
        self._threads = ThreadPoolExecutor(limits.workers, thread_name_prefix="segmenter")
        self._batcher: KeyedBatcher[Photo, Mask] = KeyedBatcher(self._run, key=_shape, cost=_pixels, limits=limits)

    @classmethod
    def load(cls, bundle: str, limits: Limits, device: str | None = None, threads: int | None = None) -> Segmenter:
        """The segmenter of the bundle at `bundle`, warm: it has answered the golden image, and rightly.

        `threads`: CPU threads of one forward pass; None leaves torch's own number. Raises BundleError where the bundle
        cannot be loaded or answers wrongly.
        """
        if threads is not None:
            torch.set_num_threads(threads)
        predictor = Predictor.load(bundle, device, pixel_budget=limits.max_cost)
        predictor.self_check()
        return cls(predictor, limits)

    async def segment(self, image: Photo, ask: Ask = Ask()) -> Segmented:
        """The mask of `image` (uint8 [H, W, 3]).

        Raises DataError for an image that the network cannot take, Overloaded where the queue is full.
        """
        self._predictor.check(image)  # before queueing: a batch must not fail for one caller's image
        batched = await self._batcher.submit(image)
        return Segmented(batched.result, self._card, batched.batch_size)

    async def describe(self) -> dict[str, Any]:
        """bundle.json and the bundle's digest."""
        return self._predictor.info

    async def _run(self, images: Sequence[Photo]) -> list[Mask]:
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._predictor.predict, images)


def _shape(image: Photo) -> tuple[int, int]:
    return int(image.shape[0]), int(image.shape[1])


def _pixels(image: Photo) -> int:
    height, width = _shape(image)
    return height * width
