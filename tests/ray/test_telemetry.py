"""Ray's own metrics port tells Prometheus what the endpoint counted, under the names that alerts and dashboard use."""

from __future__ import annotations

import time
from collections.abc import Iterator

import httpx
import pytest
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from jobs.serve import serving
from serve.telemetry import METRICS, RAYS, exported
from tests.bundles import CLASSES, half_bright, write_bundle
from tests.support import POLL_S
from tests.unit.serve.uploads import encoded

PNG = encoded(Image.fromarray(half_bright()[0]), "PNG")
PIXELS = 48 * 64
SENT = 5
LONGEST_S = 60  # Ray's workers hand their values on every few seconds
# Told by a batch that does not fit, which none of these does.
UNTOLD = set(exported("sceneray_out_of_memory"))


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An endpoint that scales, so that the autoscaler tells its numbers too."""
    bundle = write_bundle(str(tmp_path_factory.mktemp("telemetry") / "bundle"))
    with serving(bundle, max_replicas=2, cpus=0.2, threads=1, access_log=False) as url:
        yield url


def scraped() -> dict[str, list[Sample]]:
    """Every sample that Prometheus would get now, by name, of ours and of Ray Serve's."""
    import ray

    (node,) = ray.nodes()
    text = httpx.get(f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics", timeout=30).text
    found: dict[str, list[Sample]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name.startswith(("ray_sceneray_", "ray_serve_")):
                found.setdefault(sample.name, []).append(sample)
    return found


def total(samples: list[Sample], **labels: str) -> float:
    """The sum of the samples that have these labels."""
    return sum(sample.value for sample in samples if labels.items() <= sample.labels.items())


def test_prometheus_sees_every_metric(url: str) -> None:
    """After a few requests each of our metrics, and each of Ray's that we draw on, is there with the right numbers."""
    for _ in range(SENT):
        answer = httpx.post(f"{url}/v1/segment", content=PNG, headers={"Content-Type": "image/png"}, timeout=60)
        assert answer.status_code == 200
    assert httpx.post(f"{url}/v1/segment", content=b"no image", timeout=60).status_code == 415
    wanted = {name for metric in METRICS for name in exported(metric)} - UNTOLD | RAYS.keys()
    deadline = time.monotonic() + LONGEST_S
    while True:
        seen = scraped()
        answered = total(seen.get("ray_sceneray_requests_total", []), route="/v1/segment", status="200")
        if wanted <= seen.keys() and answered >= SENT:
            break
        assert time.monotonic() < deadline, f"missing: {sorted(wanted - seen.keys())}, answered: {answered}"
        time.sleep(POLL_S)
    requests = seen["ray_sceneray_requests_total"]
    assert total(requests, route="/v1/segment", status="200", error_type="none") == SENT
    assert total(requests, status="415", error_type="unsupported_image") == 1
    assert total(seen["ray_sceneray_images_total"]) == SENT
    assert total(seen["ray_sceneray_batch_images_count"]) == SENT  # in exact mode on a CPU each alone
    assert total(seen["ray_sceneray_batch_images_bucket"], le="1.0") == SENT
    assert total(seen["ray_sceneray_pixels_total"], model="brightness", version="7") == SENT * PIXELS
    shares = [total(seen["ray_sceneray_class_pixels_total"], **{"class": entry.name}) for entry in CLASSES]
    assert shares[2] == 0
    assert sum(shares) == SENT * PIXELS
    assert total(seen["ray_sceneray_candidate_refused"]) == 0
    digest = httpx.get(f"{url}/v1/model", timeout=60).json()["digest"]
    assert total(seen["ray_sceneray_model_info"], digest=digest) == 1
    assert total(seen["ray_serve_autoscaling_target_replicas"], deployment="Segmenter") == 1
    for name in sorted(wanted):
        if not name.startswith("ray_serve_"):
            assert all(sample.labels["application"] == "sceneray" for sample in seen[name])
    print(f"{len(wanted)} names, {sum(len(seen[name]) for name in wanted)} samples")


def test_no_key_and_no_path_leaves_by_the_metrics_port(url: str) -> None:
    """What a caller writes into path, query and headers is nowhere among the labels."""
    secret = "open-sesame-4711"
    headers = {"X-API-Key": secret, "x-request-id": secret, "Authorization": f"Bearer {secret}"}
    assert httpx.get(f"{url}/{secret}?key={secret}", headers=headers, timeout=60).status_code == 404
    deadline = time.monotonic() + LONGEST_S
    while not total((seen := scraped()).get("ray_sceneray_requests_total", []), status="404", route="none"):
        assert time.monotonic() < deadline
        time.sleep(POLL_S)
    assert secret not in str([sample for name, samples in seen.items() if "sceneray" in name for sample in samples])
