"""One sequence's way through a grammar."""

from collections.abc import Sequence

from llguidance import LLMatcher


class GrammarConstraint:
    """An ``engine.constraint.TokenConstraint`` by llguidance."""

    def __init__(self, matcher: LLMatcher) -> None:
        """``matcher``: at its start, and nobody else's."""
        self._matcher = matcher

    def allowed_tokens(self) -> bytes | None:
        """As ``TokenConstraint.allowed_tokens``."""
        mask = self._matcher.compute_bitmask()
        # A failed matcher allows the end of the turn, as if its text were complete.
        return None if self._matcher.is_error() else mask

    def accept(self, token_id: int) -> None:
        """As ``TokenConstraint.accept``."""
        self._matcher.consume_token(token_id)

    def num_acceptable(self, token_ids: Sequence[int]) -> int:
        """As ``TokenConstraint.num_acceptable``."""
        return self._matcher.validate_tokens([*token_ids])

    def fork(self) -> "GrammarConstraint":
        """As ``TokenConstraint.fork``."""
        return GrammarConstraint(self._matcher.deep_copy())

    @property
    def is_over(self) -> bool:
        """As ``TokenConstraint.is_over``."""
        return self._matcher.is_stopped() and not self._matcher.is_error()
