"""The HTTP application: its routes, and what stands before them."""

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any, Final, Literal

from fastapi import FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import HTMLResponse, PlainTextResponse

from gemma_serve import __version__
from gemma_serve.errors import GemmaServeError, NotFoundError, UnavailableError
from gemma_serve.generation import GenerationClient
from gemma_serve.images.loader import ImageLoader
from gemma_serve.openai_api.chat_admission import ChatAdmission
from gemma_serve.openai_api.chat_completions import ChatCompletions
from gemma_serve.openai_api.chat_schemas import ChatCompletionRequest
from gemma_serve.openai_api.chat_tools import ToolRules
from gemma_serve.openai_api.completion_schemas import CompletionRequest
from gemma_serve.openai_api.completions import Completions
from gemma_serve.openai_api.config import ApiConfig
from gemma_serve.openai_api.disconnects import CancelOnDisconnect
from gemma_serve.openai_api.error_responses import (
    handle_error,
    handle_http_exception,
    handle_validation_error,
)
from gemma_serve.openai_api.json_bodies import JsonBodyRoute
from gemma_serve.openai_api.metrics.exposition import CONTENT_TYPE, document
from gemma_serve.openai_api.metrics.measured_client import MeasuredClient
from gemma_serve.openai_api.metrics.server_metrics import ServerMetrics
from gemma_serve.openai_api.middleware import ApiKeyCheck, BodyLimit, CountRequests, RequestContext
from gemma_serve.openai_api.reference_page import reference_page
from gemma_serve.openai_api.response_schemas import (
    ChatCompletion,
    ChatCompletionChunk,
    Completion,
    ErrorResponse,
    Model,
    ModelList,
    Status,
    Version,
)
from gemma_serve.openai_api.responses.endpoint import Responses
from gemma_serve.openai_api.responses.event_schemas import ResponseEvent
from gemma_serve.openai_api.responses.request_schemas import ResponseRequest
from gemma_serve.openai_api.responses.response_schemas import DeletedResponse, InputTokens
from gemma_serve.openai_api.responses.response_schemas import Response as ResponseObject
from gemma_serve.openai_api.responses.store import ResponseStore
from gemma_serve.openai_api.responses.stored_items import InputItemList
from gemma_serve.openai_api.served_model import check_model
from gemma_serve.openai_api.stream_schemas import documented_stream
from gemma_serve.openai_api.tokenization import (
    Detokenized,
    DetokenizeRequest,
    Tokenization,
    Tokenized,
    TokenizeRequest,
)

# FastAPI's own type for this holds Any. "4XX" also keeps it from documenting a 422.
_ERRORS: Final[dict[int | str, dict[str, Any]]] = {
    "4XX": {"model": ErrorResponse, "description": "The request is at fault."},
    "5XX": {"model": ErrorResponse, "description": "The server is at fault, or not ready."},
}


def build_app(
    client: GenerationClient, config: ApiConfig, image_loader: ImageLoader | None = None
) -> FastAPI:
    """An OpenAI-compatible application in front of ``client``.

    The application closes ``image_loader`` when it shuts down.
    """
    loader = image_loader or ImageLoader(config.limits.images)
    metrics = ServerMetrics()
    client = MeasuredClient(client, metrics)
    admission = ChatAdmission(client, config, loader, ToolRules(config))

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await loader.aclose()

    app = FastAPI(
        title="gemma-serve",
        version=__version__,
        lifespan=lifespan,
        middleware=_middleware(config, metrics),
        exception_handlers={
            GemmaServeError: handle_error,
            RequestValidationError: handle_validation_error,
            HTTPException: handle_http_exception,
        },
        redirect_slashes=False,
        docs_url=None,  # its page loads scripts from elsewhere; ours does not
        redoc_url=None,
    )
    app.router.route_class = JsonBodyRoute
    _add_chat_routes(app, ChatCompletions(admission))
    _add_completion_routes(app, Completions(client, config))
    store = ResponseStore(config.response_store_bytes)
    _add_response_routes(app, Responses(admission, store))
    _add_missing_response_routes(app)
    _add_model_routes(app, client, config)
    _add_tokenization_routes(app, Tokenization(client, config, admission))
    _add_status_routes(app, client)
    _add_metrics_route(app, client, metrics)
    _add_reference_route(app)
    return app


def _middleware(config: ApiConfig, metrics: ServerMetrics) -> list[Middleware]:
    """Outermost first: every answer, an error of a later one too, passes the earlier ones."""
    middleware = [
        Middleware(RequestContext),
        Middleware(CountRequests, metrics=metrics),
        Middleware(CancelOnDisconnect),
    ]
    if config.cors_allow_origins:
        middleware.append(
            Middleware(
                CORSMiddleware,
                allow_origins=config.cors_allow_origins,
                allow_methods=("GET", "POST", "DELETE"),
                allow_headers=("*",),
                expose_headers=("x-request-id", "openai-processing-ms", "retry-after"),
            )
        )
    if config.api_keys:
        middleware.append(Middleware(ApiKeyCheck, api_keys=config.api_keys))
    limits = config.limits
    middleware.append(
        Middleware(
            BodyLimit, max_body_bytes=limits.max_body_bytes, body_timeout_s=limits.body_timeout_s
        )
    )
    return middleware


