from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemma_serve.engine.detokenizer import Detokenizer

BYTES = tuple(bytes([i]) for i in range(256))
"""Token id ``i`` is the byte ``i``."""


def make_detokenizer(
    stop: tuple[str, ...] = (), token_bytes: Sequence[bytes] = BYTES
) -> Detokenizer:
    return Detokenizer(token_bytes, stop)


def feed(detokenizer: Detokenizer, pieces: Sequence[str | bytes]) -> list[str]:
    """Append each piece's bytes at once, until a stop string ends the text."""
    texts = []
    for piece in pieces:
        texts.append(detokenizer.append(piece.encode() if isinstance(piece, str) else piece))
        if detokenizer.matched_stop is not None:
            break
    return texts


def read(stop: tuple[str, ...], pieces: Sequence[bytes]) -> tuple[str, str | None]:
    detokenizer = make_detokenizer(stop)
    text = "".join(feed(detokenizer, pieces))
    if detokenizer.matched_stop is None:
        text += detokenizer.flush()
    return text, detokenizer.matched_stop


def first_complete(text: str, stop: tuple[str, ...]) -> tuple[str, str | None]:
    """The specification: look at ever longer beginnings of ``text``."""
    for end in range(1, len(text) + 1):
        matches = [string for string in stop if text[:end].endswith(string)]
        if matches:
            longest = max(matches, key=len)
            return text[:end].removesuffix(longest), longest
    return text, None


def test_character_is_held_until_its_last_byte() -> None:
    detokenizer = make_detokenizer()
    assert feed(detokenizer, [b"a\xf0", b"\x9f\x98", b"\x80b"]) == ["a", "", "😀b"]


def test_tokens_are_looked_up_by_id_and_special_ones_are_silent() -> None:
    detokenizer = make_detokenizer(token_bytes=[b"", b"Par", b"is", b" "])
    assert detokenizer.append((0, 1, 2)) == "Paris"
    assert detokenizer.append((3, 0)) == " "


def test_character_that_was_never_finished_becomes_a_replacement_character() -> None:
    detokenizer = make_detokenizer()
    assert feed(detokenizer, [b"ok\xe4\xb8"]) == ["ok"]
    assert detokenizer.flush() == "\ufffd"


def test_invalid_byte_does_not_swallow_its_neighbours() -> None:
    assert feed(make_detokenizer(), [b"\xe4", b"a\x80b"]) == ["", "\ufffda\ufffdb"]


def test_stop_string_split_over_three_deltas_is_never_emitted() -> None:
    detokenizer = make_detokenizer(stop=("END",))
    assert feed(detokenizer, ["go E", "N", "D more"]) == ["go ", "", ""]
    assert detokenizer.matched_stop == "END"


def test_text_that_only_began_a_stop_string_comes_out_when_that_is_clear() -> None:
    detokenizer = make_detokenizer(stop=("END",))
    assert feed(detokenizer, ["E", "N", "TER"]) == ["", "", "ENTER"]
    assert detokenizer.matched_stop is None


def test_text_that_could_still_begin_a_stop_string_comes_out_at_the_end() -> None:
    detokenizer = make_detokenizer(stop=("\n\nUser:",))
    assert feed(detokenizer, ["Paris.\n", "\nUs"]) == ["Paris.", ""]
    assert detokenizer.flush() == "\n\nUs"
    assert detokenizer.matched_stop is None


def test_mismatch_falls_back_to_the_longest_beginning_that_is_left() -> None:
    detokenizer = make_detokenizer(stop=("aab",))
    assert feed(detokenizer, ["aa", "a", "b"]) == ["", "a", ""]
    assert detokenizer.matched_stop == "aab"


def test_stop_string_inside_one_token_cuts_the_token() -> None:
    detokenizer = make_detokenizer(stop=(".",))
    assert feed(detokenizer, ["one. two."]) == ["one"]


def test_first_complete_stop_string_wins() -> None:
    detokenizer = make_detokenizer(stop=("abcd", "c"))
    assert feed(detokenizer, ["abcd"]) == ["ab"]
    assert detokenizer.matched_stop == "c"


