"""A store that fails as it is told: a process that dies at a chosen operation, lost answers, a full disk, a hang.

It is an fsspec file system in memory with a protocol of its own, so that everything goes through `sceneray.storage` as
any other URL does. One call of storage.py may be several operations here; each is counted, before and after its effect.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import random
import threading
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import fsspec
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry
from fsspec.spec import AbstractFileSystem

from tests.saving import PATIENCE_S

WRITES = ("pipe_file", "rm_file")

# What goes wrong at one moment ("before" or "after" the effect) of one operation; None: nothing.
Rule = Callable[[str, "Operation"], BaseException | None]
T = TypeVar("T")


class Died(BaseException):
    """The process ends here. It is no Exception, so that nothing catches it and goes on."""


@dataclass(frozen=True)
class Operation:
    """One request to the store."""

    number: int  # from 1 on
    kind: str  # the file system's method
    path: str


@dataclass
class Hold:
    """A kind of operation that is kept waiting: `arrived` is set when the first one has come."""

    kind: str
    ending: str
    arrived: threading.Event = field(default_factory=threading.Event)
    released: threading.Event = field(default_factory=threading.Event)


def dies_at(number: int, moment: str) -> Rule:
    """The process dies at the operation `number`, and so does everything that it does afterwards."""

    def rule(now: str, operation: Operation) -> BaseException | None:
        gone = operation.number > number or (operation.number == number and now in (moment, "after"))
        return Died(f"{moment} {operation}") if gone else None

    return rule


def fails_at(number: int, moment: str) -> Rule:
    """The operation `number` raises; with the moment "after" it took effect, and its answer is lost."""

    def rule(now: str, operation: Operation) -> BaseException | None:
        hit = operation.number == number and now == moment
        return OSError(errno.EIO, f"no answer to {operation.kind}") if hit else None

    return rule


def flaky(seed: int, share: float) -> Rule:
    """A share of all operations raises; half of those took effect."""
    chance = random.Random(seed)

    def rule(_: str, operation: Operation) -> BaseException | None:
        return ConnectionResetError(f"reset during {operation.kind}") if chance.random() < share / 2 else None

    return rule


def refuses(number: int, kinds: tuple[str, ...] = WRITES) -> Rule:
    """Every operation of these kinds raises the OSError of an `errno`, such as errno.ENOSPC, and has no effect."""

    def rule(now: str, operation: Operation) -> BaseException | None:
        return OSError(number, os.strerror(number)) if now == "before" and operation.kind in kinds else None

    return rule


def away(now: str, operation: Operation) -> BaseException | None:
    """The rule of a store that cannot be reached."""
    return ConnectionRefusedError(f"nobody answers {operation.kind}") if now == "before" else None


class FaultyStore:
    """The files, what was asked of them, and what is to go wrong. Take one from `faulty_store`."""

    def __init__(self, protocol: str) -> None:
        self.protocol = protocol
        self.files = _Memory()
        self.operations: list[Operation] = []
        self.raised: Counter[str] = Counter()  # by the class of what was raised
        self.rules: list[Rule] = []
        self.holds: list[Hold] = []
        self.gate: Callable[[], None] = lambda: None  # called before each operation
        self._lock = threading.RLock()

    def url(self, *names: str) -> str:
        """`PROTOCOL://name/...`."""
        return f"{self.protocol}://" + "/".join(names)

    def content(self) -> dict[str, bytes]:
        """Every file."""
        return {path: self.files.cat_file(path) for path in self.files.find("")}

    def restart(self, content: dict[str, bytes], *rules: Rule) -> None:
        """Hold `content` and nothing else, count from 1, and fail as `rules` say."""
        self.files.store.clear()
        for path, data in content.items():
            self.files.pipe_file(path, data)
        self.operations.clear()
        self.raised.clear()
        self.rules = list(rules)

    def faults_in(
        self,
        action: Callable[[], object],
        rule: Callable[[int, str], Rule],
        moments: tuple[str, ...] = ("before", "after"),
    ) -> Iterator[int]:
        """For each operation of `action` and each moment: start over from what is here now, with one fault there.

        `action` is done once without a fault, to count its operations; `rule` is dies_at or fails_at. Gives the number
        of the operation that will fail; doing `action` again is left to the caller.
        """
        before = self.content()
        self.restart(before)
        action()
        count = len(self.operations)
        assert count, "what asks the store for nothing meets no fault"
        for number, moment in itertools.product(range(1, count + 1), moments):
            self.restart(before, rule(number, moment))
            yield number

    @contextlib.contextmanager
    def held(self, kind: str, ending: str = "") -> Iterator[Hold]:
        """Keep operations of `kind` on paths with this ending waiting until the context ends."""
        hold = Hold(kind, ending)
        self.holds.append(hold)
        try:
            yield hold
        finally:
            self.holds.remove(hold)
            hold.released.set()

    def perform(self, kind: str, path: str, action: Callable[[], T]) -> T:
        """Count one operation and do it, or fail."""
        self.gate()
        with self._lock:
            operation = Operation(len(self.operations) + 1, kind, path)
            self.operations.append(operation)
        for hold in list(self.holds):
            if kind == hold.kind and path.endswith(hold.ending):
                hold.arrived.set()
                assert hold.released.wait(PATIENCE_S), f"nobody released {operation}"
        self._fail("before", operation)
        with self._lock:
            result = action()
        self._fail("after", operation)
        return result

    def _fail(self, moment: str, operation: Operation) -> None:
        with self._lock:
            for rule in self.rules:
                error = rule(moment, operation)
                if error is not None:
                    self.raised[type(error).__name__] += 1
                    raise error


class _Memory(MemoryFileSystem):
    """fsspec's file system in memory, with files of its own."""

    cachable = False

    def __init__(self) -> None:
        super().__init__()
        self.store: dict[str, Any] = {}
        self.pseudo_dirs = [""]


