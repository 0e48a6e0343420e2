"""How the replicas of the model share what the cluster's nodes have."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Self

import ray

from config.settings import AppSettings
from gemma_serve.errors import ConfigurationError


@dataclass(frozen=True, slots=True)
class Node:
    """What one machine of the cluster offers."""

    num_cpus: int
    num_gpus: int


def cluster_nodes() -> tuple[Node, ...]:
    """The machines that are up now."""
    return tuple(
        Node(int(node["Resources"].get("CPU", 0)), int(node["Resources"].get("GPU", 0)))
        for node in ray.nodes()  # type: ignore[no-untyped-call]  # ray
        if node["Alive"]
    )


@dataclass(frozen=True, slots=True)
class ReplicaResources:
    """What one replica of the model gets."""

    num_gpus: int
    num_threads: int

    @property
    def device(self) -> Literal["cpu", "cuda"]:
        """A replica that was given no GPU must not use one that Ray may give to others."""
        return "cuda" if self.num_gpus else "cpu"

    @classmethod
    def resolve(cls, settings: AppSettings, nodes: Sequence[Node]) -> Self:
        """Put numbers to ``auto``: equal shares of the nodes' GPUs and cores."""
        return cls(_num_gpus(settings, nodes), _num_threads(settings, nodes))


def _num_gpus(settings: AppSettings, nodes: Sequence[Node]) -> int:
    if settings.device == "cpu":
        return 0
    if settings.gpus_per_replica != "auto":
        return settings.gpus_per_replica
    available = [node.num_gpus for node in nodes]
    share = _equal_share(available, settings.num_replicas)
    if share == 0 and (sum(available) > 0 or settings.device == "cuda"):
        raise ConfigurationError(
            f"num_replicas: {settings.num_replicas} replicas cannot share the cluster's "
            f"{sum(available)} GPUs; lower it, or set device: cpu"
        )
    return share


def _num_threads(settings: AppSettings, nodes: Sequence[Node]) -> int:
    if settings.threads_per_replica != "auto":
        return settings.threads_per_replica
    return max(1, _equal_share([node.num_cpus for node in nodes], settings.num_replicas))


def _equal_share(available: Sequence[int], num_replicas: int) -> int:
    """The most that every replica can have, each from one node; 0 if there is not enough."""
    for share in range(max(available, default=0), 0, -1):
        if sum(num // share for num in available) >= num_replicas:
            return share
    return 0
