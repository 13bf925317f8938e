"""`POST /v1/responses`: stateless, so every request carries its whole conversation."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Discriminator, Field, Tag
from pydantic_core import PydanticCustomError

from mixbit.server.schema.chat import Name
from mixbit.server.schema.common import MAX_TOKENS, RequestModel, ResponseModel, unsupported
from mixbit.server.settings import REQUEST

_IGNORED = "Accepted and not used."


class InputText(RequestModel):
    """Text."""

    type: Literal["input_text", "output_text", "text"]
    text: str


class Refusal(RequestModel):
    """An earlier refusal of the assistant, read as text."""

    type: Literal["refusal"]
    refusal: str


InputPart = Annotated[InputText | Refusal, Field(discriminator="type")]
InputContent = str | Annotated[list[InputPart], Field(max_length=REQUEST.max_parts)]


class InputMessage(RequestModel):
    """One turn."""

    type: Literal["message"] | None = None
    role: Literal["user", "assistant", "system", "developer"]
    content: InputContent


class FunctionCallItem(RequestModel):
    """A call of an earlier turn."""

    type: Literal["function_call"]
    call_id: Name
    name: Name
    namespace: Name | None = None
    arguments: str


class FunctionCallOutput(RequestModel):
    """The result of a call."""

    type: Literal["function_call_output"]
    call_id: Name
    output: InputContent


class ReasoningText(RequestModel):
    """Thinking, or a summary of it."""

    type: Literal["reasoning_text", "summary_text", "text"]
    text: str


class ReasoningItem(RequestModel):
    """Thinking of an earlier turn, for templates that show it again."""

    type: Literal["reasoning"]
    content: Annotated[list[ReasoningText], Field(max_length=REQUEST.max_parts)] | None = None
    summary: Annotated[list[ReasoningText], Field(max_length=REQUEST.max_parts)] | None = None
    encrypted_content: str | None = Field(None, description=_IGNORED)


def _item_type(item: Any) -> str | None:
    if not isinstance(item, dict):
        return getattr(item, "type", None) or "message"
    return item.get("type") or "message"


InputItem = Annotated[
    Annotated[InputMessage, Tag("message")]
    | Annotated[FunctionCallItem, Tag("function_call")]
    | Annotated[FunctionCallOutput, Tag("function_call_output")]
    | Annotated[ReasoningItem, Tag("reasoning")],
    Discriminator(
        _item_type,
        custom_error_type="item",
        custom_error_message="must be of type message, function_call, function_call_output or reasoning",
    ),
]


class FunctionTool(RequestModel):
    """A function that the client runs."""

    type: Literal["function"]
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.\-]{1,128}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class NamespaceTool(RequestModel):
    """Functions under one name, as Codex sends them. The model knows each as `namespace.function`."""

    type: Literal["namespace"]
    name: Name
    description: str | None = None
    tools: Annotated[list[FunctionTool], Field(max_length=REQUEST.max_tools)]


class WebSearchTool(RequestModel):
    """Accepted, since agents always send it, and left out: this server searches nothing."""

    type: Literal["web_search", "web_search_preview"]


ResponseTool = Annotated[FunctionTool | NamespaceTool | WebSearchTool, Field(discriminator="type")]


class NamedTool(RequestModel):
    """Make the model call one function."""

    type: Literal["function"]
    name: Name


class TextFormat(RequestModel):
    """The form of the answer."""

    type: Literal["text", "json_object", "json_schema"]
    name: Name | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class TextConfig(RequestModel):
    """How the answer is to be written."""

    format: TextFormat | None = None
    verbosity: str | None = Field(None, description=_IGNORED)


class ReasoningConfig(RequestModel):
    """How much to think."""

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = Field(
        None, description="Given to the chat template; no effect on models whose template does not read it."
    )
    summary: str | None = Field(None, description=_IGNORED)


def _false_only(value: Any) -> Any:
    if value:
        raise PydanticCustomError("unsupported", "not supported by this server; leave it out")
    return value


def _not_auto(value: Any) -> Any:
    if value == "auto":
        raise PydanticCustomError("unsupported", "conversations are not cut; use 'disabled'")
    return value


class CreateResponseRequest(RequestModel):
    """A conversation to be continued."""

    model: str | None = Field(None, description="The served name or an alias; absent means the served model.")
    input: str | Annotated[list[InputItem], Field(min_length=1, max_length=REQUEST.max_messages)]
    instructions: str | None = None
    stream: bool | None = None
    tools: Annotated[list[ResponseTool], Field(max_length=REQUEST.max_tools)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    max_output_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    text: TextConfig | None = None
    reasoning: ReasoningConfig | None = None
    truncation: Annotated[Literal["auto", "disabled"], AfterValidator(_not_auto)] | None = None
    previous_response_id: Annotated[Any, unsupported("send the whole conversation as input")] = None
    conversation: Annotated[Any, unsupported("send the whole conversation as input")] = None
    prompt: Annotated[Any, unsupported("send instructions and input")] = None
    background: Annotated[bool | None, AfterValidator(_false_only)] = None
    top_logprobs: Annotated[int | None, AfterValidator(_false_only)] = None
    store: bool | None = Field(None, description="Accepted and not used: nothing is stored.")
    include: list[str] | None = Field(None, description=_IGNORED)
    metadata: dict[str, str] | None = Field(None, description="Given back as it is.")
    max_tool_calls: int | None = Field(None, description=_IGNORED)
    prompt_cache_key: str | None = Field(None, description=_IGNORED)
    safety_identifier: str | None = Field(None, description=_IGNORED)
    service_tier: str | None = Field(None, description=_IGNORED)
    stream_options: dict[str, Any] | None = Field(None, description=_IGNORED)
    user: str | None = Field(None, description=_IGNORED)


class OutputText(ResponseModel):
    """Text of the answer."""

    type: Literal["output_text"]
    text: str
    annotations: list[Any]
    logprobs: list[Any]


class OutputMessage(ResponseModel):
    """What the assistant says."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    status: Literal["in_progress", "completed", "incomplete"]
    content: list[OutputText]


