"""Committed checkpoints: they exist whole or not at all, and pointers only move forward."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from sceneray import checkpoint, local_files, storage
from sceneray.config import TrainSettings
from sceneray.data import town
from sceneray.errors import CheckpointError, StorageError
from sceneray.models.pspnet import build_model
from tests import bundles
from tests.stores import tiny_settings
from tests.support import ROOT


@pytest.fixture
def run(tmp_path: Path) -> str:
    """An empty run folder."""
    return str(tmp_path / "run")


def state(step: int, attempt: int = 1, miou: float | None = None) -> dict[str, Any]:
    """What state.json holds."""
    return {
        "step": step,
        "attempt": attempt,
        "metrics": {} if miou is None else {"miou": miou},
        "store_digest": "0" * 64,
        "classes": checkpoint.classes_to_json(town.CLASSES),
        "ignore_index": 255,
    }


def settings(run: str) -> TrainSettings:
    """Settings of a tiny network."""
    return tiny_settings("stores/none", run)


def save(run: str, step: int, attempt: int = 1, miou: float | None = None) -> str:
    """Commit a checkpoint with one small tensor."""
    tensors = {"weight": torch.full((2, 3), float(step))}
    return checkpoint.save(
        run, tensors, {"weight/momentum": tensors["weight"]}, state(step, attempt, miou), settings(run)
    )


def test_a_checkpoint_comes_back_whole(run: str) -> None:
    """Tensors, state and settings are what was saved, and the network can be built from them alone."""
    model = build_model(settings(run).model, len(town.CLASSES)).to(memory_format=torch.channels_last)
    name = checkpoint.save(run, model.state_dict(), {}, state(7, miou=0.5), settings(run))
    saved = checkpoint.load(storage.join(run, name))
    assert saved.step == 7
    assert saved.metrics == {"miou": 0.5}
    assert saved.classes == town.CLASSES
    assert saved.settings == settings(run)
    built = checkpoint.build(saved)
    assert all(torch.equal(tensor, built.state_dict()[key]) for key, tensor in model.state_dict().items())
    assert not built.training


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json", "config.yaml"])
@pytest.mark.parametrize("damage", ["truncated", "altered", "removed"])
def test_a_damaged_file_is_noticed(run: str, name: str, damage: str) -> None:
    """A checkpoint with any file cut short, changed or gone is refused, naming the file."""
    folder = Path(run) / save(run, 1)
    data = (folder / name).read_bytes()
    if damage == "removed":
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(data[:-1] if damage == "truncated" else data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(CheckpointError, match=name):
        checkpoint.load(str(folder))


def test_without_a_manifest_there_is_no_checkpoint(run: str) -> None:
    """A folder whose writing never finished is not taken for a checkpoint."""
    folder = Path(run) / save(run, 1)
    (folder / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="without a manifest"):
        checkpoint.load(str(folder))
    assert checkpoint.newest(run, print) is None


def test_another_format_version_is_refused(run: str) -> None:
    """A checkpoint of a later version says so in a sentence."""
    url = storage.join(run, save(run, 1), storage.MANIFEST)
    storage.write_json(url, {**storage.read_json(url), "version": 2})
    with pytest.raises(CheckpointError, match="of version 2; this sceneray reads"):
        checkpoint.load(storage.join(run, checkpoint.name_of(1, 1)))


def test_newest_passes_over_damage(run: str) -> None:
    """Going on uses the newest checkpoint that verifies, and says what it passed over."""
    save(run, 1)
    broken = Path(run) / save(run, 2)
    (broken / "model.safetensors").write_bytes(b"")
    warnings: list[str] = []
    found = checkpoint.newest(run, warnings.append)
    assert found is not None
    assert found.step == 1
    assert "damaged" in warnings[0]


def test_newest_is_by_step_then_attempt(run: str) -> None:
    """A repeated step counts as newer than its first writing, a later step as newer than both."""
    for step, attempt in [(10, 1), (9, 2), (10, 2), (8, 3)]:
        save(run, step, attempt)
    found = checkpoint.newest(run, print)
    assert found is not None
    assert (found.step, found.state["attempt"]) == (10, 2)


def test_pointers_lead_to_checkpoints(run: str) -> None:
    """RUN/last and RUN/best load what they name; best moves only upwards."""
    for step, miou in [(1, 0.2), (2, 0.5), (3, 0.4)]:
        name = save(run, step, miou=miou)
        checkpoint.point(run, "last", name, state(step, miou=miou))
        checkpoint.point(run, "best", name, state(step, miou=miou), better=True)
    assert checkpoint.load(storage.join(run, "last")).step == 3
    assert checkpoint.load(storage.join(run, "best")).step == 2


def test_a_given_up_attempt_moves_nothing(run: str) -> None:
    """A worker group with a lower attempt number neither moves pointers nor prunes."""
    for step in (1, 2, 3):
        save(run, step, attempt=1)
    checkpoint.point(run, "last", save(run, 4, attempt=2), state(4, attempt=2))
    assert not checkpoint.point(run, "last", save(run, 9, attempt=1), state(9, attempt=1))
    assert checkpoint.load(storage.join(run, "last")).step == 4
    assert checkpoint.prune(run, keep=1, attempt=1) == []


def test_pruning_keeps_the_newest_and_the_pointed(run: str) -> None:
    """Old checkpoints go, but never the best one."""
    for step, miou in [(1, 0.9), (2, 0.1), (3, 0.1), (4, 0.1)]:
        name = save(run, step, miou=miou)
        checkpoint.point(run, "best", name, state(step, miou=miou), better=True)
    assert checkpoint.prune(run, keep=2, attempt=1) == [checkpoint.name_of(2, 1)]
    assert checkpoint.names(run) == [checkpoint.name_of(step, 1) for step in (1, 3, 4)]


def test_what_is_no_checkpoint_says_what_to_give(run: str) -> None:
    """A run folder, an empty path and a stray file each get a sentence with the fix."""
    save(run, 1)
    storage.write_bytes(storage.join(run, "config.yaml"), b"x: 1")
    storage.write_json(storage.join(run, "notes"), ["not", "a", "pointer"])
    for url in (run, storage.join(run, "nothing"), storage.join(run, "notes")):
        with pytest.raises(CheckpointError, match="Give RUN/best"):
            checkpoint.load(url)


def test_a_checkpoint_of_version_1_is_read_for_ever(tmp_path: Path) -> None:
    """The first format's checkpoint, kept as it was written, loads through its pointer and builds the known network."""
    with zipfile.ZipFile(ROOT / "tests" / "formats" / "checkpoint-v1.zip") as kept:
        kept.extractall(tmp_path)
    saved = checkpoint.load(str(tmp_path / "best"))
    assert (saved.step, saved.state["position"], saved.metrics) == (120, 1920, {"miou": 0.5})
    assert saved.classes == bundles.CLASSES
    assert saved.optimizer["head.classifier.weight/momentum_buffer"].unique().tolist() == [0.25]
    image, mask = bundles.half_bright()
    answer = checkpoint.build(saved).predict(torch.from_numpy(image).permute(2, 0, 1)[None])[0].numpy()
    assert bundles.agree(answer, mask)


