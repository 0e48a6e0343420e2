"""The tools of a chat completion request, and the choice among them."""

from typing import Annotated, Final, Literal

from pydantic import BaseModel, BeforeValidator, Field

from gemma_serve.openai_api.field_types import Bool, Text

MAX_TOOLS: Final = 1024
"""Far more than a context of 128K tokens holds."""

FunctionName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]


class FunctionDefinition(BaseModel):
    """A function that a model may call."""

    name: FunctionName
    description: Text | None = None
    parameters: dict[Text, object] | None = Field(default=None, description="A JSON Schema.")
    strict: Bool | None = Field(
        default=None, description="Without effect: calls that are certain always fit the schema."
    )


class Tool(BaseModel):
    """A tool; functions are the only kind."""

    type: Literal["function"]
    function: FunctionDefinition


class ChoiceMode(BaseModel):
    """A choice that is one word."""

    type: Literal["none", "auto", "required"]


class ChosenFunction(BaseModel):
    """A function by its name."""

    name: Text


class NamedChoice(BaseModel):
    """The function to call."""

    type: Literal["function"]
    function: ChosenFunction


class AllowedTools(BaseModel):
    """Some of the tools, and whether one of them must be called."""

    mode: Literal["auto", "required"]
    tools: list[NamedChoice] = Field(min_length=1)


class AllowedToolsChoice(BaseModel):
    """A choice among some of the tools."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


def word_as_object(value: object) -> object:
    """For a ``BeforeValidator``: a mode may be written as its word alone."""
    return {"type": value} if isinstance(value, str) else value


ToolChoiceField = Annotated[
    ChoiceMode | NamedChoice | AllowedToolsChoice,
    Field(discriminator="type"),
    BeforeValidator(
        word_as_object,
        json_schema_input_type=Literal["none", "auto", "required"]
        | NamedChoice
        | AllowedToolsChoice,
    ),
]
