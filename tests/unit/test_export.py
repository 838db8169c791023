"""Export: checkpoint in, proved bundle out; nothing of value is written over or left half done."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from jobs.cli import main_of
from sceneray import bundle, checkpoint, storage
from sceneray.config import DataSettings, TrainSettings
from sceneray.errors import BundleError, CheckpointError, ConfigError, ConflictError
from sceneray.export import export
from sceneray.predictor import Predictor
from tests.bundles import CLASSES, SETTINGS, agree, brightness_model, half_bright


def commit(run: str, model: dict[str, Tensor], ema: dict[str, Tensor] | None = None) -> str:
    """A scored checkpoint of the hand-set classes, as training commits it; the pointer to it."""
    state = {
        "step": 12,
        "attempt": 1,
        "metrics": {"miou": 0.75},
        "store_digest": "ab" * 32,
        "ignore_index": 255,
        "classes": checkpoint.classes_to_json(CLASSES),
    }
    settings = TrainSettings(run=run, data=DataSettings(store="stores/x"), model=SETTINGS)
    name = checkpoint.save(run, model, {}, state, settings, ema)
    checkpoint.point(run, "best", name, state)
    return f"{run}/best"


@pytest.fixture
def trained(tmp_path: Path) -> str:
    """A checkpoint of the hand-set network."""
    return commit(str(tmp_path / "run"), brightness_model().state_dict())


def test_the_exported_bundle_answers_as_the_checkpoint(trained: str, tmp_path: Path) -> None:
    """Export tells where it wrote and what was measured, and the bundle gives the network's masks."""
    url = str(tmp_path / "bundle")
    result = export(trained, url, "bright", "3")
    loaded = bundle.load(url)
    assert result["bundle"] == url
    assert result["digest"] == loaded.digest
    assert (loaded.name, loaded.version) == ("bright", "3")
    assert loaded.about["metrics"] == {"store_digest": "ab" * 32, "split": "val", "values": {"miou": 0.75}}
    assert loaded.about["source"]["digest"] == checkpoint.load(trained).digest
    image, mask = half_bright()
    assert agree(Predictor(loaded, "cpu").predict([image])[0], mask)


def test_the_average_of_the_weights_is_what_is_exported(tmp_path: Path) -> None:
    """Where training kept an average, the bundle holds that network and not the last step's."""
    average = brightness_model().state_dict()
    last_step = {name: torch.zeros_like(tensor) for name, tensor in average.items()}
    best = commit(str(tmp_path / "run"), last_step, ema=average)
    export(best, str(tmp_path / "bundle"), "bright", "1")
    image, mask = half_bright()
    assert agree(Predictor(bundle.load(str(tmp_path / "bundle")), "cpu").predict([image])[0], mask)


def test_the_verb_names_the_model_after_the_folder(
    trained: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`sceneray export` prints where the bundle is, exits with 0, and a second time refuses with one sentence."""
    argv = [trained, str(tmp_path / "my bundle")]
    assert main_of("export", argv) == 0
    assert bundle.load(argv[1]).name == "my-bundle"
    assert f"bundle {argv[1]}" in capsys.readouterr().out
    assert main_of("export", argv) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_the_version_defaults_to_the_checkpoints_digest(trained: str, tmp_path: Path) -> None:
    """Without a version, the start of the source's digest names it: two checkpoints never share one by accident."""
    result = export(trained, str(tmp_path / "bundle"), "bright")
    assert result["version"] == checkpoint.load(trained).digest[:12]


def test_a_standing_bundle_is_not_written_over(trained: str, tmp_path: Path) -> None:
    """A second export to the same place is refused and changes nothing; asked to, it replaces the bundle."""
    url = str(tmp_path / "bundle")
    first = export(trained, url, "bright", "1")
    with pytest.raises(ConflictError, match=r"stands at .* already.*--overwrite"):
        export(trained, url, "bright", "2")
    assert bundle.load(url).digest == first["digest"]
    assert export(trained, url, "bright", "2", overwrite=True)["version"] == "2"
    assert bundle.load(url).version == "2"


@pytest.mark.parametrize("bad", ["", "two words", "ü", "line\nbreak", "x" * 65])
def test_names_that_no_header_carries_are_refused(trained: str, tmp_path: Path, bad: str) -> None:
    """A name or version goes into headers and paths: what cannot stand there is refused before anything is written."""
    for name, version in ((bad, "1"), ("bright", bad or " ")):
        with pytest.raises(ConfigError, match="1 to 64 letters"):
            export(trained, str(tmp_path / "bundle"), name, version)
    assert not (tmp_path / "bundle").exists()


def test_a_missing_checkpoint_costs_no_bundle(trained: str, tmp_path: Path) -> None:
    """Overwriting with a checkpoint that cannot be read leaves the old bundle as it was."""
    url = str(tmp_path / "bundle")
    first = export(trained, url, "bright", "1")
    with pytest.raises(CheckpointError):
        export(str(tmp_path / "nowhere"), url, "bright", "2", overwrite=True)
    assert bundle.load(url).digest == first["digest"]


def test_another_kind_of_folder_is_never_replaced(trained: str) -> None:
    """Pointed at a checkpoint's own folder, export refuses, even when told to overwrite."""
    folder = checkpoint.resolve(trained)
    with pytest.raises(ConflictError, match="holds a sceneray-checkpoint"):
        export(trained, folder, "bright", "1", overwrite=True)
    assert checkpoint.load(trained).step == 12


def test_a_bundle_that_answers_otherwise_is_withdrawn(
    trained: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If what was written does not give the checkpoint's golden mask, no bundle stands afterwards."""
    url = str(tmp_path / "bundle")
    real = bundle.golden_answer

    def off_by_one(model: Any, golden: Any) -> Any:
        answer = real(model, golden)
        answer[0, 0] = 2
        return answer

    monkeypatch.setattr(bundle, "golden_answer", off_by_one)
    with pytest.raises(BundleError, match="answers 1 of 49152 pixels"):
        export(trained, url, "bright", "1")
    assert storage.open_committed(url) is None


def test_a_bundle_that_cannot_be_loaded_is_withdrawn(
    trained: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the written weights cannot be read back, no bundle stands afterwards."""
    url = str(tmp_path / "bundle")
    real = bundle._deployed
    monkeypatch.setattr(bundle, "_deployed", lambda model: real(model) | {"stray": torch.zeros(1)})
    with pytest.raises(BundleError, match="stray"):
        export(trained, url, "bright", "1")
    assert storage.open_committed(url) is None
