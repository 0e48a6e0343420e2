"""Text to tokens and back over HTTP."""

import httpx
import pytest

from gemma_serve import __version__
from tests.fakes import FakeGenerationClient
from tests.openai_api.harness import MODEL, connect, error_of, make_app


async def post(path: str, **body: object) -> httpx.Response:
    async with connect(make_app(FakeGenerationClient())) as http:
        return await http.post(path, json=body)


async def test_text_to_tokens() -> None:
    response = await post("/tokenize", model=MODEL, prompt="ab")
    assert response.json() == {"count": 3, "max_model_len": 4096, "tokens": [2, 97, 98]}
    plain = await post("/tokenize", prompt="aé", add_special_tokens=False, return_token_strs=True)
    assert plain.json()["tokens"] == [97, 195, 169]
    assert plain.json()["token_strs"] == ["a", "\ufffd", "\ufffd"]


async def test_chat_to_tokens() -> None:
    response = await post("/tokenize", messages=[{"role": "user", "content": "Hi"}])
    assert response.json()["tokens"] == [2]


async def test_tokens_to_text() -> None:
    assert (await post("/detokenize", tokens=[2, 195, 169])).json() == {"prompt": "<bos>é"}
    assert (await post("/detokenize", tokens=[])).json() == {"prompt": ""}


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": [{"role": "user", "content": "a"}]}, "prompt"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": [5, -1]}, "tokens[1]"),
        ("/detokenize", {"tokens": [5, 1000]}, "tokens[1]"),
    ],
)
async def test_mistake_is_a_400_that_names_the_field(
    path: str, body: dict[str, object], param: str
) -> None:
    response = await post(path, **body)
    assert (response.status_code, error_of(response)["param"]) == (400, param)


async def test_unknown_model_is_a_404() -> None:
    assert (await post("/tokenize", model="gpt-4o", prompt="a")).status_code == 404


async def test_version() -> None:
    async with connect(make_app(FakeGenerationClient())) as http:
        assert (await http.get("/version")).json() == {"version": __version__}
