"""transformers' own ``generate`` as a target: all chats of a burst in one padded batch."""

from collections.abc import Sequence
from pathlib import Path
from time import perf_counter

import torch
from transformers import (
    AutoTokenizer,
    Gemma3ForCausalLM,
    PreTrainedTokenizerBase,
    StoppingCriteria,
)

from benchmarks.serving_metrics import RequestRecord
from benchmarks.targets import Chat, check_length


class GenerateTarget:
    """What a script without a server has: no HTTP, no scheduling, everybody ends together."""

    def __init__(self, checkpoint: Path) -> None:
        self._tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            checkpoint, padding_side="left"
        )
        self._model = Gemma3ForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16).eval()

    async def send(self, chats: Sequence[Chat]) -> list[RequestRecord]:
        """All ``chats`` must ask for answers of one length."""
        (max_tokens,) = {chat.max_tokens for chat in chats}
        started_s = perf_counter()
        inputs = self._tokenizer.apply_chat_template(
            [list(chat.messages) for chat in chats],
            add_generation_prompt=True,
            tokenize=True,
            padding=True,
            return_dict=True,
            return_tensors="pt",
        )
        clock = _StepClock()
        output = self._model.generate(
            **inputs, do_sample=False, max_new_tokens=max_tokens, stopping_criteria=[clock]
        )
        ended_s = perf_counter()
        prompt_length = inputs["input_ids"].shape[1]
        return [
            check_length(
                RequestRecord(
                    started_s=started_s,
                    ended_s=ended_s,
                    chunk_times_s=tuple(clock.times_s),
                    prompt_tokens=int(mask.sum()),
                    completion_tokens=len(tokens) - prompt_length,
                    text=self._tokenizer.decode(tokens[prompt_length:]),
                ),
                max_tokens,
            )
            for tokens, mask in zip(output, inputs["attention_mask"], strict=True)
        ]


class _StepClock(StoppingCriteria):  # type: ignore[misc]  # transformers is untyped here
    """Never stops, but notes when each token came."""

    def __init__(self) -> None:
        self.times_s: list[float] = []

    def __call__(self, input_ids: torch.Tensor, _scores: torch.Tensor, **_: object) -> torch.Tensor:
        self.times_s.append(perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool)
