"""The Makefile's own decisions: which Python makes the environment, and what it says where there is none."""

from __future__ import annotations

import subprocess
from pathlib import Path

from tests.support import ROOT


def make(*words: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """`make ...` with its environment in `folder`."""
    command = ["make", f"VENV={folder / 'venv'}", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def program(path: Path, body: str) -> Path:
    """A shell script that can be run."""
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


def test_without_a_python_the_message_says_what_to_do(tmp_path):
    """A Python that is too old or absent ends in one sentence with the fix, and nothing is made."""
    too_old = program(tmp_path / "python-too-old", "exit 1")
    done = make(f"PYTHON={too_old} no-such-python", "install", folder=tmp_path)
    assert done.returncode != 0
    assert "sceneray needs Python 3.11 or newer" in done.stderr
    assert str(too_old) in done.stderr
    assert "make PYTHON=" in done.stderr
    assert not (tmp_path / "venv").exists()


def test_the_first_python_that_is_new_enough_is_taken(tmp_path):
    """Older ones on the way are passed over, and the environment is made by the first that will do."""
    too_old = program(tmp_path / "python-too-old", "exit 1")
    # Answers the question for its version, and fails to make an environment, which ends the run.
    good = program(tmp_path / "python-good", '[ "$1" = -c ] || { echo "asked: $*" >&2; exit 9; }')
    done = make(f"PYTHON={too_old} {good}", "install", folder=tmp_path)
    assert done.returncode != 0
    assert f"asked: -m venv --clear {tmp_path / 'venv'}" in done.stderr


def test_help_is_what_bare_make_says(tmp_path):
    """`make` alone lists the targets and does nothing."""
    listed = make(folder=tmp_path)
    assert listed.returncode == 0
    assert listed.stdout == make("help", folder=tmp_path).stdout
    assert "make demo" in listed.stdout
