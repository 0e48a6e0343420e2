"""Where the log lines of a replica go."""

import logging

from gemma_serve.errors import OverloadedError, RequestError


def configure_logging() -> None:
    """Show INFO of this application on stderr, which Ray passes on to the terminal.

    Ray's worker processes have no handler for anybody's loggers but its own.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(levelname)s %(asctime)s %(name)s %(message)s"))
    for name in ("gemma_serve", "deployments"):
        application_logger = logging.getLogger(name)
        application_logger.setLevel(logging.INFO)
        application_logger.handlers = [handler]
        application_logger.propagate = False
    logging.getLogger("ray.serve").addFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    """Serve would write an error and a stack trace for every caller's mistake."""
    error = record.exc_info[1] if record.exc_info else None
    return not isinstance(error, RequestError | OverloadedError)
