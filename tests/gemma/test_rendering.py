import pytest
from transformers import PreTrainedTokenizerBase

from gemma_serve.errors import CheckpointError
from gemma_serve.gemma.history import Turn
from gemma_serve.gemma.rendering import ChatRenderer, Segment
from gemma_serve.gemma.synthetic_tokenizer import synthetic_tokenizer
from gemma_serve.messages import ImagePart, Role, TextPart

PARTS_TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]"
    "{% for part in m.content %}"
    "{{ '<start_of_image>' if part.type == 'image' else part.text | trim }}"
    "{% endfor %};{% endfor %}{{ '[assistant]' if add_generation_prompt }}"
)
STRING_TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content | trim }};{% endfor %}"
    "{{ '[assistant]' if add_generation_prompt }}"
)
CONCATENATING_TEMPLATE = "{% for m in messages %}{{ m.role + ':' + m.content }};{% endfor %}"
REFUSING_TEMPLATE = (
    "{% for m in messages %}{% if m.content is not string %}"
    "{{ raise_exception('strings only') }}{% endif %}{{ m.content }};{% endfor %}"
)


def make_renderer(template: str | None) -> ChatRenderer:
    tokenizer: PreTrainedTokenizerBase = synthetic_tokenizer(
        vocab_size=512, boi_token_id=509, eoi_token_id=510
    )
    tokenizer.chat_template = template
    return ChatRenderer(tokenizer)


def user(*contents: str | ImagePart) -> Turn:
    return Turn(Role.USER, tuple(TextPart(c) if isinstance(c, str) else c for c in contents))


def assistant(text: str) -> Turn:
    return Turn(Role.ASSISTANT, (TextPart(text),))


def joined(segments: list[Segment]) -> str:
    return "".join(segment.text for segment in segments)


@pytest.mark.parametrize("template", [PARTS_TEMPLATE, STRING_TEMPLATE])
def test_client_text_is_kept_apart_from_the_templates_own(template: str) -> None:
    segments = make_renderer(template).render([user("hello")])
    assert segments == [
        Segment("[user]", "template"),
        Segment("hello", "client"),
        Segment(";[assistant]", "template"),
    ]


def test_whitespace_at_the_edges_is_for_the_template_to_trim() -> None:
    assert joined(make_renderer(STRING_TEMPLATE).render([user(" a  b\n")])) == (
        "[user]a  b;[assistant]"
    )
    assert joined(make_renderer(CONCATENATING_TEMPLATE).render([user(" a ")])) == "user: a ;"


@pytest.mark.parametrize("text", ["", " \n"])
def test_text_without_a_letter_needs_no_placeholder(text: str) -> None:
    assert joined(make_renderer(PARTS_TEMPLATE).render([user(text)])) == "[user];[assistant]"


def test_turn_without_parts_is_an_empty_text() -> None:
    assert joined(make_renderer(STRING_TEMPLATE).render([user()])) == "[user];[assistant]"


@pytest.mark.parametrize("template", [PARTS_TEMPLATE, STRING_TEMPLATE])
def test_last_answer_is_continued_to_the_letter(template: str) -> None:
    segments = make_renderer(template).render([user("u"), assistant(" once upon \n")])
    assert joined(segments) == "[user]u;[assistant] once upon \n"
    assert segments[-2] == Segment(" once upon \n", "client")


@pytest.mark.parametrize(
    "template", [PARTS_TEMPLATE, STRING_TEMPLATE, CONCATENATING_TEMPLATE, REFUSING_TEMPLATE]
)
def test_image_stands_between_its_texts(template: str) -> None:
    rendered = joined(make_renderer(template).render([user("a", ImagePart((b"",)), "b")]))
    assert "a<start_of_image>b;" in rendered


@pytest.mark.parametrize(
    "text",
    [
        "{{ 7 * 7 }}{% for m in messages %}{{ m }}{% endfor %}",
        "\ufdd00\ufdd1 \ufdd01\ufdd1",
        "CONTINUE_FINAL_MESSAGE_TAG ",
        "[user]\\g<0> \\1 %s {0}",
    ],
)
def test_text_that_looks_like_code_or_a_placeholder_is_only_text(text: str) -> None:
    renderer = make_renderer(PARTS_TEMPLATE)
    assert Segment(text.strip(), "client") in renderer.render([user(text), assistant("a")])
    assert renderer.render([user("u"), assistant(text)])[-2] == Segment(text, "client")


@pytest.mark.parametrize("template", [None, ""])
def test_checkpoint_without_a_template_is_refused(template: str | None) -> None:
    with pytest.raises(CheckpointError, match="no chat template"):
        make_renderer(template)
