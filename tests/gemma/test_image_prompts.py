"""Images in prompts stand where transformers' own processor puts them."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers import Gemma3Processor, PreTrainedTokenizerBase
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

from gemma_serve.engine.sequence import ImageSpan
from gemma_serve.errors import ContextLengthError, InvalidRequestError
from gemma_serve.gemma.prompt import PromptBuilder
from gemma_serve.gemma.synthetic_tokenizer import synthetic_tokenizer
from gemma_serve.messages import ImagePart
from tests.gemma.prompt_building import (
    IMAGE,
    SOFT,
    STRICT_TEMPLATE,
    VISION,
    build,
    make_builder,
    message,
    strict_tokenizer,
    user,
)

OTHER_IMAGE = ImagePart((b"other",))
CROPPED_IMAGE = ImagePart((b"original", b"left", b"right"))


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return strict_tokenizer()


@pytest.fixture(scope="module")
def builder(tokenizer: PreTrainedTokenizerBase) -> PromptBuilder:
    return make_builder(tokenizer)


@pytest.fixture(scope="module")
def processor(tokenizer: PreTrainedTokenizerBase) -> Any:  # transformers is untyped here
    image_processor = Gemma3ImageProcessorPil(size={"height": 28, "width": 28})
    return Gemma3Processor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        chat_template=STRICT_TEMPLATE,
        image_seq_length=VISION.tokens_per_view,
    )


def processed(processor: Any, contents: Sequence[str | ImagePart], **kwargs: Any) -> Any:
    """What transformers makes of the same content, with pictures for the views."""
    parts = [
        {"type": "text", "text": c} if isinstance(c, str) else {"type": "image"} for c in contents
    ]
    text = processor.apply_chat_template(
        [{"role": "user", "content": parts}], tokenize=False, add_generation_prompt=True
    )
    images = [picture(part) for part in contents if isinstance(part, ImagePart)]
    return processor(text=text, images=images, add_special_tokens=False, **kwargs)["input_ids"][0]


def picture(part: ImagePart) -> Image.Image:
    """Twice as wide as high where pan-and-scan should cut it in two."""
    return Image.fromarray(np.zeros((28, 28 * max(1, len(part.views) - 1), 3), dtype=np.uint8))


CONTENTS: list[tuple[str | ImagePart, ...]] = [
    (IMAGE,),
    (IMAGE, "after"),
    ("before", IMAGE),
    ("before ", IMAGE, " after"),
    ("before\n\n", IMAGE, "\n\nafter"),
    (IMAGE, OTHER_IMAGE),
    ("one", IMAGE, "two", OTHER_IMAGE, "three", IMAGE),
]


@pytest.mark.parametrize("contents", CONTENTS)
def test_image_prompt_is_the_one_of_transformers(
    builder: PromptBuilder, processor: Any, contents: Sequence[str | ImagePart]
) -> None:
    prompt = build(builder, [user(*contents)])
    assert list(prompt.token_ids) == list(processed(processor, contents))


@pytest.mark.parametrize(
    "contents",
    [(CROPPED_IMAGE,), ("Read ", CROPPED_IMAGE, IMAGE, "this", CROPPED_IMAGE)],
)
def test_cropped_image_prompt_is_the_one_of_transformers(
    builder: PromptBuilder, processor: Any, contents: Sequence[str | ImagePart]
) -> None:
    """ms-swift#3972, transformers#36864, trl#7090: more features than soft tokens."""
    prompt = build(builder, [user(*contents)])
    assert list(prompt.token_ids) == list(
        processed(
            processor,
            contents,
            do_pan_and_scan=True,
            pan_and_scan_min_crop_size=8,
            pan_and_scan_max_num_crops=4,
            pan_and_scan_min_ratio_to_activate=1.2,
        )
    )


def test_spans_name_the_soft_tokens_and_the_views_in_order(builder: PromptBuilder) -> None:
    prompt = build(builder, [user("see", CROPPED_IMAGE), message("assistant", "ok"), user(IMAGE)])
    assert [span.view for span in prompt.images] == [b"original", b"left", b"right", b"whole"]
    assert all(span.num_tokens == VISION.tokens_per_view for span in prompt.images)
    covered = [i for span in prompt.images for i in range(span.start, span.end)]
    assert covered == [i for i, token_id in enumerate(prompt.token_ids) if token_id == SOFT]
    assert prompt.images[0] == ImageSpan(prompt.token_ids.index(SOFT), 4, b"original")


def test_image_for_a_text_model_is_refused_where_it_stands(tokenizer: Any) -> None:
    builder = make_builder(tokenizer, vision=None)
    with pytest.raises(InvalidRequestError, match="text only") as error:
        build(builder, [user("hi"), user("see", IMAGE)])
    assert error.value.param == "messages[1].content"


def test_template_without_a_place_for_images_is_no_way_to_lose_them() -> None:
    tokenizer = synthetic_tokenizer(vocab_size=512, boi_token_id=509, eoi_token_id=510)
    tokenizer.chat_template = (
        "{% for m in messages %}{% for part in m.content %}{{ part.text }}{% endfor %}{% endfor %}"
    )
    with pytest.raises(InvalidRequestError, match="no place for images"):
        build(make_builder(tokenizer), [user("see", IMAGE)])


def test_too_many_images_are_refused_by_their_number(tokenizer: Any) -> None:
    builder = make_builder(tokenizer, max_model_len=1000)
    with pytest.raises(ContextLengthError, match="maximum context length is 1000 tokens"):
        build(builder, [user(*[IMAGE] * 250)])
