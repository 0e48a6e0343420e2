"""The memory that holds keys and values, and where each layer's part of it lies."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Gemma3TextConfig


@dataclass(frozen=True, slots=True)
class LayerPlace:
    """``group``: whose blocks the layer reads. ``plane``: its storage; layers of other groups share
    it, in other blocks."""

    group: int
    plane: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheLayout:
    """How layers share blocks.

    Layers with the same window are dealt into groups, so that one block covers one group. Gemma 3
    has five sliding layers to a full one: one group of all full layers and about five of sliding
    layers, equally large. A *plane* is a tensor with room for one layer in every block; the layers
    of different groups that stand at the same rank share a plane, and a plane lies on one device.
    """

    windows: tuple[int | None, ...]
    """Per group: tokens that a query sees, itself included; ``None`` for all."""
    places: tuple[LayerPlace, ...]
    """Per layer."""
    plane_devices: tuple[torch.device, ...]
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype

    @classmethod
    def of(
        cls, config: Gemma3TextConfig, layer_devices: Sequence[torch.device], dtype: torch.dtype
    ) -> "CacheLayout":
        """The layout for a model whose layer ``i`` is on ``layer_devices[i]``."""
        layer_windows = [
            config.sliding_window if layer_type == "sliding_attention" else None
            for layer_type in config.layer_types
        ]
        num_layers = Counter(layer_windows)
        smallest = min(num_layers.values())
        windows: list[int | None] = []
        groups_of: dict[int | None, list[int]] = {}
        for window in sorted(num_layers, key=lambda w: w is not None):  # full layers first
            num_groups = -(-num_layers[window] // smallest)
            groups_of[window] = list(range(len(windows), len(windows) + num_groups))
            windows += [window] * num_groups
        plane_devices: list[torch.device] = []
        places = [LayerPlace(0, 0)] * len(layer_windows)
        for device in dict.fromkeys(layer_devices):
            num_planes_before = len(plane_devices)
            ranks: Counter[int | None] = Counter()
            for layer, window in enumerate(layer_windows):
                if layer_devices[layer] == device:
                    groups = groups_of[window]
                    plane, group = divmod(ranks[window], len(groups))
                    places[layer] = LayerPlace(groups[group], num_planes_before + plane)
                    ranks[window] += 1
            num_planes = max(-(-n // len(groups_of[window])) for window, n in ranks.items())
            plane_devices += [device] * num_planes
        return cls(
            windows=tuple(windows),
            places=tuple(places),
            plane_devices=tuple(plane_devices),
            num_kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            dtype=dtype,
        )

    def bytes_per_block(self, block_size: int) -> int:
        """Memory of one block: keys and values in every plane."""
        per_token = 2 * self.num_kv_heads * self.head_dim * self.dtype.itemsize
        return len(self.plane_devices) * block_size * per_token


class KVCache:
    """The planes. A *slot* is the place of one token: ``block * block_size + offset``."""

    def __init__(self, layout: CacheLayout, *, num_blocks: int, block_size: int) -> None:
        self.layout = layout
        self.num_blocks = num_blocks
        self.block_size = block_size
        shape = (2, num_blocks * block_size, layout.num_kv_heads * layout.head_dim)
        # Zeros cost nothing until they are touched, and no later mask can meet a stray NaN.
        self._planes = [
            torch.zeros(shape, dtype=layout.dtype, device=device) for device in layout.plane_devices
        ]

    def write(self, layer: int, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """Store ``keys`` and ``values`` ``[num_tokens, num_kv_heads, head_dim]`` at ``slots``."""
        plane = self._planes[self.layout.places[layer].plane]
        plane[0].index_copy_(0, slots, keys.flatten(1))
        plane[1].index_copy_(0, slots, values.flatten(1))

    def read(self, layer: int, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values at ``slots``: ``[*slots.shape, num_kv_heads, head_dim]`` each."""
        plane = self._planes[self.layout.places[layer].plane]
        shape = (*slots.shape, self.layout.num_kv_heads, self.layout.head_dim)
        flat = slots.reshape(-1)
        return plane[0].index_select(0, flat).view(shape), plane[1].index_select(0, flat).view(
            shape
        )
