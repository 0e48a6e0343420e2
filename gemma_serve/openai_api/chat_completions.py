"""One chat completion, from the parsed body to the last byte of the answer."""

import time
import uuid
from dataclasses import dataclass

from starlette.responses import Response

from gemma_serve.openai_api.answers import Answer
from gemma_serve.openai_api.chat_admission import AdmittedChat, ChatAdmission
from gemma_serve.openai_api.chat_responses import ChatCompletionBuilder
from gemma_serve.openai_api.chat_schemas import ChatCompletionRequest


@dataclass(frozen=True, slots=True)
class ChatCompletions:
    """Answers chat completion requests with the help of a model."""

    admission: ChatAdmission

    async def create(
        self, body: ChatCompletionRequest, *, request_id: str, api_key_id: str | None = None
    ) -> Response:
        """Admit the request and answer it; ``request_id`` is what logs call it, here and there.

        ``api_key_id``: as ``Requester.of`` takes it.
        Raises whatever keeps the request from being admitted, so that it becomes a real status.
        """
        chat = await self.admission.admit(body, request_id=request_id, api_key_id=api_key_id)
        answer = Answer(request_id, chat.stream, self._builder(body, chat))
        if body.stream:
            return answer.streamed(self.admission.config.keep_alive_interval_s)
        return await answer.whole()

    def _builder(self, body: ChatCompletionRequest, chat: AdmittedChat) -> ChatCompletionBuilder:
        return ChatCompletionBuilder(
            completion_id=f"chatcmpl-{uuid.uuid4().hex}",
            created=int(time.time()),
            model=self.admission.config.model_name,
            n=chat.request.n,
            started=chat.stream.started,
            stream_usage=body.stream_usage,
            make_parser=None if chat.tool_use is None else chat.tool_use.parser,
            logprobs=chat.request.sampling.logprobs is not None,
            tokens_as_token_ids=bool(body.return_tokens_as_token_ids),
            return_token_ids=bool(body.return_token_ids),
            num_prompt_logprobs=body.prompt_logprobs,
        )
