"""Every message between the server process and the engine worker. Imports nothing of ours.

Frames on the socket: a 4-byte little-endian length, then one msgpack-encoded message (msgspec tagged
unions `ToWorker` and `FromWorker`). Nothing is pickled.
"""

from __future__ import annotations

from typing import Literal

import msgspec

FinishReason = Literal["stop", "length"]
ErrorCode = Literal[
    "context_length_exceeded",  # 400
    "invalid_value",  # 400; `param` names the field
    "queue_full",  # 429
    "insufficient_memory",  # 503: the request alone needs more cache than there is
    "not_ready",  # 503: loading, restarting or failed
    "timeout",  # 504; made by the client, never sent
    "worker_died",  # 503; made by the client, never sent
    "internal_error",  # 500
]


class Message(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Base of all messages: frozen, tagged by class name."""


class Sampling(msgspec.Struct, frozen=True, kw_only=True):
    """How to choose tokens. All values are resolved: the server has filled in the model's defaults."""

    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0
    top_k: int = 0  # 0: off
    min_p: float = 0.0
    repetition_penalty: float = 1.0  # over prompt and output, as transformers does
    presence_penalty: float = 0.0  # over output, as OpenAI does
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = {}
    seed: int | None = None  # None: drawn by the worker


class Schema(msgspec.Struct, frozen=True, kw_only=True):
    """A JSON schema. lenient: keywords that cannot be enforced are left aside instead of refused."""

    json: str
    param: str  # the request's field, for errors
    lenient: bool = False


class Grammar(msgspec.Struct, frozen=True, kw_only=True):
    """What the output must match: a grammar in llguidance's Lark syntax, which begins at `start`.

    The worker adds the rules `schema_N` for each schema and `pattern_N` for each regular expression; and for
    each marker, which may be one token of the model, `marker_N`, `until_N`: any text, then the marker, and
    `without_N`: any text without it.
    """

    lark: str
    param: str  # the request's field, for errors
    schemas: list[Schema] = []
    patterns: list[str] = []
    markers: list[str] = []


# --- server to worker ---


class Generate(Message, frozen=True):
    """Start one completion. Answered by Accepted or Refused, then Deltas, then Finished or Failed."""

    request_id: str
    prompt: str | list[int]  # text: special tokens in it are parsed
    add_special_tokens: bool  # whether the tokenizer adds its own (BOS); false for rendered templates
    sampling: Sampling
    max_tokens: int | None  # None: up to the context length
    stop: list[str] = []
    ignore_eos: bool = False
    logprobs: int | None = None  # None: off; n: the chosen token and the n most likely
    prompt_logprobs: bool = False  # those of the prompt come first, in Deltas without text; the first token's is 0
    grammar: Grammar | None = None
    shown_tokens: list[str] = []  # special tokens that are part of the text; others are not shown


class Embed(Message, frozen=True):
    """Compute the embedding of one text: the mean of the hidden states of its tokens, scaled to length 1.

    Answered as Generate, but for Deltas.
    """

    request_id: str
    prompt: str | list[int]  # text: special tokens in it are parsed
    add_special_tokens: bool


class Abort(Message, frozen=True):
    """Stop a request and free what it holds. Nothing more is sent for it. Unknown ids are ignored."""

    request_id: str


class Tokenize(Message, frozen=True):
    """Answered by Tokenized."""

    request_id: str
    text: str
    add_special_tokens: bool


class Detokenize(Message, frozen=True):
    """Answered by Detokenized, or Refused if a token is out of range."""

    request_id: str
    tokens: list[int]


class Shutdown(Message, frozen=True):
    """Finish nothing, free the device, exit 0."""


ToWorker = Generate | Embed | Abort | Tokenize | Detokenize | Shutdown


# --- worker to server ---


class Progress(Message, frozen=True):
    """While loading: what is being done and how far it is."""

    stage: str
    done: int
    total: int


class TensorClass(msgspec.Struct, frozen=True, kw_only=True):
    """Tensors of one role, shape and format.

    bits, group_size, mode: None if unquantized. dtype: of the values, or of the scales. layers: where they are, in
    order; none of those outside. overrides: keys of config.json that gave the width, none where the global values
    did. parameters, size and token_bytes are of all of them together; token_bytes: what one token reads (top_k of
    the experts, one row of the embedding).
    """

    role: str
    count: int
    shape: tuple[int, ...]
    bits: int | None
    group_size: int | None
    mode: str | None
    dtype: str
    parameters: int
    size: int
    token_bytes: int
    layers: tuple[int, ...] = ()
    overrides: tuple[str, ...] = ()


class ModelDescription(msgspec.Struct, frozen=True, kw_only=True):
    """What a model is made of. layers: kind -> count. experts: active for a token, all; None without experts."""

    model_type: str
    layers: dict[str, int]
    experts: tuple[int, int] | None
    classes: tuple[TensorClass, ...]


class Ready(Message, frozen=True):
    """The model is loaded."""

    model: ModelDescription
    context_length: int  # tokens, prompt and output together
    vocab_size: int
    backend: str  # "cpu"
    backend_reason: str  # the registry's explanation, for people
    memory_reason: str  # what stays in memory and what is streamed from disk, for people
    weight_bytes: int
    cache_bytes: int  # KV and recurrent states, allocated
    expert_bytes: int  # for streamed experts; 0 if all stay where they are mapped
    block_bytes: int  # of them, one KV block in all layers
    load_seconds: float
    embedding_size: int | None = None  # values of an embedding; None if the backend gives none


class ExpertStats(msgspec.Struct, frozen=True, kw_only=True):
    """Streamed experts since the start: asked for by steps and in memory, or not; of the latter, begun to be read
    before they were asked for; read ahead in vain; bytes and seconds of reading; seconds in which steps waited for it,
    and in which they computed experts."""

    hits: int = 0
    misses: int = 0
    ahead: int = 0
    unused: int = 0
    bytes_read: int = 0
    read_seconds: float = 0
    wait_seconds: float = 0
    compute_seconds: float = 0


class Stats(Message, frozen=True):
    """What the worker holds, and has done since it started.

    Sent a few times a second while requests run, and whenever the last has ended.
    """

    running: int = 0
    waiting: int = 0
    blocks_used: int = 0  # KV blocks that requests hold
    blocks_cached: int = 0  # those that hold a prefix for later prompts, and no request uses
    steps: int = 0
    preemptions: int = 0
    leaks: int = 0  # times that something was held when nothing ran: a defect, described in the log
    experts: ExpertStats = ExpertStats()  # of all layers that are streamed together
    fault: str | None = None  # weights could not be read, for people: requests that need them fail


class LoadFailed(Message, frozen=True):
    """The model cannot be loaded; starting again would not help. The worker exits 1."""

    message: str


class Accepted(Message, frozen=True):
    """The prompt is tokenized and within the limits; the request is queued."""

    request_id: str
    prompt_tokens: int


class Refused(Message, frozen=True):
    """The request was not taken."""

    request_id: str
    code: ErrorCode
    message: str
    param: str | None = None


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True):
    """One token with its log-probability (after penalties and bias, before temperature and filters)."""

    token_id: int
    text: bytes  # may be part of a UTF-8 character
    logprob: float


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """The chosen token and the most likely ones, best first."""

    chosen: TokenLogprob
    top: list[TokenLogprob]


class Delta(Message, frozen=True):
    """New text of a request: whole UTF-8 characters, nothing that could still become a stop string."""

    request_id: str
    text: str
    token_count: int  # tokens this text was made of
    logprobs: list[TokenLogprobs] = []


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """Token counts of one request."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


class Finished(Message, frozen=True):
    """The request ended by itself."""

    request_id: str
    reason: FinishReason
    usage: Usage
    stop: str | None = None  # the stop string that ended it
    embedding: bytes | None = None  # of an Embed: float32, little-endian


class Failed(Message, frozen=True):
    """The request ended by an error. Others go on."""

    request_id: str
    code: ErrorCode
    message: str


class Tokenized(Message, frozen=True):
    """Answer to Tokenize."""

    request_id: str
    tokens: list[int]


class Detokenized(Message, frozen=True):
    """Answer to Detokenize. pieces: of each token, what it adds to the text."""

    request_id: str
    text: str
    pieces: list[bytes]


FromWorker = (
    Progress | Ready | Stats | LoadFailed | Accepted | Refused | Delta | Finished | Failed | Tokenized | Detokenized
)
