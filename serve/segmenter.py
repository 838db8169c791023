"""One model replica: a bundle's model behind a batcher of equal shapes. Nothing of Ray."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image

from sceneray import windows
from sceneray.errors import DataError, ServingError
from sceneray.masks import Mask, Photo
from sceneray.predictor import Predictor
from serve.batching import Batched, KeyedBatcher, Limits, TooLate
from serve.load import LoadMeter
from serve.priority import step_back
from serve.runner import Item, Outcome, Runner
from serve.schemas import Ask, InputRule, ModelCard, Rules, Segmented
from serve.telemetry import Silent, Telemetry, batch_ran, mask_answered

HEALTHY_S = 60.0  # within so long a forward pass must have ended where one is asked for


@dataclass(frozen=True)
class _Job:
    """An item and the model it was checked for: a model that is replaced answers what it was asked."""

    runner: Runner
    item: Item


def load_predictor(bundle: str, device: str | None, limits: Limits, rules: Rules) -> Predictor:
    """The predictor of a bundle, once it has answered the golden image rightly. Raises BundleError.

    Loaded in a thread of its own: those that a runtime starts for its passes have the priority of the one that loads.
    """
    with ThreadPoolExecutor(1, "segmenter-loader", step_back, (rules.nice,)) as loader:
        load = loader.submit(Predictor.load, bundle, device, limits.max_cost, rules.runtime, rules.precision)
        predictor = load.result()
        loader.submit(predictor.self_check).result()
    return predictor


class Segmenter:
    """Answers images one by one and runs them together where their shapes agree."""

    def __init__(
        self, predictor: Predictor, limits: Limits, rules: Rules | None = None, telemetry: Telemetry | None = None
    ) -> None:
        """`limits` in pixels. The predictor runs in `limits.workers` threads, never on the event loop."""
        self.rules = rules or Rules()
        self.telemetry = telemetry or Silent()
        self.meter = LoadMeter()  # levels: pixels (queued and on the model), requests, passes
        self.limits = self._fitting(limits, predictor)
        self._threads = ThreadPoolExecutor(limits.workers, "segmenter", step_back, (self.rules.nice,))
        self._helpers = ThreadPoolExecutor(2, thread_name_prefix="segmenter-helper")
        self._batcher: KeyedBatcher[_Job, Outcome] = KeyedBatcher(self._run, key=_key, cost=_pixels, limits=self.limits)
        self._passed_at = time.monotonic()  # when the last forward pass ended
        self._runner = self.prepared(predictor)

    @classmethod
    def load(
        cls,
        bundle: str,
        limits: Limits,
        device: str | None = None,
        threads: int | None = None,
        rules: Rules | None = None,
        telemetry: Telemetry | None = None,
    ) -> Segmenter:
        """The segmenter of the bundle at `bundle`, warm: it has answered the golden image, and rightly.

        `threads`: CPU threads of one forward pass; None leaves torch's own number. Raises BundleError where the bundle
        cannot be loaded or answers wrongly.
        """
        if threads is not None:
            torch.set_num_threads(threads)
        rules = rules or Rules()
        return cls(load_predictor(bundle, device, limits, rules), limits, rules, telemetry)

    def prepared(self, predictor: Predictor) -> Runner:
        """A runner of `predictor` under this segmenter's rules, warm. Slow."""
        most = self.limits.max_items if self.rules.mode == "exact" else 1
        runner = Runner(predictor, self.rules.mode, most, self.telemetry)
        shapes = self.rules.warm if self.rules.warm is not None else runner.input.get("warm", ())
        runner.warm(shapes, self.limits.max_items)
        return runner

    def use(self, runner: Runner) -> None:
        """Answer with another model from now on. What was asked before is answered by the one before."""
        self._runner = runner

    @property
    def card(self) -> ModelCard:
        """The model that answers."""
        return self._runner.card

    @property
    def digest(self) -> str:
        """Of the bundle that answers."""
        return self.card.digest

    @property
    def device(self) -> torch.device:
        """Where the model runs."""
        return self._runner.predictor.device

    async def segment(self, image: Photo, ask: Ask | None = None) -> Segmented:
        """The mask of `image` (uint8 [H, W, 3]).

        Raises DataError for an image that the network cannot take, Overloaded where the queue is full, TooLate where
        no forward pass began before the deadline, OutOfMemory.
        """
        ask = ask or Ask()
        runner = self._runner
        rule = ask.rule or self.rules.input or runner.rule
        with self.meter.holding("requests"):
            answer = await INPUTS[rule](self, runner, image, ask)
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._helpers, mask_answered, self.telemetry, answer.mask, answer.model)
        return answer

    async def describe(self) -> dict[str, Any]:
        """bundle.json and the bundle's digest."""
        return self._runner.predictor.info

    async def check(self, within_s: float = HEALTHY_S) -> None:
        """Raise ServingError where the model is stuck: no forward pass ended lately, and none ends now."""
        if time.monotonic() - self._passed_at < within_s / 4:
            return  # it works, and a canary would only take its time
        loop = asyncio.get_running_loop()
        canary = loop.run_in_executor(self._threads, self._runner.predictor.self_check)
        try:
            await asyncio.wait_for(asyncio.shield(canary), within_s)
        except TimeoutError as error:
            raise ServingError(f"the model has not answered its golden image in {within_s:g} s.") from error
        self._passed_at = time.monotonic()

    async def native(self, runner: Runner, image: Photo, ask: Ask) -> Segmented:
        """The photograph as it is."""
        runner.predictor.check(image)  # before queueing: a batch must not fail for one caller's image
        return _answer(runner, [await self._submit(runner, Item(image, _size(image), ask.confidence), ask)])

    async def resized(self, runner: Runner, image: Photo, ask: Ask) -> Segmented:
        """The photograph with its long side at the rule's length; the scores are scaled to the photograph's size."""
        side = self.rules.long_side or runner.input.get("long_side")
        if side is None:
            raise DataError("this model has no long side to resize to: serve it with long_side=N, or ask for native.")
        small = await asyncio.get_running_loop().run_in_executor(self._helpers, _shrunk, image, side)
        runner.predictor.check(small)
        return _answer(runner, [await self._submit(runner, Item(small, _size(image), ask.confidence), ask)])

    async def windowed(self, runner: Runner, image: Photo, ask: Ask) -> Segmented:
        """The photograph in windows of one shape, a row of them at a time."""
        side = self.rules.window or runner.input.get("window")
        if side is None:
            raise DataError("this model has no window: serve it with window=N, or ask for native.")
        loop = asyncio.get_running_loop()
        grown = windows.padded(image, side)
        runner.predictor.check(grown)
        height, width = _size(grown)
        bands = windows.Bands(width, side, ask.confidence)
        parts: list[tuple[Mask, Mask | None]] = []
        answers: list[Batched[Outcome]] = []
        lefts = windows.starts(width, side)
        for top in windows.starts(height, side):
            tiles = [Item(grown[top : top + side, left : left + side], (side, side), window=True) for left in lefts]
            row = await _all(self._submit(runner, tile, ask, admitted=top > 0) for tile in tiles)
            parts += await loop.run_in_executor(self._helpers, _add_row, bands, top, lefts, row)
            answers += [replace(answer, result=Outcome()) for answer in row]
        parts.append(await loop.run_in_executor(self._helpers, bands.rest))
        rows, columns = _size(image)
        mask = np.concatenate([part for part, _ in parts])[:rows, :columns]
        sure = [confidence for _, confidence in parts if confidence is not None]
        confidence = np.concatenate(sure)[:rows, :columns] if sure else None
        return _answer(runner, answers, np.ascontiguousarray(mask), confidence)

    async def _submit(self, runner: Runner, item: Item, ask: Ask, admitted: bool = False) -> Batched[Outcome]:
        within_s = None if ask.deadline is None else ask.deadline - time.time()
        if within_s is not None and within_s <= 0:
            raise TooLate("the request's deadline has passed.")
        job = _Job(runner, item)
        with self.meter.holding("pixels", _pixels(job)):
            answer = await self._batcher.submit(job, within_s, admitted)
        self.telemetry.record("sceneray_queue_wait_seconds", answer.waited_s)
        return answer

    async def _run(self, jobs: Sequence[_Job]) -> list[Outcome]:
        runner, items = jobs[0].runner, [job.item for job in jobs]
        started_at = time.monotonic()
        with self.meter.holding("passes"):
            outcomes = await asyncio.get_running_loop().run_in_executor(self._threads, runner.run, items)
        self._passed_at = time.monotonic()
        batch_ran(self.telemetry, len(jobs), sum(map(_pixels, jobs)), self._passed_at - started_at, self.limits)
        return outcomes

    def _fitting(self, limits: Limits, predictor: Predictor) -> Limits:
        """`limits` with the size of the mode's passes."""
        size = self.rules.pass_size(limits.max_items, on_cpu=predictor.device.type == "cpu")
        return replace(limits, max_items=size)


