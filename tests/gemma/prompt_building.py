"""Prompts built with a small tokenizer and a template as strict as the official one."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from gemma_serve.engine.sequence import PromptInputs
from gemma_serve.gemma.prompt import PromptBuilder
from gemma_serve.gemma.synthetic_tokenizer import synthetic_tokenizer
from gemma_serve.generation import ChatPrompt, VisionInput
from gemma_serve.messages import ChatMessage, ImagePart, Role, TextPart, ToolOffer

BOS, START_OF_TURN, END_OF_TURN, SOFT = 2, 105, 106, 512
VISION = VisionInput(view_size=28, tokens_per_view=4)
IMAGE = ImagePart((b"whole",))

# As strict as the official one: a folded system text, turns that alternate, trimmed parts.
STRICT_TEMPLATE = """
{%- macro show(content) -%}
  {%- if content is string -%}{{ content | trim }}
  {%- elif content is iterable -%}
    {%- for part in content -%}
      {%- if part.type == 'image' -%}<start_of_image>{%- else -%}{{ part.text | trim }}{%- endif -%}
    {%- endfor -%}
  {%- else -%}{{ raise_exception('Invalid content type') }}
  {%- endif -%}
{%- endmacro -%}
{{- bos_token -}}
{%- set turns = messages -%}
{%- set opening = '' -%}
{%- if messages[0].role == 'system' -%}
  {%- set first = messages[0].content -%}
  {%- set opening = (first if first is string else first[0].text) + '\n\n' -%}
  {%- set turns = messages[1:] -%}
{%- endif -%}
{%- for turn in turns -%}
  {%- if turn.role != ('assistant' if loop.index0 % 2 else 'user') -%}
    {{- raise_exception('Conversation roles must alternate user/assistant') -}}
  {%- endif -%}
  {{- '<start_of_turn>' + ('model' if turn.role == 'assistant' else 'user') + '\n' -}}
  {{- (opening if loop.first else '') + show(turn.content) + '<end_of_turn>\n' -}}
{%- endfor -%}
{{- '<start_of_turn>model\n' if add_generation_prompt else '' -}}
"""


def strict_tokenizer() -> PreTrainedTokenizerBase:
    tokenizer = synthetic_tokenizer(
        vocab_size=512, boi_token_id=509, eoi_token_id=510, image_token_id=SOFT
    )
    tokenizer.chat_template = STRICT_TEMPLATE
    return tokenizer


def make_builder(
    tokenizer: PreTrainedTokenizerBase,
    *,
    vision: VisionInput | None = VISION,
    max_model_len: int = 100_000,
) -> PromptBuilder:
    return PromptBuilder(tokenizer, vision=vision, image_token_id=SOFT, max_model_len=max_model_len)


def build(
    builder: PromptBuilder, messages: Sequence[ChatMessage], tools: ToolOffer | None = None
) -> PromptInputs:
    return builder.build(ChatPrompt(tuple(messages), continue_final_message=True, tools=tools))


def message(role: str, *contents: str | ImagePart) -> ChatMessage:
    parts = tuple(TextPart(c) if isinstance(c, str) else c for c in contents)
    return ChatMessage(Role(role), parts)


def user(*contents: str | ImagePart) -> ChatMessage:
    return message("user", *contents)
