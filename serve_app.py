"""The Serve application that ``serve_config.yaml`` names. Wiring only.

Serve reads the annotation of ``build_app`` at run time: it must be a class there, not a string.
"""

import os

from ray import serve
from ray.serve import Application

from config.settings import AppSettings, parse_api_keys
from deployments.gemma import GemmaDeployment
from deployments.http_server import OpenAIServer
from deployments.ingress import OpenAIIngress
from deployments.resources import ReplicaResources, cluster_nodes
from gemma_serve.engine.config import EngineConfig


def build_app(settings: AppSettings) -> Application:
    """The OpenAI ingress in front of the model, as ``settings`` say."""
    resources = ReplicaResources.resolve(settings, cluster_nodes())
    engine = settings.to_engine_config()
    deploy_gemma = serve.deployment(
        num_replicas=settings.num_replicas,
        ray_actor_options={"num_cpus": settings.cpus_per_replica, "num_gpus": resources.num_gpus},
        max_ongoing_requests=_max_ongoing_requests(engine),
        max_queued_requests=settings.num_replicas * _max_ongoing_requests(engine),
        # A model that cannot be loaded fails again: say so at once.
        max_constructor_retry_count=1,
        graceful_shutdown_timeout_s=60,  # for the answers that are under way
        graceful_shutdown_wait_loop_s=0.5,
    )
    deploy_ingress = serve.deployment(
        num_replicas=settings.num_ingress_replicas,
        ray_actor_options={"num_cpus": settings.cpus_per_ingress_replica},
        # Never the limit: a request that waits here could be answered by nobody.
        max_ongoing_requests=10_000,
        graceful_shutdown_timeout_s=60,
        graceful_shutdown_wait_loop_s=0.5,
    )
    gemma = deploy_gemma(GemmaDeployment).bind(
        settings.to_model_config(resources.device), engine, resources.num_threads
    )
    api = settings.to_api_config(parse_api_keys(os.environ))
    timeout_s = settings.admission_timeout_s
    if settings.port is None:
        return deploy_ingress(OpenAIIngress).bind(gemma, api, timeout_s)
    return deploy_ingress(OpenAIServer).bind(gemma, api, timeout_s, settings.host, settings.port)


def _max_ongoing_requests(engine: EngineConfig) -> int:
    """Requests per replica: so many that the engine itself, which knows its queue, says no."""
    return 2 * (engine.max_num_seqs + engine.max_queued_requests)