class OutputFunctionCall(ResponseModel):
    """A call of one of the tools."""

    id: str
    type: Literal["function_call"]
    status: Literal["in_progress", "completed", "incomplete"]
    call_id: str
    name: str
    namespace: str | None = None
    arguments: str


class OutputReasoningText(ResponseModel):
    """Thinking."""

    type: Literal["reasoning_text"]
    text: str


class OutputReasoning(ResponseModel):
    """Thinking before the answer."""

    id: str
    type: Literal["reasoning"]
    status: Literal["in_progress", "completed", "incomplete"]
    summary: list[Any]
    content: list[OutputReasoningText]


class InputTokensDetails(ResponseModel):
    """Of the input: how many were not computed again."""

    cached_tokens: int
    cache_write_tokens: int


class OutputTokensDetails(ResponseModel):
    """Of the output: how many were thinking; not counted here, always 0."""

    reasoning_tokens: int


class ResponseUsage(ResponseModel):
    """Token counts."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class ResponseFault(ResponseModel):
    """Why it failed."""

    code: str
    message: str


class IncompleteDetails(ResponseModel):
    """Why it ended early."""

    reason: Literal["max_output_tokens"]


class Response(ResponseModel):
    """The whole answer. What the request set is given back."""

    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    model: str
    output: list[OutputMessage | OutputFunctionCall | OutputReasoning]
    usage: ResponseUsage | None
    error: ResponseFault | None
    incomplete_details: IncompleteDetails | None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    parallel_tool_calls: bool
    previous_response_id: None
    reasoning: dict[str, Any]
    store: Literal[False]
    temperature: float | None
    text: dict[str, Any]
    tool_choice: Any
    tools: list[dict[str, Any]]
    top_p: float | None
    truncation: Literal["disabled"]
    background: Literal[False]
