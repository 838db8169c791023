"""How an attempt at a run is doing: a small JSON file, RUN/status/0002.json, that its rank 0 writes anew now and then.

The file has one writer, so the last one written wins; an attempt that is killed leaves the last one it wrote.
"""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError

from sceneray import storage
from sceneray.errors import StorageError

VERSION = 1
FOLDER = "status"
RESULT = "result.json"  # RUN/result.json: written once, when the run is finished
_READERS = 8  # requests on their way at once

State = Literal["running", "finished", "stopped", "preempted", "over_budget", "failed"]
Count = Annotated[int, Field(ge=0)]
Number = Annotated[float, Field(ge=0, allow_inf_nan=False)]


@dataclasses.dataclass(frozen=True)
class Status:
    """One attempt: where it is, what it has saved and what it runs on.

    Times are ISO 8601 in UTC; `..._after_s` and `seconds` count from the attempt's start.
    """

    attempt: Count
    state: State
    from_step: Count
    step: Count
    steps: Count
    epoch: Number
    epochs: Number
    miou: float | None  # the best so far
    workers: Count
    started_at: str
    updated_at: str
    seconds: Number
    first_step_after_s: Number | None = None  # None until the first step ended
    saved_step: Count | None = None  # of the newest committed checkpoint of this attempt
    saved_after_s: Number | None = None  # when the snapshot for it was taken, not when it was written
    nodes: dict[str, Count] = dataclasses.field(default_factory=dict)  # node types and how many of each
    price_per_hour: Number = 0.0  # of all these nodes together
    images_per_second: Number | None = None  # lately; None where the writer does not tell

    def to_json(self) -> dict[str, Any]:
        """The status as plain JSON values."""
        return {"version": VERSION, **dataclasses.asdict(self)}

    @classmethod
    def from_json(cls, tree: Any, source: str) -> Status:
        """The inverse of `to_json`; keys that this version does not know are left out.

        Raises StorageError, which names `source`, where the tree is no status of this version.
        """
        version = tree.get("version") if isinstance(tree, dict) else None
        if version != VERSION:
            raise StorageError(f"{source} is no status of version {VERSION}. It is damaged or of another sceneray.")
        try:
            return _ADAPTER.validate_python(tree)
        except ValidationError as error:
            wrong = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
            raise StorageError(f"{source} is a damaged status: {wrong}. Remove it; the run itself is whole.") from error


_ADAPTER = TypeAdapter(Status)


def write(run: str, status: Status) -> None:
    """Write the status of an attempt over the one before. Raises StorageError where that keeps failing."""
    storage.write_json(storage.join(run, FOLDER, f"{status.attempt:04d}.json"), status.to_json())


def read_all(run: str) -> list[Status]:
    """The statuses of all attempts of a run, first to last; none where there is no such folder.

    Raises StorageError for a file that is damaged.
    """
    folder = storage.join(run, FOLDER)

    def read(name: str) -> Status:
        url = storage.join(folder, name)
        return Status.from_json(storage.read_json(url), url)

    listed = [name for name in storage.list_names(folder) if name.endswith(".json")]
    with ThreadPoolExecutor(_READERS) as pool:
        return sorted(pool.map(read, listed), key=lambda status: status.attempt)
