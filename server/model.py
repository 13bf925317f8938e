"""What the server itself must know of a checkpoint: its names, sampling defaults and chat template.

Weights and tokenizer are the worker's affair; here only small JSON files are read.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from mixbit.engine.errors import UserError
from mixbit.server.parsing.formats import FORMATS, reasoning_markers, tool_format
from mixbit.server.parsing.hermes import HERMES
from mixbit.server.parsing.machine import ReasoningMarkers
from mixbit.server.parsing.tools import ToolFormat
from mixbit.server.presets import FillInMiddle, SamplingDefaults, find_preset
from mixbit.server.templates import ChatTemplate, ChatTemplateError

_CONSTANTS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


class ModelFileError(UserError):
    """A file of the model directory that cannot be read; the message names it."""


@dataclass(frozen=True)
class ServedModel:
    """One model under its names, the first of which is shown in answers.

    template: None if there is none, `template_problem` then says why. fim: None if the model cannot fill in.
    tools: how it writes calls. reasoning: None if it does not think.
    """

    names: tuple[str, ...]
    created: int
    defaults: SamplingDefaults
    template: ChatTemplate | None
    template_problem: str
    fim: FillInMiddle | None
    quantization: str
    tools: ToolFormat = HERMES
    reasoning: ReasoningMarkers | None = None

    @property
    def name(self) -> str:
        """The name that answers carry."""
        return self.names[0]


def describe_model(directory: Path, names: Sequence[str], chat_template: Path | None = None) -> ServedModel:
    """Read `directory`. `chat_template`: a file to use instead of the model's own. Raises UserError."""
    config = _read_json(directory / "config.json") or {}
    preset = find_preset(str(config.get("model_type", "")), [*names, directory.name])
    template, problem = None, ""
    try:
        template = _load_template(directory, chat_template)
        problem = "" if template else "the model has no chat template"
    except ChatTemplateError as error:
        if chat_template is not None:
            raise
        problem = str(error)
    if preset.tools is not None and preset.tools not in FORMATS:
        raise ModelFileError(f"presets.toml: {preset.name}: tools = {preset.tools!r}; known: {', '.join(FORMATS)}")
    thinking = ReasoningMarkers(preset.reasoning.open, preset.reasoning.close) if preset.reasoning else None
    knows = template.knows if template else (lambda word: False)
    return ServedModel(
        names=tuple(names),
        created=int(time.time()),
        defaults=_generation_config(directory).over(preset.sampling),
        template=template,
        template_problem=problem,
        fim=_known_tokens(directory, preset.fim) if preset.fim else None,
        quantization=_quantization_summary(config),
        tools=tool_format(knows, preset.tools),
        reasoning=reasoning_markers(knows, thinking),
    )


def _load_template(directory: Path, override: Path | None) -> ChatTemplate | None:
    """As transformers looks for it: chat_template.jinja, then tokenizer_config.json, then chat_template.json."""
    settings = _read_json(directory / "tokenizer_config.json") or {}
    constants = {name: text for name in _CONSTANTS if (text := _token_text(settings.get(name))) is not None}
    if override is not None:
        return ChatTemplate({"default": _read_text(override)}, constants)
    sources: dict[str, str] = {}
    if (file := directory / "chat_template.jinja").is_file():
        sources["default"] = _read_text(file)
        for extra in sorted((directory / "additional_chat_templates").glob("*.jinja")):
            sources[extra.stem] = _read_text(extra)
    else:
        value = settings.get("chat_template")
        if value is None:
            value = (_read_json(directory / "chat_template.json") or {}).get("chat_template")
        if isinstance(value, str):
            sources["default"] = value
        elif isinstance(value, list):
            sources = {str(each.get("name")): str(each.get("template")) for each in value if isinstance(each, dict)}
    if "default" not in sources:
        return None
    return ChatTemplate(sources, constants)


def _token_text(value: Any) -> str | None:
    """A special token as tokenizer_config.json has it: text, or a dict with `content`."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _generation_config(directory: Path) -> SamplingDefaults:
    path = directory / "generation_config.json"
    values = _read_json(path) or {}
    known = {name: values[name] for name in SamplingDefaults.__struct_fields__ if values.get(name) is not None}
    try:
        defaults = msgspec.convert(known, SamplingDefaults)
    except msgspec.ValidationError as error:
        raise ModelFileError(f"{path}: {error}") from None
    bounds = {
        "temperature": (0, 100),
        "top_p": (0, 1),
        "top_k": (-1, 2**31),
        "min_p": (0, 1),
        "repetition_penalty": (0.01, 100),
    }
    for name, (low, high) in bounds.items():
        value = getattr(defaults, name)
        if value is not None and not low <= value <= high:
            raise ModelFileError(f"{path}: {name} is {value}; it must be from {low} to {high}")
    return defaults


class _AddedToken(msgspec.Struct):
    content: str


class _TokenizerFile(msgspec.Struct):
    added_tokens: list[_AddedToken] = []


def _known_tokens(directory: Path, fim: FillInMiddle) -> FillInMiddle | None:
    """The tokens for filling in, if the tokenizer has them; without that of files if it has not."""
    try:
        tokens = msgspec.json.decode((directory / "tokenizer.json").read_bytes(), type=_TokenizerFile).added_tokens
    except (OSError, msgspec.MsgspecError):
        return None  # the worker reads this file too and says what is wrong
    names = {token.content for token in tokens}
    if not {fim.prefix, fim.suffix, fim.middle} <= names:
        return None
    return fim if fim.file in names else msgspec.structs.replace(fim, file=None)


def _quantization_summary(config: dict[str, Any]) -> str:
    """For people: `4-bit, group 32; 8-bit: 1 matrix`."""
    table = config.get("quantization") or config.get("quantization_config")
    if not isinstance(table, dict):
        return "not quantized"
    counts: dict[str, int] = {}
    for value in table.values():
        if isinstance(value, dict) and "bits" in value:
            name = f"{value['bits']}-bit"
        elif value is False:
            name = "unquantized"
        else:
            continue
        counts[name] = counts.get(name, 0) + 1
    base = f"{table['bits']}-bit, group {table.get('group_size', '?')}" if "bits" in table else "mixed"
    return "; ".join([base, *(f"{name}: {n} {'matrix' if n == 1 else 'matrices'}" for name, n in counts.items())])


def _read_json(path: Path) -> dict[str, Any] | None:
    """The object in `path`, None if there is no such file."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ModelFileError(f"{path}: cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise ModelFileError(f"{path}: holds a {type(value).__name__}, not an object")
    return value


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelFileError(f"{path}: cannot be read: {error}") from None
