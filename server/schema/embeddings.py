"""`POST /v1/embeddings`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag

from mixbit.server.schema.common import RequestModel, ResponseModel
from mixbit.server.schema.completions import Tokens, prompt_kind
from mixbit.server.settings import REQUEST

Texts = Annotated[list[str], Field(min_length=1, max_length=REQUEST.max_inputs)]
TokenLists = Annotated[list[Tokens], Field(min_length=1, max_length=REQUEST.max_inputs)]
Input = Annotated[
    Annotated[str, Tag("text")]
    | Annotated[Texts, Tag("texts")]
    | Annotated[Tokens, Tag("tokens")]
    | Annotated[TokenLists, Tag("token lists")],
    Discriminator(
        prompt_kind,
        custom_error_type="input",
        custom_error_message="must be text, tokens, or a list of either",
    ),
]


class CreateEmbeddingRequest(RequestModel):
    """Texts to be embedded, each by itself. Special tokens in them are read as such."""

    input: Input
    model: str | None = Field(None, description="The served name or an alias; absent means the served model.")
    encoding_format: Literal["float", "base64"] | None = Field(
        None, description="Base64 is of float32 values, little-endian. Floats if absent."
    )
    dimensions: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = Field(
        None, description="Only the model's own: its embeddings mean nothing when cut off."
    )
    user: str | None = Field(None, description="Accepted and not used.")


class Embedding(ResponseModel):
    """One text's vector, of length 1."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingUsage(ResponseModel):
    """Token counts of all texts together."""

    prompt_tokens: int
    total_tokens: int


class CreateEmbeddingResponse(ResponseModel):
    """The vectors, in the order of the texts."""

    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage
