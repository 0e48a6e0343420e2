"""The streams of several requests as one."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace

from gemma_serve.generation import GenerationDelta, GenerationStarted, GenerationStream


def merge_streams(streams: Sequence[GenerationStream], *, n: int) -> GenerationStream:
    """One stream of ``n`` sequences for each of ``streams``, numbered in their order.

    Closing it closes them all; the first that fails fails it.
    """
    if len(streams) == 1:
        return streams[0]
    started = GenerationStarted(sum(stream.started.prompt_tokens for stream in streams))
    merged = _MergedDeltas(streams, n)
    return GenerationStream(started, merged, merged.aclose)


async def close_all(streams: Sequence[GenerationStream]) -> None:
    """Close each, whatever closing another one raises."""
    await asyncio.gather(*(stream.aclose() for stream in streams), return_exceptions=True)


class _MergedDeltas(AsyncIterator[Sequence[GenerationDelta]]):
    """Reads all streams at once; a task for each holds what comes next."""

    def __init__(self, streams: Sequence[GenerationStream], n: int) -> None:
        self._streams = streams
        self._n = n
        self._unread = list(range(len(streams)))
        self._reading: dict[asyncio.Task[Sequence[GenerationDelta] | None], int] = {}

    async def __anext__(self) -> Sequence[GenerationDelta]:
        while self._unread or self._reading:
            for position in self._unread:
                task = asyncio.create_task(_next_of(self._streams[position]))
                self._reading[task] = position
            self._unread = []
            done, _ = await asyncio.wait(self._reading, return_when=asyncio.FIRST_COMPLETED)
            if deltas := [delta for task in done for delta in self._take(task)]:
                return deltas
        raise StopAsyncIteration

    async def aclose(self) -> None:
        tasks, self._reading = list(self._reading), {}
        self._unread = []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await close_all(self._streams)

    def _take(
        self, task: asyncio.Task[Sequence[GenerationDelta] | None]
    ) -> Sequence[GenerationDelta]:
        position = self._reading.pop(task)
        deltas = task.result()
        if deltas is None:
            return ()
        self._unread.append(position)
        return [replace(delta, index=position * self._n + delta.index) for delta in deltas]


async def _next_of(stream: GenerationStream) -> Sequence[GenerationDelta] | None:
    """The next deltas; ``None`` at the end."""
    return await anext(stream, None)
