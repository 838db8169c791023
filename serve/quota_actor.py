"""The ledger of all quotas as one Ray actor, which every ingress replica leases tokens from.

It has a name in Serve's namespace and belongs to the replica that made it: where that replica ends, the next lease
makes a new one, whose buckets are full again. Nothing of it outlives the application.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError

from serve.keys import Allowance
from serve.quotas import Amounts, Buckets, LeasedQuotas

NAMESPACE = "serve"


@ray.remote(num_cpus=0, max_restarts=-1)
class QuotaLedger:
    """Token buckets behind a name."""

    def __init__(self) -> None:
        self._buckets = Buckets()

    def take(
        self, key_id: str, rules: Mapping[str, Allowance], need: Amounts, want: Amounts
    ) -> tuple[float, dict[str, float]]:
        """As Buckets.take."""
        return self._buckets.take(key_id, rules, need, want)


class _Ledger:
    """The actor, found or made when it is first needed and again when it is lost."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._actor: Any = None
        self._finding: asyncio.Future[Any] | None = None

    async def __call__(
        self, key_id: str, rules: Mapping[str, Allowance], need: Amounts, want: Amounts
    ) -> tuple[float, dict[str, float]]:
        if self._actor is None:
            await self._find()
        try:
            taken: tuple[float, dict[str, float]] = await self._actor.take.remote(key_id, rules, need, want)
        except RayError:
            self._actor = None
            raise
        return taken

    async def _find(self) -> None:
        """Starting an actor takes longer than a request waits for its lease: the next ones wait for the same start."""
        if self._finding is None:
            self._finding = asyncio.ensure_future(asyncio.to_thread(self._found))
        finding = self._finding
        try:
            self._actor = await asyncio.shield(finding)
        finally:
            if finding.done():
                self._finding = None

    def _found(self) -> Any:
        # Named in a namespace of its own choice: a replica's is that of whoever started Serve.
        options = {"name": self._name, "namespace": NAMESPACE, "get_if_exists": True}
        return QuotaLedger.options(**options).remote()  # type: ignore[attr-defined]


def shared_quotas(replicas: int) -> LeasedQuotas:
    """Quotas that hold over all ingress replicas of this Serve application. Call it inside a replica."""
    app = serve.get_replica_context().app_name
    return LeasedQuotas(_Ledger(f"sceneray-quotas:{app}"), replicas)
