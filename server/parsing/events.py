"""What a model's output consists of. Joined, deltas do not depend on how the text was cut."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ReasoningDelta:
    """More of the thinking."""

    text: str


@dataclass(frozen=True, slots=True)
class TextDelta:
    """More of the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolCallStart:
    """A call begins. index: 0, 1, ... in order."""

    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class ArgumentsDelta:
    """More of a call's arguments: joined, they are the JSON text of one object."""

    index: int
    text: str


@dataclass(frozen=True, slots=True)
class ToolCallEnd:
    """A call ends. complete: false if it broke off or was malformed; its source then follows as text."""

    index: int
    complete: bool


Event = ReasoningDelta | TextDelta | ToolCallStart | ArgumentsDelta | ToolCallEnd


def joined(events: list[Event]) -> list[Event]:
    """The same with neighbouring deltas of one kind made one, and empty ones left out."""
    result: list[Event] = []
    for event in events:
        last = result[-1] if result else None
        match last, event:
            case (_, ReasoningDelta("") | TextDelta("")) | (_, ArgumentsDelta(_, "")):
                pass
            case ReasoningDelta(before), ReasoningDelta(after):
                result[-1] = ReasoningDelta(before + after)
            case TextDelta(before), TextDelta(after):
                result[-1] = TextDelta(before + after)
            case ArgumentsDelta(index, before), ArgumentsDelta(same, after) if index == same:
                result[-1] = ArgumentsDelta(index, before + after)
            case _:
                result.append(event)
    return result
