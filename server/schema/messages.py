"""`POST /v1/messages` and `/v1/messages/count_tokens`, with the names of Anthropic's public API."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from mixbit.server.schema.chat import Name
from mixbit.server.schema.common import MAX_TOKENS, RequestModel, ResponseModel, StopList, unsupported
from mixbit.server.settings import REQUEST

_IGNORED = "Accepted and not used."


class TextBlock(RequestModel):
    """Text."""

    type: Literal["text"]
    text: str


class ToolUseBlock(RequestModel):
    """A call of an earlier turn."""

    type: Literal["tool_use"]
    id: Name
    name: Name
    input: dict[str, Any]


ResultContent = str | Annotated[list[TextBlock], Field(max_length=REQUEST.max_parts)] | None


class ToolResultBlock(RequestModel):
    """The result of a call."""

    type: Literal["tool_result"]
    tool_use_id: Name
    content: ResultContent = None
    is_error: bool | None = Field(None, description="Accepted and not used: the content tells the model.")


class ThinkingBlock(RequestModel):
    """Thinking of an earlier turn, for templates that show it again."""

    type: Literal["thinking"]
    thinking: str
    signature: str | None = Field(None, description=_IGNORED)


class RedactedThinkingBlock(RequestModel):
    """Thinking that another server hid; left out."""

    type: Literal["redacted_thinking"]


Block = Annotated[
    TextBlock | ToolUseBlock | ToolResultBlock | ThinkingBlock | RedactedThinkingBlock, Field(discriminator="type")
]


class MessageParam(RequestModel):
    """One turn. The last may be the assistant's: the beginning of the answer, to be continued."""

    role: Literal["user", "assistant", "system"]
    content: str | Annotated[list[Block], Field(max_length=REQUEST.max_parts)]


class Tool(RequestModel):
    """A tool that the client runs."""

    type: Literal["custom"] | None = None
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.\-]{1,128}$")]
    description: str | None = None
    input_schema: dict[str, Any]
    strict: bool | None = None


class ToolChoice(RequestModel):
    """Whether tools are called: any makes it call one, tool a certain one."""

    type: Literal["auto", "any", "tool", "none"]
    name: Name | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(RequestModel):
    """Whether the model thinks first, where its template can turn that on and off."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: int | None = Field(None, description=_IGNORED)


class OutputFormat(RequestModel):
    """The form of the answer."""

    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(RequestModel):
    """How much effort, and which form."""

    effort: str | None = Field(None, description=_IGNORED)
    format: OutputFormat | None = None


class CountTokensRequest(RequestModel):
    """A conversation whose prompt is to be measured."""

    model: str | None = Field(None, description="The served name or an alias; absent means the served model.")
    messages: Annotated[list[MessageParam], Field(min_length=1, max_length=REQUEST.max_messages)]
    system: str | Annotated[list[TextBlock], Field(max_length=REQUEST.max_parts)] | None = None
    tools: Annotated[list[Tool], Field(max_length=REQUEST.max_tools)] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = Field(None, description="Absent: disabled.")
    output_config: OutputConfig | None = None


class CreateMessageRequest(CountTokensRequest):
    """A conversation to be continued."""

    max_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)]
    stream: bool | None = None
    stop_sequences: StopList | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=MAX_TOKENS)] | None = None
    metadata: dict[str, Any] | None = Field(None, description=_IGNORED)
    service_tier: str | None = Field(None, description=_IGNORED)
    context_management: Any = Field(None, description=_IGNORED)
    mcp_servers: Annotated[Any, unsupported("run tools yourself")] = None
    container: Annotated[Any, unsupported("leave it out")] = None


class TextContent(ResponseModel):
    """Text of the answer."""

    type: Literal["text"]
    text: str


class ThinkingContent(ResponseModel):
    """Thinking before the answer. The signature is always empty."""

    type: Literal["thinking"]
    thinking: str
    signature: str


class ToolUseContent(ResponseModel):
    """A call of one of the tools."""

    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


class MessageUsage(ResponseModel):
    """Token counts. input_tokens leaves out those that were cached."""

    input_tokens: int
    output_tokens: int
    cache_read_input_tokens: int
    cache_creation_input_tokens: int


class Message(ResponseModel):
    """The whole answer."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[TextContent | ThinkingContent | ToolUseContent]
    stop_reason: Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"] | None
    stop_sequence: str | None
    usage: MessageUsage


class MessageTokensCount(ResponseModel):
    """Tokens of the prompt."""

    input_tokens: int


class AnthropicErrorDetail(ResponseModel):
    """What went wrong."""

    type: str
    message: str


class AnthropicError(ResponseModel):
    """The body of every answer that is not a success."""

    type: Literal["error"]
    error: AnthropicErrorDetail
