"""The chat templates of checkpoints that bring none.

Messages come normalised: an optional ``system`` message, then ``user`` and ``assistant`` in turn.
Content is a string, or a list of ``{"type": "text", "text": ...}`` and ``{"type": "image"}``.
"""

from typing import Final

_TEXT_OF: Final = """\
{{ bos_token }}
{%- macro text_of(content) -%}
{%- if content is string -%}
{{ content | trim }}
{%- else -%}
{%- for part in content -%}
{%- if part.type == 'image' -%}<start_of_image>
{%- elif part.type == 'text' -%}{{ part.text | trim }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
"""

GEMMA_CHAT_TEMPLATE: Final = (
    _TEXT_OF
    + r"""
{%- set state = namespace(prefix='') -%}
{%- for message in messages -%}
{%- if message.role == 'system' -%}
{%- set state.prefix = text_of(message.content) ~ '\n\n' -%}
{%- else -%}
{{ '<start_of_turn>' ~ ('model' if message.role == 'assistant' else 'user') ~ '\n' }}
{{- state.prefix ~ text_of(message.content) ~ '<end_of_turn>\n' }}
{%- set state.prefix = '' -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<start_of_turn>model\n' }}
{%- endif -%}
"""
)
"""Gemma's own turns. A system message opens the first user turn, with a blank line after it."""

TRANSCRIPT_STOP_STRING: Final = "\n\nUser:"

TRANSCRIPT_CHAT_TEMPLATE: Final = (
    _TEXT_OF
    + r"""
{{- 'A chat between a curious user and a friendly assistant who answers every question in full ' }}
{{- 'sentences.\n\n' }}
{%- if messages and messages[0].role == 'system' -%}
{{ text_of(messages[0].content) ~ '\n\n' }}
{%- endif -%}
{{ 'User:\nWhat is the largest planet in the solar system?\n\n' }}
{{- 'Assistant:\nThe largest planet in the solar system is Jupiter.' }}
{%- for message in messages if message.role != 'system' -%}
{{ '\n\n' ~ ('Assistant' if message.role == 'assistant' else 'User') ~ ':\n' }}
{{- text_of(message.content) }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '\n\nAssistant:\n' }}
{%- endif -%}
"""
)
"""A transcript that a pre-trained model continues, with one exchange to show how.

A completion ends where it would write the user's next line, at ``TRANSCRIPT_STOP_STRING``. Speakers
have a line of their own because after ``Assistant:`` every completion would begin with a space.
"""
