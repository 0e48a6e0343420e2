"""The HTTP application: its routes, and what stands before them."""

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware

from gemma_serve import __version__
from gemma_serve.errors import GemmaServeError
from gemma_serve.generation import GenerationClient
from gemma_serve.images.loader import ImageLoader
from gemma_serve.openai_api.chat_completions import ChatCompletions, check_model
from gemma_serve.openai_api.chat_schemas import ChatCompletionRequest
from gemma_serve.openai_api.chat_tools import ToolRules
from gemma_serve.openai_api.config import ApiConfig
from gemma_serve.openai_api.disconnects import CancelOnDisconnect
from gemma_serve.openai_api.error_responses import (
    handle_error,
    handle_http_exception,
    handle_validation_error,
)
from gemma_serve.openai_api.middleware import ApiKeyCheck, BodyLimit, RequestContext
from gemma_serve.openai_api.response_schemas import (
    ChatCompletion,
    ChatCompletionChunk,
    ErrorResponse,
    Model,
    ModelList,
    Status,
)

# FastAPI's own type for this holds Any. "4XX" also keeps it from documenting a 422.
_ERRORS: Final[dict[int | str, dict[str, Any]]] = {
    "4XX": {"model": ErrorResponse, "description": "The request is at fault."},
    "5XX": {"model": ErrorResponse, "description": "The server is at fault, or not ready."},
}
# Its "$id" makes the chunk's schema a document of its own, in which its "$defs" are found.
_CHUNK_SCHEMA: Final = {"$id": "chat.completion.chunk", **ChatCompletionChunk.model_json_schema()}
_STREAM: Final[dict[int | str, dict[str, Any]]] = {
    200: {"content": {"text/event-stream": {"schema": _CHUNK_SCHEMA}}}
}


def build_app(
    client: GenerationClient, config: ApiConfig, image_loader: ImageLoader | None = None
) -> FastAPI:
    """An OpenAI-compatible application in front of ``client``.

    The application closes ``image_loader`` when it shuts down.
    """
    loader = image_loader or ImageLoader(config.limits.images)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await loader.aclose()

    app = FastAPI(
        title="gemma-serve",
        version=__version__,
        lifespan=lifespan,
        middleware=_middleware(config),
        exception_handlers={
            GemmaServeError: handle_error,
            RequestValidationError: handle_validation_error,
            HTTPException: handle_http_exception,
        },
        redirect_slashes=False,
        docs_url=None,  # its page loads scripts from elsewhere
        redoc_url=None,
    )
    _add_chat_routes(app, ChatCompletions(client, config, loader, ToolRules(config)))
    _add_model_routes(app, client, config)
    _add_status_routes(app, client)
    return app


def _middleware(config: ApiConfig) -> list[Middleware]:
    """Outermost first: every answer, an error of a later one too, passes the earlier ones."""
    middleware = [Middleware(RequestContext), Middleware(CancelOnDisconnect)]
    if config.cors_allow_origins:
        middleware.append(
            Middleware(
                CORSMiddleware,
                allow_origins=config.cors_allow_origins,
                allow_methods=("GET", "POST"),
                allow_headers=("*",),
                expose_headers=("x-request-id", "openai-processing-ms", "retry-after"),
            )
        )
    if config.api_keys:
        middleware.append(Middleware(ApiKeyCheck, api_keys=config.api_keys))
    middleware.append(Middleware(BodyLimit, max_body_bytes=config.limits.max_body_bytes))
    return middleware


def _add_chat_routes(app: FastAPI, chat_completions: ChatCompletions) -> None:
    @app.post("/v1/chat/completions", response_model=ChatCompletion, responses=_ERRORS | _STREAM)
    async def create_chat_completion(body: ChatCompletionRequest, request: Request) -> Response:
        return await chat_completions.create(body, request_id=request.state.request_id)


def _add_model_routes(app: FastAPI, client: GenerationClient, config: ApiConfig) -> None:
    created = int(time.time())

    async def served_model() -> Model:
        description = await client.describe()
        return Model(
            id=config.model_name,
            created=created,
            owned_by="google",
            max_model_len=description.max_model_len,
        )

    @app.get("/v1/models", responses=_ERRORS)
    async def list_models() -> ModelList:
        return ModelList(data=[await served_model()])

    # Model names may hold slashes.
    @app.get("/v1/models/{model_id:path}", responses=_ERRORS)
    async def retrieve_model(model_id: str) -> Model:
        check_model(model_id, config)
        return await served_model()


def _add_status_routes(app: FastAPI, client: GenerationClient) -> None:
    @app.head("/health", include_in_schema=False)
    @app.get("/health", responses=_ERRORS)
    async def check_health() -> Status:
        await client.check_health()
        return Status()

    @app.head("/", include_in_schema=False)
    @app.get("/", include_in_schema=False)
    async def greet() -> Status:
        return Status()
