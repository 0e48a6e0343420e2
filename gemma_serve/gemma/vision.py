"""From views of images to the soft tokens that stand for them."""

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor
from transformers import Gemma3ForConditionalGeneration

from gemma_serve.engine.sequence import ImageSpan
from gemma_serve.engine.transfers import upload
from gemma_serve.gemma.feature_cache import FeatureCache
from gemma_serve.gemma.projections import activation_dtype

MAX_VIEWS_PER_PASS: Final = 4
"""Views that the tower sees at once. Each takes about 0.1 GiB on the way through, and one alone, of
4,096 patches, is work enough for a GPU."""


class VisionEncoder:
    """The vision tower and projector of one model. Used by the engine thread."""

    def __init__(
        self,
        model: Gemma3ForConditionalGeneration,
        *,
        image_mean: Sequence[float],
        image_std: Sequence[float],
        cache_bytes: int,
    ) -> None:
        """``cache_bytes``: memory for features of images that may come again.

        On a CPU that would emulate bfloat16 the tower's weights become float32: 0.8 GB more.
        """
        self._model = model
        self._cache = FeatureCache(cache_bytes)
        self._view_size: int = model.config.vision_config.image_size
        patches = model.model.vision_tower.embeddings.patch_embedding.weight
        self._device = patches.device
        self._dtype = activation_dtype(patches.dtype, patches.device)
        for part in (model.model.vision_tower, model.model.multi_modal_projector):
            part.to(self._dtype)
        self._embeddings = model.get_input_embeddings().weight
        # Normalisation of bytes in one multiplication and addition: (x / 255 - mean) / std.
        std = torch.tensor(image_std, device=self._device)[:, None, None]
        self._scale = 1 / (255 * std)
        self._shift = -torch.tensor(image_mean, device=self._device)[:, None, None] / std

    def encode(self, images: Sequence[ImageSpan]) -> list[Tensor]:
        """Features of each image: ``[num_tokens, hidden]`` where the language model begins.

        For reading only. Images with the same content are looked at once, now and while the cache
        remembers them.
        """
        views = {image.digest: image.view for image in images}
        known = {digest: self._cache.get(digest) for digest in views}
        features = {digest: found for digest, found in known.items() if found is not None}
        missing = [digest for digest in views if digest not in features]
        for start in range(0, len(missing), MAX_VIEWS_PER_PASS):
            digests = missing[start : start + MAX_VIEWS_PER_PASS]
            of_views = self._compute([views[digest] for digest in digests])
            for digest, of_view in zip(digests, of_views, strict=True):
                features[digest] = of_view.clone()  # of its own: the pass's memory must go
                self._cache.put(digest, features[digest])
        return [features[image.digest] for image in images]

    def _compute(self, views: Sequence[bytes]) -> Tensor:
        """Features of ``views`` (``messages.ImagePart``): ``[num_views, num_tokens, hidden]``."""
        size = self._view_size
        pixels = torch.stack([torch.frombuffer(bytearray(v), dtype=torch.uint8) for v in views])
        pixels = upload(pixels, self._device).view(-1, size, size, 3).permute(0, 3, 1, 2)
        normalized = pixels * self._scale + self._shift  # [num_views, 3, size, size] float32
        outputs = self._model.get_image_features(normalized.to(self._dtype))
        features: Tensor = outputs.pooler_output
        return features.to(self._embeddings)
