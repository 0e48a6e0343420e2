import pytest

from gemma_serve.engine.prompt_lookup import PromptLookup
from tests.engine.builders import spell


def lookup_in(prompt: str) -> tuple[PromptLookup, list[int]]:
    """A lookup that knows the prompt, and the list that its sequence grows."""
    token_ids = list(spell(prompt))
    lookup = PromptLookup(token_ids, num_prompt_tokens=len(token_ids))
    lookup.catch_up()
    return lookup, token_ids


def say(lookup: PromptLookup, token_ids: list[int], text: str) -> None:
    for token_id in spell(text):
        token_ids.append(token_id)
        lookup.catch_up()


def guessed(lookup: PromptLookup, count: int = 8) -> str:
    return bytes(lookup.guess(count)).decode()


def test_guesses_what_followed_the_same_three_tokens() -> None:
    lookup, token_ids = lookup_in("The cat sat. A dog ")
    say(lookup, token_ids, "The")
    assert guessed(lookup, 4) == " cat"


def test_prompt_that_ends_as_it_began_is_guessed_on_at_once() -> None:
    assert guessed(lookup_in("one two one")[0], 4) == " two"


@pytest.mark.parametrize("text", ["", "a", "ab", "abc", "a new text"])
def test_new_text_is_not_guessed(text: str) -> None:
    lookup, token_ids = lookup_in(text)
    assert guessed(lookup) == ""
    say(lookup, token_ids, "xyz")
    assert guessed(lookup) == ""


def test_latest_of_several_occurrences_is_followed() -> None:
    lookup, token_ids = lookup_in("abc1 abc2 ")
    say(lookup, token_ids, "abc")
    assert guessed(lookup, 1) == "2"


def test_passage_that_is_being_copied_is_followed_past_a_later_look_alike() -> None:
    lookup, token_ids = lookup_in("start: f(x) = 1; other: f(x) = 2; ")
    say(lookup, token_ids, "start: f(x) = ")
    assert guessed(lookup, 2) == "1;"


def test_after_a_wrong_guess_the_text_is_looked_up_anew() -> None:
    lookup, token_ids = lookup_in("the red house, the big house ")
    say(lookup, token_ids, "the red ho")
    assert guessed(lookup, 3) == "use"
    say(lookup, token_ids, "t")
    assert guessed(lookup) == ""


def test_guess_that_reaches_the_end_goes_on_in_its_period() -> None:
    lookup, token_ids = lookup_in("!")
    say(lookup, token_ids, "abababa")
    assert guessed(lookup, 6) == "bababa"


def test_long_prompt_is_taken_in_over_several_steps() -> None:
    token_ids = [*range(3000), 5, 6, 7]
    lookup = PromptLookup(token_ids, num_prompt_tokens=len(token_ids))
    lookup.catch_up()
    assert lookup.guess(2) == []
    lookup.catch_up()
    assert lookup.guess(2) == [8, 9]


def test_tokens_that_came_while_the_prompt_was_taken_in_are_not_missed() -> None:
    token_ids = [*range(3000), 0]
    lookup = PromptLookup(token_ids, num_prompt_tokens=len(token_ids))
    for token_id in (2998, 2999):
        lookup.catch_up()
        token_ids.append(token_id)
    token_ids.append(0)
    lookup.catch_up()
    assert lookup.guess(3) == [2998, 2999, 0]


def test_hit_rates_follow_what_comes_true_though_nothing_is_drafted() -> None:
    lookup, token_ids = lookup_in("".join(chr(i) for i in range(32, 127)))
    before = lookup.hit_rates()
    say(lookup, token_ids, "ABCDEFGHIJKLMNOP")
    first, further = lookup.hit_rates()
    assert first == further > before[1]  # in the middle of a copy, the next guess is a further one
    say(lookup, token_ids, "!!!x")
    assert lookup.hit_rates()[0] == 0.0  # nothing to guess


def test_first_guesses_that_never_come_true_lose_their_credit() -> None:
    lookup, token_ids = lookup_in("abc1")
    for token_id in range(300, 330):
        say(lookup, token_ids, "abc")
        token_ids.append(token_id)
    say(lookup, token_ids, "abc")
    first, further = lookup.hit_rates()
    assert 0 < first < 0.1
    assert further == 0.8
