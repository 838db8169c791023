"""`sceneray demo`: the whole line as a newcomer runs it, shortened."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from PIL import Image

from sceneray.data import town
from tests.support import ROOT

LIMIT_S = 400


def demo(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the verb in a process of its own."""
    command = [sys.executable, "-m", "jobs", "demo", str(folder), *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S, check=False)


def test_the_demo_ends_with_pictures_and_says_where_they_are(tmp_path: Path) -> None:
    """Prepare, train, evaluate, export, serve and segment, in one command; nothing of it lives on."""
    folder = tmp_path / "demo"
    done = demo(folder, "epochs=0.1", "--json", str(tmp_path / "demo.json"))
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "demo.json").read_text())
    assert 0 < result["miou"] < 1
    with Image.open(result["mask"]) as mask:
        assert mask.mode == "P"
        assert mask.getpalette()[:3] == list(town.CLASSES[0].color)
    with Image.open(result["overlay"]) as overlay, Image.open(result["photo"]) as photo:
        assert overlay.size == photo.size
    for name in ("photo", "mask", "overlay", "run", "bundle"):
        assert str(folder) in result[name]
        assert result[name] in done.stdout
    assert "Traceback" not in done.stderr


def test_the_demo_leaves_a_strangers_folder_alone(tmp_path: Path) -> None:
    """A folder that no demo made and that is not empty is refused and not touched."""
    (tmp_path / "thesis.txt").write_text("years of work")
    done = demo(tmp_path)
    assert done.returncode == 2
    assert "is not empty and no demo made it" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
