"""`POST /v1/completions`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from mixbit.server.schema.common import MAX_TOKENS, CompletionUsage, ResponseModel, SamplingFields
from mixbit.server.settings import REQUEST

Token = Annotated[int, Field(ge=0, le=MAX_TOKENS)]
Tokens = Annotated[list[Token], Field(min_length=1)]
Prompts = Annotated[list[str], Field(min_length=1, max_length=REQUEST.max_choices)]
TokenPrompts = Annotated[list[Tokens], Field(min_length=1, max_length=REQUEST.max_choices)]


def prompt_kind(prompt: Any) -> str | None:
    """The kind of prompt, told by the first entry of a list, so that an error is about what was meant."""
    if isinstance(prompt, str):
        return "text"
    if not isinstance(prompt, list):
        return None
    first = prompt[0] if prompt else ""
    return "tokens" if isinstance(first, int) else "token lists" if isinstance(first, list) else "texts"


Prompt = Annotated[
    Annotated[str, Tag("text")]
    | Annotated[Prompts, Tag("texts")]
    | Annotated[Tokens, Tag("tokens")]
    | Annotated[TokenPrompts, Tag("token lists")],
    Discriminator(
        prompt_kind,
        custom_error_type="prompt",
        custom_error_message="must be text, tokens, or a list of either",
    ),
]


class CreateCompletionRequest(SamplingFields):
    """A text to be continued. Special tokens in it are read as such."""

    prompt: Prompt
    max_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = Field(None, description="16 if absent.")
    echo: bool | None = Field(
        None, description="Begin each choice with its prompt; with `logprobs` its tokens' too, the first's being null."
    )
    suffix: str | None = Field(None, description="Fill in between prompt and suffix, if the model can.")
    logprobs: Annotated[int, Field(ge=0, le=REQUEST.max_top_logprobs)] | None = None
    best_of: Annotated[int, Field(ge=1)] | None = Field(None, description="Must not exceed n.")


class CompletionLogprobs(ResponseModel):
    """Parallel lists over the tokens of the text."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class CompletionChoice(ResponseModel):
    """One completion. Of prompt p, choice c: index p * n + c."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"] | None


class CreateCompletionResponse(ResponseModel):
    """The whole answer, or one event of it when streamed."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: CompletionUsage | None = None
