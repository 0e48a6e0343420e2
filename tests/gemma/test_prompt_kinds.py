"""Raw prompts, truncation, and the variables of chat templates."""

import pytest
from transformers import PreTrainedTokenizerBase

from gemma_serve.engine.sequence import ImageSpan, PromptInputs
from gemma_serve.errors import ContextLengthError, InvalidRequestError
from gemma_serve.gemma.chat_templates import GEMMA_CHAT_TEMPLATE
from gemma_serve.gemma.prompt import PromptBuilder
from gemma_serve.gemma.synthetic_tokenizer import synthetic_tokenizer
from gemma_serve.gemma.truncation import truncate
from gemma_serve.generation import ChatPrompt, TemplateValue, TextPrompt, TokenPrompt
from gemma_serve.messages import ChatMessage, Role, TextPart

BOS, START_OF_TURN, END_OF_TURN, FIRST_BYTE = 2, 105, 106, 238
A, B = FIRST_BYTE + ord("a"), FIRST_BYTE + ord("b")
THINKING_TEMPLATE = GEMMA_CHAT_TEMPLATE + "{{ 'think' if enable_thinking }}{{ level }}"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return synthetic_tokenizer(vocab_size=512, boi_token_id=509, eoi_token_id=510)


def make_builder(
    tokenizer: PreTrainedTokenizerBase, *, template: str = GEMMA_CHAT_TEMPLATE, limit: int = 100
) -> PromptBuilder:
    tokenizer.chat_template = template
    return PromptBuilder(tokenizer, vision=None, image_token_id=None, max_model_len=limit)


def say(text: str, **variables: TemplateValue) -> ChatPrompt:
    message = ChatMessage(Role.USER, (TextPart(text),))
    return ChatPrompt((message,), template_kwargs=tuple(variables.items()))


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        (TextPrompt("ab"), (BOS, A, B)),
        (TextPrompt("<bos>ab"), (BOS, A, B)),
        (TextPrompt("ab", add_bos=False), (A, B)),
        (TextPrompt("a<end_of_turn>"), (BOS, A, END_OF_TURN)),
        (TextPrompt(""), (BOS,)),
        (TokenPrompt((A, BOS, BOS)), (A, BOS, BOS)),
    ],
)
def test_raw_prompt_is_read_as_it_is_with_one_bos(
    tokenizer: PreTrainedTokenizerBase, prompt: TextPrompt | TokenPrompt, expected: tuple[int, ...]
) -> None:
    assert make_builder(tokenizer).build(prompt) == PromptInputs(expected)


def test_empty_prompt_without_bos_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(InvalidRequestError, match="no tokens") as caught:
        make_builder(tokenizer).build(TextPrompt("", add_bos=False))
    assert caught.value.param == "prompt"


@pytest.mark.parametrize("prompt", [TextPrompt("a" * 99), TokenPrompt((A,) * 100)])
def test_too_long_a_raw_prompt_is_told_by_its_own_name(
    tokenizer: PreTrainedTokenizerBase, prompt: TextPrompt | TokenPrompt
) -> None:
    with pytest.raises(ContextLengthError, match=r"has 100 tokens .* shorten the prompt") as caught:
        make_builder(tokenizer).build(prompt)
    assert caught.value.param == "prompt"


def test_truncation_keeps_the_end_of_a_prompt_that_would_not_fit(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    builder = make_builder(tokenizer)
    assert builder.build(TextPrompt("a" * 300 + "b"), truncate_to=2).token_ids == (A, B)
    assert builder.build(TextPrompt("ab"), truncate_to=50).token_ids == (BOS, A, B)
    assert len(builder.build(say("a" * 300), truncate_to=20).token_ids) == 20


def test_prompt_of_many_contexts_is_refused_before_it_is_tokenized(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    with pytest.raises(ContextLengthError):
        make_builder(tokenizer).build(TextPrompt("a" * 10_000_000), truncate_to=2)


def test_truncation_moves_images_and_never_cuts_one() -> None:
    images = (ImageSpan(2, 3, b"first"), ImageSpan(7, 3, b"second"))
    inputs = PromptInputs(tuple(range(12)), images)
    assert truncate(inputs, 12) == inputs
    assert truncate(inputs, 5) == PromptInputs((7, 8, 9, 10, 11), (ImageSpan(0, 3, b"second"),))
    with pytest.raises(InvalidRequestError, match="cut an image"):
        truncate(inputs, 4)


def test_variables_reach_the_template(tokenizer: PreTrainedTokenizerBase) -> None:
    builder = make_builder(tokenizer, template=THINKING_TEMPLATE)
    plain = builder.build(say("a")).token_ids
    thinking = builder.build(say("a", enable_thinking=True, level=7)).token_ids
    assert thinking[: len(plain)] == plain
    assert tokenizer.decode(list(thinking[len(plain) :])) == "think7"


@pytest.mark.parametrize("name", ["messages", "add_generation_prompt", "tokenize", "bos_token"])
def test_variables_that_the_server_sets_are_refused(
    tokenizer: PreTrainedTokenizerBase, name: str
) -> None:
    with pytest.raises(InvalidRequestError, match="the server's to set") as caught:
        make_builder(tokenizer).build(say("a", **{name: True}))
    assert caught.value.param == f"chat_template_kwargs.{name}"


def test_variables_cannot_write_control_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(InvalidRequestError, match="control tokens"):
        make_builder(tokenizer).build(say("a", level="<end_of_turn>"))


def test_variables_that_break_the_template_are_the_clients_mistake(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    template = GEMMA_CHAT_TEMPLATE + "{% if level %}{{ raise_exception('no levels') }}{% endif %}"
    builder = make_builder(tokenizer, template=template)
    with pytest.raises(InvalidRequestError, match="no levels") as caught:
        builder.build(say("a", level="high"))
    assert caught.value.param == "chat_template_kwargs"


def test_last_message_of_the_assistant_may_be_answered(tokenizer: PreTrainedTokenizerBase) -> None:
    messages = (
        ChatMessage(Role.USER, (TextPart("a"),)),
        ChatMessage(Role.ASSISTANT, (TextPart("b"),)),
    )
    builder = make_builder(tokenizer)
    continued = builder.build(ChatPrompt(messages, continue_final_message=True)).token_ids
    answered = builder.build(ChatPrompt(messages)).token_ids
    assert continued[-1] == B
    assert answered[: len(continued)] == continued
    assert tokenizer.decode(list(answered[len(continued) :])) == (
        "<end_of_turn>\n<start_of_turn>model\n"
    )
