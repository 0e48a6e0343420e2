"""How the API presents itself, and to whom."""

from dataclasses import dataclass, field
from typing import Literal

from gemma_serve.messages import PromptedToolForm
from gemma_serve.openai_api.limits import ApiLimits

ToolPolicy = Literal["prompt", "ignore", "reject"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiConfig:
    """What an operator decides about the HTTP side. ``config/settings.py`` says why."""

    model_name: str
    """The only ``model`` that requests may name, and the one that every answer carries."""
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    """Any of these opens every path but those of probes; none at all: no key is asked for."""
    cors_allow_origins: tuple[str, ...] = ()
    """Web origins whose pages may call this server from a browser; ``*`` allows all."""
    share_prefix_cache: bool = False
    """Whether requests with different API keys may share what is cached of their prompts."""
    keep_alive_interval_s: float = 15.0
    """How long a stream may be silent before it gets a comment, so that nothing on the way takes
    it for dead."""
    response_store_bytes: int = 64 * 1024 * 1024
    """Memory for the responses that clients may continue; 0 stores none."""
    tools: ToolPolicy | None = None
    """What ``tools`` do that a model may call: ``None`` leaves it to what the model can."""
    tool_form: PromptedToolForm = "json"
    limits: ApiLimits = field(default_factory=ApiLimits)
