import pytest

from config.settings import AppSettings
from deployments.resources import Node, ReplicaResources
from gemma_serve.errors import ConfigurationError

CPU_NODE = Node(num_cpus=8, num_gpus=0)
GPU_NODE = Node(num_cpus=32, num_gpus=4)


@pytest.mark.parametrize(
    ("nodes", "num_replicas", "num_gpus"),
    [
        ([CPU_NODE], 1, 0),
        ([GPU_NODE], 1, 4),
        ([GPU_NODE], 3, 1),
        ([GPU_NODE, GPU_NODE], 2, 4),
        ([GPU_NODE, GPU_NODE], 3, 2),
        ([GPU_NODE, CPU_NODE], 2, 2),
    ],
)
def test_replicas_share_the_gpus_equally(
    nodes: list[Node], num_replicas: int, num_gpus: int
) -> None:
    resources = ReplicaResources.resolve(AppSettings(num_replicas=num_replicas), nodes)
    assert resources.num_gpus == num_gpus
    assert resources.device == ("cuda" if num_gpus else "cpu")


def test_more_replicas_than_gpus_are_refused_rather_than_put_on_the_cpu() -> None:
    with pytest.raises(ConfigurationError, match=r"num_replicas: 5 .* cluster's 4 GPUs"):
        ReplicaResources.resolve(AppSettings(num_replicas=5), [GPU_NODE])


def test_cuda_on_a_cluster_without_gpus_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="cannot share the cluster's 0 GPUs"):
        ReplicaResources.resolve(AppSettings(device="cuda"), [CPU_NODE])


@pytest.mark.parametrize(
    "settings", [AppSettings(device="cpu"), AppSettings(gpus_per_replica=0)], ids=["device", "gpus"]
)
def test_cpu_is_used_where_it_is_asked_for(settings: AppSettings) -> None:
    assert ReplicaResources.resolve(settings, [GPU_NODE]).device == "cpu"


def test_replicas_share_the_cores_equally() -> None:
    assert ReplicaResources.resolve(AppSettings(), [CPU_NODE]).num_threads == 8
    assert ReplicaResources.resolve(AppSettings(num_replicas=3), [CPU_NODE]).num_threads == 2
    assert ReplicaResources.resolve(AppSettings(num_replicas=9), [CPU_NODE]).num_threads == 1


def test_numbers_that_are_set_are_taken() -> None:
    settings = AppSettings(gpus_per_replica=2, threads_per_replica=3)
    assert ReplicaResources.resolve(settings, [GPU_NODE]) == ReplicaResources(
        num_gpus=2, num_threads=3
    )
