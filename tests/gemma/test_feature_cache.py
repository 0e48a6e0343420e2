import torch
from torch import Tensor

from gemma_serve.gemma.feature_cache import FeatureCache


def features(num_bytes: int) -> Tensor:
    return torch.zeros(num_bytes, dtype=torch.uint8)


def test_what_was_put_comes_back_and_nothing_else() -> None:
    cache = FeatureCache(10)
    one = features(4)
    cache.put(b"one", one)
    assert cache.get(b"one") is one
    assert cache.get(b"two") is None


def test_the_least_recently_used_goes_first() -> None:
    cache = FeatureCache(10)
    for digest in (b"one", b"two"):
        cache.put(digest, features(5))
    cache.get(b"one")
    cache.put(b"three", features(1))
    assert [cache.get(d) is not None for d in (b"one", b"two", b"three")] == [True, False, True]


def test_memory_stays_within_the_budget() -> None:
    cache = FeatureCache(100)
    for size in (60, 30, 20, 90, 7):
        cache.put(b"%d" % size, features(size))
        assert cache.num_bytes <= 100
    assert cache.num_bytes == 97


def test_features_larger_than_the_budget_push_nothing_out() -> None:
    cache = FeatureCache(10)
    cache.put(b"small", features(6))
    cache.put(b"large", features(11))
    assert cache.get(b"large") is None
    assert cache.get(b"small") is not None


def test_the_same_features_count_once() -> None:
    cache = FeatureCache(10)
    cache.put(b"one", features(4))
    cache.put(b"one", features(4))
    assert cache.num_bytes == 4


def test_a_budget_of_nothing_keeps_nothing() -> None:
    cache = FeatureCache(0)
    cache.put(b"one", features(1))
    assert cache.get(b"one") is None
