"""Whatever the endpoint, one API key's prompts are not in another's cache."""

from collections.abc import Mapping

import pytest

from tests.fakes import FakeGenerationClient, answer
from tests.openai_api.harness import CHAT, HELLO, MODEL, connect, error_of, make_app

BODIES: Mapping[str, Mapping[str, object]] = {
    CHAT: HELLO,
    "/v1/completions": {"model": MODEL, "prompt": "Hello"},
    "/v1/responses": {"model": MODEL, "input": "Hello"},
}
every_endpoint = pytest.mark.parametrize("path", BODIES)


async def requester(
    path: str, *, key: str | None = None, share: bool = False, **fields: object
) -> tuple[str | None, str | None]:
    """User and salt of a request, as the model's side gets them."""
    client = FakeGenerationClient(*answer())
    app = make_app(client, api_keys=("one", "two") if key else (), share_prefix_cache=share)
    async with connect(app) as http:
        headers = {"authorization": f"Bearer {key}"} if key else {}
        response = await http.post(path, json={**BODIES[path], **fields}, headers=headers)
    assert response.status_code == 200, response.text
    (request,) = client.requests
    return request.user, request.cache_salt


def test_every_endpoint_that_generates_is_among_these() -> None:
    paths = make_app(FakeGenerationClient()).openapi()["paths"]
    generating = {
        path
        for path, operations in paths.items()
        if "post" in operations
        and path.startswith("/v1/")
        and not path.endswith(("/cancel", "/input_tokens"))
    }
    assert generating == set(BODIES)


@every_endpoint
async def test_user_is_whoever_the_newer_field_names(path: str) -> None:
    assert (await requester(path))[0] is None
    assert (await requester(path, user="ann"))[0] == "ann"
    assert (await requester(path, user="ann", safety_identifier="bob"))[0] == "bob"
    assert (await requester(path, key="one", user="ann"))[0] == "ann"


@every_endpoint
async def test_without_keys_the_salt_is_the_clients_own(path: str) -> None:
    assert (await requester(path))[1] is None
    assert (await requester(path, cache_salt="mine"))[1] == "mine"


@every_endpoint
async def test_another_key_is_another_user_with_another_salt(path: str) -> None:
    first, again, other = [await requester(path, key=key) for key in ("one", "one", "two")]
    assert first == again
    assert first[0] != other[0]
    assert first[1] != other[1]
    assert None not in first
    assert "one" not in str(first)


@every_endpoint
async def test_a_client_cannot_choose_the_salt_of_another_key(path: str) -> None:
    _, salt = await requester(path, key="one")
    _, forged = await requester(path, key="two", cache_salt=salt)
    assert forged != salt


@every_endpoint
async def test_keys_may_be_let_share(path: str) -> None:
    salts = [(await requester(path, key=key, share=True))[1] for key in ("one", "two")]
    assert salts == [None, None]


async def test_the_endpoints_share_what_one_key_may_see() -> None:
    salts = {(await requester(path, key="one"))[1] for path in BODIES}
    assert len(salts) == 1


@every_endpoint
@pytest.mark.parametrize("key", [None, "one"])
async def test_priority_reaches_the_engine(path: str, key: str | None) -> None:
    client = FakeGenerationClient(*answer())
    async with connect(make_app(client, api_keys=("one",) if key else ())) as http:
        for fields in ({}, {"priority": -3}, {"priority": None}):
            headers = {"authorization": f"Bearer {key}"}
            response = await http.post(path, json={**BODIES[path], **fields}, headers=headers)
            assert response.status_code == 200, response.text
    assert [request.priority for request in client.requests] == [0, -3, 0]


@every_endpoint
@pytest.mark.parametrize("value", ["high", 1.5, True, 2**63])
async def test_priority_that_is_no_integer_is_refused(path: str, value: object) -> None:
    client = FakeGenerationClient(*answer())
    async with connect(make_app(client)) as http:
        response = await http.post(path, json={**BODIES[path], "priority": value})
    assert (response.status_code, error_of(response)["param"]) == (400, "priority")
