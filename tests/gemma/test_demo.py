import hashlib
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoTokenizer,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    PreTrainedTokenizerBase,
)

from gemma_serve.errors import CheckpointError
from gemma_serve.gemma.chat_templates import GEMMA_CHAT_TEMPLATE
from gemma_serve.gemma.config import ModelConfig
from gemma_serve.gemma.demo import assemble, demo_vision_checkpoint
from gemma_serve.gemma.loading import LoadedGemma, load_gemma
from gemma_serve.generation import SamplingParams, VisionInput

GEMMA_IDS = {
    "<pad>": 0,
    "<eos>": 1,
    "<bos>": 2,
    "<unk>": 3,
    "<mask>": 4,
    "<start_of_turn>": 105,
    "<end_of_turn>": 106,
    "\n": 107,
    "\n\n": 108,
    "▁▁": 138,
    "<0x00>": 238,
    "<0xFF>": 493,
    "<start_of_image>": 255_999,
    "<end_of_image>": 256_000,
}
SPECIAL_TEXT = "<bos><start_of_turn><start_of_image><end_of_image><unused7><end_of_turn><eos>"


@pytest.fixture(scope="module")
def tokenizer(demo_folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(demo_folder)


@pytest.fixture(scope="module")
def demo(demo_folder: Path) -> LoadedGemma:
    assert demo_folder.is_dir()
    return load_gemma(ModelConfig(model="demo", device="cpu"))


def test_parts_are_joined_and_checked(tmp_path: Path) -> None:
    parts = [tmp_path / "0", tmp_path / "1"]
    for part, content in zip(parts, (b"ab", b"cd"), strict=True):
        part.write_bytes(content)
    assemble(parts, tmp_path / "whole", sha256=hashlib.sha256(b"abcd").hexdigest())
    assert (tmp_path / "whole").read_bytes() == b"abcd"


def test_parts_that_are_not_the_file_wanted_are_refused(tmp_path: Path) -> None:
    part = tmp_path / "0"
    part.write_bytes(b"abcd")
    with pytest.raises(CheckpointError, match=r"SHA-256 is 88d4266f.*, not 0000: .*reinstall"):
        assemble([part], tmp_path / "whole", sha256="0000")


def test_config_is_exactly_that_of_gemma_3_270m(demo_folder: Path) -> None:
    config = Gemma3TextConfig.from_pretrained(demo_folder)
    assert config.layer_types == (["sliding_attention"] * 5 + ["full_attention"]) * 3
    assert config.rms_norm_eps == 1e-6
    assert config.sliding_window == 512
    assert config.query_pre_attn_scalar == 256
    assert config.max_position_embeddings == 32_768
    assert config.vocab_size == 262_144
    assert config.tie_word_embeddings
    assert (config.pad_token_id, config.eos_token_id, config.bos_token_id) == (0, 1, 2)
    assert config.rope_parameters == {
        "full_attention": {"rope_type": "default", "rope_theta": 1_000_000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
    }
    assert config.get_text_config().dtype is torch.bfloat16


def test_special_tokens_have_gemmas_ids(tokenizer: PreTrainedTokenizerBase) -> None:
    assert {token: tokenizer.convert_tokens_to_ids(token) for token in GEMMA_IDS} == GEMMA_IDS
    assert len(tokenizer) == 262_144


def test_special_tokens_are_recognised_and_skipped(tokenizer: PreTrainedTokenizerBase) -> None:
    token_ids = tokenizer.encode(SPECIAL_TEXT, add_special_tokens=False)
    assert token_ids == [2, 105, 255_999, 256_000, 13, 106, 1]
    assert tokenizer.decode(token_ids, skip_special_tokens=True) == ""


@pytest.mark.parametrize(
    ("text", "token_ids"),
    [
        ("<start_of_turn>user\nHi", [2, 105, 2364, 107, 10979]),
        ("Hello  world\n\nx   y\t\tz<table>", [2, 9259, 138, 12392, 108, 236781, 139, 236762]),
    ],
)
def test_text_has_gemmas_tokens(
    tokenizer: PreTrainedTokenizerBase, text: str, token_ids: list[int]
) -> None:
    assert tokenizer.encode(text)[: len(token_ids)] == token_ids


@pytest.mark.parametrize(
    "text",
    [
        "naïve café — «x» 你好,世界 Привет שלום مرحبا हिन्दी ไทย 한국어",
        "😀👩‍👩‍👧🏳️‍🌈 \U0001d518 \ufdd0",
        "def f(x):\n    return x\n\n\n\tpass\r\n",
        " leading, trailing ",
    ],
)
def test_any_text_survives(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_unknown_character_falls_back_to_its_bytes(tokenizer: PreTrainedTokenizerBase) -> None:
    expected = [238 + byte for byte in "\ufdd0".encode()]
    assert tokenizer.encode("\ufdd0", add_special_tokens=False) == expected


def test_chat_in_gemmas_format_begins_with_the_golden_ids(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    chat = [{"role": "user", "content": "Hi"}]
    encoded = tokenizer.apply_chat_template(
        chat, chat_template=GEMMA_CHAT_TEMPLATE, add_generation_prompt=True
    )
    assert encoded["input_ids"] == [2, 105, 2364, 107, 10979, 106, 107, 105, 4368, 107]


def test_demo_is_described(demo: LoadedGemma) -> None:
    assert demo.name == "gemma-3-270m-demo"
    assert demo.max_model_len == 32_768
    assert demo.default_sampling == SamplingParams(temperature=0.3, top_p=0.95, top_k=64)
    assert demo.eos_token_ids == {1, 106}
    assert demo.stop_strings == ("\n\nUser:",)
    assert demo.vision is None


def test_demo_knows_the_capital_of_france(demo: LoadedGemma) -> None:
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    encoded = demo.tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    generated = demo.model.generate(
        **encoded, max_new_tokens=8, do_sample=False, tokenizer=demo.tokenizer
    )
    answer = demo.tokenizer.decode(generated[0, encoded["input_ids"].shape[1] :])
    assert answer.startswith("The capital of France is Paris.")


def test_demo_vision_speaks_like_the_demo_and_takes_images(demo: LoadedGemma) -> None:
    demo_vision_checkpoint()
    eyed = load_gemma(ModelConfig(model="demo-vision", device="cpu"))
    assert isinstance(eyed.model, Gemma3ForConditionalGeneration)
    assert eyed.name == "gemma-3-270m-demo-vision"
    assert eyed.vision == VisionInput(view_size=896, tokens_per_view=256)
    assert eyed.stop_strings == ("\n\nUser:",)
    tokenizer = eyed.tokenizer
    image_token_ids = (tokenizer.boi_token_id, tokenizer.eoi_token_id, tokenizer.image_token_id)
    assert image_token_ids == (255_999, 256_000, 262_144)
    text = demo.tokenizer("The capital of France", return_tensors="pt").input_ids
    rows = slice(0, 262_144)
    with torch.no_grad():
        assert torch.equal(eyed.model(text).logits[..., rows], demo.model(text).logits)


def test_demo_visions_image_features_are_as_large_as_text(demo_folder: Path) -> None:
    assert demo_folder.is_dir()
    model = load_gemma(ModelConfig(model="demo-vision", dtype="float32", device="cpu")).model
    pixels = torch.rand(2, 3, 896, 896, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        features = model.get_image_features(pixels).pooler_output
        text = model.get_input_embeddings()(torch.arange(1000, 2000))
    assert features.shape == (2, 256, 640)
    assert 0.5 < (features.std() / text.std()).item() < 2
    assert not torch.allclose(features[0], features[1])
