"""What the endpoint counts about itself: every metric by name, and the few functions that record them. Nothing of Ray.

Ray writes them for Prometheus on each node's metrics port (serve/ray_telemetry.py), with its own prefix and with labels
of the application, deployment and replica. All other labels come from sets that a caller cannot widen: route templates,
status codes, our words for errors, stages, and the names that a bundle carries. No path, no key, no request id.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

from PIL import Image

from sceneray.masks import Mask
from serve.batching import Limits
from serve.schemas import ModelCard

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
PREFIX = "ray_"  # Ray puts it before the name of each metric
NOTHING_TO_TELL = "none"  # a label that is empty would not be there at all

Labels = Mapping[str, str]


@dataclass(frozen=True)
class Metric:
    """One metric. `buckets`: upper bounds of a histogram's."""

    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


METRICS: dict[str, Metric] = {
    # Of the ingress: one request, whatever became of it.
    "sceneray_requests": Metric("counter", "requests that ended", ("route", "status", "error_type")),
    "sceneray_request_seconds": Metric("histogram", "from the request to its answer", ("route",), SECONDS),
    "sceneray_stage_seconds": Metric("histogram", "stages of the requests that were answered", ("stage",), SECONDS),
    # Of a model replica: its batches.
    "sceneray_batch_images": Metric("histogram", "images of a batch", (), (1, 2, 4, 8, 16, 32, 64, 128)),
    "sceneray_batch_fill": Metric(
        "histogram", "part of a batch's limit that was used, of images or pixels", (), (0.125, 0.25, 0.5, 0.75, 0.9, 1)
    ),
    "sceneray_batch_seconds": Metric("histogram", "forward pass of a batch, with its masks", (), SECONDS),
    "sceneray_images": Metric("counter", "images, or windows of images, of all batches"),
    "sceneray_busy_seconds": Metric("counter", "seconds of all forward passes"),
    "sceneray_queue_wait_seconds": Metric("histogram", "from the queue to the forward pass", (), SECONDS),
    "sceneray_out_of_memory": Metric("counter", "batches that did not fit and were halved, or refused"),
    # Of a model replica: what it answered.
    "sceneray_pixels": Metric("counter", "pixels of the masks that were answered", ("model", "version")),
    "sceneray_class_pixels": Metric("counter", "those pixels by class", ("model", "version", "class")),
    # Of a model replica: its state, told every few seconds. A gauge that is not told any more disappears.
    "sceneray_load_pixels": Metric("gauge", "pixels in the queue and on the model, mean of the last seconds"),
    "sceneray_model_info": Metric("gauge", "1: this model answers", ("model", "version", "digest")),
    "sceneray_candidate_refused": Metric("gauge", "1: the version to follow was refused, the one before answers"),
}

# Metrics of Ray Serve itself that the dashboard and the alerts draw on.
RAYS = {
    "ray_serve_deployment_replica_healthy": "1 for each replica that is well, 0 for each that is not",
    "ray_serve_autoscaling_target_replicas": "replicas that the autoscaler wants",
}


class Telemetry(Protocol):
    """Where values go."""

    def record(self, name: str, value: float, labels: Labels | None = None) -> None:
        """Add to a counter, set a gauge, or observe a histogram's value. `labels`: exactly those of METRICS[name]."""


class Silent:
    """Telemetry that nobody reads."""

    def record(self, name: str, value: float, labels: Labels | None = None) -> None:
        """Forget it."""


@dataclass
class Memory:
    """Telemetry for tests: each series' values in the order in which they came."""

    series: dict[tuple[str, tuple[tuple[str, str], ...]], list[float]] = field(default_factory=dict)

    def record(self, name: str, value: float, labels: Labels | None = None) -> None:
        """Keep it. Raises ValueError for labels that the metric does not have: Ray would, too."""
        labels = labels or {}
        if set(labels) != set(METRICS[name].labels):
            raise ValueError(f"{name} takes the labels {METRICS[name].labels}, got {tuple(labels)}.")
        self.series.setdefault((name, tuple(sorted(labels.items()))), []).append(float(value))

    def values(self, name: str, **labels: str) -> list[float]:
        """Every value of the metric's series that have these labels."""
        return [
            value
            for (found, pairs), values in self.series.items()
            if found == name and labels.items() <= dict(pairs).items()
            for value in values
        ]


def exported(name: str) -> Iterator[str]:
    """The names under which Prometheus sees the metric `name` of METRICS, as far as they are right.

    Ray hands on a histogram's buckets and sets each value to the middle of its bucket (ray-project/ray issue 64852), so
    `_sum` is left out: what needs a sum has a counter.
    """
    suffixes = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_count")}
    yield from (f"{PREFIX}{name}{suffix}" for suffix in suffixes[METRICS[name].kind])


def request_ended(
    to: Telemetry, route: str | None, status: int, error_type: str | None, seconds: float, times: Mapping[str, float]
) -> None:
    """Count one request. `route`: as it was declared, None where none matched. `times`: seconds by stage."""
    route = route or NOTHING_TO_TELL
    labels = {"route": route, "status": str(status), "error_type": error_type or NOTHING_TO_TELL}
    to.record("sceneray_requests", 1, labels)
    to.record("sceneray_request_seconds", seconds, {"route": route})
    if status < 400:
        for stage, taken in times.items():
            to.record("sceneray_stage_seconds", taken, {"stage": stage})


def batch_ran(to: Telemetry, images: int, pixels: int, seconds: float, limits: Limits) -> None:
    """Count one batch of `images` with `pixels` together, which took the model `seconds`."""
    to.record("sceneray_batch_images", images)
    to.record("sceneray_batch_fill", min(1.0, max(images / limits.max_items, pixels / limits.max_cost)))
    to.record("sceneray_batch_seconds", seconds)
    to.record("sceneray_images", images)
    to.record("sceneray_busy_seconds", seconds)


def mask_answered(to: Telemetry, mask: Mask, card: ModelCard) -> None:
    """Count the pixels of a mask by class. Slow for large masks (2 million pixels: 0.7 ms): off the event loop."""
    model = {"model": card.name, "version": card.version}
    to.record("sceneray_pixels", mask.size, model)
    counts = Image.fromarray(mask).histogram()
    for entry in card.classes:
        if counts[entry.id]:
            to.record("sceneray_class_pixels", counts[entry.id], {**model, "class": entry.name})


def replica_state(to: Telemetry, card: ModelCard, load_pixels: float, refused: bool) -> None:
    """Tell the state of a model replica."""
    to.record("sceneray_load_pixels", load_pixels)
    to.record("sceneray_model_info", 1, {"model": card.name, "version": card.version, "digest": card.digest})
    to.record("sceneray_candidate_refused", float(refused))
