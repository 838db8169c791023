"""The endpoint beside its peers: the same photographs, predictor and codecs behind plain FastAPI, LitServe and ours.

    python -m benchmarks.serve [--quick] [--json] [--bundle URL] [--photos FOLDER] [--repetitions N] [--threads N]

    limit      the predictor in a loop, decode and encode included: no server at all
    fastapi    FastAPI + uvicorn, the model in a thread, codecs in a pool
    litserve   LitServe, its worker process
    sceneray   `sceneray serve`: Ray Serve with all its checks
    tutorial   eager NCHW model, one request at a time, in the event loop

One server is up at a time; every repetition takes all of them, in turned order every second time. First the closed loop
(CALLERS callers) gives a server's peak; then open-loop Poisson arrivals at three shares of one base rate for
all (the fastapi peer's first peak) give latencies, and one at twice that rate the goodput under
overload. Prints a table and one JSON line; no result is judged here. docs/benchmarks.md says what each part claims.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

from benchmarks.peers import figures
from benchmarks.peers.runs import ROOT, prepare_environment

SERVERS = ("limit", "fastapi", "litserve", "sceneray", "tutorial")
MODULES = {"fastapi": "plain", "litserve": "lit", "tutorial": "tutorial"}
RATIOS = [("sceneray", "limit"), ("sceneray", "fastapi"), ("sceneray", "litserve"), ("sceneray", "tutorial")]
SHARES = (0.5, 0.7, 0.9)
OVERLOAD = 2.0
CALLERS = 4
SHAPES = ((360, 480), (480, 360), (300, 400), (240, 320))
Found = dict[str, list[dict[str, Any]]]


def main() -> None:
    """Measure and print."""
    args = _parser().parse_args()
    prepare_environment()
    seconds = 2.0 if args.quick else args.seconds
    servers = args.servers.split(",")
    with tempfile.TemporaryDirectory(prefix="sceneray-bench-") as name:
        folder = Path(name)
        bundle = args.bundle or make_bundle(folder, args.quick)
        photos = args.photos or str(make_photos(folder / "photos", args.quick))
        peaks, loads = measure(servers, bundle, photos, args.repetitions, seconds, args.threads)
    result = {
        "benchmark": "serve",
        "quick": args.quick,
        "cores": os.cpu_count(),
        "threads": args.threads,
        "callers": CALLERS,
        "seconds": seconds,
        "peaks": {name: [record["rate"] for record in records] for name, records in peaks.items()},
        "ratios": ratios(peaks),
        "generator_cores": max(record.get("generator_cores", 0.0) for records in peaks.values() for record in records),
        "loads": loads,
    }
    if not args.json:
        print(report(result))
    print(json.dumps(result))


def measure(
    servers: list[str], bundle: str, photos: str, repetitions: int, seconds: float, threads: int
) -> tuple[Found, Found]:
    """Peaks of every server in every repetition, and in the first one its latencies under load."""
    peaks: Found = {name: [] for name in servers}
    loads: Found = {name: [] for name in servers if name != "limit"}
    for repetition in range(repetitions):
        for name in servers if repetition % 2 == 0 else reversed(servers):
            if name == "limit":
                peaks[name].append(_json("work", bundle, photos, str(seconds), str(threads)))
                say(f"{name}: {peaks[name][-1]['rate']:.2f}/s")
                continue
            with server(name, bundle, threads) as url:
                form = ["json"] if name == "litserve" else []
                _json("load", url, photos, "closed", str(CALLERS), str(min(5.0, seconds)), *form)  # warm
                peaks[name].append(_json("load", url, photos, "closed", str(CALLERS), str(seconds), *form))
                say(f"{name}: {peaks[name][-1]['rate']:.2f}/s with {CALLERS} callers")
                if repetition == 0:
                    base = peaks.get("fastapi", peaks[name])[0]["rate"]
                    loads[name] = [
                        _json("load", url, photos, "open", str(share * base), str(seconds), *form)
                        for share in (*SHARES, OVERLOAD)
                    ]
    return peaks, loads


@contextlib.contextmanager
def server(name: str, bundle: str, threads: int) -> Iterator[str]:
    """The base URL of a server that answers; it ends with the context."""
    from tests.support import free_port

    port = free_port()
    url = f"http://127.0.0.1:{port}"
    if name == "sceneray":
        command = [sys.executable, "-m", "jobs.serve", bundle, "--port", str(port), f"threads={threads}"]
    else:
        command = [sys.executable, "-m", f"benchmarks.endpoints.{MODULES[name]}", bundle, str(port), str(threads)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    try:
        _wait(url, process)
        yield url
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        assert process.stderr is not None
        process.stderr.close()


def ratios(peaks: Found) -> dict[str, dict[str, float]]:
    """Ratios of peaks within each repetition."""
    return {
        f"{ours} over {theirs}": figures.paired_ratio(
            [record["rate"] for record in peaks[ours]], [record["rate"] for record in peaks[theirs]]
        )
        for ours, theirs in RATIOS
        if peaks.get(ours) and peaks.get(theirs)
    }


def report(result: dict[str, Any]) -> str:
    """The result for people, in Markdown."""
    peaks = [(name, statistics.median(rates)) for name, rates in result["peaks"].items()]
    rows = [
        (name, found["amount"], found["p50"], found["p99"], found["goodput"], json.dumps(found["statuses"]))
        for name, records in result["loads"].items()
        for found in records
    ]
    return "\n\n".join(
        [
            figures.markdown(("server", "images/s"), peaks),
            figures.markdown(
                ("ratio", "median", "least", "most"),
                [(name, r["median"], r["least"], r["most"]) for name, r in result["ratios"].items()],
            ),
            figures.markdown(("server", "offered/s", "p50 s", "p99 s", "goodput/s", "statuses"), rows),
        ]
    )


def make_bundle(folder: Path, quick: bool) -> str:
    """A MobileNetV2 PSPNet with random weights: how fast it is does not depend on what it learned."""
    import torch

    from sceneray import bundle, onnx_graph
    from sceneray.config import ModelSettings
    from sceneray.data import town
    from sceneray.models.pspnet import build_model

    torch.manual_seed(0)
    width = 16 if quick else 128
    settings = ModelSettings(backbone="mobilenet_v2", head_width=width)
    model = build_model(settings, len(town.CLASSES), load_weights=False)
    url = str(folder / "bundle")
    about = {"name": "benchmark", "version": "0"}
    bundle.write(url, model, settings, town.CLASSES, 255, about, onnx_graph.export(model.eval()))
    return url


def make_photos(folder: Path, quick: bool) -> Path:
    """Drawn scenes of several sizes as JPEG files."""
    from sceneray.data import town
    from sceneray.data.images import encode_jpeg

    folder.mkdir()
    shapes = [(height // 4, width // 4) for height, width in SHAPES] if quick else SHAPES
    for number in range(12):
        image = town.draw(number, *shapes[number % len(shapes)])[0]
        (folder / f"{number:02d}.jpg").write_bytes(encode_jpeg(image, 90))
    return folder


def say(text: str) -> None:
    """A line of progress on stderr."""
    print(text, file=sys.stderr, flush=True)


def _wait(url: str, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise SystemExit(f"the server ended:\n{process.stderr.read()[-3000:] if process.stderr else ''}")
        with contextlib.suppress(httpx.TransportError):
            # LitServe has its own health path; any answer below 500 means that requests are taken.
            if any(httpx.get(url + path).status_code == 200 for path in ("/v2/health/ready", "/health")):
                return
        time.sleep(0.2)
    raise SystemExit("the server did not answer in 120 s")


def _json(module: str, *arguments: str) -> dict[str, Any]:
    command = [sys.executable, "-m", f"benchmarks.endpoints.{module}", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command[2:])} failed:\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="the endpoint beside its peers")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that it runs")
    parser.add_argument("--json", action="store_true", help="print the JSON line alone")
    parser.add_argument("--bundle", help="default: a MobileNetV2 PSPNet with random weights")
    parser.add_argument("--photos", help="folder of JPEG files; default: drawn scenes of four sizes")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each measurement (default: 20)")
    parser.add_argument("--repetitions", type=int, default=1 if "--quick" in sys.argv else 5)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of a forward pass (default: 2)")
    known = [name for name in SERVERS if name != "litserve" or importlib.util.find_spec("litserve")]
    parser.add_argument("--servers", default=",".join(known), help=f"which of {','.join(SERVERS)}")
    return parser


if __name__ == "__main__":
    main()