class FaultyFiles(AbstractFileSystem):
    """The fsspec face of a FaultyStore; it swaps as memory does, under storage.py's lock."""

    protocol: str | tuple[str, ...] = ("memory",)
    faults: FaultyStore

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return "/" + path.partition("://")[2].strip("/") if "://" in path else path

    def cat_file(self, path: str, **_: Any) -> bytes:
        return self._do("cat_file", path)

    def pipe_file(self, path: str, value: bytes, **_: Any) -> None:
        self.faults.perform("pipe_file", path, lambda: self.faults.files.pipe_file(path, value))

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
        return self.faults.perform("ls", path, lambda: self.faults.files.ls(path, detail=detail))

    def find(self, path: str, *_: Any, **options: Any) -> Any:
        return self.faults.perform("find", path, lambda: self.faults.files.find(path, **options))

    def info(self, path: str, **_: Any) -> Any:
        return self._do("info", path)

    def exists(self, path: str, **_: Any) -> bool:
        return self._do("exists", path)

    def isfile(self, path: str) -> bool:
        return self._do("isfile", path)

    def modified(self, path: str) -> Any:
        return self._do("modified", path)

    def rm(self, path: str, *_: Any, **__: Any) -> None:
        """One operation a file: a writer may die in the middle of a folder."""
        files = self.find(path)
        if not files:
            raise FileNotFoundError(path)
        for file in files:
            self.faults.perform("rm_file", file, lambda file=file: self.faults.files.rm_file(file))

    def _do(self, kind: str, path: str) -> Any:
        return self.faults.perform(kind, path, lambda: getattr(self.faults.files, kind)(path))


@contextlib.contextmanager
def faulty_store() -> Iterator[FaultyStore]:
    """An empty store under a protocol of its own."""
    store = FaultyStore(f"faulty{uuid.uuid4().hex}")
    kind = type("FaultyFiles", (FaultyFiles,), {"protocol": ("memory", store.protocol), "faults": store})
    fsspec.register_implementation(store.protocol, kind)
    try:
        yield store
    finally:
        _registry.pop(store.protocol)
