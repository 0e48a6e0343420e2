from typing import Any

import pytest

from gemma_serve.gemma.chat_templates import GEMMA_CHAT_TEMPLATE, TRANSCRIPT_CHAT_TEMPLATE
from tests.tiny import tiny_tokenizer

SYSTEM = {"role": "system", "content": " Be kind. "}
USER = {"role": "user", "content": "Hi "}
ASSISTANT = {"role": "assistant", "content": " Hello!\n"}
WITH_IMAGE = {
    "role": "user",
    "content": [
        {"type": "text", "text": " Look: "},
        {"type": "image"},
        {"type": "text", "text": "What is it?"},
    ],
}
PREAMBLE = (
    "<bos>A chat between a curious user and a friendly assistant who answers every question in "
    "full sentences.\n\n"
)
EXAMPLE = (
    "User:\nWhat is the largest planet in the solar system?\n\n"
    "Assistant:\nThe largest planet in the solar system is Jupiter.\n\n"
)


def render(template: str, *messages: dict[str, Any], **options: bool) -> str:
    text: str = tiny_tokenizer().apply_chat_template(
        list(messages), chat_template=template, tokenize=False, **options
    )
    return text


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        (
            [USER],
            "<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n",
        ),
        (
            [SYSTEM, USER, ASSISTANT, WITH_IMAGE],
            "<bos><start_of_turn>user\nBe kind.\n\nHi<end_of_turn>\n"
            "<start_of_turn>model\nHello!<end_of_turn>\n"
            "<start_of_turn>user\nLook:<start_of_image>What is it?<end_of_turn>\n"
            "<start_of_turn>model\n",
        ),
    ],
    ids=["one turn", "all kinds"],
)
def test_gemma_template(messages: list[dict[str, Any]], expected: str) -> None:
    assert render(GEMMA_CHAT_TEMPLATE, *messages, add_generation_prompt=True) == expected


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([USER], PREAMBLE + EXAMPLE + "User:\nHi\n\nAssistant:\n"),
        (
            [SYSTEM, USER, ASSISTANT, WITH_IMAGE],
            PREAMBLE + "Be kind.\n\n" + EXAMPLE + "User:\nHi\n\nAssistant:\nHello!\n\n"
            "User:\nLook:<start_of_image>What is it?\n\nAssistant:\n",
        ),
    ],
    ids=["one turn", "all kinds"],
)
def test_transcript_template(messages: list[dict[str, Any]], expected: str) -> None:
    assert render(TRANSCRIPT_CHAT_TEMPLATE, *messages, add_generation_prompt=True) == expected


@pytest.mark.parametrize(
    ("template", "end"),
    [
        (GEMMA_CHAT_TEMPLATE, "Hi<end_of_turn>\n<start_of_turn>model\nHello!"),
        (TRANSCRIPT_CHAT_TEMPLATE, "Hi\n\nAssistant:\nHello!"),
    ],
)
def test_final_assistant_message_can_be_continued(template: str, end: str) -> None:
    assert render(template, USER, ASSISTANT, continue_final_message=True).endswith(end)


@pytest.mark.parametrize("template", [GEMMA_CHAT_TEMPLATE, TRANSCRIPT_CHAT_TEMPLATE])
def test_there_is_one_bos(template: str) -> None:
    assert render(template, SYSTEM, USER, ASSISTANT, USER).count("<bos>") == 1
