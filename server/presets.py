"""Model presets from configs/presets.toml: what a model's authors recommend and its files do not say."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

import msgspec

from mixbit.server.settings import read_toml


class SamplingDefaults(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Sampling values that are used when a request leaves them out; None: not said here."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None

    def over(self, other: SamplingDefaults) -> SamplingDefaults:
        """These values, and those of `other` where these say nothing."""
        names = self.__struct_fields__
        return SamplingDefaults(**{n: v if (v := getattr(self, n)) is not None else getattr(other, n) for n in names})


class FillInMiddle(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The special tokens that ask a model to fill in: prefix, text, suffix, text, middle.

    file: stands before the name of each file, in models that were trained on several; None if unknown.
    """

    prefix: str
    suffix: str
    middle: str
    file: str | None = None

    def prompt(self, before: str, after: str, extra: Sequence[tuple[str, str]] = ()) -> str:
        """The prompt whose completion stands between `before` and `after`. extra: other files, (name, text)."""
        files = "".join(f"{self.file}{name}\n{text}\n" for name, text in extra) if self.file else ""
        return f"{files}{self.file if files else ''}{self.prefix}{before}{self.suffix}{after}{self.middle}"


class Reasoning(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What surrounds a model's thinking."""

    open: str
    close: str


class Preset(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One entry. `model_types` and `names` (globs, lower case) must both match; an empty one always does."""

    name: str
    model_types: list[str] = []
    names: list[str] = []
    sampling: SamplingDefaults = SamplingDefaults()
    fim: FillInMiddle | None = None
    tools: str | None = None  # a name in mixbit.server.parsing.formats; None: as the template shows
    reasoning: Reasoning | None = None  # None: as the template shows

    def matches(self, model_type: str, names: Sequence[str]) -> bool:
        """Whether this preset is for a model of that type with one of those names."""
        return (not self.model_types or model_type in self.model_types) and (
            not self.names or any(fnmatchcase(name.lower(), glob) for name in names for glob in self.names)
        )


def load_presets() -> list[Preset]:
    """All presets, in order."""
    return msgspec.convert(read_toml("presets.toml")["preset"], list[Preset])


def find_preset(model_type: str, names: Sequence[str]) -> Preset:
    """The first preset that matches, else an empty one."""
    return next((each for each in load_presets() if each.matches(model_type, names)), Preset(name="none"))
