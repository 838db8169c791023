"""Every URL is opened here: read, write, list, commit a folder, compare-and-swap one file.

A URL is anything fsspec knows (`s3://bucket/key`, `memory://x`, `gs://...`) or a local path. Credentials and
endpoints come from the environment (`AWS_ENDPOINT_URL`, instance profiles, ...), never from a URL or a config.

What is atomic where:

| file system | one file appears whole          | create only if absent      | compare-and-swap           |
|-------------|---------------------------------|----------------------------|----------------------------|
| local       | temp file, fsync, rename        | under a lock beside it     | same lock                  |
| s3          | a put is atomic                 | put with If-None-Match: *  | put with If-Match: etag    |
| memory      | under a process-wide lock       | same lock                  | same lock                  |

Object stores cannot rename or append, so a folder is committed by writing `manifest.json` (names, sizes, sha256)
last: a folder without a valid manifest does not exist for any reader.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import secrets
import tempfile
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
from fsspec.spec import AbstractFileSystem

from sceneray import local_files
from sceneray.errors import ConflictError, StorageError
from sceneray.retries import is_fault, retry

MANIFEST = "manifest.json"

_MEMORY_LOCK = threading.RLock()


def absolute(url: str) -> str:
    """`url` with a local relative path resolved: workers of a cluster run in other folders."""
    if "://" in url:
        return url.rstrip("/")
    return str(Path(url).expanduser().resolve())


def join(url: str, *names: str) -> str:
    """`url` with path segments appended."""
    return "/".join([url.rstrip("/"), *names])


def basename(url: str) -> str:
    """The last path segment of `url`."""
    return url.rstrip("/").rsplit("/", 1)[-1]


def is_local(url: str) -> bool:
    """True where `url` names a file on this machine's disk."""
    return "://" not in url or url.startswith(("file://", "local://"))


def filesystem(url: str) -> tuple[AbstractFileSystem, str]:
    """The fsspec file system behind `url`, and the path inside it."""
    options: dict[str, Any] = {}
    if url.startswith(("s3://", "s3a://")):
        # A cached listing would hide what another machine committed a second ago; and one layer retries: this module.
        options = {"use_listings_cache": False, "config_kwargs": {"retries": {"total_max_attempts": 1}}}
    try:
        fs, path = fsspec.core.url_to_fs(absolute(url), **options)
    except (ValueError, ImportError) as error:
        raise StorageError(
            f"cannot open '{url}': {error}. Use a local path or a URL such as s3://bucket/key."
        ) from error
    return fs, path


def read_bytes(url: str) -> bytes:
    """The whole file at `url`, in one request: never the head of one version and the tail of another.

    Raises FileNotFoundError where there is none, IsADirectoryError where a local folder stands there, StorageError
    where the file system keeps failing.
    """
    fs, path = filesystem(url)

    def read() -> bytes:
        try:
            data: bytes = fs.cat_file(path)
        except NotADirectoryError as error:
            raise FileNotFoundError(f"no file at {url}") from error
        return data

    return retry(f"reading {url}", read)


def read_json(url: str) -> Any:
    """The JSON document at `url`."""
    data = read_bytes(url)
    try:
        return json.loads(data)
    except ValueError as error:
        raise StorageError(f"{url} is not JSON: {error}. It is damaged or not a file of ours.") from error


def exists(url: str) -> bool:
    """True where a file or folder stands at `url`."""
    fs, path = filesystem(url)
    return retry(f"looking for {url}", lambda: bool(fs.exists(path)))


def is_file(url: str) -> bool:
    """True where a file (not a folder) stands at `url`."""
    fs, path = filesystem(url)
    return retry(f"looking for {url}", lambda: bool(fs.isfile(path)))


