"""`POST /v1/chat/completions`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints

from mixbit.server.schema.common import (
    MAX_TOKENS,
    CompletionUsage,
    RequestModel,
    ResponseModel,
    SamplingFields,
    unsupported,
)
from mixbit.server.settings import REQUEST

Name = Annotated[str, StringConstraints(min_length=1, max_length=256)]


class ChatCompletionRequestMessageContentPartText(RequestModel):
    """Text. Parts of one message are joined by newlines."""

    type: Literal["text"]
    text: str


class ChatCompletionRequestMessageContentPartRefusal(RequestModel):
    """An earlier refusal of the assistant, read as text."""

    type: Literal["refusal"]
    refusal: str


ContentPart = Annotated[
    ChatCompletionRequestMessageContentPartText | ChatCompletionRequestMessageContentPartRefusal,
    Field(discriminator="type"),
]
Content = str | Annotated[list[ContentPart], Field(max_length=REQUEST.max_parts)] | None


class ChatCompletionRequestSystemMessage(RequestModel):
    """Instructions."""

    role: Literal["system"]
    content: Content
    name: Name | None = None


class ChatCompletionRequestDeveloperMessage(RequestModel):
    """Instructions; given to the template as `system` unless it knows the role."""

    role: Literal["developer"]
    content: Content
    name: Name | None = None


class ChatCompletionRequestUserMessage(RequestModel):
    """What the user says."""

    role: Literal["user"]
    content: Content
    name: Name | None = None


class FunctionCall(RequestModel):
    """A function that the assistant called, with its arguments as JSON text."""

    name: Name
    arguments: str


class ChatCompletionMessageToolCall(RequestModel):
    """One call of an earlier turn."""

    id: Name
    type: Literal["function"] = "function"
    function: FunctionCall


class ChatCompletionRequestAssistantMessage(RequestModel):
    """An earlier turn of the assistant. As the last message: the beginning of the answer, to be continued."""

    role: Literal["assistant"]
    content: Content = None
    refusal: str | None = None
    name: Name | None = None
    reasoning_content: str | None = Field(None, description="Earlier thinking, for templates that show it again.")
    tool_calls: Annotated[list[ChatCompletionMessageToolCall], Field(max_length=REQUEST.max_tools)] | None = None


class ChatCompletionRequestToolMessage(RequestModel):
    """The result of a call."""

    role: Literal["tool"]
    content: Content
    tool_call_id: Name | None = None
    name: Name | None = None


ChatCompletionRequestMessage = Annotated[
    ChatCompletionRequestSystemMessage
    | ChatCompletionRequestDeveloperMessage
    | ChatCompletionRequestUserMessage
    | ChatCompletionRequestAssistantMessage
    | ChatCompletionRequestToolMessage,
    Field(discriminator="role"),
]


class FunctionObject(RequestModel):
    """A function the model may call."""

    name: Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9_.\-]{1,128}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ChatCompletionTool(RequestModel):
    """A tool; functions are the only kind."""

    type: Literal["function"]
    function: FunctionObject


class NamedFunction(RequestModel):
    """A function by name."""

    name: Name


class ChatCompletionNamedToolChoice(RequestModel):
    """Make the model call one function."""

    type: Literal["function"]
    function: NamedFunction


class ResponseFormatText(RequestModel):
    """Any text."""

    type: Literal["text"]


class ResponseFormatJsonObject(RequestModel):
    """A JSON object."""

    type: Literal["json_object"]


class JSONSchema(RequestModel):
    """A schema with a name. Keywords that cannot be enforced are refused if strict, else left aside."""

    name: Name
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormatJsonSchema(RequestModel):
    """JSON that fits a schema."""

    type: Literal["json_schema"]
    json_schema: JSONSchema


ResponseFormat = Annotated[
    ResponseFormatText | ResponseFormatJsonObject | ResponseFormatJsonSchema, Field(discriminator="type")
]


TemplateKwargs = Annotated[dict[str, Any], Field(max_length=REQUEST.max_template_kwargs)]


class CreateChatCompletionRequest(SamplingFields):
    """A conversation to be continued."""

    messages: Annotated[list[ChatCompletionRequestMessage], Field(min_length=1, max_length=REQUEST.max_messages)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = Field(
        None, description="Wins over max_tokens, its older name. Absent: up to the context length."
    )
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=REQUEST.max_top_logprobs)] | None = None
    tools: Annotated[list[ChatCompletionTool], Field(max_length=REQUEST.max_tools)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ChatCompletionNamedToolChoice | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = Field(
        None, description="Given to the chat template; no effect on models whose template does not read it."
    )
    chat_template_kwargs: TemplateKwargs | None = Field(
        None, description="Variables for the chat template, such as enable_thinking. Control keys are refused."
    )
    chat_template: Annotated[Any, unsupported("a template is chosen by who starts it, with --chat-template")] = None
    functions: Annotated[Any, unsupported("use tools")] = None
    function_call: Annotated[Any, unsupported("use tool_choice")] = None
    modalities: list[Literal["text"]] | None = None
    audio: Annotated[Any, unsupported("this server writes text only")] = None
    web_search_options: Annotated[Any, unsupported("leave it out")] = None
    store: bool | None = Field(None, description="Accepted and not used: nothing is stored.")
    metadata: dict[str, Any] | None = Field(None, description="Accepted and not used.")


class TopLogprob(ResponseModel):
    """A token that was likely here."""

    token: str
    logprob: float
    bytes: list[int] | None


class ChatCompletionTokenLogprob(TopLogprob):
    """A token of the answer. `bytes` of all tokens joined are the text's UTF-8."""

    top_logprobs: list[TopLogprob]


class ChoiceLogprobs(ResponseModel):
    """Log-probabilities of the tokens that the text was made of."""

    content: list[ChatCompletionTokenLogprob] | None
    refusal: None = None


class FunctionCallOutput(ResponseModel):
    """A function with its arguments as JSON text."""

    name: str
    arguments: str


class ChatCompletionMessageToolCallOutput(ResponseModel):
    """A call."""

    id: str
    type: Literal["function"]
    function: FunctionCallOutput


class ChatCompletionResponseMessage(ResponseModel):
    """The answer. A call that broke off stands in `content` as the model wrote it."""

    role: Literal["assistant"]
    content: str | None
    refusal: str | None
    reasoning_content: str | None = Field(None, description="What the model thought before it answered.")
    tool_calls: list[ChatCompletionMessageToolCallOutput] | None = None


class ChatChoice(ResponseModel):
    """One of n answers."""

    index: int
    message: ChatCompletionResponseMessage
    logprobs: ChoiceLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"]


class CreateChatCompletionResponse(ResponseModel):
    """The whole answer."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: CompletionUsage


class FunctionCallChunk(ResponseModel):
    """The name once, then pieces of the arguments."""

    name: str | None = None
    arguments: str | None = None


class ChatCompletionMessageToolCallChunk(ResponseModel):
    """A piece of the call at `index`; id, type and name are in its first."""

    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionCallChunk


class ChatCompletionStreamResponseDelta(ResponseModel):
    """What is new in an answer."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ChatCompletionMessageToolCallChunk] | None = None


class ChatStreamChoice(ResponseModel):
    """A piece of one of n answers."""

    index: int
    delta: ChatCompletionStreamResponseDelta
    logprobs: ChoiceLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"] | None


class CreateChatCompletionStreamResponse(ResponseModel):
    """One event of a streamed answer."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatStreamChoice]
    usage: CompletionUsage | None = None
