"""What the documents tell: their commands are accepted, their files exist, their settings load."""

from __future__ import annotations

import ast
import json
import re
import shlex

import pytest
import yaml
from fastapi.routing import APIRoute

from jobs.cli import VERBS, arguments_of
from sceneray import config
from sceneray.config import TrainSettings
from serve.api import ApiSettings, create_app
from tests.documents import FENCE, blocks, documents
from tests.support import ROOT

COMMANDS = [
    pytest.param(words, id=f"{path.name}: {shlex.join(words)}")
    for path in documents()
    for block in blocks(path, "bash")
    for words in block.commands
]
KNOWN_PROGRAMS = {"make", "sceneray", "curl", "ray", "export", "serve", "git", "pytest"}


def parse(words: list[str]) -> None:
    """Parse `sceneray VERB ...` with the verb's own parser, and what it submits with the submitted verb's."""
    assert words[0] in VERBS, f"{words[0]} is no verb"
    arguments = arguments_of(words[0], words[1:])
    if words[0] == "submit":
        parse([arguments.verb, *arguments.arguments])


def test_the_documents_are_all_read():
    """README, CONTRIBUTING, CHANGELOG and the pages in docs/ are what these tests look at."""
    names = {path.name for path in documents()}
    assert {"README.md", "CONTRIBUTING.md", "CHANGELOG.md", "formats.md", "architecture.md"} <= names
    assert len(COMMANDS) > 20


@pytest.mark.parametrize("words", COMMANDS)
def test_a_documented_command_is_accepted(words):
    """A command line in a document names a program we speak of, and a verb's parser or the Makefile takes it."""
    program, *arguments = words
    assert program in KNOWN_PROGRAMS
    if program == "sceneray" and arguments != ["--help"]:
        parse(arguments)
    if program == "make":
        targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
        assert set(arguments) <= targets


def test_documented_paths_of_the_endpoint_exist():
    """Each URL that a document asks the endpoint for is a route of the endpoint."""
    routes = {route.path for route in create_app(None, ApiSettings()).routes if isinstance(route, APIRoute)}
    asked = {
        re.search(r":\d+(/[\w/]*)", word)[1]
        for path in documents()
        for block in blocks(path, "bash")
        for words in block.commands
        if words[0] == "curl"
        for word in words
        if word.startswith("http")
    }
    assert asked == {"/v1/segment", "/predict", "/v1/model"}
    assert asked <= routes


def test_links_and_pictures_lead_somewhere():
    """Every relative link in a document names a file of the repository."""
    for path in documents():
        prose = FENCE.sub("", path.read_text(encoding="utf-8"))
        for target in re.findall(r"\]\((?!https?://)([^)#]+)", prose):
            assert (path.parent / target).exists(), f"{path.name} links to {target}"


def test_documented_settings_load():
    """A YAML block is a settings file that `train` takes; JSON and Python blocks parse."""
    seen = set()
    for path in documents():
        for block in blocks(path):
            seen.add(block.language)
            if block.language == "yaml":
                config.validate(TrainSettings, yaml.safe_load(block.text), path.name)
            elif block.language == "json":
                json.loads(block.text)
            elif block.language == "python":
                ast.parse(block.text)
    assert {"bash", "yaml", "json", "python", "diff"} <= seen


def test_quick_start_comes_first():
    """The first command of the README is `make demo`, before any other section's."""
    first = blocks(ROOT / "README.md", "bash")[0]
    assert first.commands[0] == ["make", "demo"]


def test_every_make_target_is_explained():
    """Each target that a person may type has a line in `make help`."""
    makefile = (ROOT / "Makefile").read_text()
    phony = set(re.findall(r"^\.PHONY: (\S+)", makefile, re.M))
    explained = set(re.findall(r"^([a-z-]+):.*## \w", makefile, re.M))
    assert phony == explained
    assert {"demo", "test", "lint", "bench", "help", "test-chaos", "format"} <= phony


def test_changelog_names_the_version_and_every_verb():
    """The top entry of the changelog is this version's, and it tells of every verb."""
    from sceneray import __version__

    text = (ROOT / "CHANGELOG.md").read_text()
    assert re.search(r"^## \[([\d.]+)\]", text, re.M)[1] == __version__
    for verb in VERBS:
        assert f"`{verb}`" in text or f"`sceneray {verb}`" in text, verb
