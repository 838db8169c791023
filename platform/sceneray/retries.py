"""Asking a file system again where it failed, and only then."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable
from typing import TypeVar

from sceneray.errors import ConflictError, UnreachableError

ATTEMPTS = 6
FIRST_WAIT_S = 0.3
LONGEST_WAIT_S = 15.0

# These are answers, not faults: asking again gives the same answer.
_ANSWERS = (ConflictError, FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError)

# What a network does to an S3 client is no OSError in these: no route, no credentials, an answer cut short.
_CLIENTS = ("botocore.", "aiobotocore.", "aiohttp.", "urllib3.")

T = TypeVar("T")
log = logging.getLogger("sceneray.retries")


def retry(what: str, action: Callable[[], T]) -> T:
    """Run `action`, again on a storage fault with jittered back-off; conflicts and missing files pass through.

    Raises StorageError where it is not permitted or keeps failing; `what` begins the message ("reading s3://...").
    """
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return action()
        except _ANSWERS:
            raise
        except PermissionError as error:
            raise UnreachableError(
                f"{what} is not permitted: {error}. Check its rights and your credentials."
            ) from error
        except Exception as error:
            if not is_fault(error):
                raise
            if attempt == ATTEMPTS:
                raise UnreachableError(f"{what} failed {ATTEMPTS} times; last: {error}") from error
            log.info("%s failed, attempt %d of %d: %s", what, attempt, ATTEMPTS, error)
            time.sleep(FIRST_WAIT_S * 2 ** (attempt - 1) * (0.5 + random.random()))
    raise AssertionError("unreachable")


def is_fault(error: Exception) -> bool:
    """True for what a network or a disk does."""
    return isinstance(error, OSError) or type(error).__module__.startswith(_CLIENTS)


def patiently(what: str, action: Callable[[], T], seconds: float) -> T:
    """Run `action`, again while the store cannot be reached, for up to `seconds`: one that is away for a minute costs a
    minute. Other errors pass through; raises the last UnreachableError once the time is up.
    """
    gives_up_at = time.monotonic() + seconds
    wait_s = FIRST_WAIT_S
    while True:
        try:
            return action()
        except UnreachableError as error:
            if time.monotonic() + wait_s > gives_up_at:
                raise
            log.warning("%s: %s Again in %.0f s.", what, error, wait_s)
        time.sleep(wait_s)
        wait_s = min(2 * wait_s, LONGEST_WAIT_S)
