"""Deadlines, and callers who hang up: nothing is computed for nobody. Behind a real server."""

from __future__ import annotations

import asyncio
import gc
import socket
import time
from collections.abc import Callable

import httpx
import pytest
from PIL import Image
from starlette.datastructures import Headers

from serve.admission import Refused
from serve.api import ApiSettings, Backend, create_app
from serve.middleware import timeout_of
from serve.refusals import FLOOD
from serve.schemas import ErrorBody
from serve.visit import Visit
from tests.unit.serve.servers import Busy, Endless, Still, uvicorn_of, wait_for
from tests.unit.serve.uploads import Client, encoded

PNG = encoded(Image.new("RGB", (40, 25), (90, 90, 90)), "PNG")
HEAD = f"POST /v1/segment HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: {len(PNG)}\r\n"


def post(port: int, **headers: str) -> httpx.Response:
    """One upload, with headers written in Python's way."""
    sent = {"Content-Type": "image/png"} | {name.replace("_", "-"): value for name, value in headers.items()}
    return httpx.post(f"http://127.0.0.1:{port}/v1/segment", content=PNG, headers=sent, timeout=60)


def test_a_late_answer_is_a_504_of_ours_and_its_work_is_called_off() -> None:
    """Past the deadline: JSON with the time it had, its id in the header, and the model's work cancelled."""
    backend = Endless()
    with uvicorn_of(create_app(backend, ApiSettings(deadline_s=0.3))) as port:
        answer = post(port)
        body = ErrorBody.model_validate_json(answer.content)
        assert (answer.status_code, body.error_type, body.detail) == (504, "deadline_exceeded", {"timeout_s": 0.3})
        assert body.request_id == answer.headers["x-request-id"]
        wait_for(backend.cancelled.is_set)
        assert httpx.get(f"http://127.0.0.1:{port}/livez").status_code == 200


def test_a_caller_may_ask_for_less_time_and_never_for_more() -> None:
    """The header x-request-timeout-s shortens the endpoint's own deadline; the model is told which it is."""
    backend = Endless()
    with uvicorn_of(create_app(backend, ApiSettings(deadline_s=30))) as port:
        before = time.time()
        answer = post(port, x_request_timeout_s="0.2")
    assert answer.json()["detail"] == {"timeout_s": 0.2}
    (asked,) = backend.asked
    assert before < asked.deadline < before + 30
    assert timeout_of(Headers({"x-request-timeout-s": "1e9"}), 30) == 30
    assert timeout_of(Headers({}), 30) == 30


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "soon", ""])
def test_a_deadline_that_is_no_time_is_refused(value: str) -> None:
    """422 with the fix, and the upload is not looked at."""
    with pytest.raises(Refused, match="send 10 for ten seconds"):
        timeout_of(Headers({"x-request-timeout-s": value}), 30)
    backend = Still()
    with Client(create_app(backend, ApiSettings(deadline_s=30))) as client:
        answer = client.post("/v1/segment", content=PNG, headers={"x-request-timeout-s": value})
    assert (answer.status_code, answer.json()["error_type"]) == (422, "invalid_parameter")
    assert backend.asked == []


def test_without_a_deadline_of_its_own_a_request_has_the_endpoints() -> None:
    """The model hears of the endpoint's deadline; where there is none, of none."""
    for deadline_s in (30.0, None):
        backend = Still()
        with Client(create_app(backend, ApiSettings(deadline_s=deadline_s))) as client:
            before = time.time()
            assert client.post("/v1/segment", content=PNG).status_code == 200
        (asked,) = backend.asked
        if deadline_s is None:
            assert asked.deadline is None
        else:
            assert before + 30 <= asked.deadline <= time.time() + 30


def test_who_hangs_up_is_not_computed_for() -> None:
    """The connection ends while the model works: its work is cancelled, and the endpoint answers the next one."""
    backend = Endless()
    with uvicorn_of(create_app(backend, ApiSettings())) as port:
        with socket.create_connection(("127.0.0.1", port)) as sock:
            sock.sendall(HEAD.encode() + b"\r\n" + PNG)
            wait_for(backend.entered.is_set)
            assert not backend.cancelled.is_set()
        wait_for(backend.cancelled.is_set)
        assert httpx.get(f"http://127.0.0.1:{port}/readyz").status_code == 200


def test_who_hangs_up_while_sending_is_not_decoded_for() -> None:
    """Half of a body and then nothing: the model is never asked, and the server lives on."""
    backend = Still()
    with uvicorn_of(create_app(backend, ApiSettings())) as port:
        with socket.create_connection(("127.0.0.1", port)) as sock:
            sock.sendall(HEAD.encode() + b"\r\n" + PNG[: len(PNG) // 2])
        assert post(port).status_code == 200
    assert len(backend.asked) == 1


def test_a_body_that_never_ends_is_ended_by_the_deadline() -> None:
    """A caller who sends a byte and waits is answered 504, and the connection is closed."""
    with (
        uvicorn_of(create_app(Still(), ApiSettings(deadline_s=0.3))) as port,
        socket.create_connection(("127.0.0.1", port), timeout=30) as sock,
    ):
        sock.sendall(HEAD.encode() + b"\r\n" + PNG[:1])
        assert sock.recv(65536).startswith(b"HTTP/1.1 504 ")


def test_the_gate_is_free_again_after_a_cancelled_request() -> None:
    """Pixels of a request that was called off do not stay counted, however it ended."""
    backend = Endless()
    with uvicorn_of(create_app(backend, ApiSettings(max_pixels_in_work=1000, deadline_s=0.2))) as port:
        assert [post(port).status_code for _ in range(3)] == [504, 504, 504]


def test_a_cancelled_request_waits_for_its_decoder() -> None:
    """A thread cannot be stopped: its image holds its room at the gate until it is done."""
    import threading

    import numpy as np

    from serve.site import in_thread

    entered, leave, ended = threading.Event(), threading.Event(), threading.Event()

    def slow(_: bytes) -> np.ndarray:
        entered.set()
        leave.wait(30)
        ended.set()
        return np.zeros((1, 1, 3), np.uint8)

    async def play() -> None:
        task = asyncio.ensure_future(in_thread(slow, b""))
        await asyncio.to_thread(entered.wait, 30)
        task.cancel()
        await asyncio.sleep(0)
        assert not task.done()
        leave.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert ended.is_set()

    asyncio.run(play())


def visits() -> int:
    """Requests that this process still knows of."""
    return sum(type(thing) is Visit for thing in gc.get_objects())


@pytest.mark.parametrize(
    ("backend", "headers", "times_before", "status"),
    [
        (Still, {}, 1, 200),
        (Still, {"x_request_timeout_s": "soon"}, 1, 422),
        (Busy, {}, 1, 429),
        (Busy, {}, FLOOD, 429),  # refused by its header from then on
        (Endless, {"x_request_timeout_s": "0.2"}, 1, 504),
    ],
)
def test_a_request_leaves_no_garbage(
    backend: Callable[[], Backend], headers: dict[str, str], times_before: int, status: int
) -> None:
    """What a request held, its image among it, is free when it ends, however it ends: nothing waits for the garbage
    collector, which stops the whole process in order to look for it."""
    with uvicorn_of(create_app(backend(), ApiSettings())) as port:
        for _ in range(times_before):
            post(port, **headers)
        gc.collect()
        before = visits()
        gc.disable()
        try:
            assert [post(port, **headers).status_code for _ in range(3)] == [status] * 3
            wait_for(lambda: visits() <= before)
        finally:
            gc.enable()
