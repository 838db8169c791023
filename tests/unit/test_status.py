"""The status file of an attempt: what is written comes back, and damage is named."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sceneray import status, storage
from sceneray.errors import StorageError
from sceneray.status import Status

PLAIN = Status(
    attempt=2,
    state="running",
    from_step=40,
    step=90,
    steps=200,
    epoch=4.5,
    epochs=10.0,
    miou=0.41,
    workers=2,
    started_at="2026-11-22T03:00:00+00:00",
    updated_at="2026-11-22T03:05:00+00:00",
    seconds=300.0,
    first_step_after_s=12.5,
    saved_step=80,
    saved_after_s=250.0,
    nodes={"gpu_spot": 2},
    price_per_hour=2.4,
)


def test_a_status_comes_back(any_root: str) -> None:
    """Every attempt's status is read back as written, in order of attempts; the last written of one attempt wins."""
    assert status.read_all(any_root) == []
    first = dataclasses.replace(PLAIN, attempt=1, miou=None, saved_step=None, saved_after_s=None)
    tenth = dataclasses.replace(PLAIN, attempt=10, state="finished")
    for one in (tenth, first, PLAIN, dataclasses.replace(PLAIN, step=91)):
        status.write(any_root, one)
    assert status.read_all(any_root) == [first, dataclasses.replace(PLAIN, step=91), tenth]
    assert storage.list_names(storage.join(any_root, "status")) == ["0001.json", "0002.json", "0010.json"]


@given(
    step=st.integers(0, 10**9),
    seconds=st.floats(0, 1e9),
    miou=st.none() | st.floats(0, 1),
    first_step_after_s=st.none() | st.floats(0, 1e6),
    saved_step=st.none() | st.integers(0, 10**9),
    saved_after_s=st.none() | st.floats(0, 1e6),
    nodes=st.dictionaries(st.text(max_size=5), st.integers(0, 99), max_size=3),
    price_per_hour=st.floats(0, 1e6),
)
def test_json_keeps_every_value(**values: Any) -> None:
    """Through JSON text and back, no value changes."""
    one = dataclasses.replace(PLAIN, **values)
    assert Status.from_json(json.loads(json.dumps(one.to_json())), "here") == one


def test_a_later_writer_may_add_keys() -> None:
    """Keys that are not known are left out, so that an older reader lists a newer run."""
    assert Status.from_json({**PLAIN.to_json(), "weather": "fine"}, "here") == PLAIN


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"version": 2}, "no status of version 1"),
        ({"step": "many"}, "step: "),
        ({"step": -1}, "step: "),
        ({"state": "asleep"}, "state: "),
        ({"nodes": [1]}, "nodes: "),
        ({"seconds": None}, "seconds: "),
    ],
)
def test_a_wrong_value_is_named(any_root: str, change: dict[str, Any], says: str) -> None:
    """A status with a value of another kind raises StorageError with the file and the key."""
    status.write(any_root, PLAIN)
    storage.write_json(storage.join(any_root, "status", "0003.json"), {**PLAIN.to_json(), **change})
    with pytest.raises(StorageError, match=r"0003\.json") as caught:
        status.read_all(any_root)
    assert says in str(caught.value)


@pytest.mark.parametrize("data", [b"", b'{"version": 1', b"[]", b"\xff\xfe", b'{"version": 1}'])
def test_a_damaged_file_is_named(any_root: str, data: bytes) -> None:
    """A file that is cut short or no status at all raises StorageError with its URL."""
    url = storage.join(any_root, "status", "0001.json")
    storage.write_bytes(url, data)
    with pytest.raises(StorageError) as caught:
        status.read_all(any_root)
    assert url in str(caught.value)
