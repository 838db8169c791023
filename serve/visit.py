"""One request while it is answered: its name, its key, its deadline, and what it has cost so far.

The middleware makes it; routes and the site read and add to it. It travels in a context variable, so that what a
request calls need not hand it down, and each request of an event loop sees its own.
"""

from __future__ import annotations

import re
import uuid
from contextvars import ContextVar
from dataclasses import dataclass, field

from serve.keys import Key

MAX_REQUEST_ID = 128
# No spaces, quotes, brackets or line ends: what stands here goes into headers and logs.
_UNFIT = re.compile(r"[^A-Za-z0-9._:/+=@-]+")


@dataclass
class Visit:
    """The state of one request."""

    request_id: str
    deadline: float | None = None  # unix time after which nobody waits for the answer
    times: dict[str, float] = field(default_factory=dict)  # seconds by stage, in the order of the stages
    key: Key | None = None  # who asks; None: nobody was asked for a key
    pixels: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    error_type: str | None = None


_CURRENT: ContextVar[Visit | None] = ContextVar("sceneray_visit", default=None)


def current() -> Visit | None:
    """The request that is answered now; None outside of one."""
    return _CURRENT.get()


def enter(visit: Visit) -> None:
    """Make `visit` the one that `current` names, in this request's context."""
    _CURRENT.set(visit)


def clean_request_id(given: str) -> str:
    """The caller's own name for a request as far as it may stand in a header or a log; a new one where nothing may.

    >>> clean_request_id("mine-1\\x1b[31m")
    'mine-131m'
    """
    return _UNFIT.sub("", given)[:MAX_REQUEST_ID] or uuid.uuid4().hex
