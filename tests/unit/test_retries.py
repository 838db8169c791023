"""Asking again after a fault, and only then."""

from __future__ import annotations

import fsspec
import pytest

from sceneray import retries, storage
from sceneray.errors import ConflictError, StorageError


def test_retry_asks_again_after_a_fault_only(monkeypatch):
    """Faults are tried again until they pass; answers and refusals are not."""
    monkeypatch.setattr(retries, "FIRST_WAIT_S", 0.0)
    calls: list[int] = []

    def flaky() -> str:
        calls.append(1)
        if len(calls) < retries.ATTEMPTS:
            raise ConnectionResetError("lost")
        return "done"

    assert retries.retry("asking", flaky) == "done"
    assert len(calls) == retries.ATTEMPTS
    for error, raised in [
        (FileNotFoundError("x"), FileNotFoundError),
        (ConflictError("x"), ConflictError),
        (PermissionError("x"), StorageError),
        (ZeroDivisionError("x"), ZeroDivisionError),
    ]:
        calls.clear()

        def failing(error: Exception = error) -> None:
            calls.append(1)
            raise error

        with pytest.raises(raised):
            retries.retry("asking", failing)
        assert len(calls) == 1


def test_an_unreachable_server_is_a_storage_error(monkeypatch):
    """Where nobody listens, the error is one of ours after the attempts are used up, not botocore's."""
    monkeypatch.setattr(retries, "FIRST_WAIT_S", 0.0)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    try:
        with pytest.raises(StorageError, match=f"failed {retries.ATTEMPTS} times"):
            storage.read_bytes("s3://bucket/key")
    finally:
        fsspec.get_filesystem_class("s3").clear_instance_cache()
