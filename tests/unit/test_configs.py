"""Every shipped YAML: it loads with the settings of the verb that takes it, and says at its top what it is for."""

from __future__ import annotations

import re
import shlex

import pytest
import yaml

from jobs.cli import arguments_of
from sceneray import config
from sceneray.config import TrainSettings
from tests.support import ROOT, tracked_files
from tune.settings import TuneSettings

SETTINGS = {"jobs/configs": TrainSettings, "tune/configs": TuneSettings}
# Files of Ray's own kinds, which their own tests load: tests/cloud and the tests of serve.
OTHERS = {"cluster.yaml", "serve/config.yaml", "serve/alerts.yaml", "serve/config.cluster.yaml"}
FILES = [str(path.relative_to(ROOT)) for path in tracked_files() if path.suffix in (".yaml", ".yml")]
OURS = [name for name in FILES if name.rpartition("/")[0] in SETTINGS]


def opening(name: str) -> list[str]:
    """The comment lines that a file begins with, without their #."""
    lines = []
    for line in (ROOT / name).read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#"))
    return lines


def test_every_shipped_file_is_known():
    """Each YAML file is either settings of a verb, or listed here with the others; none escapes its test."""
    assert set(FILES) == set(OURS) | OTHERS
    assert {folder: sum(name.startswith(folder) for name in OURS) for folder in SETTINGS} == {
        "jobs/configs": 2,
        "tune/configs": 1,
    }


@pytest.mark.parametrize("name", OURS)
def test_shipped_settings_load(name):
    """A shipped settings file is valid for its verb, as it is, and reads back after being written."""
    cls = SETTINGS[name.rpartition("/")[0]]
    settings = config.load(cls, str(ROOT / name))
    assert config.validate(cls, yaml.safe_load(config.dump(settings)), name) == settings


@pytest.mark.parametrize("name", OURS)
def test_a_shipped_file_opens_with_what_it_is(name):
    """A shipped file begins with a comment: what it is, the command, the expected time."""
    comment = opening(name)
    assert len(comment) >= 3
    assert len(comment[0].strip()) > 30
    assert re.search(r"\b(second|minute|hour)s?\b", " ".join(comment)), "the expected time"


@pytest.mark.parametrize("name", OURS)
def test_the_command_in_the_comment_is_accepted(name):
    """The command lines in the comment are what the verbs' parsers take, and one of them names the file itself."""
    commands = [shlex.split(line) for line in opening(name) if line.strip().startswith("sceneray ")]
    for words in commands:
        arguments_of(words[1], words[2:])
    assert any(name in words for words in commands)
