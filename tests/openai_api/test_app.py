"""Models, health, and every other path; the headers, keys and limits that all of them share."""

from collections.abc import AsyncIterator

import httpx
import pytest
from fastapi import FastAPI
from starlette.types import Receive, Scope, Send

from gemma_serve.errors import OverloadedError, UnavailableError
from gemma_serve.openai_api.config import ApiConfig
from gemma_serve.openai_api.limits import ApiLimits
from gemma_serve.openai_api.middleware import RequestContext
from tests.fakes import FakeGenerationClient, FakeImageLoader, answer
from tests.openai_api.harness import CHAT, HELLO, MODEL, Exchange, connect, error_of, make_app

KEYS = ("sk-one", "sk-zwölf")


async def get(app: FastAPI, path: str, **headers: str) -> httpx.Response:
    return await request(app, "GET", path, **headers)


async def request(app: FastAPI, method: str, path: str, **headers: str) -> httpx.Response:
    async with connect(app) as http:
        named = {name.replace("_", "-").encode(): value.encode() for name, value in headers.items()}
        return await http.request(method, path, headers=named)


async def test_model_list_has_the_served_model() -> None:
    app = make_app(FakeGenerationClient())
    body = (await get(app, "/v1/models")).json()
    (model,) = body["data"]
    assert isinstance(model.pop("created"), int)
    assert body["object"] == "list"
    assert model == {"id": MODEL, "object": "model", "owned_by": "google", "max_model_len": 4096}


@pytest.mark.parametrize("path", [f"/v1/models/{MODEL}", "/v1/models/google%2Fgemma-3-270m"])
async def test_model_is_found_by_its_id_with_a_slash(path: str) -> None:
    app = make_app(FakeGenerationClient())
    assert (await get(app, path)).json() == (await get(app, "/v1/models")).json()["data"][0]


@pytest.mark.parametrize("model_id", ["gpt-4o", "", "google", f"{MODEL}/x"])
async def test_other_model_is_a_404(model_id: str) -> None:
    response = await get(make_app(FakeGenerationClient()), f"/v1/models/{model_id}")
    assert response.status_code == 404
    assert error_of(response)["code"] == "model_not_found"


@pytest.mark.parametrize("path", ["/health", "/"])
async def test_sign_of_life(path: str) -> None:
    app = make_app(FakeGenerationClient())
    assert (await get(app, path)).json() == {"status": "ok"}
    assert (await request(app, "HEAD", path)).status_code == 200


@pytest.mark.parametrize("path", ["/health", "/v1/models"])
async def test_model_that_loads_is_a_503_that_says_when_to_come_back(path: str) -> None:
    error = UnavailableError("The model is loading.")
    client = FakeGenerationClient(describe_error=error, health_error=error)
    response = await get(make_app(client), path)
    assert response.status_code == 503
    assert response.headers["retry-after"] == "1"
    assert error_of(response) == {
        "message": "The model is loading.",
        "type": "service_unavailable",
        "param": None,
        "code": "model_unavailable",
    }


async def test_health_tells_of_a_model_that_is_gone_though_its_description_is_known() -> None:
    client = FakeGenerationClient(health_error=UnavailableError("The model is gone."))
    app = make_app(client)
    assert (await get(app, "/v1/models")).status_code == 200
    assert (await get(app, "/health")).status_code == 503


async def test_overload_says_when_to_come_back() -> None:
    client = FakeGenerationClient(generate_error=OverloadedError("Full.", retry_after_s=1.25))
    async with connect(make_app(client)) as http:
        response = await http.post(CHAT, json=HELLO)
    assert response.status_code == 429
    assert response.headers["retry-after"] == "2"
    assert response.headers["retry-after-ms"] == "1250"
    assert error_of(response)["type"] == "rate_limit_error"


