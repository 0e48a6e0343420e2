"""Small engines without a model."""

from collections.abc import Callable
from collections.abc import Sequence as Seq

from gemma_serve.engine.block_chain import BlockChain, ImageContent
from gemma_serve.engine.block_manager import BlockManager, BlockTable
from gemma_serve.engine.constraint import TokenConstraint
from gemma_serve.engine.detokenizer import Detokenizer
from gemma_serve.engine.draft_costs import DraftCosts
from gemma_serve.engine.drafter import Drafter
from gemma_serve.engine.engine import Engine, EngineRequest
from gemma_serve.engine.model_runner import ModelRunner, SampledToken
from gemma_serve.engine.prompt_lookup import LookupDrafter
from gemma_serve.engine.sampling_state import SamplingState
from gemma_serve.engine.scheduler import ScheduledBatch, ScheduledSequence, Scheduler
from gemma_serve.engine.sequence import ImageSpan, PromptInputs, Sequence
from gemma_serve.engine.speculation import Speculation
from gemma_serve.engine.vocabulary import Vocabulary
from gemma_serve.generation import SamplingParams
from tests.engine.whole_steps import WholeStepRunner

EOS = 1
LETTERS = tuple(bytes([i]) for i in range(256))
"""Token id ``i`` is the byte ``i``."""


def spell(text: str) -> tuple[int, ...]:
    return tuple(text.encode())


class ScriptedRunner(WholeStepRunner):
    """Gives each sequence the next letter of ``script``, or what ``script`` returns for it.

    ``before_step`` may raise what a device would.
    """

    def __init__(
        self,
        script: str | Callable[[Sequence], int],
        before_step: Callable[[ScheduledBatch], None] = lambda _: None,
    ) -> None:
        self._script = script
        self._before_step = before_step
        self.batches: list[ScheduledBatch] = []

    def run(self, batch: ScheduledBatch) -> list[SampledToken]:
        self.batches.append(batch)
        self._before_step(batch)
        return [SampledToken(i) for s in batch.sampling for i in self._next_tokens(s)]

    def _next_tokens(self, scheduled: ScheduledSequence) -> list[int]:
        """What follows the last known token, and each draft."""
        token_ids = scheduled.sequence.token_ids
        num_known = len(token_ids)
        next_tokens = [self._next_token(scheduled.sequence)]
        for draft in scheduled.drafts:
            token_ids.append(draft)
            next_tokens.append(self._next_token(scheduled.sequence))
        del token_ids[num_known:]
        return next_tokens

    def _next_token(self, sequence: Sequence) -> int:
        if not isinstance(self._script, str):
            return self._script(sequence)
        position = len(sequence.token_ids) - len(sequence.prompt.token_ids)
        return self._script.encode()[position] if position < len(self._script.encode()) else EOS


class SpellingRunner(ScriptedRunner):
    """Tells the same alternatives with every letter, which has the logprob -1."""

    def __init__(self, script: str, logprobs: tuple[tuple[int, float], ...]) -> None:
        super().__init__(script)
        self._logprobs = logprobs

    def run(self, batch: ScheduledBatch) -> list[SampledToken]:
        token_ids = [token.token_id for token in super().run(batch)]
        return [SampledToken(i, ((i, -1.0), *self._logprobs)) for i in token_ids if i is not None]


def make_block_manager(
    *, num_blocks: int = 100, block_size: int = 4, windows: Seq[int | None] = (None,)
) -> BlockManager:
    return BlockManager(num_blocks=num_blocks, block_size=block_size, windows=windows)


def make_sequence(
    block_manager: BlockManager,
    *,
    num_prompt_tokens: int = 5,
    arrival: int = 0,
    images: Seq[tuple[int, int]] = (),
    user: str | None = None,
    priority: int = 0,
) -> Sequence:
    """A sequence that shares its blocks with nobody."""
    prompt = PromptInputs(
        tuple(range(num_prompt_tokens)),
        tuple(ImageSpan(start, end - start, b"") for start, end in images),
    )
    sequence = make_sequence_of(prompt, block_manager.new_table(), arrival=arrival, user=user)
    sequence.priority = priority
    return sequence


