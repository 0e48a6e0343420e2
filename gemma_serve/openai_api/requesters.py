"""Who asks: whose turn a request takes and when, and whose cached prompts it may reuse."""

from dataclasses import dataclass
from typing import Annotated, Self

from pydantic import BaseModel, Field

from gemma_serve.openai_api.field_types import Int, Text

CacheSalt = Annotated[Text, Field(min_length=1, max_length=256)]


class RequesterFields(BaseModel):
    """What every endpoint that generates takes. Each description is the field's line in the docs.

    Their values go through ``Requester`` only: a client's own salt must not open what another API
    key's prompts left in the cache.
    """

    user: Text | None = Field(
        default=None, description="Who asks. Users take turns when requests have to wait."
    )
    safety_identifier: Text | None = Field(
        default=None, description="OpenAI's newer name of `user`, which it wins over."
    )
    cache_salt: CacheSalt | None = Field(
        default=None,
        description="Only requests of the same salt reuse what is cached of their prompts.",
    )
    priority: Annotated[Int, Field(ge=-(2**63), le=2**63 - 1)] | None = Field(
        default=None,
        description="vLLM's: of a user's requests that wait, the one with the smallest is first.",
    )


@dataclass(frozen=True, slots=True)
class Requester:
    """As the model's side knows it, of which both are opaque."""

    user: str | None
    cache_salt: str | None
    priority: int = 0

    @classmethod
    def of(
        cls, fields: RequesterFields, *, api_key_id: str | None, share_prefix_cache: bool
    ) -> Self:
        """``api_key_id``: stands for the key that the request came with, if keys are asked for.

        Those who have the same one take turns as one user unless they name themselves, and share
        nothing with others unless ``share_prefix_cache``.
        """
        user = next(
            (name for name in (fields.safety_identifier, fields.user) if name is not None),
            api_key_id,
        )
        salt = fields.cache_salt
        if api_key_id is not None and not share_prefix_cache:
            salt = f"{api_key_id}:{salt or ''}"  # the client's own, within what its key may see
        return cls(user, salt, fields.priority or 0)
