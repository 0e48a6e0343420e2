"""From views of images to the soft tokens that stand for them."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import Gemma3ForConditionalGeneration


class VisionEncoder:
    """The vision tower and projector of one model. Used by the engine thread."""

    def __init__(
        self,
        model: Gemma3ForConditionalGeneration,
        *,
        image_mean: Sequence[float],
        image_std: Sequence[float],
    ) -> None:
        self._model = model
        self._view_size: int = model.config.vision_config.image_size
        weight = model.model.multi_modal_projector.mm_input_projection_weight
        self._device, self._dtype = weight.device, weight.dtype
        # Normalisation of bytes in one multiplication and addition: (x / 255 - mean) / std.
        std = torch.tensor(image_std, device=self._device)[:, None, None]
        self._scale = 1 / (255 * std)
        self._shift = -torch.tensor(image_mean, device=self._device)[:, None, None] / std

    def encode(self, views: Sequence[bytes]) -> Tensor:
        """Features of ``views`` (``messages.ImagePart``): ``[num_views, num_tokens, hidden]``."""
        size = self._view_size
        pixels = torch.stack([torch.frombuffer(bytearray(v), dtype=torch.uint8) for v in views])
        pixels = pixels.to(self._device).view(-1, size, size, 3).permute(0, 3, 1, 2)
        normalized = pixels * self._scale + self._shift  # [num_views, 3, size, size] float32
        outputs = self._model.get_image_features(normalized.to(self._dtype))
        features: Tensor = outputs.pooler_output
        return features
