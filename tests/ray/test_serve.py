"""The endpoint on a real Ray Serve: batches of equal shapes, the predictor's own masks, and a clean end."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

from jobs import predict
from jobs.cli import main_of
from jobs.serve import serving
from sceneray.data import town
from sceneray.data.images import decode_label
from sceneray.errors import ServingError
from sceneray.predictor import Predictor
from tests.bundles import agree, half_bright, write_bundle
from tests.support import ROOT, free_port
from tests.unit.serve.uploads import encoded

KEY = "open sesame"
SHAPES = [(48, 64), (64, 48)]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The bundle whose answers are known."""
    return write_bundle(str(tmp_path_factory.mktemp("serve") / "bundle"))


@pytest.fixture(scope="module", params=[False, True], ids=["apart", "together"])
def endpoint(bundle: str, request: pytest.FixtureRequest) -> Iterator[httpx.Client]:
    """A client of a running endpoint that wants a key, and waits half a second for a batch to fill; with its HTTP
    routes apart from the model and in one process with it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SCENERAY_API_KEY", KEY)
        with (
            serving(bundle, together=request.param, max_batch_size=4, exact_batch=4, batch_wait_ms=500) as url,
            httpx.Client(base_url=url, timeout=60, headers={"X-API-Key": KEY}) as client,
        ):
            yield client


def png(image: np.ndarray) -> bytes:
    """`image` as a file without loss."""
    return encoded(Image.fromarray(image), "PNG")


def segment(client: httpx.Client, body: bytes) -> httpx.Response:
    """One raw upload."""
    return client.post("/v1/segment", content=body, headers={"Content-Type": "image/png"})


def test_equal_shapes_are_batched_and_answered_as_alone(endpoint: httpx.Client, bundle: str) -> None:
    """Eight images of two shapes at once run in batches above one, and each mask is the predictor's own."""
    images = [town.draw(seed, *SHAPES[seed % 2])[0] for seed in range(8)]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda image: segment(endpoint, png(image)), images))
    assert [answer.status_code for answer in answers] == [200] * 8
    predictor = Predictor.load(bundle, "cpu")
    for image, answer in zip(images, answers, strict=True):
        assert np.array_equal(decode_label(answer.content), predictor.predict([image])[0])
    sizes = [int(answer.headers["x-batch-size"]) for answer in answers]
    assert max(sizes) > 1
    assert max(sizes) <= 4


def test_every_answer_carries_one_request_id(endpoint: httpx.Client) -> None:
    """The proxy's id is in the header once, and the body of an error names the same."""
    answer = segment(endpoint, b"no image")
    assert answer.status_code == 415
    assert answer.headers.get_list("x-request-id") == [answer.json()["request_id"]]


def test_bad_uploads_leave_the_endpoint_alive(endpoint: httpx.Client) -> None:
    """A body above the limit and a broken image are 4xx through the proxy too; a good one follows."""
    image, mask = half_bright()
    assert segment(endpoint, b"\xff" * (21 * 2**20)).status_code == 413
    assert segment(endpoint, png(image)[:100]).status_code == 422
    assert segment(endpoint, png(image[:5])).json()["error_type"] == "unfit_image"
    assert agree(decode_label(segment(endpoint, png(image)).content), mask)


def test_the_key_is_asked_for(endpoint: httpx.Client) -> None:
    """Without the key the model does not answer, and its health does."""
    with httpx.Client(base_url=endpoint.base_url) as stranger:
        assert segment(stranger, png(half_bright()[0])).status_code == 401
        assert stranger.get("/v2/health/ready").status_code == 200


def test_predict_asks_the_endpoint(endpoint: httpx.Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`sceneray predict --url` writes the endpoint's mask; one file that is no image fails it at the end, by name."""
    image, mask = half_bright()
    (tmp_path / "good.png").write_bytes(png(image))
    (tmp_path / "small.png").write_bytes(png(image[:5]))
    monkeypatch.setenv("SCENERAY_API_KEY", KEY)
    out = tmp_path / "out"
    argv = [str(tmp_path), "--url", str(endpoint.base_url), "--out", str(out)]
    assert main_of("predict", argv) == 1
    assert agree(decode_label((out / "good.mask.png").read_bytes()), mask)
    assert sorted(path.name for path in out.iterdir()) == ["good.mask.png", "good.overlay.jpg"]
    monkeypatch.setenv("SCENERAY_API_KEY", "wrong")
    parser = argparse.ArgumentParser()
    predict.add_arguments(parser)
    with pytest.raises(ServingError, match="401"):
        predict.run(parser.parse_args(argv))


@pytest.mark.parametrize("sent", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.chaos)])
def test_the_verb_ends_cleanly(bundle: str, tmp_path: Path, sent: signal.Signals) -> None:
    """`python -m jobs.serve` answers, then on Ctrl-C or SIGTERM exits with 0, its port free and no process left."""
    port, result = free_port(), tmp_path / "result.json"
    command = [sys.executable, "-m", "jobs.serve", bundle, "--port", str(port), "--json", str(result)]
    marker = f"sceneray-test-{port}"
    env = os.environ | {"PYTHONPATH": f"{ROOT / 'platform'}:{ROOT}", "SCENERAY_TEST_MARKER": marker}
    with started(command, env) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert f"http://127.0.0.1:{port}" in line
        assert httpx.get(f"http://127.0.0.1:{port}/v2/health/ready", timeout=30).status_code == 200
        assert len(processes_with(marker)) > 3
        if sent == signal.SIGINT:
            os.killpg(process.pid, sent)  # a terminal's Ctrl-C reaches Ray's own processes as well
        else:
            process.send_signal(sent)
        rest = process.stdout.read()
        assert process.wait(60) == 0
    assert rest == ""
    assert json.loads(result.read_text())["url"] == f"http://127.0.0.1:{port}"
    deadline = time.monotonic() + 10
    while processes_with(marker) and time.monotonic() < deadline:
        time.sleep(0.1)  # between two looks: a process that was killed takes a moment to be gone
    assert processes_with(marker) == []
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(("127.0.0.1", port))


@contextlib.contextmanager
def started(command: list[str], env: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    """A program in a session of its own; killed where the test fails before it ends by itself."""
    with subprocess.Popen(
        command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


def processes_with(marker: str) -> list[str]:
    """Command lines of the running processes that inherited the variable with this value."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if marker.encode() in (folder / "environ").read_bytes():
                found.append((folder / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:  # it ended while we looked
            continue
    return found
