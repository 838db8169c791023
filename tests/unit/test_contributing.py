"""CONTRIBUTING's worked changes: each diff applies to a copy of this tree, and the lines after it run there."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.documents import Block, blocks
from tests.support import ROOT

COPIED = ("platform", "jobs", "tune", "serve")


def marked(kind: str) -> dict[str, Block]:
    """The blocks marked `<!-- kind: name -->`, by name."""
    found = [block for block in blocks(ROOT / "CONTRIBUTING.md") if block.marker.startswith(f"{kind}: ")]
    return {block.marker.removeprefix(f"{kind}: "): block for block in found}


def run(command: list[str], folder: Path, text: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run a program in the copy, which is all that it can import."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(str(folder / name) for name in ("platform", ""))}
    return subprocess.run(command, cwd=folder, env=env, input=text, capture_output=True, text=True, check=False)


@pytest.fixture
def copy(tmp_path):
    """A copy of the code."""
    for name in COPIED:
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def test_the_three_usual_changes_are_told():
    """There is a worked change for a loss, a layout and an answer format, and each is followed by lines to run."""
    assert set(marked("apply")) == set(marked("then")) == {"loss", "layout", "answer"}


@pytest.mark.parametrize("name", ["loss", "layout", "answer"])
def test_a_worked_change_applies_and_runs(copy, name):
    """The diff applies as it stands, what it adds passes the lines after it, and without it they fail."""
    snippet = marked("then")[name].text
    before = run([sys.executable, "-c", snippet], copy)
    assert before.returncode != 0, "the lines pass without the change: they show nothing"
    applied = run(["git", "apply", "-"], copy, marked("apply")[name].text)
    assert applied.returncode == 0, applied.stderr
    after = run([sys.executable, "-c", snippet], copy)
    assert after.returncode == 0, after.stderr


@pytest.mark.parametrize("name", ["loss", "layout", "answer"])
def test_a_worked_change_is_house_style(copy, name):
    """The changed tree passes the linter and its formatter, as a contributor's would have to."""
    shutil.copy(ROOT / "pyproject.toml", copy)
    applied = run(["git", "apply", "-"], copy, marked("apply")[name].text)
    assert applied.returncode == 0, applied.stderr
    for arguments in (["check", "--quiet"], ["format", "--check", "--quiet"]):
        files = [
            line.removeprefix("+++ b/") for line in marked("apply")[name].text.splitlines() if line.startswith("+++ ")
        ]
        done = run([sys.executable, "-m", "ruff", *arguments, "--no-cache", *files], copy)
        assert done.returncode == 0, done.stdout + done.stderr
