"""`routing.order` as a request router of Ray Serve. It runs where a handle of the model replicas is: in each ingress.

Ray pickles this module by value; what it imports must be importable where a handle is.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from ray.serve.config import RequestRouterConfig
from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from serve.routing import order
from serve.settings import ServeArgs


def by_shape(args: ServeArgs) -> dict[str, RequestRouterConfig]:
    """The option of the model replicas' deployment that routes by shape; none where there is one replica at most."""
    if (args.max_replicas or args.replicas) < 2:
        return {}
    config = RequestRouterConfig(
        request_router_class=f"{__name__}.{ShapeRouter.__name__}", request_router_kwargs={"slack": pass_size(args)}
    )
    return {"request_router_config": config}


def pass_size(args: ServeArgs) -> int:
    """Images that share a forward pass at most, as far as it can be told before a model runs."""
    return args.rules.pass_size(args.max_batch_size, on_cpu=args.gpus == 0)


def shape_of(request: PendingRequest) -> tuple[int, ...] | None:
    """Height and width of the request's image: the first argument, or the one named `image`. None where it has none.

    An image that is still with another replica or in the object store has no shape here.
    """
    image = request.args[0] if request.args else request.kwargs.get("image")
    return image.shape[:2] if isinstance(image, np.ndarray) else None


class ShapeRouter(RequestRouter):  # type: ignore[misc]
    """Equal shapes to the same replica, where it holds at most about `slack` requests more than the least loaded one.

    Loads are what Ray's cache of queue lengths knows: what this process sent, and what each replica said of itself when
    it last took a request. A replica that the cache does not know counts as idle, and Ray asks it before it sends.
    Requests without an image go to the less loaded of two replicas drawn by chance, as they would without this router.

    Ray's FIFOMixin is left out: it gives the replica that was chosen for one request to another one.
    """

    def initialize_state(self, slack: int) -> None:
        """Ray hands in `request_router_kwargs`."""
        self._slack = slack
        self._chosen: Counter[str] = Counter()
        self._asking: WeakKeyDictionary[asyncio.Task[Any], PendingRequest] = WeakKeyDictionary()

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """The best replica, and then the others, of which Ray takes the least loaded that has room.

        Ray asks each rank for room, drops replicas that are dead, and comes back after a pause where none has room.
        """
        if not candidate_replicas:
            return []
        if pending_request is None:
            return [_two(candidate_replicas)]
        pending_request.routing_context.should_backoff = True  # or Ray would come back without the pause
        self._asking[_this_task()] = pending_request
        shape = shape_of(pending_request)
        if shape is None:
            return [_two(candidate_replicas)]
        known = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        first, *others = order(shape, {name: self._load(replica) for name, replica in known.items()}, self._slack)
        self._count(first)
        return [[known[first]], [known[name] for name in others]]

    def _load(self, replica: RunningReplica) -> int:
        held = self.replica_queue_len_cache.get(replica.replica_id) or 0
        return held + self._chosen[replica.replica_id.unique_id]

    def _count(self, name: str) -> None:
        # Ray may choose for many requests before it counts the first as sent, which it does when the loop comes round.
        self._chosen[name] += 1
        asyncio.get_running_loop().call_soon(self._uncount, name)

    def _uncount(self, name: str) -> None:
        self._chosen[name] -= 1
        if not self._chosen[name]:
            del self._chosen[name]

    def _fulfill_next_pending_request(self, replica: RunningReplica, request_metadata: Any = None) -> None:
        # Ray finds the request by an id that all calls of one HTTP request share: of several images at once it would
        # serve one and leave the others waiting for ever. The request in question is the one that this task asked for.
        pending = self._asking.get(_this_task())
        if pending is not None and not pending.future.done():
            self._pending_requests_by_id[pending.metadata.internal_request_id] = pending
            super()._fulfill_next_pending_request(replica, request_metadata)


def _two(replicas: list[RunningReplica]) -> list[RunningReplica]:
    return random.sample(replicas, min(2, len(replicas)))


def _this_task() -> asyncio.Task[Any]:
    task = asyncio.current_task()
    assert task is not None
    return task