def test_longest_of_stop_strings_that_are_complete_together_wins() -> None:
    detokenizer = make_detokenizer(stop=("b", "aab", "ab"))
    assert feed(detokenizer, ["xaab"]) == ["x"]
    assert detokenizer.matched_stop == "aab"


def test_stop_string_of_several_byte_characters_is_found_across_tokens() -> None:
    detokenizer = make_detokenizer(stop=("。好",))
    assert feed(detokenizer, [bytes([byte]) for byte in "你。好吗".encode()]) == [
        *("", "", "你"),
        *("", "", ""),
        *("", "", ""),
    ]
    assert detokenizer.matched_stop == "。好"


def test_nothing_may_follow_a_stop_string() -> None:
    detokenizer = make_detokenizer(stop=("x",))
    detokenizer.append(b"x")
    with pytest.raises(AssertionError, match="after a stop string"):
        detokenizer.append(b"y")


def test_empty_stop_string_is_refused() -> None:
    with pytest.raises(ValueError, match="must not be empty"):
        make_detokenizer(stop=("",))


def test_long_repetitive_stop_string_takes_linear_time() -> None:
    stop = "a" * 20_000 + "b"
    detokenizer = make_detokenizer(stop=(stop,))
    assert feed(detokenizer, ["a" * 10] * 4_000 + ["b"])[-1] == ""
    assert detokenizer.matched_stop == stop


@given(
    text=st.text(alphabet="ab\né😀", max_size=30),
    stop=st.lists(st.text(alphabet="ab\né😀", min_size=1, max_size=4), max_size=3, unique=True),
    cuts=st.lists(st.integers(0, 120), max_size=20),
)
def test_any_split_gives_the_same_text_and_no_part_of_the_stop_string(
    text: str, stop: list[str], cuts: list[int]
) -> None:
    encoded = text.encode()
    borders = sorted({0, len(encoded), *(cut for cut in cuts if cut < len(encoded))})
    pieces = [encoded[start:end] for start, end in pairwise(borders)]
    assert read(tuple(stop), pieces) == first_complete(text, tuple(stop))


@given(noise=st.binary(max_size=40), cuts=st.lists(st.integers(0, 40), max_size=10))
def test_any_split_of_any_bytes_gives_the_same_text(noise: bytes, cuts: list[int]) -> None:
    borders = sorted({0, len(noise), *(cut for cut in cuts if cut < len(noise))})
    pieces = [noise[start:end] for start, end in pairwise(borders)]
    assert read((), pieces) == (noise.decode(errors="replace"), None)


@given(
    text=st.text(alphabet="ab", max_size=30),
    stop=st.text(alphabet="ab", min_size=1, max_size=4),
)
def test_no_text_is_emitted_that_later_turns_out_to_belong_to_the_stop_string(
    text: str, stop: str
) -> None:
    detokenizer = make_detokenizer(stop=(stop,))
    emitted = ""
    for character in text:
        emitted += detokenizer.append(character.encode())
        assert (text + stop).startswith(emitted)
        assert stop not in emitted
        if detokenizer.matched_stop is not None:
            assert emitted == text[: text.index(stop)]
            return


def test_stop_string_is_part_of_the_text_if_asked_for() -> None:
    detokenizer = Detokenizer(BYTES, ("END",), include_stop=True)
    assert feed(detokenizer, ["go E", "N", "D more"]) == ["go ", "", "END"]
    assert detokenizer.matched_stop == "END"


def test_stop_string_within_the_first_tokens_does_not_end_the_text() -> None:
    detokenizer = Detokenizer(BYTES, ("ab",), min_tokens=3)
    assert feed(detokenizer, list("abcabc")) == ["a", "b", "c", "", ""]
    assert detokenizer.matched_stop == "ab"


def test_control_tokens_write_their_names_if_asked_for() -> None:
    texts = (b"a", b"", b"b")
    assert Detokenizer(texts, ()).append((0, 1, 2)) == "ab"
    names = {1: b"<end_of_turn>"}
    named = Detokenizer(texts, (), control_token_names=names)
    assert named.append((0, 1, 2)) == "a<end_of_turn>b"
