"""The access log: one JSON line a request on the logger `sceneray.access`.

It says who (the key's id), what (method and path template), how it went and how long each stage took. It never holds
an image, a key, a header of the caller, a query string, or a path as it was sent: whatever could be a secret.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from serve.visit import Visit

NAME = "sceneray.access"
log = logging.getLogger(NAME)

CLIENT_GONE = 499  # as nginx writes it: nobody was there to be answered
# Methods that HTTP defines; anything else is the caller's own text.
_METHODS = {"GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS"}


def write(scope: Mapping[str, Any], visit: Visit, status: int, headers: Mapping[str, str], seconds: float) -> None:
    """Log one request that has been answered. `headers`: those of the answer."""
    line = {
        "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "request_id": visit.request_id,
        "method": scope["method"] if scope["method"] in _METHODS else "other",
        "path": path_template(scope),
        "status": status,
        "error_type": visit.error_type,
        "key": visit.key.id if visit.key else None,
        "bytes_in": visit.bytes_in,
        "bytes_out": visit.bytes_out,
        "pixels": visit.pixels,
        "model": headers.get("x-model-version"),
        "ms": {stage: round(1000 * taken, 1) for stage, taken in {**visit.times, "total": seconds}.items()},
    }
    log.info(json.dumps(line, separators=(",", ":")))


def path_template(scope: Mapping[str, Any]) -> str | None:
    """The route's path as it was declared; None where no route matched, for such a path is the caller's own text."""
    route = scope.get("route")
    found: str | None = getattr(route, "path", None)
    return found


def to_stdout() -> None:
    """Send the lines to this process's stdout, which Ray keeps in a file for each replica. Once a process."""
    if not log.handlers:
        handler = logging.StreamHandler(sys.stdout)
        handler.setFormatter(logging.Formatter("%(message)s"))
        log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
