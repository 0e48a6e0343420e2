"""A second, smaller Gemma 3 that guesses for the served one."""

import logging
from dataclasses import replace
from itertools import zip_longest

from gemma_serve.engine.block_manager import BlockManager
from gemma_serve.engine.config import EngineConfig
from gemma_serve.engine.model_drafter import ModelDrafter
from gemma_serve.errors import ConfigurationError
from gemma_serve.gemma.config import ModelConfig
from gemma_serve.gemma.kv_cache import CacheLayout
from gemma_serve.gemma.loading import LoadedGemma, load_gemma
from gemma_serve.gemma.runner_factory import RunnerFactory
from gemma_serve.gemma.token_bytes import token_bytes

logger = logging.getLogger(__name__)


def load_draft(draft_model: str, served: ModelConfig) -> LoadedGemma:
    """Load it as the ``served`` model is loaded, but as its checkpoint has it.

    To be called before the served model is loaded: layers of a large one are then spread over what
    memory the small one leaves, not the other way about. Raises ``ConfigurationError``.
    """
    try:
        return load_gemma(replace(served, model=draft_model, revision=None, quantization="none"))
    except ConfigurationError as error:
        raise ConfigurationError(f"draft_model: {error}") from error


def check_same_vocabulary(draft: LoadedGemma, served: LoadedGemma) -> None:
    """Raise ``ConfigurationError`` unless every token id means the same text to both.

    Ids that are no text may differ: nothing depends on a guess, and few guesses on those.
    """
    texts = (token_bytes(g.tokenizer, g.model.lm_head.out_features) for g in (draft, served))
    for token_id, (ours, theirs) in enumerate(zip_longest(*texts, fillvalue=b"")):
        if ours != theirs:
            raise ConfigurationError(
                f"draft_model: {draft.name} has not the vocabulary of {served.name}: token "
                f"{token_id} is {ours!r} to it, not {theirs!r}. It must be a Gemma 3 with the same "
                "tokenizer, such as google/gemma-3-270m-it"
            )


class DraftModel:
    """What a drafter is made of."""

    def __init__(
        self, draft: LoadedGemma, served: LoadedGemma, config: EngineConfig, *, max_model_len: int
    ) -> None:
        """``max_model_len``: of the served model; what the smaller one has not learned to read it
        does not guess. Raises ``ConfigurationError`` if it has another vocabulary.
        """
        check_same_vocabulary(draft, served)
        self._name = draft.name
        self._config = config
        self._max_model_len = min(max_model_len, draft.max_model_len)
        self._runners = RunnerFactory(draft, config, max_model_len=self._max_model_len)

    @property
    def layout(self) -> CacheLayout:
        """Of its cache."""
        return self._runners.layout

    def drafter(self, cache_bytes: int) -> ModelDrafter:
        """With a cache of so many bytes, which are taken at once."""
        block_size = self._config.block_size
        num_blocks = max(1, cache_bytes // self.layout.bytes_per_block(block_size))
        logger.info(
            "drafts come from %s, with a KV cache of %.2f GiB", self._name, cache_bytes / 2**30
        )
        return ModelDrafter(
            self._runners.make_for_serving(num_blocks),
            BlockManager(num_blocks=num_blocks, block_size=block_size, windows=self.layout.windows),
            vocab_size=self._runners.vocab_size,
            max_model_len=self._max_model_len,
            prefill_chunk_size=self._config.prefill_chunk_size,
        )
