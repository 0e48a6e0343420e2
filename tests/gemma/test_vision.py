"""The tower looks at each distinct image once, several at a time, and remembers some."""

import pytest
import torch
from torch import Tensor, nn
from transformers import Gemma3ForConditionalGeneration

from gemma_serve.engine.sequence import ImageSpan
from gemma_serve.gemma.projections import activation_dtype
from gemma_serve.gemma.vision import MAX_VIEWS_PER_PASS, VisionEncoder
from tests.tiny import IMAGE_SIZE, tiny_vision_model

BYTES_PER_IMAGE = 4 * 32 * 4  # tokens, hidden size, float32


class CountingEncoder(VisionEncoder):
    """Notes how many views each pass through the tower had."""

    def __init__(self, model: Gemma3ForConditionalGeneration, *, cache_bytes: int = 0) -> None:
        super().__init__(
            model, image_mean=(0.5, 0.4, 0.3), image_std=(0.5, 0.6, 0.7), cache_bytes=cache_bytes
        )
        self.passes: list[int] = []
        model.model.vision_tower.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, _: nn.Module, __: tuple[()], kwargs: dict[str, Tensor]) -> None:
        self.passes.append(len(kwargs["pixel_values"]))


@pytest.fixture(scope="module")
def model() -> Gemma3ForConditionalGeneration:
    return tiny_vision_model()


def picture(seed: int) -> ImageSpan:
    generator = torch.Generator().manual_seed(seed)
    view = torch.randint(256, (IMAGE_SIZE * IMAGE_SIZE * 3,), generator=generator)
    return ImageSpan(start=0, num_tokens=4, view=bytes(view.tolist()))


@torch.inference_mode()
def test_features_are_what_transformers_computes_of_normalised_pixels(
    model: Gemma3ForConditionalGeneration,
) -> None:
    image = picture(0)
    rows = torch.frombuffer(bytearray(image.view), dtype=torch.uint8).view(28, 28, 3)
    mean, std = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.5, 0.6, 0.7])
    pixels = ((rows / 255 - mean) / std).permute(2, 0, 1)
    expected = model.get_image_features(pixels[None]).pooler_output[0]
    (features,) = CountingEncoder(model).encode([image])
    assert features.shape == (4, 32)
    torch.testing.assert_close(features, expected)


@torch.inference_mode()
def test_images_of_a_step_are_computed_together_in_bounded_passes(
    model: Gemma3ForConditionalGeneration,
) -> None:
    encoder = CountingEncoder(model)
    images = [picture(seed) for seed in range(2 * MAX_VIEWS_PER_PASS + 1)]
    together = encoder.encode(images)
    assert encoder.passes == [MAX_VIEWS_PER_PASS, MAX_VIEWS_PER_PASS, 1]
    for image, features in zip(images, together, strict=True):
        torch.testing.assert_close(features, encoder.encode([image])[0])


@torch.inference_mode()
def test_an_image_that_stands_in_a_step_twice_is_computed_once(
    model: Gemma3ForConditionalGeneration,
) -> None:
    encoder = CountingEncoder(model)
    first, other, again = encoder.encode([picture(1), picture(2), picture(1)])
    assert encoder.passes == [2]
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@torch.inference_mode()
def test_an_image_that_comes_again_is_remembered_as_far_as_memory_goes(
    model: Gemma3ForConditionalGeneration,
) -> None:
    encoder = CountingEncoder(model, cache_bytes=2 * BYTES_PER_IMAGE)
    (cold,) = encoder.encode([picture(1)])
    encoder.encode([picture(2)])
    (warm,) = encoder.encode([picture(1)])
    assert encoder.passes == [1, 1]
    assert torch.equal(warm, cold)
    encoder.encode([picture(3)])  # 2 was used longest ago
    encoder.encode([picture(1), picture(2)])
    assert encoder.passes == [1, 1, 1, 1]


@torch.inference_mode()
def test_a_step_with_more_images_than_the_cache_holds_gets_them_all(
    model: Gemma3ForConditionalGeneration,
) -> None:
    encoder = CountingEncoder(model, cache_bytes=BYTES_PER_IMAGE)
    images = [picture(seed) for seed in range(3)]
    expected = CountingEncoder(model).encode(images)
    encoder.encode(images)
    assert all(
        torch.equal(features, other)
        for features, other in zip(encoder.encode(images), expected, strict=True)
    )


@torch.inference_mode()
def test_remembered_features_do_not_hold_the_memory_of_their_neighbours(
    model: Gemma3ForConditionalGeneration,
) -> None:
    encoder = CountingEncoder(model, cache_bytes=BYTES_PER_IMAGE)
    for features in encoder.encode([picture(1), picture(2)]):
        assert features.untyped_storage().nbytes() == BYTES_PER_IMAGE


def test_spans_with_the_same_view_have_the_same_digest_wherever_they_stand() -> None:
    view = picture(1).view
    assert ImageSpan(3, 4, view).digest == ImageSpan(9, 4, view).digest
    assert ImageSpan(3, 4, view).digest != picture(2).digest


@torch.inference_mode()
def test_the_tower_computes_in_what_the_machine_has_arithmetic_for() -> None:
    model = tiny_vision_model().to(torch.bfloat16)
    (features,) = CountingEncoder(model).encode([picture(0)])
    patches = model.model.vision_tower.embeddings.patch_embedding.weight
    assert patches.dtype == activation_dtype(torch.bfloat16, torch.device("cpu"))
    assert features.dtype == torch.bfloat16