def test_the_average_of_the_weights_is_the_network(run: str) -> None:
    """EMA weights come back, and the network that is built has them; what they do not name stays the model's."""
    model = build_model(settings(run).model, len(town.CLASSES)).state_dict()
    name = next(name for name, tensor in model.items() if name.endswith("classifier.weight") and tensor.ndim == 4)
    average = {name: torch.full_like(model[name], 0.25)}
    url = storage.join(run, checkpoint.save(run, model, {}, state(1), settings(run), average))
    saved = checkpoint.load(url)
    built = checkpoint.build(saved).state_dict()
    assert saved.ema.keys() == average.keys()
    assert all(torch.equal(built[key], average.get(key, tensor)) for key, tensor in model.items())
    assert torch.equal(saved.model[name], model[name])  # a run that goes on needs both


def test_an_average_of_another_network_is_refused(run: str) -> None:
    """EMA weights of names that the network does not have are an error, not left out."""
    model = build_model(settings(run).model, len(town.CLASSES)).state_dict()
    name = checkpoint.save(run, model, {}, state(1), settings(run), {"stranger": torch.zeros(1)})
    with pytest.raises(RuntimeError, match="stranger"):
        checkpoint.build(checkpoint.load(storage.join(run, name)))


def test_without_an_average_there_is_no_file_for_it(run: str) -> None:
    """A run without EMA writes no ema.safetensors, and its checkpoint has an empty average."""
    name = save(run, 1)
    assert checkpoint.load(storage.join(run, name)).ema == {}
    assert not storage.exists(storage.join(run, name, "ema.safetensors"))


