"""The endpoint asked for far more than it can answer: what it still answers, how fast it refuses, how it comes back.

    python -m benchmarks.overload [--quick] [--json] [--server sceneray] [--seconds 60]
                                 [--threads 1] [--passes 2]

`sceneray serve` with its defaults, in this order:

    unloaded  one caller: the p50 of an answer when nobody else asks
    peak      a closed loop of PEAK_CALLERS: the most that is answered a second
    refusing  a closed loop of more callers than the queue holds: whoever is refused asks again at once. Refusals a
              second, in the median of the seconds after the queue was full, are the refusal-only rate. The model goes
              on computing beside, as it does under any overload, so this is what is left of the machine for refusing
    overload  Poisson arrivals at 10 x the peak or half the refusal-only rate, whichever is less, for --seconds
    recovery  from the last arrival on: one caller, until it is answered within twice the unloaded p50 (what was
              admitted before is answered first: max_queue_s at most); then the closed loop of the peak again

Resident memory is sampled every second over all processes of the server, shared pages counted in each. The generator
is a process of its own on the same machine: on two cores it takes from the server what it uses, which is printed, as is
how late it was itself. Prints tables and one JSON line; no result is judged here.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import psutil

from benchmarks.endpoints import servers
from benchmarks.endpoints.tree import Watch
from benchmarks.peers import figures
from benchmarks.peers.runs import ROOT, prepare_environment
from benchmarks.serve import make_bundle, make_photos, say

PEAK_CALLERS = 4
TIMES_PEAK = 10.0
MORE_CALLERS = 32  # than the queue holds, while refusals are counted
MOST_CALLERS = 900
SETTLED_S = 10.0  # of the overload, from when on memory should no longer grow
LONGEST_RECOVERY_S = 60.0
Found = dict[str, Any]


def main() -> None:
    """Measure and print."""
    args = _parser().parse_args()
    prepare_environment()
    with tempfile.TemporaryDirectory(prefix="sceneray-bench-") as name:
        folder = Path(name)
        bundle = args.bundle or make_bundle(folder, args.quick)
        photos = args.photos or str(make_photos(folder / "photos", args.quick))
        with servers.server(args.server, bundle, args.threads, args.passes) as server:
            found = measure(server, photos, 4.0 if args.quick else args.seconds)
    about = {
        "benchmark": "overload",
        "server": args.server,
        "quick": args.quick,
        "cores": os.cpu_count(),
        "threads": args.threads,
        "passes": args.passes,
    }
    result = {**about, **figures_of(found), "phases": found}
    if not args.json:
        print(report(result))
    print(json.dumps(result))


def measure(server: servers.Server, photos: str, seconds: float) -> Found:
    """All phases, by name; `seconds` of overload, and of the others in proportion."""
    short, url = seconds / 4, server.url
    flood(url, photos, "closed", PEAK_CALLERS, min(5.0, short))  # warm
    unloaded = flood(url, photos, "closed", 1, short / 2)
    peak = flood(url, photos, "closed", PEAK_CALLERS, short)
    refusing = flood(url, photos, "closed", callers(peak["goodput"]), 2 * short)
    within = 2 * (unloaded["p50"] or 1.0)
    flood(url, photos, "quiet", within, LONGEST_RECOVERY_S)
    rate = offered(peak["goodput"], refusal_rate(refusing))
    say(f"peak {peak['goodput']:.1f}/s, refusals {refusal_rate(refusing):.1f}/s, offered {rate:.1f}/s")
    overload, recovery = flooded(server, photos, rate, seconds, within)
    after = flood(url, photos, "closed", PEAK_CALLERS, short)
    phases = {"unloaded": unloaded, "peak": peak, "refusing": refusing, "overload": overload}
    return {**phases, "recovery": recovery, "after": after}


def flooded(server: servers.Server, photos: str, rate: float, seconds: float, within: float) -> tuple[Found, Found]:
    """The overload with the memory and cores of the server meanwhile, and the recovery from its last arrival on."""
    child = start(server.url, photos, "open", rate, seconds)
    assert child.stdout is not None
    with Watch(psutil.Process(server.process.pid)) as watch:
        child.stdout.readline()  # `sent`
    recovery = flood(server.url, photos, "quiet", within, LONGEST_RECOVERY_S)
    overload = finished(child)
    return {**overload, "memory_mib": watch.memory_mib(min(SETTLED_S, seconds / 2)), "cores": watch.cores()}, recovery


def callers(peak: float) -> int:
    """More callers than can wait for an answer that is admitted, within what one generator can hold open."""
    from serve.settings import ServeArgs

    return MORE_CALLERS + min(MOST_CALLERS, math.ceil(peak * ServeArgs.model_fields["max_queue_s"].default))


def refusal_rate(refusing: Found) -> float:
    """Refusals a second once the queue was full; 0.0 where nobody was refused."""
    counts = [count for count in refusing["refused_per_second"][1:] if count]
    return float(statistics.median(counts)) if counts else 0.0


def offered(peak: float, refusals: float) -> float:
    """Requests a second of the overload: never below twice the peak, or it were none."""
    return max(2 * peak, min(TIMES_PEAK * peak, refusals / 2))


def figures_of(found: Found) -> Found:
    """What is claimed, out of the phases."""
    peak, overload, memory = found["peak"]["goodput"], found["overload"], found["overload"]["memory_mib"]
    return {
        "peak": peak,
        "refusal_rate": refusal_rate(found["refusing"]),
        "offered": round(overload["amount"], 1),
        "goodput": overload["goodput"],
        "goodput_over_peak": round(overload["goodput"] / peak, 3),
        "refused_p50": overload["refused_p50"],
        "refused_p99": overload["refused_p99"],
        "statuses": overload["statuses"],
        "memory_growth_mib": {part: round(row["end"] - row["settled"], 1) for part, row in memory.items()},
        "recovery_s": found["recovery"]["took"] if found["recovery"]["quiet"] else None,
        "recovered_rate_over_peak": round(found["after"]["goodput"] / peak, 3),
        "generator_cores": overload["generator_cores"],
        "generator_late_p99": overload["late_p99"],
    }


def report(result: Found) -> str:
    """The result for people, in Markdown."""
    overload = result["phases"]["overload"]
    plain = [(name, value) for name, value in result.items() if isinstance(value, int | float) and name != "quick"]
    memory = [
        (part, row["start"], row["settled"], row["end"], row["most"], overload["cores"].get(part))
        for part, row in overload["memory_mib"].items()
    ]
    return "\n\n".join(
        [
            figures.markdown(("what", "figure"), [*plain, ("statuses", json.dumps(result["statuses"]))]),
            figures.markdown(("part", "start MiB", "settled MiB", "end MiB", "most MiB", "cores"), memory),
        ]
    )


def flood(url: str, photos: str, kind: str, amount: float, seconds: float) -> Found:
    """One run of the generator."""
    say(f"{kind} {amount:g} for {seconds:g} s")
    return finished(start(url, photos, kind, amount, seconds))


def start(url: str, photos: str, kind: str, amount: float, seconds: float) -> subprocess.Popen[str]:
    """The generator, begun."""
    command = [sys.executable, "-m", "benchmarks.endpoints.flood", url, photos, kind, str(amount), str(seconds)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def finished(child: subprocess.Popen[str]) -> Found:
    """What the generator found, once it has ended."""
    said, _ = child.communicate()
    if child.returncode != 0:
        raise SystemExit(f"the load generator ended with {child.returncode}")
    found: Found = json.loads(said.splitlines()[-1])
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="the endpoint under overload")
    ours = [name for name, kind in servers.KINDS.items() if kind.module is None]
    parser.add_argument("--server", choices=ours, default="sceneray", help="how it is served (default: sceneray)")
    parser.add_argument("--seconds", type=float, default=60.0, help="of the overload (default: 60)")
    servers.add_arguments(parser)
    return parser


if __name__ == "__main__":
    main()
