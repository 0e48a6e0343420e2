"""The deployment that speaks HTTP on a port of its own, without Serve's proxy before it."""

import asyncio
from typing import Any, Final

import uvicorn
from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp

from deployments.logs import configure_logging
from deployments.ports import bind_shared
from deployments.ray_client import RayGenerationClient
from gemma_serve.errors import UnavailableError
from gemma_serve.openai_api.app import build_app
from gemma_serve.openai_api.config import ApiConfig

KEEP_ALIVE_S: Final = 90
"""How long an idle connection stays open, as with Serve's proxy: longer than load balancers' 60."""


class OpenAIServer:
    """The OpenAI API in front of ``GemmaDeployment``, at ``host:port`` of the replica's machine."""

    def __init__(
        self,
        gemma: DeploymentHandle[Any],
        config: ApiConfig,
        admission_timeout_s: float,
        host: str,
        port: int,
    ) -> None:
        configure_logging()
        self._client = RayGenerationClient(gemma, admission_timeout_s=admission_timeout_s)
        self._server = HttpServer(build_app(self._client, config), host, port)

    async def check_health(self) -> None:
        """Serve calls it every few seconds and replaces the replica when it raises."""
        self._server.check_health()

    async def __del__(self) -> None:
        # Serve calls it when the replica stops. There is no server when the constructor has failed.
        if hasattr(self, "_server"):
            await self._server.close()
            self._client.close()


class HttpServer:
    """Serves ``app`` from the running event loop until it is closed.

    Servers of one user on one machine may share a port; each connection goes to one of them.
    """

    def __init__(self, app: ASGIApp, host: str, port: int) -> None:
        """Raises ``ConfigurationError`` if it cannot listen there."""
        self._listener = bind_shared(host, port)
        self._server = uvicorn.Server(
            uvicorn.Config(
                app,
                lifespan="on",
                timeout_keep_alive=KEEP_ALIVE_S,
                log_level="warning",
                access_log=False,
            )
        )
        serving = self._server.serve([self._listener])
        self._serving = asyncio.get_running_loop().create_task(serving)

    def check_health(self) -> None:
        """Raises ``UnavailableError`` once it has stopped."""
        if self._serving.done():
            raise UnavailableError("The HTTP server has stopped.")

    async def close(self) -> None:
        """Take no more connections, and return when all answers are finished."""
        self._server.should_exit = True
        await self._serving
        self._listener.close()
