"""Every error that this project raises on purpose.

::

    GemmaServeError
    ├── ConfigurationError          an operator's mistake, found at start-up
    │   └── CheckpointError         the model cannot be found, fetched or loaded
    ├── RequestError                a caller's mistake: retrying the same request is pointless
    │   ├── InvalidRequestError     a field is malformed, out of range or unsupported
    │   │   ├── ContextLengthError  the prompt does not fit the model's context
    │   │   └── OutputConstraintError  the answer's format is malformed or cannot be enforced
    │   ├── AuthenticationError     no key, or a wrong one
    │   ├── NotFoundError           no such model or route
    │   └── PayloadTooLargeError    the body is larger than the server reads
    ├── OverloadedError             the queue is full; the same request may pass later
    ├── UnavailableError            the model is loading, draining or gone
    └── GenerationError             the engine failed while it worked on the request

They carry facts; ``openai_api.error_responses`` alone turns them into status codes and bodies. All
cross process borders, so each one's ``args`` rebuild it: required values are positional, the rest
are keywords with defaults.
"""


class GemmaServeError(Exception):
    """Base of all. ``str(error)`` is a sentence that may be shown to the caller."""


class ConfigurationError(GemmaServeError):
    """An operator's setting cannot work; the message names it and says what would."""


class CheckpointError(ConfigurationError):
    """The model cannot be found, fetched or loaded."""


class RequestError(GemmaServeError):
    """A caller's mistake.

    ``param``: path of the offending field (``messages[0].content[1].image_url.url``), if one is to
    blame. ``code``: OpenAI's machine-readable error code, if there is one.
    """

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class InvalidRequestError(RequestError):
    """A field is malformed, out of range, or asks for something that this server does not do."""


class ContextLengthError(InvalidRequestError):
    """The prompt does not fit the model's context.

    The wording is OpenAI's: clients look for "maximum context length is N tokens".
    """

    def __init__(self, message: str, *, param: str | None = "messages", code: str | None = None):
        super().__init__(message, param=param, code=code or "context_length_exceeded")

    @classmethod
    def of(
        cls, *, prompt_tokens: int, max_model_len: int, param: str = "messages"
    ) -> "ContextLengthError":
        """The prompt's ``prompt_tokens`` leave no room for an answer in ``max_model_len``."""
        return cls(
            f"This model's maximum context length is {max_model_len} tokens, but the prompt has "
            f"{prompt_tokens} tokens and at least one more is needed for the answer. "
            f"Please shorten the {param}.",
            param=param,
        )


class OutputConstraintError(InvalidRequestError):
    """The answer's format is malformed, or it cannot be enforced.

    ``param`` is the place in the format (``properties.age``), if one is to blame: whoever knows
    the request's field that holds the format puts that before it.
    """

    def under(self, field: str) -> InvalidRequestError:
        """The same error, about a format that the request has at ``field``."""
        path = self.param or ""
        separator = "." if path and not path.startswith("[") else ""
        return InvalidRequestError(str(self), param=field + separator + path, code=self.code)


class AuthenticationError(RequestError):
    """No API key, or a wrong one."""


class NotFoundError(RequestError):
    """No such model or route."""


class PayloadTooLargeError(RequestError):
    """The body is larger than the server reads."""


class OverloadedError(GemmaServeError):
    """The queue is full. ``retry_after_s``: when a caller may try again, in seconds."""

    def __init__(self, message: str, *, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class UnavailableError(GemmaServeError):
    """The model is loading, draining or gone; another replica or a later try may answer."""


class GenerationError(GemmaServeError):
    """The engine failed while it worked on the request. The message holds no internals."""
