import pytest

from gemma_serve.engine.draft_costs import DraftCosts


def measured(*steps: tuple[int, float], num_decoding: int = 1) -> DraftCosts:
    """Costs after four plain steps of a second each, and then ``(num_drafts, duration_s)``."""
    costs = DraftCosts()
    for num_drafts, duration_s in ((0, 1.0),) * 4 + steps:
        costs.observe(num_decoding, num_drafts, duration_s)
    return costs


def test_cost_is_not_known_before_a_few_plain_steps() -> None:
    costs = DraftCosts()
    for _ in range(4):
        assert costs.of(1) is None
        costs.observe(1, 0, 1.0)
    assert costs.of(1) == pytest.approx(0.1, abs=0.001)


def test_cost_approaches_what_each_draft_adds() -> None:
    assert measured(*[(4, 3.0)] * 40).of(1) == pytest.approx(0.5, abs=0.001)


def test_cost_is_that_of_about_as_many_sequences() -> None:
    costs = measured(*[(2, 3.0)] * 40, num_decoding=32)
    assert costs.of(40) == pytest.approx(1.0, abs=0.001)
    assert costs.of(1) is None


def test_one_slow_step_does_not_end_speculation() -> None:
    cost = measured((1, 100.0)).of(1)
    assert cost is not None
    assert cost < 0.5


def test_drafts_that_seem_to_save_time_are_free() -> None:
    assert measured(*[(4, 0.5)] * 60).of(1) == pytest.approx(0.0, abs=0.001)


def test_dear_drafts_are_tried_again_some_time() -> None:
    dear, forgotten = (measured(*[(1, 3.0)] * 40, *[(0, 1.0)] * n).of(1) for n in (0, 3000))
    assert dear is not None
    assert dear > 1.9
    assert forgotten == pytest.approx(0.1, abs=0.1)