def test_the_best_are_kept_besides_the_newest(run: str) -> None:
    """The `keep_best` highest val mIoUs stay, of equals the earliest; without a score there is nothing to rank."""
    for step, miou in [(1, 0.5), (2, 0.7), (3, 0.5), (4, None), (5, 0.6), (6, 0.1), (7, None)]:
        save(run, step, miou=miou)
    removed = checkpoint.prune(run, keep=1, attempt=1, keep_best=3)
    assert removed == [checkpoint.name_of(step, 1) for step in (3, 4, 6)]
    assert checkpoint.names(run) == [checkpoint.name_of(step, 1) for step in (1, 2, 5, 7)]


def test_pruning_reads_the_score_of_older_checkpoints_from_their_state(run: str) -> None:
    """Checkpoints written before the manifest told the mIoU are ranked all the same."""
    for step, miou in [(1, 0.2), (2, 0.9), (3, 0.3), (4, 0.1)]:
        url = storage.join(run, save(run, step, miou=miou), storage.MANIFEST)
        manifest = storage.read_json(url)
        storage.write_json(url, {key: manifest[key] for key in ("format", "version", "files")})
    assert checkpoint.prune(run, keep=1, attempt=1) == [checkpoint.name_of(step, 1) for step in (1, 3)]


def test_pruning_leaves_an_upload_in_flight(run: str) -> None:
    """Without a manifest only those folders go whose writing is over: a lower step of a lower attempt, or one's own."""
    for step, attempt in [(1, 1), (9, 1), (2, 2), (4, 2)]:
        storage.remove(storage.join(run, save(run, step, attempt), storage.MANIFEST))
    save(run, 3, attempt=2)
    assert checkpoint.prune(run, keep=1, attempt=2) == [checkpoint.name_of(1, 1), checkpoint.name_of(2, 2)]
    assert checkpoint.names(run) == [checkpoint.name_of(*numbers) for numbers in ((3, 2), (4, 2), (9, 1))]


def test_pruning_leaves_what_it_cannot_read(run: str) -> None:
    """A folder whose manifest is damaged is neither counted as a checkpoint nor removed."""
    for step in (1, 2, 3):
        save(run, step)
    storage.write_bytes(storage.join(run, checkpoint.name_of(1, 1), storage.MANIFEST), b"{")
    assert checkpoint.prune(run, keep=1, attempt=1) == [checkpoint.name_of(2, 1)]
    assert checkpoint.names(run) == [checkpoint.name_of(1, 1), checkpoint.name_of(3, 1)]


def test_a_save_that_the_store_altered_does_not_exist(run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written is read back first: where it differs, saving raises StorageError and leaves no checkpoint."""
    real = local_files.replace

    def replace(path: Path, data: bytes) -> None:
        real(path, data[:-1] if path.name == "optimizer.safetensors" else data)

    monkeypatch.setattr(local_files, "replace", replace)
    with pytest.raises(StorageError, match=r"optimizer\.safetensors"):
        save(run, 1)
    assert checkpoint.newest(run, print) is None
