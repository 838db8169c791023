"""The endpoint's benchmarks run from their command line; what they measure is nobody's pass or fail."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.support import ROOT


@pytest.mark.chaos  # it takes a minute
def test_the_overload_benchmark_runs() -> None:
    """`overload --quick` prints one JSON line: something is answered under overload, and the endpoint comes back."""
    command = [sys.executable, "-m", "benchmarks.overload", "--quick", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    found = json.loads(line)
    assert found["goodput"] > 0
    assert found["recovered_rate_over_peak"] > 0
    assert found["recovery_s"] is not None
    assert set(found["statuses"]) <= {"200", "429"}
    assert {"proxy", "ingress", "model", "all"} <= set(found["memory_growth_mib"])


@pytest.mark.chaos  # likewise
def test_the_benchmark_of_servers_runs() -> None:
    """`serve --quick` prints one JSON line: ratios, and latencies at every load, of a peer and of our ways."""
    names = "limit,fastapi,sceneray,sceneray-together-haproxy,tutorial"
    command = [sys.executable, "-m", "benchmarks.serve", "--quick", "--json", "--servers", names]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    found = json.loads(line)
    assert set(found["peaks"]) == set(names.split(","))
    assert all(rate > 0 for rates in found["peaks"].values() for rate in rates)
    assert {"sceneray over fastapi", "sceneray-together-haproxy over limit"} <= set(found["ratios"])
    assert all({"p50", "p99", "goodput"} <= set(load) for loads in found["loads"].values() for load in loads)
