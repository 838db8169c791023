"""What the cluster has, and how many workers fit."""

from __future__ import annotations

import os

import ray

from sceneray.config import TrainSettings
from sceneray.errors import ConfigError


def draining_nodes() -> set[str]:
    """Ids of the nodes that are about to go."""
    return set(ray._private.state.state.get_draining_nodes())


def per_worker(settings: TrainSettings, gpu: bool) -> dict[str, float]:
    """What each worker asks of the cluster, by Ray's names of resources."""
    return {"CPU": settings.resources.cpus} | ({"GPU": 1.0} if gpu else {})


def count_room(settings: TrainSettings, gpu: bool) -> int:
    """How many workers the cluster's nodes could hold, those that are about to go left out."""
    needs = per_worker(settings, gpu).items()
    going = draining_nodes()
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"] and node["NodeID"] not in going]
    return sum(min(int(node.get(kind, 0) // need) for kind, need in needs) for node in nodes)


def shortage(settings: TrainSettings, gpu: bool) -> str:
    """What was asked of the cluster, what it has, and what can be done."""
    have = ray.cluster_resources()
    kinds = per_worker(settings, gpu)
    asked = " and ".join(f"{settings.min_workers * need:g} {kind}" for kind, need in kinds.items())
    found = " and ".join(f"{have.get(kind, 0):g} {kind}" for kind in kinds)
    nodes = sum(node["Alive"] for node in ray.nodes())
    return (
        f"{settings.min_workers} workers need {asked}; the cluster has {found} on {nodes} node(s), room for "
        f"{count_room(settings, gpu)}. Lower workers or resources.cpus, end what else runs there, or let the cluster "
        "grow (max_workers in cluster.yaml, the cloud's quota)."
    )


def use_gpu(settings: TrainSettings) -> bool:
    """Whether workers get a GPU each: as told, else where the cluster has enough."""
    if settings.resources.gpu is not None:
        return settings.resources.gpu
    return bool(ray.cluster_resources().get("GPU", 0) >= settings.min_workers)


def check(settings: TrainSettings, gpu: bool) -> None:
    """Refuse what a cluster without room to grow can never place."""
    alone = len(ray.nodes()) == 1 and not _autoscales()
    if alone and count_room(settings, gpu) < settings.min_workers:
        raise ConfigError(f"{shortage(settings, gpu)} Or connect to a cluster with --address.")


def _autoscales() -> bool:
    """True where an autoscaler may add nodes (a cluster that `ray up` made sets this on its head)."""
    return bool(
        os.environ.get("RAY_CLOUD_INSTANCE_ID") or os.path.exists(os.path.expanduser("~/ray_bootstrap_config.yaml"))
    )
