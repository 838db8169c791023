"""The model repository: one document moves both aliases, versions never change, and a reference names one bundle."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from sceneray import bundle, repository, storage
from sceneray.errors import BundleError, ConfigError, ConflictError, StorageError
from sceneray.storage import Committed
from tests.repositories import NAME, aliases, check_history, content, finish, promote, small


def test_promote_and_roll_back(any_root: str) -> None:
    """champion and previous follow promotes; a rollback exchanges them, and a second one takes that back."""
    assert aliases(any_root) == [None, None]
    for version, expected in [("1", ["1", None]), ("2", ["2", "1"]), ("3", ["3", "2"])]:
        promote(any_root, version)
        assert aliases(any_root) == expected
    repo = storage.join(any_root, "repo")
    assert repository.rollback(repo, NAME).champion == repository.read(repo, NAME).champion
    assert aliases(any_root) == ["2", "3"]
    repository.rollback(repo, NAME)
    assert aliases(any_root) == ["3", "2"]
    model = repository.read(repo, NAME)
    check_history(model)
    assert [move["by"] for move in model.history] == ["promote"] * 3 + ["rollback"] * 2
    assert repository.names(repo) == [NAME]
    assert repository.versions(model) == ["1", "2", "3"]


def test_a_reference_names_a_folder(any_root: str) -> None:
    """@champion, @previous and @VERSION give the version's folder and digest; a bundle's own URL gives itself."""
    sources = [small(any_root, version) for version in ("1", "2")]
    for version in ("1", "2"):
        promote(any_root, version)
    repo = storage.absolute(storage.join(any_root, "repo"))
    for wanted, version in [("champion", 2), ("previous", 1), ("1", 1), ("2", 2)]:
        found = repository.resolve(f"{repo}/{NAME}@{wanted}")
        assert found.url == f"{repo}/{NAME}/{version}"
        assert found.digest == sources[version - 1].digest
        assert content(found.url) == content(sources[version - 1].url)
    assert repository.resolve(sources[0].url) == Committed(storage.absolute(sources[0].url), sources[0].manifest)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("repo/streed@champion", "unknown model 'streed': did you mean 'street'"),
        ("repo/street@previous", "has no previous yet"),
        ("repo/street@8", "no bundle at .*/street/8"),
        ("repo/street@", "names no bundle. Give REPO/MODEL@champion"),
        ("repo/street@../7", "no bundle at"),
        ("repo/@champion", "names no bundle"),
        ("repo/street", "no bundle at .*/street"),
        ("nowhere/street@champion", "unknown model 'street': known: none"),
    ],
)
def test_what_is_not_there_is_said(tmp_path: Any, url: str, message: str) -> None:
    """A reference that leads nowhere is one sentence that names what is missing."""
    promote(str(tmp_path), "7")
    with pytest.raises(BundleError, match=message):
        repository.resolve(str(tmp_path / "x").removesuffix("x") + url)


def test_a_bucket_is_no_model() -> None:
    """Where a repository must stand there is only a protocol: that is said, and nothing is asked of the store."""
    with pytest.raises(BundleError, match="names no bundle"):
        repository.resolve("s3://bucket@champion")


@pytest.mark.parametrize("bad", ["", ".", "..", ".tmp-x", "a/b", "two words", "x" * 65, "champion", "previous", "a@b"])
def test_names_that_would_leave_the_folder_are_refused(tmp_path: Any, bad: str) -> None:
    """A name or version that is no plain folder's, or that is an alias's, is refused before anything is written."""
    source = small(str(tmp_path / "export"), "1")
    for name, version in ((bad, "1"), (NAME, bad)):
        with pytest.raises(ConfigError, match="begins with a letter or digit"):
            repository.add(str(tmp_path / "repo"), name, version, source)
    assert not (tmp_path / "repo").exists()


@pytest.mark.parametrize("file", ["../escaped", "a/../../escaped", "/escaped", "a\\..\\escaped", "manifest.json"])
def test_a_copy_stays_in_its_folder(tmp_path: Any, file: str) -> None:
    """A manifest that names a file outside its folder, or itself, is not copied."""
    source = small(str(tmp_path), "1")
    source.manifest["files"][file] = source.manifest["files"]["weights"]
    with pytest.raises(BundleError, match=r"an entry .* that no export writes"):
        repository.add(str(tmp_path / "repo"), NAME, "1", source)
    assert not (tmp_path / "repo").exists()


def test_a_version_is_never_changed(any_root: str) -> None:
    """Another content under a version's name is refused and changes nothing; the same content is fine any time."""
    promote(any_root, "1")
    promote(any_root, "2")
    before = content(storage.join(any_root, "repo"))
    with pytest.raises(ConflictError, match=r"version 1 of .* is there already.*never changed.*--version"):
        promote(any_root, "1", "another")
    assert promote(any_root, "2").moves == 2  # the champion already: `previous` must not become it
    assert content(storage.join(any_root, "repo")) == before
    promote(any_root, "1")
    assert aliases(any_root) == ["1", "2"]


