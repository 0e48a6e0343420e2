"""Handing a request to the model, whose mistakes are told in the client's words."""

from gemma_serve.errors import OutputConstraintError
from gemma_serve.generation import GenerationClient, GenerationRequest, GenerationStream
from gemma_serve.openai_api.structured_outputs import StructuredOutputFields, constraining_field


async def admit(
    client: GenerationClient, request: GenerationRequest, body: StructuredOutputFields
) -> GenerationStream:
    """As ``client.generate``, but what cannot be enforced is an error of the field that asked."""
    try:
        return await client.generate(request)
    except OutputConstraintError as error:
        field = constraining_field(body)
        raise (error if field is None else error.under(field.path)) from None