@pytest.mark.parametrize(
    ("method", "path", "status", "allow"),
    [
        ("GET", "/v2/models", 404, None),
        ("GET", "/redoc", 404, None),
        ("POST", "/v1/chat/completions/", 404, None),
        ("POST", "/v1/embeddings", 404, None),
        ("POST", "/v1/responses/compact", 404, None),
        ("GET", "/v1/chat/completions", 405, "POST"),
        ("DELETE", "/v1/models", 405, "GET"),
        ("OPTIONS", "/v1/chat/completions", 405, "POST"),
    ],
)
async def test_wrong_path_or_method_is_an_error_object(
    method: str, path: str, status: int, allow: str | None
) -> None:
    response = await request(make_app(FakeGenerationClient()), method, path)
    assert response.status_code == status
    assert response.headers.get("allow") == allow
    error = error_of(response)
    assert error["type"] == "invalid_request_error"
    assert f"({method} {path})" in str(error["message"])


async def test_reference_shows_every_operation_and_field_and_loads_nothing() -> None:
    app = make_app(FakeGenerationClient())
    page = await get(app, "/docs")
    document = (await get(app, "/openapi.json")).json()
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    for path, methods in document["paths"].items():
        for method in methods:
            assert f"<code>{method.upper()} {path}</code>" in page.text
    assert "<code>messages</code> <b>required</b>" in page.text
    assert "0 always takes the most probable token." in page.text
    assert "<script" not in page.text
    assert "http" not in page.text.replace("HTTPValidationError", "").replace("https: or a", "")


async def test_openapi_document_tells_the_truth_about_errors() -> None:
    document = (await get(make_app(FakeGenerationClient()), "/openapi.json")).json()
    responses = document["paths"][CHAT]["post"]["responses"]
    assert sorted(responses) == ["200", "4XX", "5XX"]
    assert sorted(responses["200"]["content"]) == ["application/json", "text/event-stream"]


@pytest.mark.parametrize("key", ["sk-one", "sk-zwölf"])
async def test_any_of_the_keys_opens_the_api(key: str) -> None:
    app = make_app(FakeGenerationClient(), api_keys=KEYS)
    response = await get(app, "/v1/models", authorization=f"Bearer {key}")
    assert response.status_code == 200


@pytest.mark.parametrize("value", [None, "", "Bearer", "Bearer sk-two", "Basic sk-one", "sk-one"])
@pytest.mark.parametrize("path", ["/v1/models", CHAT, "/", "/openapi.json", "/nowhere"])
async def test_missing_or_wrong_key_is_a_401(path: str, value: str | None) -> None:
    app = make_app(FakeGenerationClient(), api_keys=KEYS)
    headers = {} if value is None else {"authorization": value}
    response = await get(app, path, **headers)
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"
    assert error_of(response)["code"] == "invalid_api_key"
    assert "sk-" not in response.text
    assert response.headers["x-request-id"].startswith("req_")


async def test_health_needs_no_key() -> None:
    app = make_app(FakeGenerationClient(), api_keys=KEYS)
    assert (await get(app, "/health")).status_code == 200
    assert (await get(app, "/ping")).status_code == 200


async def test_ping_is_health_by_get_and_post() -> None:
    client = FakeGenerationClient(health_error=UnavailableError("The model is gone."))
    for app, status in ((make_app(FakeGenerationClient()), 200), (make_app(client), 503)):
        async with connect(app) as http:
            answers = [await http.request(method, "/ping") for method in ("GET", "POST")]
        assert [answer.status_code for answer in answers] == [status, status]


async def test_every_answer_tells_the_version_of_the_api() -> None:
    app = make_app(FakeGenerationClient())
    for path in ("/health", "/nowhere"):
        assert (await get(app, path)).headers["openai-version"] == "2020-10-01"


async def test_without_keys_any_key_is_accepted() -> None:
    app = make_app(FakeGenerationClient())
    assert (await get(app, "/v1/models", authorization="Bearer x")).status_code == 200


def test_keys_are_not_printed() -> None:
    assert "sk-one" not in repr(ApiConfig(model_name=MODEL, api_keys=("sk-one",)))


@pytest.mark.parametrize("header", ["x_request_id", "x_client_request_id"])
async def test_clients_request_id_is_echoed(header: str) -> None:
    response = await get(make_app(FakeGenerationClient()), "/health", **{header: "abc-123"})
    assert response.headers["x-request-id"] == "abc-123"