def list_names(url: str) -> list[str]:
    """Sorted last segments of what lies directly in the folder `url`; empty where there is no folder."""
    fs, path = filesystem(url)

    def names() -> list[str]:
        try:
            entries = fs.ls(path, detail=False)
        except FileNotFoundError:
            return []
        own = path.rstrip("/")
        return sorted({basename(entry) for entry in entries if str(entry).rstrip("/") != own})

    return [name for name in retry(f"listing {url}", names) if not name.startswith(".tmp-")]


def walk_files(url: str) -> list[tuple[str, int]]:
    """Sorted (path relative to `url`, size in bytes) of all files below `url`; empty where there is no folder."""
    fs, path = filesystem(url)

    def found() -> list[tuple[str, int]]:
        try:
            entries: Mapping[str, Mapping[str, Any]] = fs.find(path, detail=True)
        except FileNotFoundError:
            return []
        start = len(path.rstrip("/")) + 1
        return sorted((name[start:], int(info["size"])) for name, info in entries.items() if name[start:])

    return [item for item in retry(f"listing {url}", found) if not basename(item[0]).startswith(".tmp-")]


def remove(url: str) -> None:
    """Remove the file or the folder at `url`; nothing happens where there is none."""
    fs, path = filesystem(url)

    def remove_once() -> None:
        with contextlib.suppress(FileNotFoundError):
            fs.rm(path, recursive=True)

    retry(f"removing {url}", remove_once)


def write_bytes(url: str, data: bytes) -> None:
    """Write one file; a reader sees the old one or the whole new one, never a part."""
    fs, path = filesystem(url)
    if is_local(url):
        local_files.replace(Path(path), data)
        return
    try:
        with _MEMORY_LOCK if _speaks(fs, "memory") else contextlib.nullcontext():
            retry(f"writing {url}", lambda: fs.pipe_file(path, data))
    except FileNotFoundError as error:
        raise StorageError(f"cannot write {url}: no such bucket. Make it, or correct the URL.") from error


