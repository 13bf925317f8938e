"""What llama.cpp's clients ask for besides OpenAI's endpoints: `/tokenize`, `/detokenize`, `/props`."""

from __future__ import annotations

from fastapi import APIRouter

from mixbit.engine.client import RequestRefused
from mixbit.server.generation import api_error, require_ready, resolve_sampling
from mixbit.server.schema.common import SamplingFields
from mixbit.server.schema.llama import (
    DetokenizeRequest,
    DetokenizeResponse,
    GenerationSettings,
    PropsResponse,
    TokenizeRequest,
    TokenizeResponse,
    TokenPiece,
)
from mixbit.server.service import CurrentServices
from mixbit.server.version import VERSION

router = APIRouter(tags=["llama.cpp"])


@router.post("/tokenize")
async def tokenize(body: TokenizeRequest, services: CurrentServices) -> TokenizeResponse:
    """Cut a text into tokens."""
    service = services.of(body.model)
    require_ready(service.engine)
    try:
        tokens = await service.engine.tokenize(body.content, add_special_tokens=bool(body.add_special))
        if not body.with_pieces:
            return TokenizeResponse(tokens=tokens)
        pieces = await service.engine.pieces(tokens)
    except RequestRefused as error:
        raise api_error(error, "content") from None
    return TokenizeResponse(tokens=[_piece(*pair) for pair in zip(tokens, pieces, strict=True)])


def _piece(token: int, data: bytes) -> TokenPiece:
    try:
        return TokenPiece(id=token, piece=data.decode())
    except UnicodeDecodeError:  # part of a character
        return TokenPiece(id=token, piece=list(data))


@router.post("/detokenize")
async def detokenize(body: DetokenizeRequest, services: CurrentServices) -> DetokenizeResponse:
    """Write tokens as text."""
    service = services.of(body.model)
    require_ready(service.engine)
    try:
        return DetokenizeResponse(content=await service.engine.detokenize(body.tokens))
    except RequestRefused as error:
        raise api_error(error, "tokens") from None


@router.get("/props")
async def props(services: CurrentServices, model: str | None = None) -> PropsResponse:
    """What is served, and how; of the first model, unless another is named."""
    service = services.of(model)
    served, ready = service.model, service.engine.ready
    sampling = resolve_sampling(SamplingFields.model_construct(), served.defaults)
    names = ("temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty")
    params = {name: float(getattr(sampling, name)) for name in names}
    constants = served.template.constants if served.template else {}
    return PropsResponse(
        default_generation_settings=GenerationSettings(
            n_ctx=ready.context_length if ready else None,
            params={**params, "repeat_penalty": sampling.repetition_penalty},
        ),
        model_alias=served.name,
        model_path=served.name,
        chat_template=served.template.source if served.template else "",
        bos_token=constants.get("bos_token", ""),
        eos_token=constants.get("eos_token", ""),
        modalities={"vision": False, "audio": False},
        build_info=f"mixbit-{VERSION}",
    )
