"""Plain completions of a real engine over HTTP: what lm-eval measures."""

import os
from collections.abc import Iterator

import httpx
import pytest
import torch

from gemma_serve.engine.config import EngineConfig
from gemma_serve.gemma.config import ModelConfig
from gemma_serve.gemma.generator import GemmaGenerator
from gemma_serve.openai_api.app import build_app
from gemma_serve.openai_api.config import ApiConfig
from tests.gemma.harness import prompt, transformers_logits
from tests.tiny import save_tiny_checkpoint, tiny_text_model

MODEL = "gemma"


@pytest.fixture(scope="module")
def generator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GemmaGenerator]:
    folder: os.PathLike[str] = save_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))
    config = EngineConfig(max_num_seqs=4, prefill_chunk_size=32)
    generator = GemmaGenerator.load(ModelConfig(model=str(folder), dtype="float32"), config)
    yield generator
    generator.close()


async def complete(generator: GemmaGenerator, **fields: object) -> httpx.Response:
    app = build_app(generator, ApiConfig(model_name=MODEL))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://s") as http:
        return await http.post("/v1/completions", json={"model": MODEL, **fields})


async def test_log_likelihoods_of_a_batch_equal_transformers_own(generator: GemmaGenerator) -> None:
    prompts = [prompt(num_tokens, seed=num_tokens) for num_tokens in (2, 33, 70)]
    response = await complete(
        generator,
        prompt=[list(inputs.token_ids) for inputs in prompts],
        echo=True,
        max_tokens=0,
        logprobs=1,
        temperature=0,
        return_tokens_as_token_ids=True,
    )
    assert response.status_code == 200, response.text
    model = tiny_text_model()
    for inputs, choice in zip(prompts, response.json()["choices"], strict=True):
        token_ids = inputs.token_ids
        reference = transformers_logits(model, inputs).log_softmax(dim=-1)
        of_next = reference[torch.arange(len(token_ids) - 1), torch.tensor(token_ids[1:])]
        logprobs = choice["logprobs"]
        assert logprobs["tokens"] == [f"token_id:{i}" for i in token_ids]
        assert logprobs["token_logprobs"][1:] == pytest.approx(of_next.tolist(), abs=1e-4)
        best = reference[:-1].amax(dim=-1).tolist()
        assert [max(top.values()) for top in logprobs["top_logprobs"][1:]] == pytest.approx(
            best, abs=1e-4
        )


async def test_text_is_echoed_to_the_letter(generator: GemmaGenerator) -> None:
    text = "Hällo <end_of_turn>\n wörld"
    for as_prompt in (text, [text, text]):
        response = await complete(generator, prompt=as_prompt, echo=True, max_tokens=0, logprobs=0)
        for choice in response.json()["choices"]:
            assert choice["text"] == text
            logprobs = choice["logprobs"]
            assert len({len(column) for column in logprobs.values()}) == 1
            assert logprobs["text_offset"][-1] == len(text) - 1


async def test_a_text_and_its_token_ids_go_on_alike(generator: GemmaGenerator) -> None:
    tokens = await complete(generator, prompt="hello", max_tokens=8, temperature=0, seed=1)
    asked = {"max_tokens": 8, "temperature": 0, "return_token_ids": True}
    first = (await complete(generator, prompt="hello", **asked)).json()["choices"][0]
    again = (await complete(generator, prompt=first["prompt_token_ids"], **asked)).json()
    assert again["choices"][0]["text"] == first["text"] == tokens.json()["choices"][0]["text"]
    assert again["choices"][0]["token_ids"] == first["token_ids"]


async def test_the_engine_obeys_every_limit_on_tokens(generator: GemmaGenerator) -> None:
    fields = {"prompt": "hello", "temperature": 0, "max_tokens": 6, "return_token_ids": True}
    plain = (await complete(generator, **fields)).json()["choices"][0]["token_ids"]
    allowed = (await complete(generator, **fields, allowed_token_ids=[300, 301])).json()
    assert set(allowed["choices"][0]["token_ids"]) <= {300, 301}
    stopped = (await complete(generator, **fields, stop_token_ids=[plain[0]])).json()
    assert stopped["choices"][0]["token_ids"] == plain[:1]
    longer = (await complete(generator, **fields, stop_token_ids=[plain[0]], min_tokens=3)).json()
    assert len(longer["choices"][0]["token_ids"]) >= 3
