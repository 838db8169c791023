"""Keys that change while the endpoint runs: the key file is looked at every few seconds."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

from sceneray import storage
from sceneray.errors import ConfigError, ScenerayError
from serve import keys
from serve.keys import KeyRing

log = logging.getLogger("sceneray.serve")

POLL_S = 3.0


class KeyWatch:
    """The keys that may enter: bare digests, and those of a file that is read again when it changes.

    A new file that cannot be read or understood is logged as an error, and the keys before it stay.
    """

    def __init__(self, digests: Sequence[str] = (), url: str | None = None, poll_s: float = POLL_S) -> None:
        """Reads the file. Raises ConfigError where it cannot be used: an endpoint must not start without its keys."""
        self._fixed = keys.of_digests(digests)
        self._url = url
        self._poll_s = poll_s
        self._tag: str | None = None
        self.ring = KeyRing(self._fixed, open=not digests and url is None)
        if url is not None:
            self._tag = storage.etag(url)
            self._use(keys.read(url))

    def look(self) -> bool:
        """Take over the file if it changed; True where it did. Blocks on the file's store."""
        if self._url is None:
            return False
        try:
            tag = storage.etag(self._url)  # before the content: what changes in between is seen by the next look
            if tag == self._tag:
                return False
            if tag is None:
                raise ConfigError(f"the key file {self._url} is gone; put it back.")
            self._tag = tag  # also of a broken file: its error is logged once
            self._use(keys.read(self._url))
        except ScenerayError as error:
            log.error("the keys stay as they were: %s", error)
            return False
        log.info("%d keys were read from %s", len(self.ring.keys), self._url)
        return True

    async def run(self) -> None:
        """Look again and again, until cancelled."""
        while self._url is not None:
            await asyncio.sleep(self._poll_s)
            await asyncio.to_thread(self.look)

    def _use(self, found: tuple[keys.Key, ...]) -> None:
        # The file's first: where a digest stands in both, its quotas hold.
        self.ring = KeyRing((*found, *self._fixed))