Input = Callable[[Segmenter, Runner, Photo, Ask], Awaitable[Segmented]]
# How a photograph becomes the network's input. To add a way: a method and a line, and its name in schemas.InputRule.
INPUTS: dict[InputRule, Input] = {
    "native": Segmenter.native,
    "resize": Segmenter.resized,
    "window": Segmenter.windowed,
}


def _answer(
    runner: Runner, parts: Sequence[Batched[Outcome]], mask: Mask | None = None, confidence: Mask | None = None
) -> Segmented:
    """The answer made of the forward passes that one photograph took part in."""
    if mask is None:
        mask, confidence = parts[0].result.mask, parts[0].result.confidence
    assert mask is not None
    times = {"queue": sum(part.waited_s for part in parts), "model": sum(part.ran_s for part in parts)}
    return Segmented(mask, runner.card, max(part.batch_size for part in parts), confidence, times)


async def _all(submitted: Any) -> list[Batched[Outcome]]:
    """The results of all; where one fails the others are taken out of the queue."""
    tasks = [asyncio.ensure_future(one) for one in submitted]
    try:
        return list(await asyncio.gather(*tasks))
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise


def _add_row(
    bands: windows.Bands, top: int, lefts: Sequence[int], row: Sequence[Batched[Outcome]]
) -> list[tuple[Mask, Mask | None]]:
    """Add one row of windows from left to right; the bands that it finished."""
    finished: list[tuple[Mask, Mask | None]] = []
    for left, answer in zip(lefts, row, strict=True):
        assert answer.result.probabilities is not None
        finished += bands.add(top, left, answer.result.probabilities)
    return finished


def _shrunk(image: Photo, side: int) -> Photo:
    """`image` with its long side at `side` pixels at most: never enlarged."""
    height, width = _size(image)
    if max(height, width) <= side:
        return image
    scale = side / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR))


def _size(image: Photo) -> tuple[int, int]:
    return int(image.shape[0]), int(image.shape[1])


def _key(job: _Job) -> tuple[str, int, int]:
    return (job.runner.card.digest, *_size(job.item.image))


def _pixels(job: _Job) -> int:
    height, width = _size(job.item.image)
    return height * width
