"""From the messages of a chat request to the text of a prompt."""

from __future__ import annotations

import json
import secrets
from typing import Any

from mixbit.server.errors import ApiError, invalid
from mixbit.server.model import ServedModel
from mixbit.server.schema.chat import (
    ChatCompletionMessageToolCall,
    ChatCompletionRequestAssistantMessage,
    ChatCompletionRequestMessage,
    ChatCompletionRequestMessageContentPartText,
    ChatCompletionRequestToolMessage,
    Content,
    CreateChatCompletionRequest,
)
from mixbit.server.templates import ChatTemplate, RenderError
from mixbit.server.tool_prompt import as_text, with_tools


async def render_prompt(body: CreateChatCompletionRequest, model: ServedModel) -> str:
    """The prompt's text, ending where the assistant's turn begins, or within it if the last message is the
    assistant's. Raises a 400 that quotes the template where it refuses."""
    template = model.template
    if template is None:
        raise ApiError(
            400,
            f"This model cannot chat: {model.template_problem}. Use /v1/completions, "
            "or start the server with --chat-template FILE.",
            code="no_chat_template",
        )
    messages = [_for_template(message, template) for message in body.messages]
    prefill = messages[-1]["role"] == "assistant"
    mark = secrets.token_hex(16)
    if prefill:
        if "tool_calls" in messages[-1]:
            last = f"messages[{len(messages) - 1}]"
            raise invalid(f"'{last}' calls tools: messages with role 'tool' must follow it.", last)
        messages[-1]["content"] += mark
    tools = None if body.tool_choice == "none" else [tool.model_dump(exclude_none=True) for tool in body.tools or ()]
    if not template.knows("tool_calls"):
        messages = [as_text(message) for message in messages]
    if tools and not template.knows("tools"):
        messages = with_tools(messages, tools)
    variables = {
        **_extra_variables(body, template),
        "messages": messages,
        "tools": tools or None,
        "documents": None,
        "add_generation_prompt": not prefill,
    }
    try:
        text = await template.render(variables, has_tools=bool(tools))
    except RenderError as error:
        raise ApiError(400, str(error), param="messages", code="chat_template_error") from None
    if not prefill:
        return text
    # The answer goes on where the last message ends, so what the template puts behind it must go.
    before, *after = text.split(mark)
    if len(after) != 1:
        raise invalid(
            "The last message is the assistant's, and the chat template does not permit continuing it.",
            f"messages[{len(messages) - 1}]",
        )
    return before


def _extra_variables(body: CreateChatCompletionRequest, template: ChatTemplate) -> dict[str, Any]:
    variables = dict(body.chat_template_kwargs or {})
    for name in variables:
        if name in template.control_names or not name.isidentifier() or name.startswith("_"):
            raise invalid(
                f"'chat_template_kwargs' may not set {name[:100]!r}.", "chat_template_kwargs", "unsupported_parameter"
            )
    if body.reasoning_effort is not None:
        variables.setdefault("reasoning_effort", body.reasoning_effort)
    return variables


def _for_template(message: ChatCompletionRequestMessage, template: ChatTemplate) -> dict[str, Any]:
    """A message as templates expect it: text content, arguments of calls as objects."""
    role = message.role
    if role == "developer" and not template.knows("developer"):
        role = "system"
    result: dict[str, Any] = {"role": role, "content": _text(message.content)}
    if message.name is not None:
        result["name"] = message.name
    if isinstance(message, ChatCompletionRequestToolMessage) and message.tool_call_id is not None:
        result["tool_call_id"] = message.tool_call_id
    if isinstance(message, ChatCompletionRequestAssistantMessage):
        result["content"] = result["content"] or message.refusal or ""
        if message.reasoning_content is not None:
            result["reasoning_content"] = message.reasoning_content
        if message.tool_calls:
            result["tool_calls"] = [_tool_call(call) for call in message.tool_calls]
    return result


def _text(content: Content) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    return "\n".join(
        part.text if isinstance(part, ChatCompletionRequestMessageContentPartText) else part.refusal for part in content
    )


def _tool_call(call: ChatCompletionMessageToolCall) -> dict[str, Any]:
    arguments: Any = call.function.arguments
    try:
        parsed = json.loads(arguments)
    except (ValueError, RecursionError):
        parsed = None  # a model may have written nonsense; its history must still be readable
    if isinstance(parsed, dict):
        arguments = parsed
    return {"id": call.id, "type": call.type, "function": {"name": call.function.name, "arguments": arguments}}
