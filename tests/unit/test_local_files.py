"""Writing on this machine's disk: whole or not at all."""

from __future__ import annotations

import os

import pytest

from sceneray import storage
from sceneray.errors import StorageError


def test_a_local_write_is_whole_or_not_at_all(tmp_path, monkeypatch):
    """Where the last step of a local write fails, the old content stays and no half-file is left."""
    url = str(tmp_path / "file")
    storage.write_bytes(url, b"old")

    def no_rename(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", no_rename)
    with pytest.raises(StorageError, match="No space left"):
        storage.write_bytes(url, b"new")
    assert storage.read_bytes(url) == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_path_that_cannot_be_written_says_so(tmp_path):
    """Writing below a file is a StorageError with the path, for a write and for a swap."""
    (tmp_path / "file").write_bytes(b"")
    for write in (storage.write_bytes, storage.create):
        with pytest.raises(StorageError, match="cannot write"):
            write(str(tmp_path / "file" / "below"), b"x")
