"""`sceneray promote`, `rollback` and `models`: what they say, and what is left where one is overtaken or dies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from jobs.cli import arguments_of, main_of
from sceneray import bundle, promotion, repository, storage
from sceneray.errors import BundleError, ConfigError, ConflictError, StorageError
from tests.faulty_files import Died, dies_at, faulty_store
from tests.repositories import MODEL, content, darkened, export
from tests.repositories import one_thread as one_thread


def call(verb: str, *arguments: str) -> dict[str, Any]:
    """Run a verb in this process."""
    from jobs import models, promote, rollback

    module = {"promote": promote, "rollback": rollback, "models": models}[verb]
    return module.run(arguments_of(verb, arguments))


def champion(repo: str) -> str | None:
    """The champion's version."""
    named = repository.read(repo, MODEL).champion
    return named.version if named else None


@pytest.fixture
def repo(tmp_path: Path) -> str:
    """A repository whose champion is version 1, with mIoU 0.5."""
    url = str(tmp_path / "repo")
    call("promote", export(str(tmp_path), "1"), "--repo", url)
    return url


def test_the_line_from_bundle_to_rollback(any_root: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """The verbs on every file system: promote twice, list, roll back; each gate is reported with what was found."""
    repo, result = storage.join(any_root, "repo"), tmp_path / "result.json"
    assert main_of("promote", [export(any_root, "1"), "--repo", repo]) == 0
    first = capsys.readouterr().out
    assert [line.split()[:2] for line in first.splitlines()[:-1]] == [["bundle", "passed"], ["golden", "passed"]]
    assert main_of("promote", [export(any_root, "2", 0.6), "--repo", repo, "--json", str(result)]) == 0
    gates = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()[:-1]}
    assert list(gates) == ["bundle", "golden", "miou", "classes"]
    assert "49152 of 49152 pixels" in gates["golden"]
    assert "mIoU 0.6000 against the champion's 0.5000" in gates["miou"]
    told = json.loads(result.read_text())
    assert (told["version"], told["previous"]["version"], told["moved"], told["skipped"]) == ("2", "1", True, [])
    assert told["digest"] == bundle.load(told["bundle"]).digest
    assert main_of("models", [repo]) == 0
    rows = [line.split()[:5] for line in capsys.readouterr().out.splitlines()[1:3]]
    assert [row[:4] for row in rows] == [[MODEL, "1", "previous", "0.5000"], [MODEL, "2", "champion", "0.6000"]]
    assert rows[1][4] == told["digest"][:12]
    assert main_of("rollback", ["--repo", repo, "--name", MODEL]) == 0
    assert "version 1 is the champion of" in capsys.readouterr().out
    assert bundle.load(repository.resolve(f"{repo}/{MODEL}@champion").url).version == "1"
    assert main_of("promote", [export(any_root, "3", 0.1), "--repo", repo]) == 1
    assert "refused, nothing was moved. miou: mIoU 0.1000" in capsys.readouterr().err
    assert champion(repo) == "1"


def test_names_and_versions_of_ones_own(tmp_path: Path, repo: str) -> None:
    """--name and --version say what a bundle is called in the repository; a reference can be promoted too."""
    result = call("promote", f"{repo}/{MODEL}@1", "--repo", repo, "--name", "other", "--version", "v1.0")
    assert result["bundle"] == f"{repo}/other/v1.0"
    assert result["previous"] is None
    assert repository.names(repo) == [MODEL, "other"]
    with pytest.raises(ConfigError, match="Give --version"):
        call("promote", export(str(tmp_path), "2"), "--repo", repo, "--version", "champion")
    with pytest.raises(ConflictError, match="a version is never changed"):
        call("promote", export(str(tmp_path), "2"), "--repo", repo, "--version", "1")


def test_the_champion_may_be_promoted_again(tmp_path: Path, repo: str) -> None:
    """Promoting what is the champion already succeeds and moves nothing, so that a promote can be repeated."""
    before = content(repo)
    assert not call("promote", str(tmp_path / "export-1"), "--repo", repo)["moved"]
    assert content(repo) == before


def test_a_promote_that_is_overtaken_moves_nothing(tmp_path: Path, repo: str) -> None:
    """Where another bundle became champion during the examination, its numbers are worth nothing: one sentence."""
    settings = promotion.Settings()
    candidate = promotion.open_candidate(export(str(tmp_path), "2", 0.6), repo)
    assert all(gate.passed for gate in promotion.examine(candidate, settings))
    call("promote", export(str(tmp_path), "3", 0.9), "--repo", repo)
    with pytest.raises(ConflictError, match=r"somebody else moved the champion .* to version 3\. Nothing was moved"):
        promotion.publish(candidate)
    assert champion(repo) == "3"


def test_a_bundle_that_changes_meanwhile_is_not_copied(tmp_path: Path, repo: str) -> None:
    """What is copied is what was examined: a bundle written over in between is refused."""
    candidate = promotion.open_candidate(export(str(tmp_path), "2", 0.6), repo)
    export(str(tmp_path), "2", 0.9, make=darkened)
    with pytest.raises(StorageError, match="is damaged"):
        promotion.publish(candidate)
    assert champion(repo) == "1"


def test_a_promote_that_dies_anywhere(tmp_path: Path) -> None:
    """Examining writes nothing; dead at any operation after it the champion is the old or the new one, and loads."""
    with faulty_store() as store:
        repo = store.url("top", "repo")
        call("promote", export(str(tmp_path), "1"), "--repo", repo)
        before = store.content()
        store.restart(before)
        candidate = promotion.open_candidate(export(str(tmp_path), "2", 0.6), repo)
        assert all(gate.passed for gate in promotion.examine(candidate, promotion.Settings()))
        assert store.content() == before
        assert {operation.kind for operation in store.operations}.isdisjoint({"pipe_file", "rm_file"})
        store.restart(before)
        promotion.publish(candidate)
        total, outcomes = len(store.operations), []
        for number in range(1, total + 1):
            store.restart(before, dies_at(number, "after"))
            with pytest.raises(Died):
                promotion.publish(candidate)
            store.rules.clear()
            outcomes.append(str(champion(repo)))
            bundle.verify(repository.resolve(f"{repo}/{MODEL}@champion").url)
        assert outcomes == sorted(outcomes)
        assert set(outcomes) == {"1", "2"}


def test_a_repository_without_models(tmp_path: Path) -> None:
    """`models` of an empty folder says how the first model comes there."""
    with pytest.raises(BundleError, match=r"no models in .*sceneray promote BUNDLE --repo"):
        call("models", str(tmp_path))