@pytest.mark.parametrize("request_id", ["a b", "x" * 129, "é", ""])
async def test_insane_request_id_is_replaced(request_id: str) -> None:
    response = await get(make_app(FakeGenerationClient()), "/health", x_request_id=request_id)
    assert response.headers["x-request-id"].startswith("req_")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("fields", [{}, {"temperature": 5}, {"model": "x"}])
async def test_every_answer_has_a_request_id_and_a_time(
    fields: dict[str, object], stream: bool
) -> None:
    async with connect(make_app(FakeGenerationClient(*answer()))) as http:
        response = await http.post(CHAT, json={**HELLO, **fields, "stream": stream})
    assert response.headers["x-request-id"].startswith("req_")
    assert int(response.headers["openai-processing-ms"]) >= 0


async def test_failure_outside_of_all_routes_is_a_500_without_internals() -> None:
    async def app(_scope: Scope, _receive: Receive, _send: Send) -> None:
        raise RuntimeError("0xdead")

    exchange = Exchange(RequestContext(app))
    await exchange.task
    assert exchange.sent[0]["status"] == 500
    assert b"0xdead" not in exchange.sent[1]["body"]


async def test_failure_after_the_answer_began_is_left_to_the_server() -> None:
    async def app(_scope: Scope, _receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise RuntimeError("0xdead")

    exchange = Exchange(RequestContext(app))
    with pytest.raises(RuntimeError, match="0xdead"):
        await exchange.task
    assert len(exchange.sent) == 1


SMALL = ApiLimits(max_body_bytes=200)


async def test_body_over_the_limit_is_a_413_by_its_stated_length() -> None:
    async with connect(make_app(FakeGenerationClient(), limits=SMALL)) as http:
        response = await http.post(CHAT, json={**HELLO, "user": "x" * 200})
    assert response.status_code == 413
    assert error_of(response)["message"] == "The body is larger than 200 bytes"


async def test_body_over_the_limit_is_a_413_without_a_stated_length() -> None:
    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(3):
            yield b" " * 100

    async with connect(make_app(FakeGenerationClient(), limits=SMALL)) as http:
        response = await http.post(
            CHAT, content=chunks(), headers={"content-type": "application/json"}
        )
    assert response.status_code == 413
    assert error_of(response)["type"] == "invalid_request_error"


async def test_body_at_the_limit_is_read() -> None:
    client = FakeGenerationClient(*answer())
    exchange = Exchange(make_app(client, limits=SMALL))
    body = b'{"model":"%s","messages":[{"role":"user","content":"' % MODEL.encode()
    exchange.send_bytes(body, more_body=True)
    exchange.send_bytes(b'"}]}'.rjust(200 - len(body), b"x"))
    await exchange.task
    assert exchange.sent[0]["status"] == 200


ORIGIN = "https://chat.example"


async def test_preflight_of_an_allowed_origin_passes_without_a_key() -> None:
    app = make_app(FakeGenerationClient(), cors_allow_origins=(ORIGIN,), api_keys=KEYS)
    response = await request(
        app,
        "OPTIONS",
        CHAT,
        origin=ORIGIN,
        access_control_request_method="POST",
        access_control_request_headers="authorization, content-type, x-stainless-lang",
    )
    assert response.status_code == 200
    assert response.headers["access-control-allow-origin"] == ORIGIN
    assert "authorization" in response.headers["access-control-allow-headers"]
    assert "x-stainless-lang" in response.headers["access-control-allow-headers"]


async def test_page_of_an_allowed_origin_may_read_errors_too() -> None:
    app = make_app(FakeGenerationClient(), cors_allow_origins=(ORIGIN,), api_keys=KEYS)
    response = await get(app, "/v1/models", origin=ORIGIN)
    assert response.status_code == 401
    assert response.headers["access-control-allow-origin"] == ORIGIN
    assert "x-request-id" in response.headers["access-control-expose-headers"]


async def test_no_origin_is_allowed_by_default() -> None:
    response = await get(make_app(FakeGenerationClient()), "/v1/models", origin=ORIGIN)
    assert "access-control-allow-origin" not in response.headers


async def test_shutdown_closes_the_image_loader() -> None:
    loader = FakeImageLoader()
    app = make_app(FakeGenerationClient(), loader)
    async with app.router.lifespan_context(app):
        assert not loader.is_closed
    assert loader.is_closed
