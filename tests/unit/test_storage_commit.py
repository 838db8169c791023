"""Committed folders of storage.py: without a valid manifest there is nothing, and damage is found."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable

import fsspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sceneray import local_files, storage
from sceneray.errors import StorageError
from tests.support import file_names

ABOUT = {"format": "test", "version": 1}
FILES = {"a.bin": b"alpha" * 50, "sub/b.bin": b"beta"}


def damage(url: str, change: Callable[[bytes], bytes]) -> None:
    """Rewrite the file at `url` behind the module's back."""
    fs, path = fsspec.core.url_to_fs(url)
    fs.pipe_file(path, change(fs.cat_file(path)))


def test_committed_folder(any_root):
    """A committed folder opens, verifies and gives its files; its digest follows its content."""
    url = storage.join(any_root, "folder")
    assert storage.open_committed(url) is None
    written = storage.commit(url, FILES, ABOUT)
    opened = storage.open_committed(url)
    assert opened == written
    opened.verify()
    assert {name: opened.read(name) for name in FILES} == FILES
    assert opened.manifest["format"] == "test"
    assert storage.commit(storage.join(any_root, "other"), FILES, ABOUT).digest == opened.digest
    assert storage.commit(storage.join(any_root, "third"), {**FILES, "c": b""}, ABOUT).digest != opened.digest
    with pytest.raises(StorageError, match="no file 'z'"):
        opened.read("z")


def test_the_manifest_comes_last(tmp_path, monkeypatch):
    """A writer that dies at any file leaves a folder that does not exist for a reader."""
    real = local_files.replace
    for survived in range(len(FILES) + 1):
        url = str(tmp_path / str(survived))
        left = [survived]

        def write_or_die(path, data, left=left):
            if left[0] == 0:
                raise KeyboardInterrupt
            left[0] -= 1
            real(path, data)

        monkeypatch.setattr(local_files, "replace", write_or_die)
        with pytest.raises(KeyboardInterrupt):
            storage.commit(url, FILES, ABOUT)
        assert storage.open_committed(url) is None
        assert len(storage.walk_files(url)) == survived


def test_a_verified_commit_is_the_same(any_root):
    """Reading back what was written changes nothing where it is what was written."""
    plain = storage.commit(storage.join(any_root, "plain"), FILES, ABOUT)
    checked = storage.commit(storage.join(any_root, "checked"), FILES, ABOUT, verify=True)
    assert checked.digest == plain.digest
    assert storage.open_committed(checked.url) == checked


@pytest.mark.parametrize(
    "change", [lambda data: data[:-1], lambda data: data[::-1], None], ids=["short", "other", "lost"]
)
def test_a_verified_commit_notices_what_the_disk_did(tmp_path, monkeypatch, change):
    """Where a file reads back as another or not at all, StorageError names it and nothing is committed."""
    real = local_files.replace

    def replace(path, data):
        if path.name != "b.bin":
            real(path, data)
        elif change is not None:
            real(path, change(data))

    monkeypatch.setattr(local_files, "replace", replace)
    url = str(tmp_path / "folder")
    with pytest.raises(StorageError, match=r"sub/b\.bin"):
        storage.commit(url, FILES, ABOUT, verify=True)
    assert storage.open_committed(url) is None
    monkeypatch.undo()
    storage.commit(url, FILES, ABOUT, verify=True).verify()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda data: data[:-1], "is damaged"),
        (lambda data: bytes([data[0] ^ 1]) + data[1:], "is damaged"),
        (lambda data: data + b"!", "is damaged"),
    ],
    ids=["truncated", "altered", "longer"],
)
def test_a_damaged_file_is_refused(any_root, change, says):
    """A file of a committed folder that is not what the manifest says raises StorageError, named."""
    storage.commit(any_root, FILES, ABOUT)
    damage(storage.join(any_root, "a.bin"), change)
    opened = storage.open_committed(any_root)
    with pytest.raises(StorageError, match=says):
        opened.read("a.bin")
    with pytest.raises(StorageError, match=r"'a\.bin'"):
        opened.verify()
    assert opened.read("sub/b.bin") == FILES["sub/b.bin"]


def test_a_missing_file_of_a_folder_is_refused(any_root):
    """A file that is in the manifest and not in the folder raises StorageError."""
    storage.commit(any_root, FILES, ABOUT)
    storage.remove(storage.join(any_root, "a.bin"))
    with pytest.raises(StorageError, match=r"'a\.bin' is in the manifest but is missing"):
        storage.open_committed(any_root).verify()


@pytest.mark.parametrize("manifest", [[], {}, {"files": []}, {"files": {"a": 3}}, {"files": {"a": {"bytes": "1"}}}])
def test_a_foreign_manifest_is_refused(tmp_path, manifest):
    """A manifest.json of another kind is an error that says so, not a folder of ours and not a crash."""
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(StorageError, match="is not a manifest"):
        storage.open_committed(str(tmp_path))


def test_a_truncated_manifest_is_refused(any_root):
    """Half a manifest commits nothing: opening the folder is an error."""
    storage.commit(any_root, FILES, ABOUT)
    damage(storage.join(any_root, storage.MANIFEST), lambda data: data[: len(data) // 2])
    with pytest.raises(StorageError, match="is not JSON"):
        storage.open_committed(any_root)


@given(st.dictionaries(file_names, st.binary(max_size=50), max_size=4), st.data())
def test_any_damage_is_found(files, draw):
    """Whatever single byte of whatever file is altered, `verify` refuses the folder."""
    url = f"memory://{uuid.uuid4().hex}"
    committed = storage.commit(url, files, ABOUT)
    committed.verify()
    name = draw.draw(st.sampled_from([n for n, data in files.items() if data] or [None]))
    if name is None:
        return
    position = draw.draw(st.integers(0, len(files[name]) - 1))
    damage(storage.join(url, name), lambda data: data[:position] + bytes([data[position] ^ 255]) + data[position + 1 :])
    with pytest.raises(StorageError, match="is damaged"):
        committed.verify()
