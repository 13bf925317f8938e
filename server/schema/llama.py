"""The endpoints that llama.cpp's clients use: `/infill`, `/tokenize`, `/detokenize`, `/props`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from mixbit.server.schema.common import MAX_TOKENS, RequestModel, ResponseModel, StopList, unsupported
from mixbit.server.settings import REQUEST

TokenId = Annotated[int, Field(ge=0, le=MAX_TOKENS)]
_IGNORED = "Accepted and not used."


class TokenizeRequest(RequestModel):
    """A text to be cut into tokens. Special tokens in it are read as such."""

    content: str
    model: str | None = None
    add_special: bool | None = Field(None, description="Add the tokens that begin a text, such as BOS.")
    parse_special: Annotated[Literal[True] | None, Field(description="Always so here.")] = None
    with_pieces: bool | None = Field(None, description="Tell the text of each token too.")


class TokenPiece(ResponseModel):
    """A token."""

    id: int
    piece: str | list[int]


class TokenizeResponse(ResponseModel):
    """The tokens; or with pieces, of each its text, or its bytes where they are no text."""

    tokens: list[int] | list[TokenPiece]


class DetokenizeRequest(RequestModel):
    """Tokens to be written as text, special ones included."""

    tokens: list[TokenId]
    model: str | None = None


class DetokenizeResponse(ResponseModel):
    """The text."""

    content: str


class ExtraFile(RequestModel):
    """A further file that helps to fill in."""

    text: str
    filename: str | None = None


class InfillRequest(RequestModel):
    """A gap in a file, to be filled in: `input_prefix`, `prompt`, the gap, `input_suffix`."""

    input_prefix: str | None = None
    input_suffix: str | None = None
    prompt: str | None = Field(None, description="What stands between input_prefix and the gap.")
    input_extra: Annotated[list[ExtraFile], Field(max_length=REQUEST.max_parts)] | None = Field(
        None, description="Put before the file, each under its name; used by models that have a token for it."
    )
    n_predict: Annotated[int, Field(ge=-1, le=MAX_TOKENS)] | None = Field(
        None, description="-1 or absent: no limit. 0: compute the prompt only, to have it cached."
    )
    t_max_predict_ms: Annotated[int, Field(ge=-1, le=MAX_TOKENS)] | None = Field(
        None, description="After the first line, stop when this much time has passed. 0 or -1: no limit."
    )
    stream: bool | None = None
    stop: StopList | None = None
    seed: Annotated[int, Field(ge=-1, le=2**63 - 1)] | None = Field(None, description="-1: random.")
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=MAX_TOKENS)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repeat_penalty: Annotated[float, Field(ge=0.1, le=10)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    ignore_eos: bool | None = None
    response_fields: Annotated[list[str], Field(max_length=64)] | None = Field(
        None, description="Only these fields of the last answer; `a/b` is field b of a."
    )
    model: str | None = None
    cache_prompt: Any = Field(None, description=_IGNORED)
    id_slot: Any = Field(None, description=_IGNORED)
    samplers: Any = Field(None, description=_IGNORED)
    t_max_prompt_ms: Any = Field(None, description=_IGNORED)
    n_indent: Any = Field(None, description=_IGNORED)
    grammar: Annotated[Any, unsupported("leave it out")] = None
    json_schema: Annotated[Any, unsupported("leave it out")] = None
    logit_bias: Annotated[Any, unsupported("use /v1/completions")] = None


class Timings(ResponseModel):
    """How long prompt and answer took, milliseconds."""

    prompt_n: int
    prompt_ms: float
    prompt_per_token_ms: float
    prompt_per_second: float
    predicted_n: int
    predicted_ms: float
    predicted_per_token_ms: float
    predicted_per_second: float


class InfillResponse(ResponseModel):
    """What belongs into the gap. When streamed: the new text, and all fields in the last event alone."""

    index: int
    content: str
    stop: bool
    model: str
    tokens: list[int]
    id_slot: int
    tokens_predicted: int
    tokens_evaluated: int
    tokens_cached: int | None = None
    truncated: bool | None = None
    stop_type: Literal["eos", "limit", "word"] | None = None
    stopping_word: str | None = None
    has_new_line: bool | None = None
    timings: Timings | None = None


class GenerationSettings(ResponseModel):
    """The context length and the sampling values of requests that leave them out."""

    n_ctx: int | None
    params: dict[str, float]


class PropsResponse(ResponseModel):
    """What is served, and how. `n_ctx` is null until the model is loaded."""

    default_generation_settings: GenerationSettings
    model_alias: str
    model_path: str
    chat_template: str
    bos_token: str
    eos_token: str
    modalities: dict[str, bool]
    build_info: str
