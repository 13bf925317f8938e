"""What chat and plain completions share: sampling fields, usage, errors.

Rules for all requests: null means the default; fields that are not listed are ignored; a listed field either has an
effect, or says in its description that it has none, or is refused.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints
from pydantic_core import PydanticCustomError

from mixbit.server.settings import GRAMMAR, REQUEST

MAX_TOKENS = 2**31 - 1


class RequestModel(BaseModel):
    """Base of everything a client sends: no coercion of types, unknown fields ignored."""

    model_config = ConfigDict(strict=True, extra="ignore", protected_namespaces=())


class ResponseModel(BaseModel):
    """Base of everything a client gets."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())


def unsupported(hint: str) -> AfterValidator:
    """Refuse any value but null, since it could not be honoured."""

    def refuse(value: Any) -> Any:
        if value is None:
            return value
        raise PydanticCustomError("unsupported", "not supported by this server; {hint}", {"hint": hint})

    return AfterValidator(refuse)


def _whole_token(key: str) -> str:
    if not (key.isascii() and key.isdigit() and len(key) <= 9):
        raise PydanticCustomError("token_id", "keys must be token ids, such as '1234'")
    return key


TokenKey = Annotated[str, AfterValidator(_whole_token)]
Bias = Annotated[float, Field(ge=-100, le=100)]
StopString = Annotated[str, StringConstraints(min_length=1, max_length=REQUEST.max_stop_chars)]
StopList = Annotated[list[StopString], Field(max_length=REQUEST.max_stop)]


class StreamOptions(RequestModel):
    """Options of a streamed answer."""

    include_usage: bool | None = Field(None, description="End with a chunk that has no choices but the usage.")


GrammarText = Annotated[str, StringConstraints(min_length=1, max_length=GRAMMAR.max_chars)]


class GrammarFormat(RequestModel):
    """A regular expression, or a grammar in Lark."""

    syntax: Literal["regex", "lark"]
    definition: GrammarText


class SamplingFields(RequestModel):
    """Fields of both kinds of completion."""

    model: str | None = Field(None, description="The served name or an alias; absent means the served model.")
    stream: bool | None = Field(None, description="Answer with server-sent events.")
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=REQUEST.max_choices)] | None = None
    stop: StopString | StopList | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: Annotated[dict[TokenKey, Bias], Field(max_length=REQUEST.max_logit_bias)] | None = None
    user: str | None = Field(None, description="Accepted and not used.")
    top_k: Annotated[int, Field(ge=-1, le=MAX_TOKENS)] | None = Field(None, description="0 or -1: off.")
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.1, le=10)] | None = None
    ignore_eos: bool | None = Field(None, description="Go on to max_tokens; stop strings still end it.")
    grammar: GrammarFormat | GrammarText | None = Field(
        None, description="What the whole answer must match. Text alone is Lark, in the dialect of llguidance."
    )
    guided_json: Annotated[Any, unsupported("use response_format")] = None
    guided_regex: Annotated[Any, unsupported("use grammar")] = None
    guided_choice: Annotated[Any, unsupported("use grammar")] = None
    guided_grammar: Annotated[Any, unsupported("use grammar")] = None
    structured_outputs: Annotated[Any, unsupported("use response_format or grammar")] = None


class PromptTokensDetails(ResponseModel):
    """Of the prompt tokens: how many were not computed again."""

    cached_tokens: int


class CompletionUsage(ResponseModel):
    """Token counts. Prompts are counted once, however many choices; completions are summed."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class Error(ResponseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(ResponseModel):
    """The body of every answer that is not a success."""

    error: Error
