"""Bundles: what is written is read back whole, and what is damaged or foreign is refused with a sentence."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from sceneray import bundle, storage
from sceneray.data import town
from sceneray.errors import BundleError
from sceneray.predictor import Predictor
from tests.bundles import CLASSES, SETTINGS, agree, brightness_model, half_bright, write_bundle
from tests.support import ROOT


@pytest.fixture
def url(tmp_path: Path) -> str:
    """A bundle, fresh for a test that spoils it."""
    return write_bundle(str(tmp_path / "bundle"))


def test_a_bundle_comes_back_whole(url: str) -> None:
    """Weights, classes, settings and what was said about the model are what was written."""
    loaded = bundle.load(url)
    written = brightness_model().state_dict()
    read = loaded.model.state_dict()
    assert all(torch.equal(tensor, written[name]) for name, tensor in read.items())
    assert (loaded.classes, loaded.ignore_index, loaded.settings) == (CLASSES, 255, SETTINGS)
    assert (loaded.name, loaded.version, loaded.min_side) == ("brightness", "7", 8)
    assert loaded.about["metrics"]["store_digest"] == "0" * 64
    assert loaded.about["versions"]["torch"] == torch.__version__.split("+")[0]
    assert not loaded.model.training


def test_the_auxiliary_head_stays_behind(url: str) -> None:
    """No tensor of the auxiliary head is in the file, and all others are."""
    names = set(bundle.load(url).model.state_dict())
    full = set(brightness_model().state_dict())
    assert full - names == {name for name in full if name.startswith("aux_head.")}
    assert full > names


def test_convolutions_come_back_channels_last(url: str) -> None:
    """The weights are laid out as the fastest convolutions want them, though the file holds contiguous tensors."""
    weight = bundle.load(url).model.head.conv.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)


def test_the_golden_image_is_drawn_and_its_mask_is_the_networks(url: str) -> None:
    """No photograph leaves with a bundle: its picture is a town scene, its mask this network's answer to it."""
    loaded = bundle.load(url)
    assert np.array_equal(loaded.golden, town.draw(bundle.GOLDEN_SEED, 192, 256)[0])
    assert np.array_equal(loaded.golden_mask, bundle.golden_answer(loaded.model, loaded.golden))
    assert len(np.unique(loaded.golden_mask)) > 1


def test_the_start_of_the_weights_is_not_told(tmp_path: Path) -> None:
    """Where the backbone's first weights came from, perhaps a private path, is not in the bundle."""
    settings = SETTINGS.model_copy(update={"weights": "/home/somebody/secret.pth"})
    bundle.write(str(tmp_path), brightness_model(), settings, CLASSES, 255, {"name": "n", "version": "1"})
    assert "secret" not in (tmp_path / "bundle.json").read_text()


def test_a_bundle_lives_at_any_url() -> None:
    """Written to and read from a file system that is not the disk."""
    url = write_bundle("memory://bundles/bright")
    assert bundle.load(url).digest == bundle.verify(url).digest


def test_a_bundle_of_version_1_is_read_for_ever(tmp_path: Path) -> None:
    """The first format's bundle, kept as it was written, loads and answers its golden image and the known picture."""
    with zipfile.ZipFile(ROOT / "tests" / "formats" / "bundle-v1.zip") as kept:
        kept.extractall(tmp_path)
    predictor = Predictor.load(str(tmp_path), "cpu")
    assert predictor.self_check() > 0.99
    assert predictor.classes == CLASSES
    image, mask = half_bright()
    assert agree(predictor.predict([image])[0], mask)


def test_nothing_there(tmp_path: Path) -> None:
    """A folder without a manifest is no bundle: the error says how to write one."""
    with pytest.raises(BundleError, match=r"no bundle at .* sceneray export"):
        bundle.load(str(tmp_path))


def test_another_format_version_is_refused_in_one_sentence(url: str) -> None:
    """A bundle of a later format names both versions and what to do; nothing else of it is read."""
    manifest = storage.read_json(f"{url}/manifest.json")
    storage.write_json(f"{url}/manifest.json", {**manifest, "version": 2})
    with pytest.raises(BundleError, match=r"format version 2, .* reads version 1\. Export it again"):
        bundle.load(url)


def test_a_checkpoint_is_no_bundle(tmp_path: Path) -> None:
    """Another kind of committed folder is named, with the verb that makes a bundle of it."""
    storage.commit(str(tmp_path), {"x": b"1"}, {"format": "sceneray-checkpoint", "version": 1})
    with pytest.raises(BundleError, match=r"holds a sceneray-checkpoint, not a bundle.*sceneray export"):
        bundle.load(str(tmp_path))


@pytest.mark.parametrize("name", [bundle.WEIGHTS, bundle.ABOUT, bundle.GOLDEN, bundle.GOLDEN_MASK])
@pytest.mark.parametrize("read", [bundle.load, bundle.verify])
def test_every_file_is_checked(url: str, name: str, read: object) -> None:
    """One flipped byte in any file: the error names the file."""
    data = bytearray(storage.read_bytes(f"{url}/{name}"))
    data[len(data) // 2] ^= 1
    storage.write_bytes(f"{url}/{name}", bytes(data))
    with pytest.raises(BundleError, match=name):
        read(url)  # type: ignore[operator]


def test_a_missing_file_is_named(url: str) -> None:
    """A file that the manifest lists and that is gone: the error names it and the fix."""
    (Path(url) / bundle.WEIGHTS).unlink()
    with pytest.raises(BundleError, match=r"model\.safetensors.*is missing.*Export it again"):
        bundle.load(url)


def test_weights_of_another_network_are_refused(url: str) -> None:
    """Weights that do not fit the settings exactly are an error, never half loaded."""
    root = Path(url)
    about = json.loads((root / bundle.ABOUT).read_text())
    about["model"]["head_width"] = 16
    files = {path.name: path.read_bytes() for path in root.iterdir() if path.name != storage.MANIFEST}
    files[bundle.ABOUT] = json.dumps(about).encode()
    storage.commit(url, files, {"format": bundle.FORMAT, "version": bundle.VERSION})
    with pytest.raises(BundleError, match=r"cannot be loaded.*size mismatch"):
        bundle.load(url)
