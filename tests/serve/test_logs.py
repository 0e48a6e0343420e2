"""What a replica writes into its log."""

import logging
from collections.abc import Iterator

import pytest

from deployments.logs import configure_logging
from gemma_serve.errors import ContextLengthError, GenerationError, OverloadedError

SERVE_LOGGER = logging.getLogger("ray.serve")


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in ("gemma_serve", "deployments")]
    before = [(logger.level, logger.handlers, logger.propagate) for logger in loggers]
    filters = SERVE_LOGGER.filters[:]
    yield
    for logger, (level, handlers, propagate) in zip(loggers, before, strict=True):
        logger.setLevel(level)
        logger.handlers, logger.propagate = handlers, propagate
    SERVE_LOGGER.filters = filters


@pytest.mark.parametrize(
    ("error", "is_logged"),
    [
        (ContextLengthError("too long"), False),
        (OverloadedError("full"), False),
        (GenerationError("failed"), True),
        (KeyError("x"), True),
    ],
)
def test_serve_logs_faults_and_no_callers_mistakes(
    error: Exception, is_logged: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    logged: list[logging.LogRecord] = []
    monkeypatch.setattr(SERVE_LOGGER, "callHandlers", logged.append)
    configure_logging()
    try:
        raise error
    except Exception:
        SERVE_LOGGER.exception("Request failed.")
    assert bool(logged) is is_logged
