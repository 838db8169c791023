"""Telemetry through Ray's metrics agent, which Prometheus asks on each node."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ray.serve import metrics

from serve.telemetry import METRICS, Labels, Metric


class RayTelemetry:
    """Every metric of serve/telemetry.py. Make it inside a replica: Serve adds the labels that name it."""

    def __init__(self) -> None:
        self._record = {name: _recorder(name, metric) for name, metric in METRICS.items()}

    def record(self, name: str, value: float, labels: Labels | None = None) -> None:
        """As Telemetry.record. A few microseconds."""
        self._record[name](value, dict(labels or {}))


def _recorder(name: str, metric: Metric) -> Callable[[float, dict[str, str]], None]:
    """What records one metric."""
    if metric.kind == "counter":
        counter = metrics.Counter(name, metric.help, metric.labels)

        def add(value: float, labels: dict[str, str]) -> None:
            if value > 0:  # Ray refuses to add nothing
                counter.inc(value, labels)

        return add
    if metric.kind == "gauge":
        return _typed(metrics.Gauge(name, metric.help, metric.labels).set)
    return _typed(metrics.Histogram(name, metric.help, list(metric.buckets), metric.labels).observe)


def _typed(function: Any) -> Callable[[float, dict[str, str]], None]:
    record: Callable[[float, dict[str, str]], None] = function
    return record
