"""What is counted: right numbers under few labels, whatever callers send."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image

from sceneray.masks import Photo
from serve.access_log import CLIENT_GONE
from serve.admission import UploadLimits
from serve.api import ApiSettings, create_app
from serve.batching import Limits, Overloaded
from serve.runner import Item, Runner
from serve.schemas import Ask, ModelCard, Rules, Segmented
from serve.segmenter import Segmenter
from serve.telemetry import METRICS, RAYS, Memory, batch_ran, exported, mask_answered, replica_state, request_ended
from tests.bundles import CLASSES, half_bright, write_bundle
from tests.unit.serve.uploads import Client, encoded

LIMITS = Limits(max_items=4, max_cost=4 * 48 * 64, max_queued_cost=100 * 48 * 64, max_wait_s=0.05)
CARD = ModelCard("brightness", "7", "0" * 64, CLASSES)
IMAGE, MASK = half_bright()
JPEG = encoded(Image.fromarray(IMAGE), "JPEG", quality=95)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The bundle whose answers are known."""
    return write_bundle(str(tmp_path_factory.mktemp("bundle") / "bundle"))


@pytest.fixture
def telemetry() -> Memory:
    """What was counted."""
    return Memory()


@pytest.fixture
def segmenter(bundle: str, telemetry: Memory) -> Segmenter:
    """The real thing in fast mode, so that four images share a pass."""
    return Segmenter.load(bundle, LIMITS, "cpu", rules=Rules("fast"), telemetry=telemetry)


@pytest.fixture
def client(segmenter: Segmenter, telemetry: Memory) -> Iterator[Client]:
    """A client of the app over the real segmenter, which counts into the same memory."""
    with Client(create_app(segmenter, ApiSettings(UploadLimits(50_000, 20_000, 300)), telemetry=telemetry)) as client:
        yield client


def test_a_metric_has_what_its_kind_needs() -> None:
    """Names start with ours, histograms have rising buckets, and no label is one that Ray adds by itself."""
    for name, metric in METRICS.items():
        assert name.startswith("sceneray_")
        assert metric.help
        assert bool(metric.buckets) == (metric.kind == "histogram")
        assert list(metric.buckets) == sorted(set(metric.buckets))
        assert not set(metric.labels) & {"application", "deployment", "replica", "le", "request_id", "key", "path"}
    assert list(exported("sceneray_requests")) == ["ray_sceneray_requests_total"]
    assert list(exported("sceneray_batch_fill")) == ["ray_sceneray_batch_fill_bucket", "ray_sceneray_batch_fill_count"]
    assert not RAYS.keys() & {name for metric in METRICS for name in exported(metric)}


def test_the_memory_refuses_labels_that_the_metric_does_not_have() -> None:
    """A missing or a foreign label is an error in tests, not a surprise in production."""
    for labels in ({}, {"route": "/"}, {"route": "/", "status": "200", "error_type": "none", "key": "alice"}):
        with pytest.raises(ValueError, match="takes the labels"):
            Memory().record("sceneray_requests", 1, labels)


def test_a_batch_is_counted_once_and_each_of_its_images(segmenter: Segmenter, telemetry: Memory) -> None:
    """Four photographs at once: one batch of four, full; four waits; all their pixels, by class as in the masks."""

    async def together() -> list[Segmented]:
        return await asyncio.gather(*(segmenter.segment(IMAGE) for _ in range(4)))

    answers = asyncio.run(together())
    assert telemetry.values("sceneray_batch_images") == [4]
    assert telemetry.values("sceneray_batch_fill") == [1]
    (seconds,) = telemetry.values("sceneray_batch_seconds")
    assert seconds > 0
    assert telemetry.values("sceneray_busy_seconds") == [seconds]
    assert telemetry.values("sceneray_images") == [4]
    assert len(telemetry.values("sceneray_queue_wait_seconds")) == 4
    assert sum(telemetry.values("sceneray_pixels", model="brightness", version="7")) == 4 * MASK.size
    for entry in CLASSES:
        counted = sum(telemetry.values("sceneray_class_pixels", **{"class": entry.name}))
        assert counted == sum(int((answer.mask == entry.id).sum()) for answer in answers)
    assert set(segmenter.meter.inside.values()) == {0}


def test_windows_count_as_their_photograph(bundle: str, telemetry: Memory) -> None:
    """A photograph in six windows waits six times, and its mask counts once."""
    segmenter = Segmenter.load(
        bundle, LIMITS, "cpu", rules=Rules("fast", input="window", window=48), telemetry=telemetry
    )
    image, mask = half_bright(48, 144)
    asyncio.run(segmenter.segment(image))
    assert sum(telemetry.values("sceneray_batch_images")) == len(telemetry.values("sceneray_queue_wait_seconds")) > 1
    assert telemetry.values("sceneray_pixels") == [mask.size]


