"""The engine on a thread of its own, for callers on an event loop."""

import logging
import queue
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import count

from gemma_serve.engine.constraint import TokenConstraint
from gemma_serve.engine.engine import Engine, EngineRequest, StepOutput
from gemma_serve.engine.mailbox import Mailbox
from gemma_serve.engine.sequence import PromptInputs
from gemma_serve.engine.stats import EngineStats
from gemma_serve.engine.vocabulary import Vocabulary
from gemma_serve.errors import GemmaServeError, GenerationError, OverloadedError, UnavailableError
from gemma_serve.generation import GenerationStarted, GenerationStream, SamplingParams

logger = logging.getLogger(__name__)

_MAX_FAILED_STEPS_IN_A_ROW = 3
"""So many failed steps without one that worked are a broken device, not bad requests."""


@dataclass(frozen=True, slots=True)
class _Add:
    request: EngineRequest


@dataclass(frozen=True, slots=True)
class _Abort:
    key: int


@dataclass(frozen=True, slots=True)
class _Stop:
    pass


class AsyncEngine:
    """Runs ``Engine.step`` in a loop and carries requests in and deltas out.

    Commands reach the engine thread through one queue, between two steps. A step's outputs come
    back in one call per event loop.
    """

    def __init__(self, make_engine: Callable[[], Engine], *, max_unfinished_sequences: int) -> None:
        """Wait for ``make_engine``, which runs on the engine's thread, and raise what it raises.

        It had better load the model too: torch's OpenMP keeps threads for each thread that computes
        and, with more of them than cores, lets them sleep between operations (a step of the 270M
        model took 100 ms instead of 65 on two cores).
        """
        self._max_unfinished_sequences = max_unfinished_sequences
        self._commands: queue.SimpleQueue[_Add | _Abort | _Stop] = queue.SimpleQueue()
        self._mailboxes: dict[int, Mailbox] = {}
        self._keys = count()
        self._accepting = True
        made: Future[Engine] = Future()
        self._thread = threading.Thread(
            target=self._run, args=(make_engine, made), name="gemma-engine", daemon=True
        )
        self._thread.start()
        self._engine = made.result()

    @property
    def stats(self) -> EngineStats:
        """May be read from any thread; exact only while the engine is idle."""
        return self._engine.stats

    @property
    def vocabulary(self) -> Vocabulary:
        """The checkpoint's tokens, which do not change."""
        return self._engine.vocabulary

    def submit(
        self,
        request_id: str,
        prompt: PromptInputs,
        sampling: SamplingParams,
        n: int,
        *,
        user: str | None = None,
        priority: int = 0,
        cache_salt: str | None = None,
        constraints: tuple[TokenConstraint, ...] = (),
    ) -> GenerationStream:
        """Admit a request of the running event loop. The rest is as in ``EngineRequest``.

        Raises ``OverloadedError`` or ``UnavailableError``. A request of more sequences than are
        taken at all is admitted when there is no other.
        """
        num_unfinished = sum(mailbox.num_unfinished for mailbox in list(self._mailboxes.values()))
        if num_unfinished and num_unfinished + n > self._max_unfinished_sequences:
            raise OverloadedError(
                f"The server has {num_unfinished} unfinished answers and takes at most "
                f"{self._max_unfinished_sequences}. Please try again later."
            )
        key = next(self._keys)
        mailbox = self._mailboxes[key] = Mailbox(request_id, n)
        request = EngineRequest(
            key=key,
            prompt=prompt,
            sampling=sampling,
            n=n,
            user=user,
            priority=priority,
            cache_salt=cache_salt,
            constraints=constraints,
        )
        self._commands.put(_Add(request))
        if not self._accepting:  # Read after the insertion: whoever clears it fails what it finds.
            self._mailboxes.pop(key, None)
            raise UnavailableError("The engine is not running.")

        async def close() -> None:
            if self._mailboxes.pop(key, None) is not None:
                mailbox.close()
                self._commands.put(_Abort(key))

        return GenerationStream(GenerationStarted(len(prompt.token_ids)), mailbox, close)

    def check_health(self) -> None:
        """Raises ``UnavailableError`` when no step can be expected to work."""
        if not self._accepting:
            raise UnavailableError("The engine is not running.")
        if self.stats.num_failed_steps_in_a_row >= _MAX_FAILED_STEPS_IN_A_ROW:
            raise UnavailableError(
                f"The last {_MAX_FAILED_STEPS_IN_A_ROW} steps failed, and none has worked since."
            )

    def close(self) -> None:
        """Stop after the step under way; unfinished requests get an ``UnavailableError``."""
        self._commands.put(_Stop())
        self._thread.join()

    def _run(self, make_engine: Callable[[], Engine], made: "Future[Engine]") -> None:
        try:
            engine = make_engine()
        except BaseException as error:
            made.set_exception(error)
            return
        made.set_result(engine)
        self._step_until_stopped(engine)

    def _step_until_stopped(self, engine: Engine) -> None:
        error: GemmaServeError = UnavailableError("The server is shutting down.")
        try:
            while self._obey_commands(engine):
                self._deliver(engine.step())
        except BaseException:
            logger.exception("the engine thread died")
            error = GenerationError("The engine stopped unexpectedly.")
        finally:
            self._accepting = False
            self._deliver([StepOutput(key, error=error) for key in list(self._mailboxes)])

    def _obey_commands(self, engine: Engine) -> bool:
        """Take in what was asked since the last step, waiting if idle. False to stop."""
        while not (self._commands.empty() and engine.has_work):
            match self._commands.get():
                case _Add(request):
                    self._deliver(engine.add(request))
                case _Abort(key):
                    engine.abort(key)
                case _Stop():
                    return False
        return True

    def _deliver(self, outputs: Iterable[StepOutput]) -> None:
        addressed = [
            (mailbox, output)
            for output in outputs
            if (mailbox := self._mailboxes.get(output.key)) is not None
        ]
        for loop in {mailbox.loop for mailbox, _ in addressed}:
            ours = [(mailbox, output) for mailbox, output in addressed if mailbox.loop is loop]
            try:
                loop.call_soon_threadsafe(self._put, ours)
            except RuntimeError:  # The loop is closed: nobody will read.
                for _, output in ours:
                    self._mailboxes.pop(output.key, None)
                    self._engine.abort(output.key)

    def _put(self, outputs: Iterable[tuple[Mailbox, StepOutput]]) -> None:
        """Runs on the readers' event loop."""
        for mailbox, output in outputs:
            if output.key in self._mailboxes:  # else closed while the output was on its way
                mailbox.put(output.deltas, output.error)
                if mailbox.complete:
                    del self._mailboxes[output.key]
