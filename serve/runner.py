"""Batches on one model: exact or fast, split where memory runs out, warmed up before anybody asks. Nothing of Ray."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sceneray.errors import ConfigError
from sceneray.masks import Mask, Photo
from sceneray.predictor import Predictor
from serve.batching import OutOfMemory
from serve.schemas import InputRule, Mode, ModelCard
from serve.telemetry import Silent, Telemetry

# What torch says where the host's memory ends; CUDA has a class of its own.
NO_MEMORY = ("can't allocate memory", "not enough memory")
log = logging.getLogger("sceneray.serve")


@dataclass(frozen=True)
class Item:
    """One model input, uint8 [h, w, 3], and what is wanted of it: a mask of `size`, or a window's probabilities."""

    image: Photo
    size: tuple[int, int]
    confidence: bool = False
    window: bool = False


@dataclass(frozen=True)
class Outcome:
    """What became of an Item. A window has `probabilities` (float [C, side, side], on the device), others a `mask`."""

    mask: Mask | None = None
    confidence: Mask | None = None
    probabilities: Tensor | None = None


class Runner:
    """One loaded model. `run` is called from one thread at a time for each of the batcher's workers."""

    def __init__(
        self, predictor: Predictor, mode: Mode = "exact", exact_batch: int = 1, telemetry: Telemetry | None = None
    ) -> None:
        """In `exact` mode every forward pass has `exact_batch` images, filled up with black ones: the kernels never
        change, and an image's answer is the same bytes whatever runs beside it. In `fast` mode a pass is as large as
        the batch is."""
        if exact_batch < 1:
            raise ConfigError(f"exact_batch must be at least 1, got {exact_batch}.")
        self.predictor = predictor
        self.mode: Mode = mode
        info = predictor.info
        self.card = ModelCard(info["name"], info["version"], info["digest"], predictor.classes)
        self.input: dict[str, Any] = info["input"]
        self._exact_batch = exact_batch
        self._telemetry = telemetry or Silent()
        # Batch sizes that a shape was once too large for: shape → the largest size that may still be tried.
        self._largest: dict[tuple[int, ...], int] = {}

    @property
    def rule(self) -> InputRule:
        """How a photograph becomes the network's input, as the bundle says."""
        rule: InputRule = self.input.get("rule", "native")
        return rule

    def run(self, items: Sequence[Item]) -> list[Outcome]:
        """Outcomes of items whose images have one shape, in order.

        Raises OutOfMemory where a single image is too large for the device.
        """
        shape = items[0].image.shape
        most = self._most(shape, len(items))
        try:
            outcomes: list[Outcome] = []
            for start in range(0, len(items), most):
                outcomes += self._pass(items[start : start + most], most)
            return outcomes
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            log.warning("%d images of %s do not fit: %s", most, shape[:2], (str(error) or repr(error)).splitlines()[0])
            self._telemetry.record("sceneray_out_of_memory", 1)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if most == 1:
            height, width = shape[:2]
            raise OutOfMemory(f"an image of {height} × {width} pixels does not fit into the model's memory.")
        self._largest[shape] = most // 2
        return self.run(items)

    def warm(self, shapes: Sequence[Sequence[int]], most: int) -> None:
        """Run black images of each shape [height, width], alone and `most` at a time, so that nobody waits for what a
        first pass sets up."""
        for height, width in shapes:
            image = np.zeros((height, width, 3), np.uint8)
            for count in sorted({1, most}):
                self.run([Item(image, (height, width))] * count)

    def _most(self, shape: tuple[int, ...], count: int) -> int:
        """Images of one forward pass."""
        wanted = self._exact_batch if self.mode == "exact" else count
        return min(wanted, self._largest.get(shape, wanted))

    def _pass(self, items: Sequence[Item], most: int) -> list[Outcome]:
        pad_to = most if self.mode == "exact" else 1
        scores = self.predictor.scores([item.image for item in items], pad_to)
        return [self._outcome(item, found) for item, found in zip(items, scores, strict=True)]

    def _outcome(self, item: Item, scores: Tensor) -> Outcome:
        if item.window:
            return Outcome(probabilities=self.predictor.probabilities(scores, item.size))
        mask, confidence = self.predictor.finish(scores, item.size, item.confidence)
        return Outcome(mask, confidence)


def is_out_of_memory(error: BaseException) -> bool:
    """True for what a device or a host without memory left makes torch raise."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in NO_MEMORY)