def test_the_load_is_what_waits_and_what_runs(segmenter: Segmenter) -> None:
    """While images wait for their batch, the meter holds their pixels and requests; after it nothing."""

    async def scenario() -> tuple[dict[str, float], dict[str, float]]:
        read = segmenter.meter.reader()
        tasks = [asyncio.ensure_future(segmenter.segment(IMAGE)) for _ in range(3)]
        await asyncio.sleep(0)
        inside = dict(segmenter.meter.inside)
        await asyncio.gather(*tasks)
        return inside, read()

    inside, means = asyncio.run(scenario())
    assert (inside["pixels"], inside["requests"]) == (3 * MASK.size, 3)
    assert 0 < means["pixels"] <= 3 * MASK.size
    assert 0 < means["passes"] < 1


def test_a_batch_that_does_not_fit_is_counted(
    segmenter: Segmenter, telemetry: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where memory ends at more than one image, each halving counts."""
    runner = segmenter.prepared(segmenter._runner.predictor)
    scores = runner.predictor.scores

    def small(images: list[Photo], pad_to: int = 1) -> object:
        if len(images) > 1:
            raise MemoryError
        return scores(images, pad_to)

    monkeypatch.setattr(runner.predictor, "scores", small)
    assert len(runner.run([Item(IMAGE, MASK.shape)] * 4)) == 4
    assert telemetry.values("sceneray_out_of_memory") == [1, 1]
    assert Runner(runner.predictor).run([Item(IMAGE, MASK.shape)])  # without telemetry as well


def test_a_request_is_counted_with_its_route_and_stages(client: Client, telemetry: Memory) -> None:
    """An answered photograph: one 200 under the route's template, its time, and the time of each stage."""
    assert client.post("/v1/segment", content=JPEG, headers={"Content-Type": "image/jpeg"}).status_code == 200
    assert telemetry.values("sceneray_requests", route="/v1/segment", status="200", error_type="none") == [1]
    (seconds,) = telemetry.values("sceneray_request_seconds", route="/v1/segment")
    stages = [
        sum(telemetry.values("sceneray_stage_seconds", stage=stage))
        for stage in ("header", "decode", "queue", "model", "encode")
    ]
    assert all(taken > 0 for taken in stages)
    assert sum(stages) < seconds


def test_callers_cannot_make_series(client: Client, telemetry: Memory) -> None:
    """Whatever path, method, query, header or file comes: routes are our templates, and errors our words."""
    for number in range(50):
        client.request(f"M{number}", f"/made/up/{number}?q={number}", headers={"x-request-id": f"id{number}"})
        client.get(f"/v2/models/model{number}/versions/{number}")
        client.post("/v1/segment", content=b"no image", params={"format": f"f{number}"})
    series = {labels for name, labels in telemetry.series if name == "sceneray_requests"}
    assert len(series) <= 5
    assert sum(telemetry.values("sceneray_requests")) == 150
    assert {dict(labels)["route"] for labels in series} <= {"none", "/v1/segment"} | {
        label for labels in series for label in dict(labels).values() if "{" in label
    }


class Full:
    """A backend without room."""

    async def segment(self, _image: Photo, _ask: Ask) -> Segmented:
        raise Overloaded("the queue is full; try again in 3 s.", 3)

    async def describe(self) -> dict[str, object]:
        raise RuntimeError("secret of the inside")


def test_errors_are_counted_by_our_words(telemetry: Memory) -> None:
    """A refusal for want of room and a fault of ours: with their status and word, and no stages of theirs."""
    with Client(create_app(Full(), ApiSettings(), telemetry=telemetry)) as client:
        client.post("/v1/segment", content=JPEG, headers={"Content-Type": "image/jpeg"})
        client.get("/v1/model")
    assert telemetry.values("sceneray_requests", status="429", error_type="overloaded") == [1]
    assert telemetry.values("sceneray_requests", route="/v1/model", status="500", error_type="internal_error") == [1]
    assert telemetry.values("sceneray_stage_seconds") == []


def test_every_function_records_what_the_registry_has(telemetry: Memory) -> None:
    """Together the functions fill every metric but the one that the runner counts, each with labels of its own."""
    request_ended(telemetry, None, CLIENT_GONE, "client_gone", 1.5, {"decode": 0.1})
    request_ended(telemetry, "/predict", 200, None, 0.5, {"decode": 0.1})
    batch_ran(telemetry, 3, 100, 0.2, Limits(4, 1000, 1000, 0))
    batch_ran(telemetry, 1, 5000, 0.2, Limits(4, 1000, 5000, 0))
    mask_answered(telemetry, np.full((4, 4), 255, np.uint8), CARD)
    mask_answered(telemetry, MASK, CARD)
    replica_state(telemetry, CARD, 12.5, refused=True)
    assert telemetry.values("sceneray_batch_fill") == [0.75, 1.0]
    assert telemetry.values("sceneray_candidate_refused") == [1.0]
    assert telemetry.values("sceneray_load_pixels") == [12.5]
    assert sum(telemetry.values("sceneray_class_pixels")) == MASK.size  # pixels of no class count in the total alone
    filled = {name for name, _ in telemetry.series}
    assert METRICS.keys() - filled == {"sceneray_out_of_memory", "sceneray_queue_wait_seconds"}
