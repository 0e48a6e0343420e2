"""However the engine cuts a text into deltas, every client reads the same text."""

import json
from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fakes import FakeGenerationClient, answer
from tests.openai_api.harness import CHAT, MODEL, connect, make_app

CLIENT = FakeGenerationClient()
APP = make_app(CLIENT)
TEXT = 'Hé\n\n🙂 data: [DONE]\u2028"x"\\ end'
BODIES: dict[str, dict[str, object]] = {
    CHAT: {"messages": [{"role": "user", "content": "Hi"}]},
    "/v1/completions": {"prompt": "Hi"},
    "/v1/responses": {"input": "Hi"},
}


def cut(text: str, places: Sequence[int]) -> list[str]:
    """``text`` in pieces, cut at ``places``."""
    return [text[start:end] for start, end in pairwise([0, *sorted(places), len(text)])]


def text_of(event: dict[str, object]) -> str:
    """The text that one event of any endpoint adds."""
    match event:
        case {"type": "response.output_text.delta", "delta": str(text)}:
            return text
        case {"choices": [{"delta": {"content": str(text)}}]} | {"choices": [{"text": str(text)}]}:
            return text
        case _:
            return ""


async def read(path: str, pieces: Sequence[str]) -> str:
    """What a client that knows server-sent events reads of a stream of ``pieces``."""
    CLIENT.play(*answer(*pieces))
    async with connect(APP) as http:
        response = await http.post(path, json={"model": MODEL, "stream": True, **BODIES[path]})
    data = [line[6:] for line in response.text.split("\n") if line.startswith("data: ")]
    return "".join(text_of(json.loads(line)) for line in data if line != "[DONE]")


@pytest.mark.parametrize("path", BODIES)
async def test_every_cut_in_two_reads_the_same(path: str) -> None:
    for place in range(len(TEXT) + 1):
        assert await read(path, cut(TEXT, [place])) == TEXT


@pytest.mark.parametrize("path", BODIES)
@given(text=st.text(st.characters(codec="utf-8"), max_size=20), data=st.data())
@settings(max_examples=20, deadline=None)
async def test_any_text_in_any_pieces_reads_the_same(
    path: str, text: str, data: st.DataObject
) -> None:
    places = data.draw(st.lists(st.integers(0, len(text)), max_size=5))
    assert await read(path, cut(text, places)) == text
