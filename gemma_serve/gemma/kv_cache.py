"""The memory that holds keys and values, and where each layer's part of it lies."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor
from transformers import Gemma3TextConfig

from gemma_serve.gemma.quantization.fp8 import FP8, FP8_MAX

_MAX_EMPTY_SHARE: Final = 0.1
_MAX_GROUPS: Final = 16
"""Each costs the host time in every step."""


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
    layers, equally large. 27B has smaller ones, 2 of 5 full layers and 11 of up to 5 sliding ones,
    because 52 sliding layers would leave many places in groups of 10 empty.

    A *plane* is a tensor with room for one layer in every block; the layers of different groups
    that stand at the same rank share a plane, and a plane lies on one device.
    """

    windows: tuple[int | None, ...]
    """Per group: tokens that a query sees, itself included; ``None`` for all."""
    places: tuple[LayerPlace, ...]
    """Per layer."""
    plane_devices: tuple[torch.device, ...]
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    """What the planes hold."""

    @classmethod
    def of(
        cls,
        config: Gemma3TextConfig,
        layer_devices: Sequence[torch.device],
        dtype: torch.dtype,
    ) -> "CacheLayout":
        """The layout for a model whose layer ``i`` is on ``layer_devices[i]``.

        The fewest groups of which no kind leaves more than a tenth of its places empty, or else
        those that leave the fewest empty.
        """
        layer_windows = [
            config.sliding_window if layer_type == "sliding_attention" else None
            for layer_type in config.layer_types
        ]
        num_layers = Counter(layer_windows)
        smallest = min(num_layers.values())
        layouts: list[CacheLayout] = []
        for group_size in range(smallest, 0, -1):
            windows = _windows_of_groups(num_layers, group_size)
            if layouts and len(windows) > _MAX_GROUPS:
                break
            places, plane_devices = _deal(layer_windows, layer_devices, windows)
            layout = cls(
                windows=windows,
                places=places,
                plane_devices=plane_devices,
                num_kv_heads=config.num_key_value_heads,
                head_dim=config.head_dim,
                dtype=dtype,
            )
            if layout.empty_share(num_layers) <= _MAX_EMPTY_SHARE:
                return layout
            layouts.append(layout)
        return min(layouts, key=lambda layout: layout.empty_share(num_layers))

    def empty_share(self, num_layers: Mapping[int | None, int]) -> float:
        """How much of their places the groups of one kind leave empty, at worst.

        ``num_layers``: per window.
        """
        return max(
            1 - num / (self.windows.count(window) * len(self.plane_devices))
            for window, num in num_layers.items()
        )

    def one_layer_per_window(self) -> "CacheLayout":
        """A small layout, on the first device, in which each window is that of one layer."""
        windows = tuple(dict.fromkeys(self.windows))
        return replace(
            self,
            windows=windows,
            places=tuple(LayerPlace(group, 0) for group in range(len(windows))),
            plane_devices=self.plane_devices[:1],
        )

    def bytes_per_block(self, block_size: int) -> int:
        """Memory of one block: keys and values in every plane."""
        per_token = 2 * self.num_kv_heads * self.head_dim * self.dtype.itemsize
        return len(self.plane_devices) * block_size * per_token


def _windows_of_groups(
    num_layers: Mapping[int | None, int], group_size: int
) -> tuple[int | None, ...]:
    """Per group of at most ``group_size`` layers, full attention first."""
    return tuple(
        window
        for window in sorted(num_layers, key=lambda window: window is not None)
        for _ in range(-(-num_layers[window] // group_size))
    )


def _deal(
    layer_windows: Sequence[int | None],
    layer_devices: Sequence[torch.device],
    windows: Sequence[int | None],
) -> tuple[tuple[LayerPlace, ...], tuple[torch.device, ...]]:
    """A place for each layer among the groups of its window, and the planes' devices."""
    groups_of = {w: [g for g, window in enumerate(windows) if window == w] for w in set(windows)}
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
    return tuple(places), tuple(plane_devices)


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
        self._keys_and_values = [(plane[0], plane[1]) for plane in self._planes]

    def plane(self, layer: int) -> tuple[Tensor, Tensor]:
        """Where the layer's keys and values lie: ``[num_slots, num_kv_heads * head_dim]`` each."""
        return self._keys_and_values[self.layout.places[layer].plane]

    def write(self, layer: int, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """Store ``keys`` and ``values`` ``[num_tokens, num_kv_heads, head_dim]`` at ``slots``."""
        for half, new in zip(self._halves(layer), (keys, values), strict=True):
            half.index_copy_(0, slots, self._stored(new.flatten(1)))

    def read(self, layer: int, slots: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values at ``slots``: ``[*slots.shape, num_kv_heads, head_dim]`` each."""
        shape = (*slots.shape, self.layout.num_kv_heads, self.layout.head_dim)
        flat = slots.reshape(-1)
        stored = (half.index_select(0, flat) for half in self._halves(layer))
        keys, values = (rows.view(self.layout.dtype).view(shape).to(dtype) for rows in stored)
        return keys, values

    def _halves(self, layer: int) -> Tensor:
        """``[2, num_slots, num_kv_heads * head_dim]``; float8 as bytes, which torch can index."""
        plane = self._planes[self.layout.places[layer].plane]
        return plane.view(torch.uint8) if self.layout.dtype == FP8 else plane

    def _stored(self, rows: Tensor) -> Tensor:
        if self.layout.dtype != FP8:
            return rows.to(self.layout.dtype)
        return rows.clamp(-FP8_MAX, FP8_MAX).to(FP8).view(torch.uint8)  # beyond it would be NaN