def test_a_version_that_was_begun_is_kept_for_its_bundle(any_root: str) -> None:
    """Where a copy was never finished, no other bundle takes its name; the same bundle finishes it."""
    repo, source = storage.join(any_root, "repo"), small(any_root, "1")
    folder = repository.add(repo, NAME, "1", source).url
    storage.remove(storage.join(folder, storage.MANIFEST))
    with pytest.raises(ConflictError, match="was begun and never finished"):
        promote(any_root, "1", "another")
    assert repository.versions(repository.read(repo, NAME)) == ["1"]
    promote(any_root, "1")
    assert aliases(any_root) == ["1", None]


def test_a_version_that_somebody_wrote_over_is_not_served(tmp_path: Any) -> None:
    """A folder that holds another bundle than the promoted one is refused by every reference and by a rollback."""
    root = str(tmp_path)
    promote(root, "1")
    promote(root, "2")
    for version in ("1", "2"):
        other = small(root, version, "another")
        storage.write_json(f"{root}/repo/{NAME}/{version}/manifest.json", other.manifest)
    for wanted in ("champion", "previous", "1"):
        with pytest.raises(BundleError, match="is not the bundle that was promoted"):
            repository.resolve(f"{root}/repo/{NAME}@{wanted}")
    with pytest.raises(BundleError, match="is not the bundle that was promoted"):
        repository.rollback(f"{root}/repo", NAME)


def test_a_rollback_needs_a_whole_previous(tmp_path: Any) -> None:
    """Without a previous, or with a damaged one, the champion stays and the error says why."""
    root, repo = str(tmp_path), str(tmp_path / "repo")
    with pytest.raises(BundleError, match="has no champion"):
        repository.rollback(repo, NAME)
    promote(root, "1")
    with pytest.raises(BundleError, match="one champion and none before it"):
        repository.rollback(repo, NAME)
    promote(root, "2")
    (tmp_path / "repo" / NAME / "1" / "weights").write_bytes(b"x")
    with pytest.raises(BundleError, match=r"'weights' has 1 bytes.*The champion stays"):
        repository.rollback(repo, NAME)
    assert repository.read(repo, NAME).champion == repository.Named("2", small(root, "2").digest)


def test_a_damaged_copy_does_not_become_champion(tmp_path: Any) -> None:
    """Where the version stands already, its files are read before an alias names it."""
    root = str(tmp_path)
    promote(root, "1")
    promote(root, "2")
    (tmp_path / "repo" / NAME / "1" / "weights").write_bytes(b"x")
    with pytest.raises(StorageError, match="is damaged: 'weights'"):
        promote(root, "1")
    assert repository.read(f"{root}/repo", NAME).moves == 2


def test_the_history_is_short(tmp_path: Any) -> None:
    """The document keeps the last moves alone, and goes on counting."""
    root = str(tmp_path)
    for version in ("1", "2"):
        promote(root, version)
    for _ in range(repository.HISTORY):
        model = repository.rollback(f"{root}/repo", NAME)
    assert len(model.history) == repository.HISTORY
    assert model.moves == repository.HISTORY + 2
    assert repository.read(f"{root}/repo", NAME) == model


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (b"{", "is not JSON"),
        (b"[]", "is damaged"),
        (b"{}", "is damaged"),
        (b'{"format": "sceneray-model", "version": 2}', "of version 2; this sceneray reads .* version 1"),
        (b'{"format": "sceneray-model", "version": 1, "champion": {"x": 1}, "previous": null}', "is damaged"),
    ],
)
def test_a_document_of_another_kind_is_refused(tmp_path: Any, document: bytes, message: str) -> None:
    """A damaged document, or a later version's, is said to be one; it is never taken for an empty repository."""
    storage.write_bytes(f"{tmp_path}/repo/{NAME}/{repository.DOCUMENT}", document)
    for ask in (lambda: promote(str(tmp_path), "1"), lambda: repository.resolve(f"{tmp_path}/repo/{NAME}@champion")):
        with pytest.raises(StorageError, match=message):
            ask()
    assert storage.read_bytes(f"{tmp_path}/repo/{NAME}/{repository.DOCUMENT}") == document


def test_looking_up_a_bundle_needs_no_torch() -> None:
    """The repository knows neither torch nor ray, so that an ingress may resolve a reference."""
    code = "import sys, sceneray.repository; print([m for m in ('torch', 'ray', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
    assert repository.ABOUT == bundle.ABOUT


def test_a_decision_on_an_older_champion_is_refused(any_root: str) -> None:
    """Who compared a bundle with a champion that was moved since moves nothing, even where it was moved back."""
    promote(any_root, "1")
    promote(any_root, "2")
    repo = storage.join(any_root, "repo")
    seen = repository.read(repo, NAME)
    repository.rollback(repo, NAME)
    repository.rollback(repo, NAME)
    assert repository.read(repo, NAME).champion == seen.champion
    with pytest.raises(ConflictError, match=r"somebody else moved the champion of .* meanwhile, to version 2"):
        finish(any_root, seen, small(any_root, "3"), "3")
    assert aliases(any_root) == ["2", "1"]
