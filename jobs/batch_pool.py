"""The actors of a batch: as many as the work needs and the cluster has room for, and no part lost with one that dies.

Why not `ray.util.ActorPool`, or Ray Data's `map_batches` with an actor pool that grows? An ActorPool has a fixed number
of actors and loses what a dead one held. Ray Data does a dead actor's block again for ever, so that one photo on which
every process dies (of its size, say) keeps a batch from its end; here it becomes that photo's error. Which parts are
done is decided by files in either case, so Ray Data's order and progress would be of no use.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from jobs.batch_plan import Done, Part, Photo, Row, Task, error_row, write_part
from sceneray.errors import ScenerayError

AT_ONCE = 2  # parts under way in one worker: the next one is read while one is in the network
DEATHS = 2  # a part that took so many workers with it is done photo by photo; such a photo is an error
FAILED_STARTS = 3  # in a row
LOOK_S = 1.0
NODES_S = 5.0
NOTE_S = 60.0


@dataclass(eq=False)
class Work:
    """A part to do, or one photo of a part whose photos must go one by one."""

    part: Part
    photo: int | None = None
    deaths: int = 0


@dataclass(eq=False)
class Member:
    """An actor: `ready` once its network is loaded, `work` what it has now."""

    actor: Any
    ready: bool = False
    work: list[Work] = field(default_factory=list)

    def takes(self, work: Work) -> bool:
        """Whether it may have `work` now; a photo that may be somebody's death is alone with him."""
        if not self.ready or any(other.photo is not None for other in self.work):
            return False
        return len(self.work) < (AT_ONCE if work.photo is None else 1)


def to_start(ready: int, starting: int, unfinished: int, low: int, high: int) -> int:
    """How many actors to start now.

    `low` at once; then, while each could have work, as many again as are ready: 2, 4, 8. Those that find no room wait,
    which is what an autoscaler sees; `high` bounds them all.
    """
    now = ready + starting
    wanted = max(low, now + max(0, ready - starting))
    return max(0, min(wanted, high, unfinished) - now)


