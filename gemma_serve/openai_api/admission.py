"""Handing a request to the model, whose mistakes are told in the client's words."""

import logging

from pydantic import BaseModel

from gemma_serve.errors import InvalidRequestError, OutputConstraintError
from gemma_serve.generation import GenerationClient, GenerationRequest, GenerationStream
from gemma_serve.openai_api.chat_tools import ToolUse
from gemma_serve.openai_api.structured_outputs import StructuredOutputFields, constraining_field

logger = logging.getLogger(__name__)


def log_ignored_fields(body: BaseModel, request_id: str) -> None:
    """Name the fields that nobody reads, for whoever wonders why one has no effect."""
    if body.model_extra and logger.isEnabledFor(logging.DEBUG):
        logger.debug("ignored request_id=%s fields=%a", request_id, sorted(body.model_extra))


async def admit(
    client: GenerationClient,
    request: GenerationRequest,
    body: StructuredOutputFields,
    tool_use: ToolUse | None = None,
) -> GenerationStream:
    """As ``client.generate``, but what cannot be enforced is an error of the field that asked."""
    try:
        return await client.generate(request)
    except OutputConstraintError as error:
        raise _in_its_field(error, body, tool_use) from None


def _in_its_field(
    error: OutputConstraintError, body: StructuredOutputFields, tool_use: ToolUse | None
) -> InvalidRequestError:
    if tool_use is not None and tool_use.constraint is not None:
        return tool_use.error_of_constraint(error)
    field = constraining_field(body)
    return error if field is None else error.under(field.path)
