"""What one HTTP front end counts and times."""

from collections.abc import Iterator
from typing import Final

from gemma_serve.generation import ModelLoad
from gemma_serve.openai_api.metrics.exposition import Counter, Histogram, gauge, total

_REQUEST_BOUNDS_S: Final = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_FIRST_TOKEN_BOUNDS_S: Final = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_TOKEN_BOUNDS_S: Final = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 5)


class ServerMetrics:
    """Belongs to one event loop."""

    def __init__(self) -> None:
        self.http_requests = Counter(
            "gemma_serve_http_requests_total", "HTTP requests answered, by route and status."
        )
        self.request_duration_s = Histogram(
            "gemma_serve_generation_duration_seconds",
            "From a request's way to the model to its last token.",
            _REQUEST_BOUNDS_S,
        )
        self.prompt_tokens = Counter("gemma_serve_prompt_tokens_total", "Tokens of prompts.")
        self.completion_tokens = Counter(
            "gemma_serve_completion_tokens_total", "Tokens of answers."
        )
        self.finished_sequences = Counter(
            "gemma_serve_finished_sequences_total", "Answers that ended by themselves, by reason."
        )
        self.time_to_first_token_s = Histogram(
            "gemma_serve_time_to_first_token_seconds",
            "From a request's way to the model to its first token.",
            _FIRST_TOKEN_BOUNDS_S,
        )
        self.inter_token_latency_s = Histogram(
            "gemma_serve_inter_token_latency_seconds",
            "Between two tokens of one answer.",
            _TOKEN_BOUNDS_S,
        )

    def lines(self, load: ModelLoad | None) -> Iterator[str]:
        """A scrape. ``load``: ``None`` while no model can tell."""
        for metric in (
            self.http_requests,
            self.prompt_tokens,
            self.completion_tokens,
            self.finished_sequences,
        ):
            yield from metric.lines()
        for histogram in (
            self.time_to_first_token_s,
            self.inter_token_latency_s,
            self.request_duration_s,
        ):
            yield from histogram.lines()
        if load is not None:
            yield from _load_lines(load)


def _load_lines(load: ModelLoad) -> Iterator[str]:
    yield from gauge(
        "gemma_serve_running_sequences", "Answers that are being computed.", load.num_running
    )
    yield from gauge(
        "gemma_serve_waiting_sequences", "Answers that wait for a place.", load.num_waiting
    )
    yield from gauge(
        "gemma_serve_cache_usage_ratio",
        "Share of the memory for keys and values that is taken.",
        load.cache_usage,
    )
    # As vLLM calls them, so that its dashboards' formulas for the acceptance hold.
    yield from total(
        "gemma_serve_spec_decode_num_draft_tokens_total",
        "Guessed tokens that were computed.",
        load.num_drafted_tokens,
    )
    yield from total(
        "gemma_serve_spec_decode_num_accepted_tokens_total",
        "Guessed tokens that became part of an answer.",
        load.num_accepted_tokens,
    )
