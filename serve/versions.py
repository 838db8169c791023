"""Which version of the model a replica answers with: it follows an alias, and changes without a request noticing.

A candidate is loaded, verified and warmed in a thread beside the model that answers, and takes over by one assignment.
Whatever is wrong with it, the old model goes on, and `describe` says why. Nothing of Ray.
"""

from __future__ import annotations

import asyncio
import logging
from datetime import UTC, datetime
from typing import Any

import psutil
import torch

from sceneray import repository, storage
from sceneray.errors import BundleError, ScenerayError, ServingError
from sceneray.storage import Committed
from serve.batching import Limits
from serve.runner import Runner
from serve.schemas import Rules
from serve.segmenter import Segmenter, load_predictor
from serve.telemetry import Telemetry

WEIGHTS = "model.safetensors"
# Of a bundle's weights, while it is loaded: the file's bytes and the network made of them.
MEMORY_NEEDED = 2.0
log = logging.getLogger("sceneray.serve")


class Versions:
    """A segmenter and the bundle URL it follows: one bundle, or REPO/MODEL@champion. Belongs to one event loop."""

    def __init__(self, segmenter: Segmenter, source: str, device: str | None = None) -> None:
        self.segmenter = segmenter
        self.source = source
        self._device = device
        self._candidate: dict[str, Any] | None = None
        self._refused: set[str] = set()  # digests that were tried in vain: not tried again until the source moves
        self._one = asyncio.Lock()

    @classmethod
    def start(
        cls,
        source: str,
        limits: Limits,
        device: str | None,
        threads: int | None,
        rules: Rules | None = None,
        telemetry: Telemetry | None = None,
    ) -> Versions:
        """A warm replica of the bundle that `source` names.

        Where a champion cannot be loaded the version before it answers, and `describe` names the champion as refused: a
        replica that is started again while a broken model is champion must not take the endpoint down. Raises
        BundleError where neither can be loaded.
        """
        try:
            return cls(Segmenter.load(source, limits, device, threads, rules, telemetry), source, device)
        except ScenerayError as error:
            if not source.endswith("@champion"):
                raise
            before = source.removesuffix("champion") + "previous"
            log.error("%s cannot be served, trying the one before: %s", source, error)
            reason, champion = str(error), _digest(source)
        versions = cls(Segmenter.load(before, limits, device, threads, rules, telemetry), source, device)
        versions._refuse(source, champion, reason)
        return versions

    async def describe(self) -> dict[str, Any]:
        """bundle.json and the digest of the bundle that answers, and `candidate`: None, or what became of the last one
        that was to take over ({"state": "loading" or "refused", "bundle", "digest", "reason", "at"})."""
        return {**await self.segmenter.describe(), "candidate": self._candidate}

    async def follow(self, every_s: float) -> None:
        """Look at the source again and again; ends with its task."""
        while True:
            await asyncio.sleep(every_s)
            await self.look()

    async def look(self) -> None:
        """Change to the bundle that the source names now, if it is another one. Never raises."""
        async with self._one:
            try:
                found = await asyncio.to_thread(repository.resolve, self.source)
            except Exception as error:  # noqa: BLE001  a store may raise anything, and following must not end
                log.warning("%s cannot be looked at, the model stays: %s", self.source, error)
                return
            if found.digest == self.segmenter.digest:
                self._candidate, self._refused = None, set()
            elif found.digest not in self._refused:
                await self._try(found)

    async def change_to(self, source: str) -> None:
        """Follow another source from now on. Never raises."""
        self.source, self._refused = storage.absolute(source), set()
        await self.look()

    async def _try(self, found: Committed) -> None:
        self._candidate = _candidate("loading", found.url, found.digest)
        try:
            runner = await asyncio.to_thread(self._prepare, found)
        except Exception as error:  # a candidate is anybody's file: whatever it raises must not end the old model
            log.exception("%s is refused, the model stays", found.url)
            self._refuse(found.url, found.digest, f"{type(error).__name__}: {error}")
            return
        self.segmenter.use(runner)
        self._candidate = None
        log.info("now answering with %s, digest %s", found.url, found.digest)

    def _prepare(self, found: Committed) -> Runner:
        """The candidate, verified and warm. Slow."""
        self._check_memory(found)
        predictor = load_predictor(found.url, self._device, self.segmenter.limits, self.segmenter.rules)
        if predictor.info["digest"] != found.digest:
            raise BundleError(f"{found.url} changed while it was loaded. Promote it again under a new version.")
        return self.segmenter.prepared(predictor)

    def _check_memory(self, found: Committed) -> None:
        """Raise ServingError where two models would not fit beside each other."""
        needed = MEMORY_NEEDED * found.manifest["files"][WEIGHTS]["bytes"]
        free = psutil.virtual_memory().available
        if self.segmenter.device.type == "cuda":
            free = min(free, torch.cuda.mem_get_info(self.segmenter.device)[0])
        if free < needed:
            raise ServingError(
                f"loading it beside the present model takes {needed / 2**20:.0f} MiB and {free / 2**20:.0f} are free. "
                "Serve it on larger machines, or deploy anew instead of promoting."
            )

    def _refuse(self, url: str, digest: str, reason: str) -> None:
        self._refused.add(digest)
        self._candidate = _candidate("refused", url, digest, reason)


def _digest(source: str) -> str:
    """Of the bundle that `source` names; empty where even that cannot be told."""
    try:
        return repository.resolve(source).digest
    except ScenerayError:
        return ""


def _candidate(state: str, url: str, digest: str, reason: str | None = None) -> dict[str, Any]:
    at = datetime.now(UTC).isoformat(timespec="seconds")
    return {"state": state, "bundle": url, "digest": digest, "reason": reason, "at": at}
