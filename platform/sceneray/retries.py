"""Asking a file system again where it failed, and only then."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import TypeVar

from sceneray.errors import ConflictError, StorageError

ATTEMPTS = 6
FIRST_WAIT_S = 0.3

# These are answers, not faults: asking again gives the same answer.
_ANSWERS = (ConflictError, FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError)

T = TypeVar("T")


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
            raise StorageError(f"{what} is not permitted: {error}. Check its rights and your credentials.") from error
        except Exception as error:
            if not is_fault(error):
                raise
            if attempt == ATTEMPTS:
                raise StorageError(f"{what} failed {ATTEMPTS} times; last: {error}") from error
            time.sleep(FIRST_WAIT_S * 2 ** (attempt - 1) * (0.5 + random.random()))
    raise AssertionError("unreachable")


def is_fault(error: Exception) -> bool:
    """True for what a network or a disk does; botocore's own errors (no route, no credentials) are no OSErrors."""
    return isinstance(error, OSError) or type(error).__module__.startswith("botocore.")