def room(needs: dict[str, float]) -> int:
    """How many actors that need this much the cluster's nodes could hold, whatever else runs there now."""
    import ray

    going = set(ray._private.state.state.get_draining_nodes())
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"] and node["NodeID"] not in going]
    return sum(min(int(node.get(kind, 0) // need) for kind, need in needs.items()) for node in nodes)


class Pool:
    """Actors made by `make`, from `low` to `high` of them (None: as many as the nodes have room for `needs`)."""

    def __init__(
        self, task: Task, make: Callable[[], Any], needs: dict[str, float], low: int, high: int | None,
        note: Callable[[str], None],
    ) -> None:  # fmt: skip
        self.task, self.note = task, note
        self.deaths = 0  # workers that ended while they had work
        self.most = 0  # workers ready at the same time
        self._make, self._needs, self._low, self._high = make, needs, low, high
        self._room, self._looked_at = 0, float("-inf")
        self._members: list[Member] = []
        self._waiting: deque[Work] = deque()
        self._flying: dict[Any, tuple[Member, Work | None]] = {}  # None: the start
        self._single: dict[int, dict[int, Row]] = {}  # rows of parts that go photo by photo
        self._failed_starts = 0
        self._noted_at = time.monotonic()
        self._ready_at: float | None = None

    @property
    def seconds(self) -> float:
        """How long there have been workers: the time since the first one was ready."""
        return 0.0 if self._ready_at is None else time.monotonic() - self._ready_at

    @property
    def ready(self) -> int:
        """How many workers are ready now."""
        return sum(member.ready for member in self._members)

    def results(self, parts: Sequence[Part]) -> Iterator[Done]:
        """Each part as it is finished, in whatever order. Ends its actors at the end, and on an error."""
        import ray

        self._waiting.extend(Work(part) for part in parts)
        try:
            while self._waiting or self._working():
                self._start()
                self._hand_out()
                found, _ = ray.wait(list(self._flying), num_returns=len(self._flying), timeout=0)
                if not found:
                    found, _ = ray.wait(list(self._flying), timeout=LOOK_S)
                for reference in found:
                    yield from self._take(reference)
                self._let_go()
                self._note_waiting()
        finally:
            for member in self._members:
                ray.kill(member.actor)
            self._members.clear()

    def _working(self) -> int:
        """Pieces of work whose answer is still to come, also those of a worker that is known to be dead."""
        return sum(work is not None for _, work in self._flying.values())

    def _start(self) -> None:
        starting = len(self._members) - self.ready
        unfinished = len(self._waiting) + self._working()
        for _ in range(to_start(self.ready, starting, unfinished, self._low, self._bound())):
            member = Member(self._make())
            self._members.append(member)
            self._flying[member.actor.start.remote()] = (member, None)

    def _bound(self) -> int:
        """The most workers: as told, else what there is room for now, looked up every few seconds."""
        if self._high is not None:
            return self._high
        if time.monotonic() - self._looked_at > NODES_S:
            self._room, self._looked_at = room(self._needs), time.monotonic()
        return max(self._low, self._room)

    def _hand_out(self) -> None:
        """Give waiting work to those who have least; the last parts are left to those who still have none."""
        while self._waiting:
            free = [member for member in self._members if member.takes(self._waiting[0])]
            member = min(free, key=lambda one: len(one.work), default=None)
            without = sum(not one.work for one in self._members)
            if member is None or (member.work and len(self._waiting) <= without):
                return
            work = self._waiting.popleft()
            member.work.append(work)
            method = member.actor.part if work.photo is None else member.actor.rows
            what: Any = work.part if work.photo is None else [work.part.photos[work.photo]]
            self._flying[method.remote(what)] = (member, work)

    def _take(self, reference: Any) -> Iterator[Done]:
        import ray

        member, work = self._flying.pop(reference)
        try:
            value = ray.get(reference)
        except ray.exceptions.RayTaskError as error:
            raise error.cause from error
        except ray.exceptions.RayError as error:
            yield from self._lost(member, work, error)
            return
        if work is None:
            member.ready = True
            self._failed_starts = 0
            self._ready_at = self._ready_at or time.monotonic()
            self.most = max(self.most, self.ready)
            return
        member.work.remove(work)
        yield from [value] if work.photo is None else self._one(work, value[0])

    def _lost(self, member: Member, work: Work | None, error: Exception) -> Iterator[Done]:
        """An actor is gone: what it had is done again, photo by photo where that has happened before."""
        import ray

        if member in self._members:
            self._members.remove(member)
            self.deaths += work is not None
            ray.kill(member.actor)  # it may be alive and out of reach
        if work is None:
            self._failed_starts += 1
            if self._failed_starts == FAILED_STARTS:
                raise ScenerayError(
                    f"{FAILED_STARTS} workers in a row ended while they loaded the bundle: {error} Look at their "
                    "machines' memory; what is finished stays, and the same command goes on."
                ) from error
            return
        work.deaths += not getattr(error, "preempted", False)  # of a node that was taken away nobody is guilty
        if work.deaths < DEATHS:
            self._waiting.appendleft(work)
        elif work.photo is None:
            self.note(f"part {work.part.index} ended {DEATHS} workers: its photos go one by one")
            self._single[work.part.index] = {}
            self._waiting.extendleft(Work(work.part, i) for i in reversed(range(len(work.part.photos))))
        else:
            photo = work.part.photos[work.photo]
            yield from self._one(work, error_row(self.task, photo, _why_dead(photo, error)))

    def _one(self, work: Work, row: Row) -> Iterator[Done]:
        """Keep the row of a photo that went alone; with the last one its part is finished."""
        assert work.photo is not None
        rows = self._single[work.part.index]
        rows[work.photo] = row
        if len(rows) == len(work.part.photos):
            yield write_part(self.task, work.part, [rows[i] for i in range(len(rows))])

    def _let_go(self) -> None:
        """End who has nothing to do and will have nothing: its machine may be wanted, or go."""
        import ray

        if self._waiting:
            return
        idle = [member for member in self._members if not member.work]
        for member in idle:
            ray.kill(member.actor)
            self._members.remove(member)
        self._flying = {key: value for key, value in self._flying.items() if value[0] not in idle}

    def _note_waiting(self) -> None:
        """Say now and then that no worker has found room, rather than be silent for ever."""
        import ray

        if self.ready or time.monotonic() - self._noted_at < NOTE_S:
            return
        self._noted_at = time.monotonic()
        have = ray.cluster_resources()
        asked = " and ".join(f"{need:g} {kind}" for kind, need in self._needs.items())
        found = " and ".join(f"{have.get(kind, 0):g} {kind}" for kind in self._needs)
        self.note(f"no worker is ready yet: each needs {asked}, and the whole cluster has {found}")


def _why_dead(photo: Photo, error: Exception) -> str:
    size = "" if photo.size is None else f" ({photo.size} bytes)"
    said = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return f"{DEATHS} workers ended while they had this photo{size} alone; it may need more memory than one has: {said}"