def _api_key_id(request: Request) -> str | None:
    """What ``ApiKeyCheck`` calls the request's key, if keys are asked for."""
    return getattr(request.state, "api_key_id", None)


def _add_chat_routes(app: FastAPI, chat_completions: ChatCompletions) -> None:
    responses = _ERRORS | documented_stream(ChatCompletionChunk, ErrorResponse, ends_with_done=True)

    @app.post("/v1/chat/completions", response_model=ChatCompletion, responses=responses)
    async def create_chat_completion(body: ChatCompletionRequest, request: Request) -> Response:
        return await chat_completions.create(
            body, request_id=request.state.request_id, api_key_id=_api_key_id(request)
        )


def _add_completion_routes(app: FastAPI, completions: Completions) -> None:
    responses = _ERRORS | documented_stream(Completion, ErrorResponse, ends_with_done=True)

    @app.post("/v1/completions", response_model=Completion, responses=responses)
    async def create_completion(body: CompletionRequest, request: Request) -> Response:
        return await completions.create(
            body, request_id=request.state.request_id, api_key_id=_api_key_id(request)
        )


def _add_response_routes(app: FastAPI, responses: Responses) -> None:
    stream = _ERRORS | documented_stream(ResponseEvent)

    @app.post("/v1/responses", response_model=ResponseObject, responses=stream)
    async def create_response(body: ResponseRequest, request: Request) -> Response:
        return await responses.create(
            body, request_id=request.state.request_id, api_key_id=_api_key_id(request)
        )

    @app.post("/v1/responses/input_tokens", responses=_ERRORS)
    async def count_input_tokens(body: ResponseRequest, request: Request) -> InputTokens:
        return await responses.count_input(body, request_id=request.state.request_id)

    @app.get("/v1/responses/{response_id}", responses=_ERRORS)
    async def retrieve_response(
        response_id: str, stream: Literal["false"] | None = None
    ) -> ResponseObject:
        """What is stored is whole, and not streamed again."""
        del stream
        return responses.retrieve(response_id)

    @app.get("/v1/responses/{response_id}/input_items", responses=_ERRORS)
    async def list_input_items(
        response_id: str,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        order: Literal["asc", "desc"] = "desc",
        after: str | None = None,
    ) -> InputItemList:
        return responses.list_input(response_id, limit=limit, order=order, after=after)

    @app.post("/v1/responses/{response_id}/cancel", responses=_ERRORS)
    async def cancel_response(response_id: str) -> ResponseObject:
        return responses.cancel(response_id)

    @app.delete("/v1/responses/{response_id}", responses=_ERRORS)
    async def delete_response(response_id: str) -> DeletedResponse:
        return responses.delete(response_id)


def _add_missing_response_routes(app: FastAPI) -> None:
    """OpenAI's that is not here, ``compact``, would be a 405 as a stored response has the same
    path; clients know by a 404 that a server does without."""

    @app.post("/v1/responses/{name}", include_in_schema=False)
    async def answer_not_found(name: str) -> Response:
        raise NotFoundError(f"Unknown URL (POST /v1/responses/{name[:64]})")


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


def _add_tokenization_routes(app: FastAPI, tokenization: Tokenization) -> None:
    @app.post("/tokenize", responses=_ERRORS)
    async def tokenize(body: TokenizeRequest) -> Tokenized:
        return await tokenization.tokenize(body)

    @app.post("/detokenize", responses=_ERRORS)
    async def detokenize(body: DetokenizeRequest) -> Detokenized:
        return await tokenization.detokenize(body)


def _add_status_routes(app: FastAPI, client: GenerationClient) -> None:
    @app.head("/health", include_in_schema=False)
    @app.get("/health", responses=_ERRORS)
    async def check_health() -> Status:
        await client.check_health()
        return Status()

    @app.api_route("/ping", methods=["GET", "POST"], include_in_schema=False)
    async def ping() -> Status:
        """What hosts of containers ask; the same as ``/health``."""
        return await check_health()

    @app.head("/", include_in_schema=False)
    @app.get("/", include_in_schema=False)
    async def greet() -> Status:
        return Status()

    @app.get("/version", responses=_ERRORS)
    async def tell_version() -> Version:
        return Version(version=__version__)


def _add_metrics_route(app: FastAPI, client: GenerationClient, metrics: ServerMetrics) -> None:
    @app.get("/metrics", response_class=PlainTextResponse, responses=_ERRORS)
    async def show_metrics() -> Response:
        try:
            load = await client.measure_load()
        except UnavailableError:
            load = None
        return Response(document(metrics.lines(load)), media_type=CONTENT_TYPE)


def _add_reference_route(app: FastAPI) -> None:
    @app.get("/docs", include_in_schema=False)
    async def show_reference() -> HTMLResponse:
        return HTMLResponse(reference_page(app.openapi()))
