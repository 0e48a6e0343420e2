"""Which chats a workload sends, and in which order."""

from collections.abc import Sequence

import pytest

from benchmarks.serving_metrics import RequestRecord
from benchmarks.targets import Chat, Target
from benchmarks.workloads import TURN_TOKENS, WORKLOADS, Case, Scale

SCALE = Scale(
    streams=(1, 3),
    decode_words=5,
    decode_tokens=7,
    history_words=20,
    prefix_words=20,
    prefix_users=2,
    prompt_words=(8, 16),
    short_chats=4,
)


class RecordingTarget:
    """Answers every chat with "Sure." and keeps what it was asked, burst by burst."""

    def __init__(self) -> None:
        self.bursts: list[list[Chat]] = []

    async def send(self, chats: Sequence[Chat]) -> list[RequestRecord]:
        self.bursts.append(list(chats))
        return [RequestRecord(started_s=0.0, ended_s=1.0, text="Sure.") for _ in chats]


async def run(name: str, target: Target, salt: str = "salt") -> list[tuple[Case, int]]:
    """The cases of a workload, each with its number of records."""
    return [(case, len(records)) async for case, records in WORKLOADS[name](target, SCALE, salt)]


def prompts(target: RecordingTarget) -> list[str]:
    return [chat.messages[0]["content"] for burst in target.bursts for chat in burst]


async def test_decode_sends_different_prompts_of_one_length_at_once() -> None:
    target = RecordingTarget()
    cases = await run("decode", target)
    assert cases == [(Case("decode", "1 at once", 1), 1), (Case("decode", "3 at once", 3), 3)]
    assert [len(burst) for burst in target.bursts] == [1, 3]
    assert len(set(prompts(target))) == 4
    assert {len(prompt.split()) for prompt in prompts(target)} == {5}
    assert {chat.max_tokens for burst in target.bursts for chat in burst} == {7}


async def test_second_turn_resends_the_first_with_its_answer() -> None:
    target = RecordingTarget()
    cases = await run("chat", target)
    assert [case.label for case, _ in cases] == ["first turn (cold)", "second turn"]
    (first,), (second,) = target.bursts
    assert second.messages[:1] == first.messages
    assert second.messages[1] == {"role": "assistant", "content": "Sure."}
    assert second.messages[2]["role"] == "user"


async def test_image_stays_in_the_first_turn() -> None:
    target = RecordingTarget()
    await run("image-chat", target)
    (first,), (second,) = target.bursts
    text, image = first.messages[0]["content"]
    assert len(text["text"].split()) == 20
    assert image["image_url"]["url"].startswith("data:image/jpeg;base64,")
    assert second.messages[0] == first.messages[0]


async def test_prefix_users_come_one_by_one_and_differ_only_at_the_end() -> None:
    target = RecordingTarget()
    assert [number for _, number in await run("prefix", target)] == [1, 2]
    assert [len(burst) for burst in target.bursts] == [1, 1, 1]
    texts, questions = zip(*(prompt.split(" Question ") for prompt in prompts(target)), strict=True)
    assert len(set(texts)) == 1
    assert len(set(questions)) == 3


async def test_long_prompts_are_as_long_as_asked_and_share_nothing() -> None:
    target = RecordingTarget()
    assert [case.size for case, _ in await run("long-prompts", target)] == [8, 16]
    assert [len(prompt.split()) for prompt in prompts(target)] == [8, 16]
    assert len({prompt.split()[0] for prompt in prompts(target)}) == 2


async def test_short_chats_come_all_at_once() -> None:
    target = RecordingTarget()
    assert await run("short-chats", target) == [(Case("short-chats", "4 at once", 4), 4)]
    assert [len(burst) for burst in target.bursts] == [4]
    assert target.bursts[0][0].max_tokens == TURN_TOKENS


@pytest.mark.parametrize("name", WORKLOADS)
async def test_another_salt_makes_every_prompt_new(name: str) -> None:
    target = RecordingTarget()
    await run(name, target, "one")
    await run(name, target, "two")
    half = len(target.bursts) // 2
    first = {repr(chat.messages[0]) for burst in target.bursts[:half] for chat in burst}
    second = {repr(chat.messages[0]) for burst in target.bursts[half:] for chat in burst}
    assert first.isdisjoint(second)
