"""One worker of a batch, in this process: masks and lines, errors that stay a photo's own, and what is in memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from jobs import batch_worker
from jobs.batch_plan import Photo, Task, begin, make_plan
from jobs.batch_worker import PredictWorker
from sceneray import storage
from sceneray.data.images import decode_image, decode_label
from sceneray.errors import BundleError, UnreachableError
from sceneray.predictor import Predictor
from tests.bundles import half_bright, write_bundle
from tests.unit.jobs.test_batch_predict import MODEL, put, worker_of


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The bundle whose answers are known."""
    return write_bundle(str(tmp_path_factory.mktemp("bundle")))


def test_a_worker_writes_masks_and_lines(bundle: str, any_root: str) -> None:
    """Each photo's mask is the predictor's, at its path; its line has size, digest, shares and the model."""
    put(any_root, "in/a.png")
    put(any_root, "in/deep/b.png", 40, 80)
    worker = worker_of(bundle, storage.join(any_root, "out"), overlay=True)
    plan = make_plan(worker._task, [storage.join(any_root, "in")])
    (part,) = plan.parts
    done = worker.part(part)
    assert (done.photos, done.failed) == (2, ())
    assert begin(plan) == {0: done}
    lines = storage.read_bytes(storage.join(any_root, "out/predictions/part-00000.jsonl")).decode().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["mask"] for row in rows] == ["a.mask.png", "deep/b.mask.png"]
    predictor = Predictor.load(bundle, "cpu")
    for row, shape in zip(rows, [(48, 64), (40, 80)], strict=True):
        data = storage.read_bytes(storage.join(any_root, "out", row["mask"]))
        assert np.array_equal(decode_label(data), predictor.predict([half_bright(*shape)[0]])[0])
        assert (row["height"], row["width"], row["bytes"]) == (*shape, len(data))
        assert row["sha256"] == storage._digest(data)
        assert row["model"] == worker._task.model
        assert sum(entry["share"] for entry in row["classes"]) == pytest.approx(1)
        blended = storage.read_bytes(storage.join(any_root, "out", row["overlay"]))
        assert decode_image(blended).shape == (*shape, 3)


def test_a_bad_photo_is_its_own_lines_error(bundle: str, tmp_path: Path) -> None:
    """Damaged, gone, a folder, too small: a line with the reason each; the photos around them have masks."""
    good = [Photo(put(str(tmp_path), f"{i}.png"), None, str(i)) for i in range(2)]
    bad = [Photo(str(tmp_path / name), None, name) for name in ("text.jpg", "gone.jpg", "folder.jpg", "thin.png")]
    (tmp_path / "text.jpg").write_text("no photograph")
    (tmp_path / "folder.jpg").mkdir()
    put(str(tmp_path), "thin.png", height=4)
    photos = [good[0], *bad, good[1]]
    rows = worker_of(bundle, str(tmp_path / "out")).rows(photos)
    assert [row["image"] for row in rows] == [photo.url for photo in photos]
    assert ["error" in row for row in rows] == [False, True, True, True, True, False]
    assert [
        word in row["error"] for word, row in zip(("truncated", "gone", "folder", "8 pixels"), rows[1:5], strict=True)
    ]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"0.mask.png", "1.mask.png"}


def test_equal_shapes_share_forward_passes(bundle: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 20 photos of two shapes the predictor gets at most a handful at once, and groups them; the order stays."""
    asked: list[int] = []
    real = Predictor.predict

    def recording(self: Predictor, images: Any) -> Any:
        asked.append(len(images))
        return real(self, images)

    monkeypatch.setattr(Predictor, "predict", recording)
    photos = [Photo(put(str(tmp_path), f"{i:02}.png", 40 + 8 * (i % 2)), None, f"{i:02}") for i in range(20)]
    rows = worker_of(bundle, str(tmp_path / "out")).rows(photos)
    assert asked == [batch_worker.HANDFUL, 4]
    assert [(row["mask"], row["height"]) for row in rows] == [(f"{i:02}.mask.png", 40 + 8 * (i % 2)) for i in range(20)]


def test_large_photos_go_in_small_handfuls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pixels bound a handful; a photo above the bound goes alone."""
    monkeypatch.setattr(batch_worker, "HANDFUL_PIXELS", 100)
    photo = Photo("u", None, "n")
    sizes = [40, 40, 40, 500, 10, 90, 1]
    read = iter([(photo, np.zeros((1, size, 3), np.uint8)) for size in sizes])
    handfuls = [[image.shape[1] for _, image in handful] for handful in batch_worker._handfuls(read)]
    assert handfuls == [[40, 40], [40], [500], [10, 90], [1]]


def test_too_much_for_the_device_is_done_one_by_one(
    bundle: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where torch has too little memory for several photos each goes alone; too large alone, it is an error."""
    real = Predictor.predict

    def small_device(self: Predictor, images: Any) -> Any:
        if sum(image.shape[0] * image.shape[1] for image in images) > 64 * 64:
            raise torch.OutOfMemoryError("no memory")
        return real(self, images)

    monkeypatch.setattr(Predictor, "predict", small_device)
    photos = [Photo(put(str(tmp_path), f"{h}.png", h), None, str(h)) for h in (48, 80, 56)]
    rows = worker_of(bundle, str(tmp_path / "out")).rows(photos)
    assert ["error" in row for row in rows] == [False, True, False]
    assert "80 × 64 pixels" in rows[1]["error"]


def test_a_bundle_that_was_replaced_is_refused(bundle: str, tmp_path: Path) -> None:
    """A worker takes no other network than the one that the batch began with."""
    worker = PredictWorker(Task(str(tmp_path), bundle, MODEL))
    with pytest.raises(BundleError, match=r"was replaced while the batch ran.*d{12}"):
        worker.start()


def test_a_store_in_trouble_is_no_photos_fault(bundle: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A photo that may not be read is that photo's error; a store that keeps failing ends the part unfinished."""
    worker = worker_of(bundle, str(tmp_path / "out"))
    cause: list[Exception] = [PermissionError("denied")]

    def failing(url: str) -> bytes:
        raise UnreachableError(f"reading {url} failed") from cause[0]

    monkeypatch.setattr(storage, "read_bytes", failing)
    plan = make_plan(worker._task, [put(str(tmp_path), "a.png")])
    assert len(worker.part(plan.parts[0]).failed) == 1
    storage.remove(str(tmp_path / "out"))
    cause[0] = OSError("away")
    with pytest.raises(UnreachableError):
        worker.part(plan.parts[0])
    assert not (tmp_path / "out").exists()
