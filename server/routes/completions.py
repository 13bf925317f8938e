"""`POST /v1/completions`."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec
from fastapi import APIRouter, Request, Response

from mixbit.engine.client import Engine, RequestRefused
from mixbit.engine.protocol import Delta, FinishReason, Generate, TokenLogprobs
from mixbit.server.answer import Answer, Json
from mixbit.server.errors import ApiError, invalid
from mixbit.server.generation import Batch, api_error, choice_seed, require_ready, resolve_sampling, stop_strings
from mixbit.server.logprobs import completion_logprobs
from mixbit.server.model import ServedModel
from mixbit.server.output import explicit_grammar
from mixbit.server.schema.completions import CreateCompletionRequest, CreateCompletionResponse
from mixbit.server.service import CurrentService
from mixbit.server.settings import REQUEST

router = APIRouter(tags=["completions"])

DEFAULT_MAX_TOKENS = 16  # the public specification's
Prompt = str | list[int]


@dataclass
class CompletionFormat:
    """Plain choices. `echoes`: what each choice begins with. `top_logprobs`: None for no logprobs."""

    echoes: Sequence[str]
    top_logprobs: int | None
    object: str = "text_completion"
    chunk_object: str = "text_completion"
    prompt_param: str = "prompt"
    _offsets: dict[int, int] = field(default_factory=dict)  # characters streamed of each choice

    def whole(self, index: int, text: str, logprobs: Sequence[TokenLogprobs], reason: FinishReason) -> Json:
        """A complete choice."""
        echo = self.echoes[index]
        return _choice(index, echo + text, self._logprobs(logprobs, len(echo)), reason)

    def first(self, index: int) -> Json | None:
        """The prompt, if it is to be echoed."""
        echo = self.echoes[index]
        return _choice(index, echo) if echo else None

    def piece(self, index: int, delta: Delta) -> list[Json]:
        """More text."""
        offset = self._offsets.get(index, len(self.echoes[index]))
        self._offsets[index] = offset + len(delta.text)
        return [_choice(index, delta.text, self._logprobs(delta.logprobs, offset))]

    def last(self, index: int, reason: FinishReason) -> list[Json]:
        """Why it ended."""
        return [_choice(index, "", reason=reason)]

    def _logprobs(self, tokens: Sequence[TokenLogprobs], offset: int) -> Json | None:
        if self.top_logprobs is None:
            return None
        return completion_logprobs(tokens, offset, with_top=self.top_logprobs > 0)


def _choice(index: int, text: str, logprobs: Json | None = None, reason: FinishReason | None = None) -> Json:
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}


@router.post(
    "/v1/completions",
    response_model=CreateCompletionResponse,
    responses={200: {"description": "The answer; with `stream`, server-sent events of its pieces and `[DONE]`."}},
)
async def create_completion(body: CreateCompletionRequest, request: Request, service: CurrentService) -> Response:
    """Continue a text, or several."""
    service.require_model(body.model)
    _refuse_unsupported(body)
    prompts, n = _prompts(body), body.n or 1
    if len(prompts) * n > REQUEST.max_choices:
        raise invalid(f"{len(prompts)} prompts times n = {n} exceed {REQUEST.max_choices} choices.", "n")
    require_ready(service.engine)
    name = f"cmpl-{uuid.uuid4().hex}"
    try:
        echoes = [await _text(prompt, service.engine) if body.echo else "" for prompt in prompts]
        batch = await Batch.start(service.engine, _plan(body, prompts, service.model, name), per_prompt=n)
    except RequestRefused as error:
        raise api_error(error, "prompt") from None
    form = CompletionFormat([echo for echo in echoes for _ in range(n)], body.logprobs)
    return await Answer(name, service.model.name, batch, form, body).response(request)


def _plan(body: CreateCompletionRequest, prompts: Sequence[Prompt], model: ServedModel, name: str) -> list[Generate]:
    """One message for each choice, those of a prompt side by side."""
    sampling, n = resolve_sampling(body, model.defaults), body.n or 1
    return [
        Generate(
            request_id=f"{name}-{index * n + choice}",
            prompt=_with_suffix(prompt, body.suffix, model),
            add_special_tokens=True,
            sampling=msgspec.structs.replace(sampling, seed=choice_seed(body.seed, index * n + choice)),
            max_tokens=body.max_tokens or DEFAULT_MAX_TOKENS,
            stop=stop_strings(body),
            ignore_eos=bool(body.ignore_eos),
            logprobs=body.logprobs,
            grammar=explicit_grammar(body),
        )
        for index, prompt in enumerate(prompts)
        for choice in range(n)
    ]


def _prompts(body: CreateCompletionRequest) -> list[Prompt]:
    prompt = body.prompt
    if isinstance(prompt, str):
        return [prompt]
    tokens = [each for each in prompt if isinstance(each, int)]
    return [tokens] if tokens else [each for each in prompt if not isinstance(each, int)]


def _with_suffix(prompt: Prompt, suffix: str | None, model: ServedModel) -> Prompt:
    if not suffix:
        return prompt
    if model.fim is None:
        raise invalid("'suffix': this model has no tokens for filling in the middle.", "suffix", "unsupported_value")
    if not isinstance(prompt, str):
        raise invalid("'suffix' needs a prompt that is text.", "suffix")
    return model.fim.prompt(prompt, suffix)


async def _text(prompt: Prompt, engine: Engine) -> str:
    return prompt if isinstance(prompt, str) else await engine.detokenize(prompt)


def _refuse_unsupported(body: CreateCompletionRequest) -> None:
    """Fields that are part of the API but cannot be honoured."""
    if body.stream_options is not None and not body.stream:
        raise invalid("'stream_options' needs 'stream': true.", "stream_options")
    if (body.best_of or 1) > (body.n or 1):
        raise _unsupported("best_of", "choosing the best of several is not supported; use 'n'")
    if body.echo and body.logprobs is not None:
        raise _unsupported("echo", "log-probabilities of the prompt are not supported; leave 'echo' or 'logprobs' out")
    if body.echo and body.suffix:
        raise _unsupported("echo", "not supported together with 'suffix'")


def _unsupported(param: str, what: str) -> ApiError:
    return invalid(f"'{param}': {what}.", param, "unsupported_value")
