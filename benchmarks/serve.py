"""The endpoint beside its peers: the same photographs, predictor and codecs behind plain FastAPI, LitServe and ours.

    python -m benchmarks.serve [--quick] [--json] [--bundle URL] [--photos FOLDER] [--repetitions N]
                              [--threads N] [--passes N]

    limit      the predictor in a loop, decode and encode included: no server at all
    fastapi    FastAPI + uvicorn, the model in a thread, codecs in a pool
    litserve   LitServe, its worker process
    sceneray   `sceneray serve`: Ray Serve with all its checks; -haproxy: behind HAProxy as serve/config.cluster.yaml
               has it; -together: HTTP routes and model in one process
    tutorial   eager NCHW model, one request at a time, in the event loop

All servers are up, and one has its turn while the others are stopped; every repetition takes all of them, in turned
order every second time. First the closed loop (CALLERS callers) gives a server's peak, and the CPU time that all its
processes need for an image; then open-loop Poisson arrivals at shares of one base rate for all (the fastapi peer's
peak) give latencies, and one at twice that rate the goodput under overload. Prints a table and one JSON line; no result
is judged here. docs/benchmarks.md says what each part claims.
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
from pathlib import Path
from typing import Any

from benchmarks.endpoints import servers
from benchmarks.peers import figures
from benchmarks.peers.runs import ROOT, prepare_environment

LIMIT = "limit"
OURS = [name for name, kind in servers.KINDS.items() if kind.module is None]
PEERS = (LIMIT, "fastapi", "litserve", "tutorial")
SHARES = (0.3, 0.5, 0.6, 0.7, 0.8, 0.9)
P99_BOUND_S = 0.5
OVERLOAD = 2.0
CALLERS = 4
SHAPES = ((360, 480), (480, 360), (300, 400), (240, 320))
Found = dict[str, list[dict[str, Any]]]


def main() -> None:
    """Measure and print."""
    args = _parser().parse_args()
    prepare_environment()
    seconds = 2.0 if args.quick else args.seconds
    names = args.servers.split(",")
    with tempfile.TemporaryDirectory(prefix="sceneray-bench-") as name:
        folder = Path(name)
        bundle = args.bundle or make_bundle(folder, args.quick)
        photos = args.photos or str(make_photos(folder / "photos", args.quick))
        peaks, loads = measure(
            names, bundle, photos, args.repetitions, seconds, (args.threads, args.passes), args.peaks_only
        )
    result = {
        "benchmark": "serve",
        "quick": args.quick,
        "cores": os.cpu_count(),
        "threads": args.threads,
        "passes": args.passes,
        "callers": CALLERS,
        "seconds": seconds,
        "peaks": {name: [record["rate"] for record in records] for name, records in peaks.items()},
        "ratios": ratios(peaks),
        "cpu_ms": {
            name: statistics.median(record["cpu_ms"] for record in records)
            for name, records in peaks.items()
            if name != LIMIT
        },
        "p99_bound_s": P99_BOUND_S,
        "max_rates": {name: max_rate(records) for name, records in loads.items()},
        "generator_cores": max(record.get("generator_cores", 0.0) for records in peaks.values() for record in records),
        "loads": loads,
    }
    if not args.json:
        print(report(result))
    print(json.dumps(result))


def measure(
    names: list[str],
    bundle: str,
    photos: str,
    repetitions: int,
    seconds: float,
    tuned: tuple[int, int],
    peaks_only: bool = False,
) -> tuple[Found, Found]:
    """Peaks of every server in every repetition, then their latencies under load. `tuned`: threads and passes."""
    peaks: Found = {name: [] for name in names}
    loads: Found = {name: [] for name in names if name != LIMIT}
    with contextlib.ExitStack() as stack:
        up = {name: _start(stack, name, bundle, photos, *tuned) for name in loads}
        for repetition in range(repetitions):
            for name in names if repetition % 2 == 0 else reversed(names):
                if name == LIMIT:
                    peaks[name].append(_json("work", bundle, photos, str(seconds), *map(str, tuned)))
                else:
                    peaks[name].append(_peak(up[name], photos, seconds))
                say(f"{name}: {peaks[name][-1]['rate']:.2f}/s")
        if peaks_only:
            return peaks, {}
        base = statistics.median(record["rate"] for record in peaks.get("fastapi", peaks[names[-1]]))
        for share in (*SHARES, OVERLOAD):
            for name, one in up.items():
                with one.turn():
                    found = _json("load", one.url, photos, "open", str(share * base), str(seconds), *one.kind.upload)
                loads[name].append(found | {"share": share})
                say(f"{name} at {share:g} of the base: p99 {found['p99']} s, {found['goodput']:.2f}/s in time")
    return peaks, loads


def _start(
    stack: contextlib.ExitStack, name: str, bundle: str, photos: str, threads: int, passes: int
) -> servers.Server:
    """A server that is warm and has no turn."""
    found = stack.enter_context(servers.server(name, bundle, threads, passes))
    with found.turn():
        _json("load", found.url, photos, "closed", str(CALLERS), "3", *found.kind.upload)
    return found


def _peak(server: servers.Server, photos: str, seconds: float) -> dict[str, Any]:
    with server.turn():
        before = server.cpu_seconds()
        found = _json("load", server.url, photos, "closed", str(CALLERS), str(seconds), *server.kind.upload)
        used = server.cpu_seconds() - before
    return found | {"cpu_ms": round(1000 * used / max(1, found["statuses"].get("200", 0)), 2)}


def ratios(peaks: Found) -> dict[str, dict[str, float]]:
    """Ratios of peaks within each repetition."""
    return {
        f"{ours} over {theirs}": figures.paired_ratio(
            [record["rate"] for record in peaks[ours]], [record["rate"] for record in peaks[theirs]]
        )
        for ours in OURS
        for theirs in PEERS
        if peaks.get(ours) and peaks.get(theirs)
    }


def max_rate(records: list[dict[str, Any]]) -> float:
    """The highest offered rate at which all were answered, 99 % of them within P99_BOUND_S; 0 where there is none."""
    good = [
        record["amount"] for record in records if set(record["statuses"]) == {"200"} and record["p99"] <= P99_BOUND_S
    ]
    return round(max(good, default=0.0), 2)


def report(result: dict[str, Any]) -> str:
    """The result for people, in Markdown."""
    cpu, most = result["cpu_ms"], result["max_rates"]
    peaks = [
        (name, statistics.median(rates), cpu.get(name, ""), most.get(name, ""))
        for name, rates in result["peaks"].items()
    ]
    rows = [
        (name, found["amount"], found["p50"], found["p99"], found["goodput"], json.dumps(found["statuses"]))
        for name, records in result["loads"].items()
        for found in records
    ]
    return "\n\n".join(
        [
            figures.markdown(("server", "images/s", "CPU ms an image", f"most/s with p99 <= {P99_BOUND_S} s"), peaks),
            figures.markdown(
                ("ratio", "median", "least", "most"),
                [(name, r["median"], r["least"], r["most"]) for name, r in result["ratios"].items()],
            ),
            figures.markdown(("server", "offered/s", "p50 s", "p99 s", "goodput/s", "statuses"), rows),
        ]
    )


def make_bundle(folder: Path, quick: bool) -> str:
    """A MobileNetV2 PSPNet with random weights and its graph."""
    from benchmarks.peers import networks
    from sceneray.config import ModelSettings
    from sceneray.data import town

    url = str(folder / "bundle")
    settings = ModelSettings(backbone="mobilenet_v2", head_width=16 if quick else 128)
    networks.write_random(url, settings, town.CLASSES, with_graph=True)
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


def _json(module: str, *arguments: str) -> dict[str, Any]:
    command = [sys.executable, "-m", f"benchmarks.endpoints.{module}", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command[2:])} failed:\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="the endpoint beside its peers")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each measurement (default: 20)")
    parser.add_argument("--repetitions", type=int, default=1 if "--quick" in sys.argv else 5)
    servers.add_arguments(parser)
    parser.add_argument("--peaks-only", action="store_true", help="the closed loop alone, without the loads after it")
    names = (LIMIT, *servers.KINDS)
    known = [name for name in names if name != "litserve" or importlib.util.find_spec("litserve")]
    parser.add_argument("--servers", default=",".join(known), help=f"which of {','.join(names)}")
    return parser


if __name__ == "__main__":
    main()
