"""From a request of the Responses API to the chat request that asks for the same."""

from __future__ import annotations

from typing import Any

from mixbit.server.dialogue import chat_request
from mixbit.server.schema.chat import CreateChatCompletionRequest
from mixbit.server.schema.responses import (
    CreateResponseRequest,
    FunctionCallItem,
    FunctionCallOutput,
    FunctionTool,
    InputContent,
    InputItem,
    InputMessage,
    InputText,
    NamedTool,
    NamespaceTool,
    ReasoningItem,
    TextFormat,
)

Json = dict[str, Any]


def to_chat(body: CreateResponseRequest) -> CreateChatCompletionRequest:
    """The chat request. Raises ApiError."""
    items = [{"role": "user", "content": body.input}] if isinstance(body.input, str) else _messages(body.input)
    head: list[Json] = [{"role": "system", "content": body.instructions}] if body.instructions else []
    tools = [_tool(name, tool) for name, _, tool in functions(body)]
    choice: Any = body.tool_choice
    if isinstance(choice, NamedTool):
        choice = {"type": "function", "function": {"name": choice.name}}
    return chat_request(
        {
            "messages": _one_system([*head, *items]),
            "tools": tools or None,
            "tool_choice": choice,
            "parallel_tool_calls": body.parallel_tool_calls if tools else None,
            "max_completion_tokens": body.max_output_tokens,
            "temperature": body.temperature,
            "top_p": body.top_p,
            "reasoning_effort": body.reasoning.effort if body.reasoning else None,
            "response_format": _format(body.text.format) if body.text and body.text.format else None,
        }
    )


def functions(body: CreateResponseRequest) -> list[tuple[str, str | None, FunctionTool]]:
    """The functions that the request offers: the name that the model knows, the namespace, the function."""
    found: list[tuple[str, str | None, FunctionTool]] = []
    for tool in body.tools or ():
        match tool:
            case FunctionTool():
                found.append((tool.name, None, tool))
            case NamespaceTool():
                found += [(_full_name(tool.name, each.name), tool.name, each) for each in tool.tools]
    return found


def _full_name(namespace: str | None, name: str) -> str:
    return name if namespace is None else f"{namespace}.{name}"


def _messages(items: list[InputItem]) -> list[Json]:
    """Items as messages: what the assistant thought, said and called in one turn is one message."""
    result: list[Json] = []
    for item in items:
        match item:
            case InputMessage(role="assistant"):
                turn = _turn(result, "content")
                turn["content"] = _text(item.content)
            case InputMessage():
                result.append({"role": item.role, "content": _text(item.content)})
            case ReasoningItem():
                thought = "".join(part.text for part in item.content or item.summary or ())
                turn = _turn(result, "reasoning_content")
                turn["reasoning_content"] = thought
            case FunctionCallItem():
                function = {"name": _full_name(item.namespace, item.name), "arguments": item.arguments}
                call = {"id": item.call_id, "type": "function", "function": function}
                _turn(result).setdefault("tool_calls", []).append(call)
            case FunctionCallOutput():
                result.append({"role": "tool", "tool_call_id": item.call_id, "content": _text(item.output)})
    return result


def _turn(messages: list[Json], field: str | None = None) -> Json:
    """The assistant's message that is being put together; a new one if that has the field, or has called already."""
    last = messages[-1] if messages else {"role": None}
    if last["role"] != "assistant" or (field is not None and (field in last or "tool_calls" in last)):
        last = {"role": "assistant"}
        messages.append(last)
    return last


def _one_system(messages: list[Json]) -> list[Json]:
    """Instructions at the beginning as one message: many templates take no second one."""
    count = 0
    while count < len(messages) and messages[count]["role"] in {"system", "developer"}:
        count += 1
    if count < 2:
        return messages
    text = "\n\n".join(message["content"] for message in messages[:count])
    return [{"role": "system", "content": text}, *messages[count:]]


def _text(content: InputContent) -> str:
    if isinstance(content, str):
        return content
    return "\n".join(part.text if isinstance(part, InputText) else part.refusal for part in content)


def _tool(name: str, tool: FunctionTool) -> Json:
    function = {"name": name, "description": tool.description, "parameters": tool.parameters}
    return {"type": "function", "function": {**function, "strict": tool.strict}}


def _format(form: TextFormat) -> Json:
    if form.type != "json_schema":
        return {"type": form.type}
    schema = {"name": form.name or "output", "schema": form.schema_, "strict": form.strict}
    return {"type": "json_schema", "json_schema": {**schema, "description": form.description}}
