"""Writing a file on this machine's disk: whole or not at all."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from sceneray.errors import StorageError


def replace(path: Path, data: bytes) -> None:
    """Temp file beside the target, fsync, rename, fsync of the folder: whole or not at all, also over a power cut."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=".tmp-", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(name, 0o644)
            os.replace(name, path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name)
            raise
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise _cannot_write(path, error) from error


def replace_if(path: Path, check: Callable[[], None], data: bytes) -> None:
    """`replace`, if `check` raises nothing; no other process swaps this file between the two."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.parent / f".tmp-{path.name}.lock"):
            check()
            replace(path, data)
    except OSError as error:
        raise _cannot_write(path, error) from error


def _cannot_write(path: Path, error: OSError) -> StorageError:
    return StorageError(f"cannot write {path}: {error.strerror or error}. Check the path, its rights and free space.")
