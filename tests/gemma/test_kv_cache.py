import pytest
import torch

from gemma_serve.engine.block_manager import max_blocks_held
from gemma_serve.gemma.dummy import dummy_config
from gemma_serve.gemma.kv_cache import CacheLayout, KVCache
from tests.tiny import tiny_text_model

CPU = torch.device("cpu")


def layout_of(size: str, *, num_devices: int = 1) -> CacheLayout:
    config = dummy_config(size).get_text_config()
    num_layers = config.num_hidden_layers
    devices = [torch.device("meta", i * num_devices // num_layers) for i in range(num_layers)]
    return CacheLayout.of(config, devices, torch.bfloat16)


@pytest.mark.parametrize(
    ("size", "num_groups", "num_planes"),
    [("270m", 6, 3), ("1b", 7, 4), ("4b", 7, 5), ("12b", 6, 8), ("27b", 13, 5)],
)
def test_few_groups_of_nearly_equal_size(size: str, num_groups: int, num_planes: int) -> None:
    layout = layout_of(size)
    assert layout.windows[0] is None
    assert layout.windows[-1] is not None
    assert len(layout.windows) == num_groups
    assert len(layout.plane_devices) == num_planes


@pytest.mark.parametrize("num_devices", [1, 2, 3])
@pytest.mark.parametrize("size", ["270m", "1b", "4b", "12b", "27b"])
def test_every_layer_has_a_place_of_its_own_on_its_device(size: str, num_devices: int) -> None:
    layout = layout_of(size, num_devices=num_devices)
    assert len(set(layout.places)) == len(layout.places)
    config = dummy_config(size).get_text_config()
    for layer, place in enumerate(layout.places):
        device_index = layer * num_devices // config.num_hidden_layers
        assert layout.plane_devices[place.plane].index == device_index
        is_sliding = config.layer_types[layer] == "sliding_attention"
        assert layout.windows[place.group] == (config.sliding_window if is_sliding else None)


def test_27b_over_two_devices_keeps_the_groups_that_waste_least_there() -> None:
    """Each device has 5 full and 26 sliding layers, which two groups of full ones would split."""
    layout = layout_of("27b", num_devices=2)
    assert (len(layout.windows), len(layout.plane_devices)) == (7, 10)


def test_an_8k_chat_of_27b_takes_about_a_gibibyte_instead_of_four() -> None:
    layout = layout_of("27b")
    num_blocks = max_blocks_held(8192, chunk_size=1, block_size=16, windows=layout.windows)
    num_bytes = num_blocks * layout.bytes_per_block(16)
    assert 1.03 < num_bytes / 2**30 < 1.09


def test_what_is_written_is_read_back_and_in_no_other_plane() -> None:
    config = tiny_text_model(num_layers=12).config  # two full layers, so two planes
    cache = KVCache(CacheLayout.of(config, [CPU] * 12, torch.float32), num_blocks=4, block_size=2)
    keys, values, slots = torch.randn(3, 2, 16), torch.randn(3, 2, 16), torch.tensor([6, 1, 3])
    cache.write(11, slots, keys, values)
    read_keys, read_values = cache.read(11, slots[[2, 0]], keys.dtype)
    assert torch.equal(read_keys, keys[[2, 0]])
    assert torch.equal(read_values, values[[2, 0]])
    assert not cache.read(5, slots, keys.dtype)[0].any()


def fp8_cache() -> KVCache:
    config = tiny_text_model().config
    layout = CacheLayout.of(config, [CPU] * 6, torch.float8_e4m3fn)
    return KVCache(layout, num_blocks=4, block_size=2)


def test_fp8_halves_a_block_and_gives_back_what_the_model_computes_in() -> None:
    config = tiny_text_model().config
    whole = CacheLayout.of(config, [CPU] * 6, torch.bfloat16)
    cache = fp8_cache()
    assert 2 * cache.layout.bytes_per_block(16) == whole.bytes_per_block(16)
    keys, values, slots = torch.randn(3, 2, 16), torch.randn(3, 2, 16), torch.tensor([6, 1, 3])
    cache.write(0, slots, keys.bfloat16(), values.bfloat16())
    read_keys, read_values = cache.read(0, slots, torch.bfloat16)
    assert read_keys.dtype is torch.bfloat16
    # Three bits behind the leading one: half of the last is a sixteenth.
    torch.testing.assert_close(read_keys.float(), keys, rtol=1 / 14, atol=2e-3)
    torch.testing.assert_close(read_values.float(), values, rtol=1 / 14, atol=2e-3)


def test_fp8_holds_its_largest_number_for_what_is_larger() -> None:
    cache = fp8_cache()
    keys = torch.full((1, 2, 16), 1e4, dtype=torch.bfloat16)
    cache.write(0, torch.tensor([0]), keys, -keys)
    read_keys, read_values = cache.read(0, torch.tensor([0]), torch.bfloat16)
    assert (read_keys == 448).all()
    assert (read_values == -448).all()


def test_fp8_slots_that_nothing_was_written_to_are_zeros() -> None:
    keys, values = fp8_cache().read(0, torch.arange(8), torch.bfloat16)
    assert not keys.any()
    assert not values.any()
