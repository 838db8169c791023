"""What every route shares: the model behind it, the limits, and the way from an upload to an answer. Nothing of Ray."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from sceneray.masks import Photo
from serve import visit
from serve.admission import PixelGate, UploadLimits, check_header, decode
from serve.batching import Overloaded
from serve.guard import check_quota
from serve.image_header import claimed_pixels
from serve.quotas import LocalQuotas, Quotas
from serve.refusals import Refusals
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
    """What the ingress enforces.

    `key_digests`: sha256 in hex of the keys that may enter; `keys_file`: URL of more, with quotas (serve/keys.py);
    neither: all may. `deadline_s`: the longest a request may take. `cors_origins`: whose pages may read answers.
    `proxied`: Serve's proxy stands before the app and echoes x-request-id.
    """

    uploads: UploadLimits = field(default_factory=UploadLimits)
    max_pixels_in_work: int = 4 * 4096 * 4096
    max_bytes_in_work: int = 256 * 2**20
    key_digests: Sequence[str] = ()
    keys_file: str | None = None
    deadline_s: float | None = None
    cors_origins: Sequence[str] = ()
    access_log: bool = True
    proxied: bool = False


class _Timely:
    """A backend that is told when nobody waits for the answer any more, and whose refusals are remembered."""

    def __init__(self, backend: Backend, refusals: Refusals) -> None:
        self._backend = backend
        self._refusals = refusals

    async def segment(self, image: Photo, ask: Ask) -> Segmented:
        """As Backend.segment, with the earlier of the caller's deadline and the request's."""
        here = visit.current()
        times = [at for at in (ask.deadline, here.deadline if here else None) if at is not None]
        pixels = image.shape[0] * image.shape[1]
        try:
            answer = await self._backend.segment(image, replace(ask, deadline=min(times, default=None)))
        except Overloaded as error:
            self._refusals.refused(pixels, error)
            raise
        self._refusals.answered(pixels)
        return answer

    async def describe(self) -> dict[str, Any]:
        """As Backend.describe."""
        return await self._backend.describe()


class Site:
    """The state of one ingress replica, handed to every module of serve/routes."""

    def __init__(
        self, backend: Backend, settings: ApiSettings, guard: Sequence[Any], quotas: Quotas | None = None
    ) -> None:
        """`guard`: FastAPI dependencies of the routes that ask for a key. `quotas`: how much a key may ask for."""
        self.refusals = Refusals()
        self.backend: Backend = _Timely(backend, self.refusals)
        self.quotas = quotas or LocalQuotas()
        self.settings = settings
        self.guard = list(guard)
        self.gate = PixelGate(settings.max_pixels_in_work)

    @contextlib.asynccontextmanager
    async def room(self, pixels: int) -> AsyncIterator[None]:
        """Hold room for so many pixels while the context lasts, and take them from the quota of the request's key.

        Every way to the model leads through here. Raises Refused (429, 413) by the key's quota, Overloaded.
        """
        here = visit.current()
        if here is not None:
            here.pixels += pixels
            if here.key is not None:
                await check_quota(self.quotas, here.key, pixels=pixels)
        self.refusals.check(pixels)
        with self.gate.admit(pixels):
            yield

    @contextlib.asynccontextmanager
    async def segmented(self, data: bytes, ask: Ask, times: Times) -> AsyncIterator[Answered]:
        """The answer to the image file `data`, which holds its room at the gate while the context lasts.

        Adds to `times`. Raises Refused for what is no image or too large, Overloaded, or DataError.
        """
        if (claimed := claimed_pixels(data)) is not None:
            self.refusals.look(claimed)  # in a flood most end here, without a thread
        with timed(times, "header"):
            height, width = await asyncio.to_thread(check_header, data, self.settings.uploads)
        async with self.room(height * width):
            with timed(times, "decode"):
                image = await in_thread(decode, data)
            answer = await self.backend.segment(image, ask)
            for stage, seconds in answer.times.items():
                times[stage] = times.get(stage, 0.0) + seconds
            yield Answered(image, answer.mask, answer.model, answer.confidence, answer.batch_size)


async def in_thread(function: Callable[[bytes], Photo], data: bytes) -> Photo:
    """As asyncio.to_thread, but a cancelled caller leaves only when the thread has: it still holds its memory."""
    running = asyncio.ensure_future(asyncio.to_thread(function, data))
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        await asyncio.wait([running])
        raise


@contextlib.contextmanager
def timed(times: Times, stage: str) -> Iterator[None]:
    """Add the context's duration to `times[stage]`."""
    started_at = time.perf_counter()
    try:
        yield
    finally:
        times[stage] = times.get(stage, 0.0) + time.perf_counter() - started_at
