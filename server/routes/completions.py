"""`POST /v1/completions`."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec
from fastapi import APIRouter, Request, Response

from mixbit.engine.client import Engine, RequestRefused
from mixbit.engine.protocol import Delta, FinishReason, Generate, TokenLogprobs
from mixbit.server.answer import Answer, Json, begun
from mixbit.server.errors import ApiError, invalid
from mixbit.server.generation import Batch, api_error, choice_seed, require_ready, resolve_sampling, stop_strings
from mixbit.server.logprobs import completion_logprobs, of_prompt
from mixbit.server.model import ServedModel
from mixbit.server.output import explicit_grammar
from mixbit.server.schema.completions import CreateCompletionRequest, CreateCompletionResponse
from mixbit.server.service import CurrentServices
from mixbit.server.settings import REQUEST

router = APIRouter(tags=["completions"])

DEFAULT_MAX_TOKENS = 16  # the public specification's
Prompt = str | list[int]


@dataclass
class CompletionFormat:
    """Plain choices. echoes: what each choice begins with. top_logprobs: None for no logprobs.

    scored: of each choice, the tokens of its prompt, whose logprobs come first; 0 if only the answer's do.
    """

    echoes: Sequence[str]
    top_logprobs: int | None
    scored: Sequence[int]
    object: str = "text_completion"
    chunk_object: str = "text_completion"
    prompt_param: str = "prompt"
    _offsets: dict[int, int] = field(default_factory=dict)  # characters streamed of each choice
    _prompts: dict[int, list[TokenLogprobs]] = field(default_factory=dict)  # what has come of each

    def whole(self, index: int, text: str, logprobs: Sequence[TokenLogprobs], reason: FinishReason) -> Json:
        """A complete choice."""
        echo, count = self.echoes[index], self.scored[index]
        told = self._logprobs(logprobs[count:], len(echo))
        if count and told is not None:
            prompt = self._of_prompt(index, logprobs[:count])
            told = {name: value and [*prompt[name], *value] for name, value in told.items()}
        return _choice(index, echo + text, told, reason)

    def first(self, index: int) -> Json | None:
        """The prompt, if it is to be echoed and nothing else is to be told of it."""
        echo = self.echoes[index]
        return _choice(index, echo) if echo and not self.scored[index] else None

    def piece(self, index: int, delta: Delta) -> list[Json]:
        """More text, or the prompt once all is known of it."""
        prompt = self._prompts.setdefault(index, [])
        missing = self.scored[index] - len(prompt)
        prompt += delta.logprobs[:missing]
        choices: list[Json] = []
        if missing and len(prompt) == self.scored[index]:
            choices.append(_choice(index, self.echoes[index], self._of_prompt(index, prompt)))
        if delta.text or delta.logprobs[missing:]:
            offset = self._offsets.get(index, len(self.echoes[index]))
            self._offsets[index] = offset + len(delta.text)
            choices.append(_choice(index, delta.text, self._logprobs(delta.logprobs[missing:], offset)))
        return choices

    def last(self, index: int, reason: FinishReason) -> list[Json]:
        """Why it ended."""
        return [_choice(index, "", reason=reason)]

    def _logprobs(self, tokens: Sequence[TokenLogprobs], offset: int) -> Json | None:
        if self.top_logprobs is None:
            return None
        return completion_logprobs(tokens, offset, with_top=self.top_logprobs > 0)

    def _of_prompt(self, index: int, tokens: Sequence[TokenLogprobs]) -> Json:
        shown, first = of_prompt(tokens, self.echoes[index])
        return completion_logprobs(shown, 0, with_top=bool(self.top_logprobs), first=first)


def _choice(index: int, text: str, logprobs: Json | None = None, reason: FinishReason | None = None) -> Json:
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}


@router.post(
    "/v1/completions",
    response_model=CreateCompletionResponse,
    responses={200: {"description": "The answer; with `stream`, server-sent events of its pieces and `[DONE]`."}},
)
async def create_completion(body: CreateCompletionRequest, request: Request, services: CurrentServices) -> Response:
    """Continue a text, or several."""
    service = services.of(body.model)
    _refuse_unsupported(body)
    prompts, n = _prompts(body), body.n or 1
    if len(prompts) * n > REQUEST.max_choices:
        raise invalid(f"{len(prompts)} prompts times n = {n} exceed {REQUEST.max_choices} choices.", "n")
    require_ready(service.engine)
    name = f"cmpl-{uuid.uuid4().hex}"
    plans = _plan(body, prompts, service.model, name)

    async def begin() -> Response:
        try:
            echoes = [await _text(prompt, service.engine) if body.echo else "" for prompt in prompts]
            batch = await Batch.start(service.engine, plans, per_prompt=n)
        except RequestRefused as error:
            raise api_error(error, "prompt") from None
        scored = [each.prompt_tokens if _scores_prompt(body) else 0 for each in batch.completions]
        form = CompletionFormat([echo for echo in echoes for _ in range(n)], body.logprobs, scored)
        return await Answer(name, service.model.name, batch, form, body).response(request)

    return await begun(service.engine, begin, stream=body.stream)


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
            prompt_logprobs=_scores_prompt(body),
            grammar=explicit_grammar(body),
        )
        for index, prompt in enumerate(prompts)
        for choice in range(n)
    ]


def _scores_prompt(body: CreateCompletionRequest) -> bool:
    return bool(body.echo) and body.logprobs is not None


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
    if body.echo and body.suffix:
        raise _unsupported("echo", "not supported together with 'suffix'")


def _unsupported(param: str, what: str) -> ApiError:
    return invalid(f"'{param}': {what}.", param, "unsupported_value")
