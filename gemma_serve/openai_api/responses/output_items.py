"""The items of an answer while they grow: what the model says, and what it calls."""

import uuid
from collections.abc import Iterable
from dataclasses import dataclass, field

from gemma_serve.openai_api.chat_logprobs import TokenLogprobPayload
from gemma_serve.openai_api.chat_messages import (
    AssistantMessage,
    FunctionCall,
    TextContentPart,
    ToolCallItem,
)
from gemma_serve.openai_api.responses.response_schemas import (
    FunctionCallItem,
    ItemStatus,
    OutputLogprob,
    OutputMessage,
    OutputText,
    OutputTopLogprob,
)


@dataclass(slots=True)
class MessageRecord:
    """Text between two calls, or before, or after all of them."""

    id: str = field(default_factory=lambda: f"msg_{uuid.uuid4().hex}")
    status: ItemStatus = "in_progress"
    logprobs: list[OutputLogprob] = field(default_factory=list)
    _texts: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(self._texts)

    def add(self, text: str, logprobs: Iterable[OutputLogprob]) -> None:
        self._texts.append(text)
        self.logprobs += logprobs

    def content(self) -> OutputText:
        return OutputText(text=self.text, logprobs=self.logprobs)

    def item(self) -> OutputMessage:
        return OutputMessage(id=self.id, status=self.status, content=[self.content()])

    def opening(self) -> OutputMessage:
        """The item before there is any content."""
        return OutputMessage(id=self.id, status=self.status, content=[])

    def message(self) -> AssistantMessage:
        """What it is in a chat."""
        said = TextContentPart(type="text", text=self.text)
        return AssistantMessage(role="assistant", content=[said])


@dataclass(slots=True)
class FunctionCallRecord:
    """One call."""

    call_id: str
    """What its result will refer to."""
    name: str
    id: str = field(default_factory=lambda: f"fc_{uuid.uuid4().hex}")
    status: ItemStatus = "in_progress"
    _arguments: list[str] = field(default_factory=list)

    @property
    def arguments(self) -> str:
        return "".join(self._arguments)

    def add(self, arguments: str) -> None:
        self._arguments.append(arguments)

    def item(self) -> FunctionCallItem:
        return FunctionCallItem(
            id=self.id,
            call_id=self.call_id,
            name=self.name,
            arguments=self.arguments,
            status=self.status,
        )

    def opening(self) -> FunctionCallItem:
        """The item before there are any arguments."""
        return self.item().model_copy(update={"arguments": ""})

    def message(self) -> AssistantMessage:
        """What it is in a chat."""
        function = FunctionCall(name=self.name, arguments=self.arguments)
        call = ToolCallItem(id=self.call_id, function=function)
        return AssistantMessage(role="assistant", tool_calls=[call])


ItemRecord = MessageRecord | FunctionCallRecord


def output_logprob(of_token: TokenLogprobPayload) -> OutputLogprob:
    """In the form of responses, which have no ``null`` for a token that is no text."""
    return OutputLogprob(
        token=of_token["token"],
        logprob=of_token["logprob"],
        bytes=of_token["bytes"] or [],
        top_logprobs=[
            OutputTopLogprob(token=top["token"], logprob=top["logprob"], bytes=top["bytes"] or [])
            for top in of_token["top_logprobs"]
        ],
    )