def make_sharing_sequence(
    block_manager: BlockManager,
    prompt: PromptInputs,
    *,
    arrival: int = 0,
    user: str | None = None,
    salt: str | None = None,
) -> Sequence:
    """A sequence that uses the prefix cache."""
    images = [ImageContent(i.start, i.end, i.digest) for i in prompt.images]
    chain = BlockChain(block_size=block_manager.block_size, images=images, salt=salt)
    chain.extend(prompt.token_ids, len(prompt.token_ids))
    table = block_manager.new_table(chain)
    return make_sequence_of(prompt, table, arrival=arrival, user=user)


def make_sequence_of(
    prompt: PromptInputs, table: BlockTable, *, arrival: int, user: str | None
) -> Sequence:
    return Sequence(
        request_key=arrival,
        index=0,
        prompt=prompt,
        sampling_state=SamplingState(SamplingParams(), seed=0, prompt_token_ids=()),
        detokenizer=Detokenizer(LETTERS, ()),
        stop_token_ids=frozenset(),
        max_total_tokens=1000,
        block_table=table,
        arrival=arrival,
        user=user,
        token_ids=list(prompt.token_ids),
    )


class FreeDrafts(DraftCosts):
    """A device on which every guess is worth its try."""

    def of(self, num_decoding: int) -> float:  # noqa: ARG002  # the same for any number
        return 0.0


def make_speculation(
    *drafters: Drafter,
    max_drafts: int = 4,
    max_rows: int = 64,
    vocab_size: int = 256,
    make_costs: Callable[[], DraftCosts] = FreeDrafts,
) -> Speculation:
    """By look-up, unless there are other ``drafters``."""
    return Speculation(
        drafters or (LookupDrafter(),),
        max_drafts=max_drafts,
        max_rows=max_rows,
        vocab_size=vocab_size,
        make_costs=make_costs,
    )


def make_scheduler(
    block_manager: BlockManager,
    *,
    max_num_seqs: int = 8,
    prefill_chunk_size: int = 16,
    speculation: Speculation | None = None,
) -> Scheduler:
    return Scheduler(
        block_manager=block_manager,
        max_num_seqs=max_num_seqs,
        prefill_chunk_size=prefill_chunk_size,
        speculation=speculation,
    )


def make_engine(
    runner: ModelRunner,
    *,
    block_manager: BlockManager | None = None,
    max_num_seqs: int = 8,
    prefill_chunk_size: int = 16,
    max_model_len: int = 64,
    stop_strings: tuple[str, ...] = (),
    enable_prefix_cache: bool = True,
    speculation: Speculation | None = None,
    runs_ahead: bool = False,
) -> Engine:
    block_manager = block_manager or make_block_manager()
    return Engine(
        runner=runner,
        scheduler=make_scheduler(
            block_manager,
            max_num_seqs=max_num_seqs,
            prefill_chunk_size=prefill_chunk_size,
            speculation=speculation,
        ),
        block_manager=block_manager,
        vocabulary=Vocabulary(
            token_bytes=LETTERS, eos_token_ids=frozenset({EOS}), stop_strings=stop_strings
        ),
        max_model_len=max_model_len,
        enable_prefix_cache=enable_prefix_cache,
        runs_ahead=runs_ahead,
    )


def make_request(
    key: int = 0,
    *,
    prompt: str = "hello",
    n: int = 1,
    max_tokens: int | None = None,
    stop: tuple[str, ...] = (),
    stop_token_ids: tuple[int, ...] = (),
    ignore_eos: bool = False,
    constraints: tuple[TokenConstraint, ...] = (),
) -> EngineRequest:
    sampling = SamplingParams(
        max_tokens=max_tokens, stop=stop, stop_token_ids=stop_token_ids, ignore_eos=ignore_eos
    )
    return EngineRequest(
        key=key,
        prompt=PromptInputs(spell(prompt)),
        sampling=sampling,
        n=n,
        constraints=constraints,
    )