def write_json(url: str, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    write_bytes(url, _json_bytes(value))


def create(url: str, data: bytes) -> None:
    """Write a file that must not exist yet.

    Raises ConflictError where it does.
    """
    compare_and_swap(url, None, data)


def etag(url: str) -> str | None:
    """A tag that changes with the content of the file at `url`; None where there is no file."""
    fs, path = filesystem(url)
    if _speaks(fs, "s3"):

        def head() -> str | None:
            try:
                info = fs.info(path, refresh=True)
            except FileNotFoundError:
                return None
            return str(info["ETag"])

        return retry(f"reading the tag of {url}", head)
    try:
        return _digest(read_bytes(url))
    except FileNotFoundError:
        return None


def compare_and_swap(url: str, expected: str | None, data: bytes) -> None:
    """Replace the file at `url` if its `etag` is still `expected` (None: if there is no file).

    Raises ConflictError where somebody else wrote in between; nothing is changed then.
    """
    fs, path = filesystem(url)
    if _speaks(fs, "s3"):
        _swap_s3(fs, path, url, expected, data)
    elif is_local(url):
        local_files.replace_if(Path(path), lambda: _check_tag(url, expected), data)
    elif _speaks(fs, "memory"):
        with _MEMORY_LOCK:
            _check_tag(url, expected)
            retry(f"writing {url}", lambda: fs.pipe_file(path, data))
    else:
        raise StorageError(
            f"no compare-and-swap is known for {url} ({type(fs).__name__}). Use s3://, memory:// or a local path."
        )


@dataclass(frozen=True)
class Committed:
    """A committed folder: its URL and its manifest."""

    url: str
    manifest: dict[str, Any]

    def read(self, name: str) -> bytes:
        """One file of the folder, checked against the manifest's size and sha256.

        Raises StorageError where the file is absent or differs.
        """
        entry = self.manifest["files"].get(name)
        if entry is None:
            raise StorageError(f"{self.url} has no file '{name}' in its manifest.")
        try:
            data = read_bytes(join(self.url, name))
        except FileNotFoundError as error:
            raise StorageError(f"{self.url} is damaged: '{name}' is in the manifest but is missing.") from error
        if len(data) != entry["bytes"] or _digest(data) != entry["sha256"]:
            raise StorageError(
                f"{self.url} is damaged: '{name}' has {len(data)} bytes and another sha256 than the manifest's "
                f"{entry['bytes']} bytes."
            )
        return data

    def verify(self) -> None:
        """Read every file and check it; raises StorageError at the first that differs."""
        for name in self.manifest["files"]:
            self.read(name)

    @property
    def digest(self) -> str:
        """sha256 over the manifest: names the folder's whole content."""
        return _digest(_json_bytes(self.manifest))


def commit(url: str, files: Mapping[str, bytes], about: Mapping[str, Any], verify: bool = False) -> Committed:
    """Write a folder of files and, last, the manifest that makes it exist.

    `about` (a `format` name, a `version`, ...) goes into the manifest beside the sizes and digests. With `verify` each
    file is read back first: raises StorageError, and writes no manifest, where one is not what was written.
    """
    for name, data in files.items():
        write_bytes(join(url, name), data)
    entries = {name: {"bytes": len(data), "sha256": _digest(data)} for name, data in sorted(files.items())}
    committed = Committed(url, {**about, "files": entries})
    if verify:
        committed.verify()
    write_json(join(url, MANIFEST), committed.manifest)
    return committed


def open_committed(url: str) -> Committed | None:
    """The committed folder at `url`, or None where no manifest stands (so: where nothing was committed).

    Raises StorageError where a manifest stands that is not one of ours.
    """
    try:
        manifest = read_json(join(url, MANIFEST))
    except FileNotFoundError:
        return None
    files = manifest.get("files") if isinstance(manifest, dict) else None
    if not isinstance(files, dict) or not all(_is_entry(entry) for entry in files.values()):
        raise StorageError(f"{join(url, MANIFEST)} is not a manifest: it must list each file's bytes and sha256.")
    return Committed(url, manifest)


def _is_entry(entry: Any) -> bool:
    return isinstance(entry, dict) and isinstance(entry.get("bytes"), int) and isinstance(entry.get("sha256"), str)


@contextlib.contextmanager
def local_copy(url: str) -> Iterator[Path]:
    """A path on this machine with the content of the file at `url`; a downloaded copy is removed afterwards."""
    if is_local(url):
        yield Path(filesystem(url)[1])
        return
    with tempfile.TemporaryDirectory(prefix="sceneray-") as folder:
        path = Path(folder) / basename(url)
        path.write_bytes(read_bytes(url))
        yield path


def _json_bytes(value: Any) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _speaks(fs: AbstractFileSystem, protocol: str) -> bool:
    return protocol in (fs.protocol if isinstance(fs.protocol, tuple) else (fs.protocol,))


def _check_tag(url: str, expected: str | None) -> None:
    found = etag(url)
    if found != expected:
        state = "exists already" if expected is None else "was changed by another writer"
        raise ConflictError(f"{url} {state}.")


def _swap_s3(fs: AbstractFileSystem, path: str, url: str, expected: str | None, data: bytes) -> None:
    condition = {"IfNoneMatch": "*"} if expected is None else {"IfMatch": expected}
    # An answer may be lost after the put took effect, and the retry is then refused. The mark tells our own put from
    # another writer's, even where both wrote the same bytes.
    mark = {"writer": secrets.token_hex(16)}

    def put() -> None:
        try:
            fs.pipe_file(path, data, Metadata=mark, **condition)
        except Exception as error:
            if not is_fault(error):
                raise
            # s3fs gives the loser of a conditional put the same OSError as a server in trouble: the object decides.
            found = etag(url)
            if found == expected:
                raise
            if found is None or fs.metadata(path, refresh=True).get("writer") != mark["writer"]:
                raise ConflictError(f"{url} was written by somebody else first.") from error

    try:
        retry(f"writing {url}", put)
    except FileNotFoundError as error:
        raise StorageError(f"cannot write {url}: no such bucket. Make it, or correct the URL.") from error
