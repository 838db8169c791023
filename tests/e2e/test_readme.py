"""README's commands, run line by line in a folder made as it says, with settings that make them quick."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from jobs.__main__ import main
from jobs.ray_session import ray_session
from sceneray.data import town
from tests.documents import Block, blocks
from tests.support import ROOT

# The words that begin a command, and what is added to it: a tiny network on tiny photographs, and no download.
QUICK = {
    ("prepare", "town"): ["--scenes", "8,4", "--size", "48x64"],
    ("train",): [
        "epochs=1",
        "batch_size=4",
        "augment.crop=[48, 48]",
        "model={backbone: resnet18, output_stride: 16, head_width: 8, aux_width: 8, weights: null}",
        "log.contact_sheet=2",
    ],
}


def marked(marker: str) -> Block:
    """The README's block with this comment before it."""
    (block,) = [block for block in blocks(ROOT / "README.md") if block.marker == marker]
    return block


def run_block(marker: str) -> int:
    """Run a block's `sceneray` lines, each made quick; the number of lines run."""
    for program, *words in marked(marker).commands:
        assert program == "sceneray"
        extra = [word for start, more in QUICK.items() if tuple(words[: len(start)]) == start for word in more]
        assert main([*words, *extra]) == 0, shlex.join(words)
    return len(marked(marker).commands)


@pytest.fixture(scope="module", autouse=True)
def session() -> Iterator[None]:
    """One private Ray for all the commands, which join it instead of starting their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
        with ray_session(cpus=2):
            yield


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder to work in, with the shipped settings where the README finds them."""
    (tmp_path / "jobs").symlink_to(ROOT / "jobs")
    (tmp_path / "tune").symlink_to(ROOT / "tune")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_photographs(source: Path) -> None:
    """Photographs and labels as the README's tree shows them, with the two classes of its classes.json."""
    for split, count in (("train", 4), ("val", 2)):
        for kind in ("images", "labels"):
            (source / kind / split).mkdir(parents=True)
        for index in range(count):
            image, label = town.draw(index, 48, 64)
            Image.fromarray(image).save(source / "images" / split / f"{index:04d}.jpg")
            Image.fromarray(label % 2).save(source / "labels" / split / f"{index:04d}.png")


def test_the_quick_start_by_hand(folder):
    """The lines of the quick start run one after the other and leave a store, a run, scores and a bundle."""
    assert run_block("runs: town") == 5
    for name in ("stores/town/manifest.json", "runs/town/result.json", "runs/town/best", "bundles/town/bundle.json"):
        assert (folder / name).is_file(), name
    import pandas

    (shard,) = (folder / "stores/town").glob("val-*.parquet")
    assert len(pandas.read_parquet(shard)) == 4


def test_training_on_your_own_data(folder):
    """With the README's classes.json and settings file, its lines go from photographs to masks."""
    write_photographs(folder / "street")
    for name in ("street/classes.json", "street.yaml"):
        (folder / name).write_text(marked(f"file: {name}").text)
    assert run_block("runs: own") == 6
    assert sorted(path.name for path in (folder / "masks").iterdir()) == [
        "0000.mask.png",
        "0000.overlay.jpg",
        "0001.mask.png",
        "0001.overlay.jpg",
    ]
    about = json.loads((folder / "bundles/street/bundle.json").read_text())
    assert [entry["name"] for entry in about["classes"]] == ["road", "tree"]
