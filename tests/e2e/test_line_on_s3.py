"""The whole line with store, run and bundle in a bucket of a real S3 server."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

from sceneray import checkpoint, runlog, storage
from sceneray.data import town
from sceneray.data.images import encode_jpeg
from sceneray.data.listing import LayoutOptions
from sceneray.data.store import Store
from sceneray.predictor import Predictor
from tests.stores import tiny_settings
from tests.support import S3


@pytest.fixture
def session(weed_server: S3) -> Iterator[S3]:
    """A private Ray whose workers inherit the bucket's endpoint and keys from the environment."""
    from jobs.ray_session import ray_session

    with ray_session(cpus=3):
        yield weed_server


def test_prepare_train_evaluate_export_predict_serve(session: S3, tmp_path: Path) -> None:
    """Every verb reads and writes s3:// URLs alone, and the endpoint answers what the network says."""
    from jobs.evaluate import evaluate
    from jobs.prepare import prepare
    from jobs.serve import serving
    from jobs.train import train
    from sceneray.export import export

    store, run, bundle = (session.url("line", name) for name in ("store", "run", "bundle"))
    options = LayoutOptions(train_scenes=24, val_scenes=6, size=(48, 64))
    prepare("town", None, store, options)
    assert prepare("town", None, store, options)["digest"] == Store.open(store).digest

    cache = f"data.cache={tmp_path / 'cache'}"
    settings = tiny_settings(store, run, "workers=2", "epochs=1", "resources.gpu=false", "log.tensorboard=true", cache)
    result = train(settings)
    assert result["state"] == "finished"
    assert train(settings) == result
    assert storage.walk_files(storage.join(run, "tensorboard"))
    assert [row["step"] for row in runlog.read_metrics(run) if row["kind"] == "train"] == [1, 2, 3, 4, 5, 6]

    scores = evaluate(f"{run}/best", store, "val", workers=2)
    assert scores["miou"] == pytest.approx(checkpoint.load(f"{run}/best").metrics["miou"])

    export(f"{run}/best", bundle, "town", "1")
    photo, _ = town.draw(town.scene_seed(0, "held_out", 1), 48, 64)
    jpeg = encode_jpeg(photo, 95)
    seen = np.asarray(Image.open(io.BytesIO(jpeg)))
    (expected,) = Predictor.load(bundle).predict([seen])
    with serving(bundle) as url:
        answer = httpx.post(f"{url}/v1/segment", content=jpeg, headers={"content-type": "image/jpeg"}, timeout=60)
    assert answer.status_code == 200, answer.text
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(answer.content))), expected)
