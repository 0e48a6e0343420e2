"""The deployment that speaks HTTP. It never imports torch, so that it is small and starts fast."""

from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve.handle import DeploymentHandle

from deployments.logs import configure_logging
from deployments.ray_client import RayGenerationClient
from gemma_serve.openai_api.app import build_app
from gemma_serve.openai_api.config import ApiConfig


@serve.ingress()
class OpenAIIngress:
    """The OpenAI API in front of ``GemmaDeployment``."""

    def __init__(
        self, gemma: DeploymentHandle[Any], config: ApiConfig, admission_timeout_s: float
    ) -> None:
        configure_logging()
        self._client = RayGenerationClient(gemma, admission_timeout_s=admission_timeout_s)
        self._config = config

    def __serve_build_asgi_app__(self) -> FastAPI:
        # Built in the replica, so that nothing of it has to be pickled.
        return build_app(self._client, self._config)
