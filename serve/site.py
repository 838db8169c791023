"""What every route shares: the model behind it, the limits, and the way from an upload to an answer. Nothing of Ray."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from sceneray.masks import Photo
from serve.admission import PixelGate, UploadLimits, check_header, decode
from serve.schemas import Answered, Ask, Segmented

Times = dict[str, float]  # seconds by stage of one request, in the order of the stages


class Backend(Protocol):
    """What the routes need of a model."""

    async def segment(self, image: Photo, ask: Ask) -> Segmented:
        """The mask of `image` (uint8 [H, W, 3]). Raises Overloaded, or DataError for an image it cannot take."""

    async def describe(self) -> dict[str, Any]:
        """bundle.json and the bundle's `digest`; an answer means that the model is ready."""


@dataclass(frozen=True)
class ApiSettings:
    """What the ingress enforces. `key_digests`: sha256 in hex of the keys that may enter; none: all may."""

    uploads: UploadLimits = field(default_factory=UploadLimits)
    max_pixels_in_work: int = 4 * 4096 * 4096
    key_digests: Sequence[str] = ()


class Site:
    """The state of one ingress replica, handed to every module of serve/routes."""

    def __init__(self, backend: Backend, settings: ApiSettings, guard: Sequence[Any]) -> None:
        """`guard`: FastAPI dependencies of the routes that ask for a key."""
        self.backend = backend
        self.settings = settings
        self.guard = list(guard)
        self.gate = PixelGate(settings.max_pixels_in_work)

    @contextlib.asynccontextmanager
    async def segmented(self, data: bytes, ask: Ask, times: Times) -> AsyncIterator[Answered]:
        """The answer to the image file `data`, which holds its room at the gate while the context lasts.

        Adds to `times`. Raises Refused for what is no image or too large, Overloaded, or DataError.
        """
        with timed(times, "header"):
            height, width = await asyncio.to_thread(check_header, data, self.settings.uploads)
        with self.gate.admit(height * width):
            with timed(times, "decode"):
                image = await asyncio.to_thread(decode, data)
            answer = await self.backend.segment(image, ask)
            for stage, seconds in answer.times.items():
                times[stage] = times.get(stage, 0.0) + seconds
            yield Answered(image, answer.mask, answer.model, answer.confidence, answer.batch_size)


@contextlib.contextmanager
def timed(times: Times, stage: str) -> Iterator[None]:
    """Add the context's duration to `times[stage]`."""
    started_at = time.perf_counter()
    try:
        yield
    finally:
        times[stage] = times.get(stage, 0.0) + time.perf_counter() - started_at
