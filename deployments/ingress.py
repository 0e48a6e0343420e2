"""The deployment that speaks HTTP behind Serve's proxy."""

from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

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
        app = build_app(self._client, self._config)
        app.add_middleware(LeaveRequestIdToServe)
        return app

    def __del__(self) -> None:
        # There is no client when the constructor has failed.
        if hasattr(self, "_client"):
            self._client.close()


class LeaveRequestIdToServe:
    """Takes the application's ``x-request-id`` off its answers, as clients would see two.

    Serve's proxy gives every request one, if the client has not, and adds the same to the answer.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_without_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                del MutableHeaders(scope=message)["x-request-id"]
            await send(message)

        await self._app(scope, receive, send_without_id)
