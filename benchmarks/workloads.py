"""What the comparison measures: bursts of chats as people and tools send them.

A workload sends its bursts one after another and yields each with its case. Prompts are random
words that open with ``salt``, new in every round, so that what is meant to be cold is cold in any
prefix cache; a word is about one token.
"""

from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Final

from benchmarks.chat_client import JSONObject, make_prompt
from benchmarks.noise_image import noise_image_url
from benchmarks.serving_metrics import RequestRecord
from benchmarks.targets import Chat, Target

TURN_TOKENS: Final = 16
"""Of answers whose first token is what counts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """How much of everything. ``words``: of prompts. The defaults are the full measurement."""

    streams: tuple[int, ...] = (1, 8, 32)
    decode_words: int = 100
    decode_tokens: int = 64
    history_words: int = 3000
    prefix_words: int = 6000
    prefix_users: int = 4
    """After the cold one."""
    prompt_words: tuple[int, ...] = (128, 512, 1024, 2048, 4096, 8000)
    short_chats: int = 64


@dataclass(frozen=True, slots=True)
class Case:
    """One line of the results."""

    workload: str
    label: str
    size: int
    """Streams at once, or words of the prompt: what plots have on their axis."""


Measured = tuple[Case, list[RequestRecord]]
Workload = Callable[[Target, Scale, str], AsyncIterator[Measured]]


async def decode(target: Target, scale: Scale, salt: str) -> AsyncIterator[Measured]:
    """Tokens per second: so many different chats at once, all of one length."""
    for streams in scale.streams:
        chats = [
            _chat(
                make_prompt(f"{salt}-d{streams}-{index}", scale.decode_words), scale.decode_tokens
            )
            for index in range(streams)
        ]
        label = f"{streams} at once"
        yield Case("decode", label, streams), await target.send(chats)


async def chat(target: Target, scale: Scale, salt: str) -> AsyncIterator[Measured]:
    """The second turn of a long chat, beside its first."""
    prompt = make_prompt(f"{salt}-c", scale.history_words)
    async for measured in _two_turns(target, "chat", prompt, scale):
        yield measured


async def image_chat(target: Target, scale: Scale, salt: str) -> AsyncIterator[Measured]:
    """The same with an image in the first turn."""
    content: list[JSONObject] = [
        {"type": "text", "text": make_prompt(f"{salt}-i", scale.history_words)},
        {"type": "image_url", "image_url": {"url": noise_image_url(salt)}},
    ]
    async for measured in _two_turns(target, "image-chat", content, scale):
        yield measured


async def prefix(target: Target, scale: Scale, salt: str) -> AsyncIterator[Measured]:
    """Users who ask different questions about one long text, one after another."""
    text = make_prompt(f"{salt}-p", scale.prefix_words)
    chats = [
        _chat(f"{text} Question {user}: {make_prompt(f'u{user}', 12)}?", TURN_TOKENS)
        for user in range(1 + scale.prefix_users)
    ]
    yield Case("prefix", "first user (cold)", scale.prefix_words), await target.send(chats[:1])
    records = [record for one in chats[1:] for record in await target.send([one])]
    yield Case("prefix", "each next user", scale.prefix_words), records


async def long_prompts(target: Target, scale: Scale, salt: str) -> AsyncIterator[Measured]:
    """Time to the first token over the prompt's length."""
    for words in scale.prompt_words:
        prompt = make_prompt(f"{salt}-l{words}", words)
        records = await target.send([_chat(prompt, TURN_TOKENS)])
        yield Case("long-prompts", f"{words} words", words), records


async def short_chats(target: Target, scale: Scale, salt: str) -> AsyncIterator[Measured]:
    """Many short questions at once."""
    chats = [
        _chat(make_prompt(f"{salt}-s{index}", 10), TURN_TOKENS)
        for index in range(scale.short_chats)
    ]
    case = Case("short-chats", f"{scale.short_chats} at once", scale.short_chats)
    yield case, await target.send(chats)


TEXT_WORKLOADS: Final[dict[str, Workload]] = {
    "decode": decode,
    "chat": chat,
    "prefix": prefix,
    "long-prompts": long_prompts,
    "short-chats": short_chats,
}
WORKLOADS: Final[dict[str, Workload]] = {**TEXT_WORKLOADS, "image-chat": image_chat}


async def _two_turns(
    target: Target, workload: str, content: str | Sequence[JSONObject], scale: Scale
) -> AsyncIterator[Measured]:
    first: JSONObject = {"role": "user", "content": content}
    cold = await target.send([Chat((first,), TURN_TOKENS)])
    yield Case(workload, "first turn (cold)", scale.history_words), cold
    answer: JSONObject = {"role": "assistant", "content": cold[0].text or "Yes."}
    question: JSONObject = {"role": "user", "content": "What was the third word of that?"}
    again = await target.send([Chat((first, answer, question), TURN_TOKENS)])
    yield Case(workload, "second turn", scale.history_words), again


def _chat(prompt: str, max_tokens: int) -> Chat:
    return Chat(({"role": "user", "content": prompt},), max_tokens)
