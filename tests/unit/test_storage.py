"""Reading, writing and listing in storage.py, on a disk, in memory and on a real S3 server alike."""

from __future__ import annotations

import uuid
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sceneray import storage
from sceneray.errors import StorageError
from tests.support import file_names


def test_what_was_written_is_read(any_root):
    """A file reads back as it was written, a second write replaces it, and parents need not exist."""
    url = storage.join(any_root, "deep", "er", "file")
    assert not storage.exists(url)
    storage.write_bytes(url, b"one")
    storage.write_bytes(url, b"two")
    assert storage.read_bytes(url) == b"two"
    assert storage.exists(url)
    assert storage.is_file(url)
    assert not storage.is_file(storage.join(any_root, "deep"))


def test_a_missing_file_is_a_missing_file(any_root):
    """Reading where nothing is, or below a file, raises FileNotFoundError, which no retry delays."""
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(storage.join(any_root, "nothing"))
    storage.write_bytes(storage.join(any_root, "file"), b"x")
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(storage.join(any_root, "file", "below"))
    assert storage.etag(storage.join(any_root, "nothing")) is None


def test_json_round_trip_and_damage(any_root):
    """JSON reads back equal; a truncated document is a StorageError that names the file."""
    url = storage.join(any_root, "x.json")
    storage.write_json(url, {"b": [1, 2.5, None], "a": "ä"})
    assert storage.read_json(url) == {"a": "ä", "b": [1, 2.5, None]}
    storage.write_bytes(url, storage.read_bytes(url)[:9])
    with pytest.raises(StorageError, match=r"x\.json is not JSON"):
        storage.read_json(url)


def test_listing(any_root):
    """`list_names` gives what lies directly in a folder, `walk_files` all files below it; both without half-files."""
    assert storage.list_names(storage.join(any_root, "none")) == []
    assert storage.walk_files(storage.join(any_root, "none")) == []
    for name in ("b", "a", "sub/c", "sub/deep/d", ".tmp-left-over"):
        storage.write_bytes(storage.join(any_root, name), name.encode())
    assert storage.list_names(any_root) == ["a", "b", "sub"]
    assert storage.list_names(storage.join(any_root, "sub")) == ["c", "deep"]
    assert storage.walk_files(any_root) == [("a", 1), ("b", 1), ("sub/c", 5), ("sub/deep/d", 10)]
    assert storage.list_names(storage.join(any_root, "a")) == []


def test_remove(any_root):
    """A file, a folder with all below it, and nothing at all can be removed."""
    for name in ("keep", "sub/c", "sub/deep/d"):
        storage.write_bytes(storage.join(any_root, name), b"x")
    storage.remove(storage.join(any_root, "sub"))
    assert storage.walk_files(any_root) == [("keep", 1)]
    storage.remove(storage.join(any_root, "keep"))
    storage.remove(storage.join(any_root, "never"))
    assert storage.walk_files(any_root) == []


def test_a_missing_bucket_says_so(weed_server, monkeypatch):
    """Where the server answers that there is no bucket, both ways of writing say so in a StorageError."""
    url = weed_server.url("key")
    fs, _ = storage.filesystem(url)

    def no_bucket(*_: object, **__: object) -> None:
        raise FileNotFoundError("The specified bucket does not exist")  # SeaweedFS makes missing buckets; AWS does not

    monkeypatch.setattr(fs, "pipe_file", no_bucket)
    for write in (storage.write_bytes, storage.create):
        with pytest.raises(StorageError, match="no such bucket"):
            write(url, b"x")


def test_an_unknown_protocol_says_what_to_use():
    """A URL that no file system knows is a StorageError with an example of a good one."""
    with pytest.raises(StorageError, match=r"s3://bucket/key"):
        storage.read_bytes("nosuch://x/y")


def test_local_copy(any_root):
    """A local path holds the file's content; a download is gone afterwards, a local file stays."""
    url = storage.join(any_root, "photo.jpg")
    storage.write_bytes(url, b"pixels")
    with storage.local_copy(url) as path:
        assert path.read_bytes() == b"pixels"
        assert path.name == "photo.jpg"
    assert path.exists() == storage.is_local(url)
    assert storage.read_bytes(url) == b"pixels"


def test_paths():
    """Relative paths become absolute, URLs stay, and joining and splitting agree."""
    assert storage.absolute("x") == str(Path.cwd() / "x")
    assert storage.absolute("~/x") == str(Path.home() / "x")
    assert storage.absolute("s3://bucket/key/") == "s3://bucket/key"
    assert storage.basename("s3://bucket/key/") == "key"
    assert [storage.is_local(url) for url in ("a/b", "/a", "file:///a", "s3://b/c", "memory://x")] == [
        True, True, True, False, False,
    ]  # fmt: skip


@given(st.lists(file_names, min_size=1, max_size=4), st.binary(max_size=200))
def test_any_name_and_content_round_trips(segments, data):
    """Any bytes under any tame name read back equal, and the name is listed."""
    url = storage.join(f"memory://{uuid.uuid4().hex}", *segments)
    storage.write_bytes(url, data)
    assert storage.read_bytes(url) == data
    assert storage.basename(url) in storage.list_names(url.rsplit("/", 1)[0])
