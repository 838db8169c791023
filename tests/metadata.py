"""Metadata servers of three clouds on loopback, as their manuals describe them; and one to try a notice by hand.

python -m tests.metadata --port 8169 --in 120
"""

from __future__ import annotations

import argparse
import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

EC2_ACTION = "/latest/meta-data/spot/instance-action"
EC2_REBALANCE = "/latest/meta-data/events/recommendations/rebalance"


@dataclass(frozen=True)
class Reply:
    """An answer; a body that is no bytes is sent piece by piece, without its length."""

    status: int = 200
    body: bytes | Iterable[bytes] = b""
    headers: Mapping[str, str] = field(default_factory=dict)


# Answers (method, path with query, headers).
Respond = Callable[[str, str, Mapping[str, str]], Reply]


@dataclass
class FakeEc2:
    """IMDSv2: no answer without a token that it gave itself."""

    items: dict[str, str] = field(default_factory=dict)
    tokens: list[str] = field(default_factory=list)  # all that were given
    valid: set[str] = field(default_factory=set)

    def __call__(self, method: str, path: str, headers: Mapping[str, str]) -> Reply:
        if path == "/latest/api/token":
            if method != "PUT":
                return Reply(405)
            if not 1 <= int(headers.get("X-aws-ec2-metadata-token-ttl-seconds", 0)) <= 21600:
                return Reply(400)
            self.tokens.append(f"token-{len(self.tokens)}==")
            self.valid.add(self.tokens[-1])
            return Reply(body=self.tokens[-1].encode())
        if headers.get("X-aws-ec2-metadata-token") not in self.valid:
            return Reply(401)
        return Reply(body=self.items[path].encode()) if path in self.items else Reply(404)

    def announce(self, deadline: float, action: str = "terminate") -> None:
        """From now on there is a notice for `deadline` (unix seconds)."""
        when = datetime.fromtimestamp(deadline, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        self.items[EC2_ACTION] = json.dumps({"action": action, "time": when})


@dataclass
class FakeGcp:
    """Google's server: no answer without its header."""

    items: dict[str, str] = field(default_factory=lambda: {"preempted": "FALSE", "maintenance-event": "NONE"})

    def __call__(self, method: str, path: str, headers: Mapping[str, str]) -> Reply:
        if method != "GET":
            return Reply(405)
        if headers.get("Metadata-Flavor") != "Google":
            return Reply(403)
        name = path.removeprefix("/computeMetadata/v1/instance/")
        found = self.items.get(name)
        return Reply(404) if found is None else Reply(body=found.encode(), headers={"Metadata-Flavor": "Google"})


@dataclass
class FakeAzure:
    """Azure's server: no answer without its header and an API version."""

    name: str = "spot-7"
    events: list[dict[str, object]] = field(default_factory=list)

    def __call__(self, method: str, path: str, headers: Mapping[str, str]) -> Reply:
        place, _, query = path.partition("?")
        if method != "GET":
            return Reply(405)
        if headers.get("Metadata") != "true" or "api-version=" not in query:
            return Reply(400)
        if place == "/metadata/instance/compute/name":
            return Reply(body=self.name.encode())
        if place == "/metadata/scheduledevents":
            return Reply(body=json.dumps({"DocumentIncarnation": 1, "Events": self.events}).encode())
        return Reply(404)


def always(reply: Reply) -> Respond:
    """Answers `reply` to everything."""
    return lambda _method, _path, _headers: reply


@contextlib.contextmanager
def serving(respond: Respond, port: int = 0) -> Iterator[str]:
    """The URL of an HTTP server on loopback that answers as `respond` says, until the context ends."""

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            reply = respond(self.command, self.path, self.headers)
            self.send_response(reply.status)
            for name, value in reply.headers.items():
                self.send_header(name, value)
            if isinstance(reply.body, bytes):
                self.send_header("Content-Length", str(len(reply.body)))
            self.end_headers()
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # who asked has heard enough
                for piece in [reply.body] if isinstance(reply.body, bytes) else reply.body:
                    self.wfile.write(piece)

        do_GET = do_PUT = answer  # noqa: N815 - the names that the base class calls

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def main() -> None:
    """Serve EC2's metadata with a notice, until Ctrl-C."""
    parser = argparse.ArgumentParser(description="An EC2 metadata server with a spot notice, to try `sceneray watch`.")
    parser.add_argument("--port", type=int, default=8169)
    parser.add_argument("--in", dest="seconds", type=float, default=120.0, help="seconds from now to the end")
    args = parser.parse_args()
    cloud = FakeEc2()
    cloud.announce(time.time() + args.seconds)
    with serving(cloud, args.port) as url, contextlib.suppress(KeyboardInterrupt):
        print(f"{url} announces the end in {args.seconds:g} s; Ctrl-C ends it", flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
