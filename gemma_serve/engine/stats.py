"""What the engine is busy with."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """A snapshot between two steps."""

    num_running: int
    """Sequences that have begun."""
    num_waiting: int
    """Sequences that wait for a place or for blocks."""
    num_free_blocks: int
    num_blocks: int
    num_failed_steps_in_a_row: int
    """0 after each step that worked."""
    num_drafted_tokens: int
    """Since the start: guesses that were computed."""
    num_accepted_tokens: int
    """Those of them that became part of a text."""
