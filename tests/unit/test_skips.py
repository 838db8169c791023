"""The list of skips: a skip that it does not name fails the whole session."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT, SKIPS, AllowedSkip, read_skips, unexpected_skips

TESTS = """
import pytest

def test_that_passes():
    pass

def test_that_is_skipped():
    pytest.skip("no such device here")
"""


def session(folder: Path, skips: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run this repository's conftest over one small test file, with `skips` as the list."""
    tests = folder / "tests"
    (tests / "unit").mkdir(parents=True, exist_ok=True)
    for name in ("__init__.py", "conftest.py", "support.py"):
        shutil.copy(ROOT / "tests" / name, tests)
    (tests / "skips.txt").write_text(skips)
    (tests / "unit" / "test_small.py").write_text(TESTS)
    shutil.copy(ROOT / "pyproject.toml", folder)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments]
    env = {**os.environ, "PYTHONPATH": ""}
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)


def test_an_unlisted_skip_fails_the_session(tmp_path):
    """A green run with a skip that is not listed exits with 1 and prints the line that would allow it."""
    done = session(tmp_path, "# nothing may be skipped\n")
    assert done.returncode == 1, done.stdout
    assert "1 passed, 1 skipped" in done.stdout
    assert "tests/unit/test_small.py::test_that_is_skipped | no such device here" in done.stdout


def test_a_listed_skip_is_fine(tmp_path):
    """The same skip, listed, leaves the session green; listed for another reason it does not."""
    assert session(tmp_path, "tests/unit/test_small.py | no such device\n").returncode == 0
    assert session(tmp_path, "tests/unit/test_small.py | too slow\n").returncode == 1


def test_the_folder_is_the_marker(tmp_path):
    """A test in tests/unit is selected by `-m unit` and by no other tier; a test in no tier is refused."""
    allowed = "tests/unit/test_small.py | no such device\n"
    assert "1 passed, 1 skipped" in session(tmp_path, allowed, "-m", "unit").stdout
    assert "2 deselected" in session(tmp_path, allowed, "-m", "ray or e2e or cloud or chaos").stdout
    (tmp_path / "tests" / "test_lost.py").write_text(TESTS)
    done = session(tmp_path, allowed)
    assert done.returncode not in (0, 1)
    assert "test_lost.py is in no tier" in done.stdout + done.stderr


def test_reading_the_list():
    """Comments and blank lines are left out; a line without a reason is an error."""
    assert read_skips("# x\n\n a/b.py::test | why not \n") == [AllowedSkip("a/b.py::test", "why not")]
    for line in ("a/b.py", "a/b.py |", "| why"):
        with pytest.raises(ValueError, match="must read"):
            read_skips(line)


def test_both_the_test_and_the_reason_must_fit():
    """A skip is expected only where one line covers its test and its reason."""
    allowed = [AllowedSkip("a.py", "no GPU")]
    skips = [("a.py::test", "no GPU here"), ("a.py::test", "no disk"), ("b.py::test", "no GPU here")]
    assert unexpected_skips(skips, allowed) == skips[1:]


def test_the_list_names_files_that_exist():
    """No line of the list outlives the test it was written for."""
    for skip in read_skips(SKIPS.read_text()):
        assert (ROOT / skip.prefix.partition("::")[0]).is_file(), skip.prefix
