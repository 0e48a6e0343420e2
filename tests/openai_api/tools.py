"""Functions that requests offer, a call of one, and a format that answers may have beside."""

from gemma_serve.messages import ToolDefinition

CITY = {"type": "object", "properties": {"city": {"type": "string"}}}
TIME = {"type": "function", "function": {"name": "get_time"}}
WEATHER = {
    "type": "function",
    "function": {"name": "get_weather", "description": "Sun?", "parameters": CITY, "strict": True},
}
TOOLS = [TIME, WEATHER]
DEFINITIONS = (
    ToolDefinition("get_time"),
    ToolDefinition(
        "get_weather",
        "Sun?",
        '{"type": "object", "properties": {"city": {"type": "string"}}}',
    ),
)
CALL = '{"name": "get_weather", "parameters": {"city": "Paris"}}'
NAMED = {"type": "function", "function": {"name": "get_weather"}}
ANSWER = {"type": "object", "properties": {"sunny": {"type": "boolean"}}}
ANSWER_FORMAT = {"type": "json_schema", "json_schema": {"name": "answer", "schema": ANSWER}}


def allowed(mode: str, *tools: object) -> dict[str, object]:
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}
