"""Tools for models whose chat template knows of none: described in the system message, in Hermes' form.

Earlier calls and their results are written into the messages in the same form, the results as the user's.
"""

from __future__ import annotations

import json
from typing import Any

_INSTRUCTIONS = """You can call functions. These are available, as JSON:
<tools>
{tools}
</tools>

To call one, write a JSON object with its name and its arguments between these tags:
<tool_call>
{{"name": "the function's name", "arguments": {{"argument": "value"}}}}
</tool_call>"""


def with_tools(messages: list[dict[str, Any]], tools: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages, with the tools in the system message."""
    listed = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    instructions = _INSTRUCTIONS.format(tools=listed)
    if messages[0]["role"] == "system":
        first = {**messages[0], "content": f"{messages[0]['content']}\n\n{instructions}".strip()}
        return [first, *messages[1:]]
    return [{"role": "system", "content": instructions}, *messages]


def as_text(message: dict[str, Any]) -> dict[str, Any]:
    """A message with its calls, or the result of one, as text."""
    if message["role"] == "tool":
        return {"role": "user", "content": f"<tool_response>\n{message['content']}\n</tool_response>"}
    if not message.get("tool_calls"):
        return message
    calls = [json.dumps(call["function"], ensure_ascii=False) for call in message["tool_calls"]]
    parts = [message["content"], *(f"<tool_call>\n{call}\n</tool_call>" for call in calls)]
    rest = {name: value for name, value in message.items() if name != "tool_calls"}
    return {**rest, "content": "\n".join(part for part in parts if part)}
