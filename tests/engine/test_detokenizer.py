"""Text from tokens: nothing is lost, nothing is shown too early, nothing waits without need."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixbit.engine.detokenizer import Detokenizer, Piece
from mixbit.engine.protocol import TokenLogprobs
from mixbit.engine.tokenizer import Tokenizer
from tests.engine.tokenizers_for_tests import EOS, byte_fallback, byte_level

BYTE_LEVEL = byte_level()
BYTE_FALLBACK = byte_fallback()


def pieces(tokenizer: Tokenizer, tokens: list[int], stop: list[str] | None = None) -> list[Piece]:
    detokenizer = Detokenizer(tokenizer, stop or [])
    found = []
    for place, token in enumerate(tokens):
        found.append(detokenizer.feed(token, -float(place), ((token, -1.0),)))
        if found[-1].stop is not None:
            return found
    return [*found, detokenizer.finish()]


def text_of(found: list[Piece]) -> str:
    return "".join(piece.text for piece in found)


def entries_of(found: list[Piece]) -> list[TokenLogprobs]:
    return [entry for piece in found for entry in piece.logprobs]


TOKENS = st.lists(st.integers(0, BYTE_LEVEL.vocab_size - 1), max_size=30)


@settings(max_examples=120, deadline=None)
@given(TOKENS)
def test_joined_pieces_are_the_full_decoding(tokens: list[int]) -> None:
    assert text_of(pieces(BYTE_LEVEL, tokens)) == BYTE_LEVEL.decode(tokens, skip_special_tokens=True)


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet="the catab ☃日é\n", max_size=20))
def test_joined_pieces_of_byte_fallback_are_the_text(text: str) -> None:
    tokens: list[int] = [
        BYTE_FALLBACK._base.token_to_id(name)  # type: ignore[misc]
        for character in text.replace(" ", "▁")
        for name in ([character] if character in "▁at" else [f"<0x{byte:02X}>" for byte in character.encode()])
    ]
    assert text_of(pieces(BYTE_FALLBACK, tokens)) == text
    assert BYTE_FALLBACK.decode(tokens) == text.removeprefix(" ")  # the library drops one space at the start


@settings(max_examples=80, deadline=None)
@given(st.text(max_size=30))
def test_a_character_is_never_split_and_never_waits_once_complete(text: str) -> None:
    tokens = BYTE_LEVEL.encode(text, add_special_tokens=False)
    detokenizer = Detokenizer(BYTE_LEVEL, [])
    shown, data = "", b""
    for token in tokens:
        shown += detokenizer.feed(token).text
        data += BYTE_LEVEL.visible_bytes(token)
        assert shown == data.decode(errors="ignore")
    assert detokenizer.finish().text == ""


def test_an_unfinished_character_becomes_a_replacement_at_the_end_alone() -> None:
    tokens = BYTE_LEVEL.encode("a☃", add_special_tokens=False)[:-1]
    found = pieces(BYTE_LEVEL, tokens)
    assert [piece.text for piece in found if piece.text] == ["a", "\N{REPLACEMENT CHARACTER}"]
    assert found[-1].text == "\N{REPLACEMENT CHARACTER}"


def test_special_tokens_are_not_shown_and_added_tokens_are() -> None:
    added = BYTE_LEVEL.vocab_size - 1
    assert text_of(pieces(BYTE_LEVEL, [EOS, added, EOS])) == "<tool call>"
    assert BYTE_LEVEL.decode([EOS, added]) == "<eos><tool call>"


@settings(max_examples=120, deadline=None)
@given(
    st.text(alphabet="abc☃", max_size=40),
    st.lists(st.text(alphabet="abc☃", min_size=1, max_size=5), min_size=1, max_size=3),
)
def test_text_ends_exactly_before_the_first_stop_string(text: str, stops: list[str]) -> None:
    tokens = BYTE_LEVEL.encode(text, add_special_tokens=False)
    found = pieces(BYTE_LEVEL, tokens, stops)
    # What the first stop is depends on when it is complete: the shortest prefix of the text that holds one.
    complete = next((end for end in range(len(text) + 1) if any(stop in text[:end] for stop in stops)), None)
    if complete is None:
        assert text_of(found) == text
        assert all(piece.stop is None for piece in found)
    else:
        stop = found[-1].stop
        assert stop in stops
        cut = min(place for each in stops if (place := text.find(each)) >= 0)
        assert text_of(found) == text[: text.index(stop)]
        # One character a token: nothing later than the first complete stop is looked at.
        assert cut <= text.index(stop) <= complete


@settings(max_examples=80, deadline=None)
@given(st.text(alphabet="ab", max_size=30), st.text(alphabet="ab", min_size=1, max_size=6))
def test_text_is_held_back_only_while_it_could_become_the_stop_string(text: str, stop: str) -> None:
    detokenizer = Detokenizer(BYTE_LEVEL, [stop])
    shown = seen = ""
    for token in BYTE_LEVEL.encode(text, add_special_tokens=False):
        piece = detokenizer.feed(token)
        if piece.stop is not None:
            return
        shown += piece.text
        seen += BYTE_LEVEL.token_bytes(token).decode()
        held = seen[len(shown) :]
        assert stop.startswith(held)
        assert not any(stop.startswith(seen[start:]) for start in range(len(shown)))


def test_the_longest_of_two_stop_strings_at_one_place_is_named() -> None:
    token = BYTE_LEVEL.vocab_size - 1  # "<tool call>" in one token
    found = pieces(BYTE_LEVEL, [token], ["<tool", "<tool call"])
    assert (text_of(found), found[-1].stop) == ("", "<tool call")


@settings(max_examples=80, deadline=None)
@given(st.text(max_size=20), st.sampled_from([[], ["a"], ["th", "cat"], ["☃"]]))
def test_joined_logprob_entries_are_the_text(text: str, stops: list[str]) -> None:
    tokens = BYTE_LEVEL.encode(f"the {text} cat☃", add_special_tokens=False)
    found = pieces(BYTE_LEVEL, tokens, stops)
    entries = entries_of(found)
    assert b"".join(entry.chosen.text for entry in entries) == text_of(found).encode()
    assert [entry.chosen.token_id for entry in entries] == tokens[: len(entries)]
    assert [entry.chosen.logprob for entry in entries] == [-float(place) for place in range(len(entries))]
    assert sum(piece.token_count for piece in found) == len(entries)


def test_no_logprobs_unless_given() -> None:
    piece = Detokenizer(BYTE_LEVEL, []).feed(BYTE_LEVEL.encode("a", add_special_tokens=False)[0])
    assert piece == Piece("a", 1, [])


def test_logprobs_hold_the_bytes_of_the_alternatives() -> None:
    first, *_ = BYTE_LEVEL.encode("☃", add_special_tokens=False)
    detokenizer = Detokenizer(BYTE_LEVEL, [])
    detokenizer.feed(first, -0.5, ((first, -0.5), (EOS, -2.0)))
    (entry,) = detokenizer.finish().logprobs
    assert entry.chosen.text == "☃".encode()[: len(entry.chosen.text)]
    assert [(each.token_id, each.text, each.logprob) for each in entry.top] == [
        (first, entry.chosen.text, -0.5),
        (EOS, b"<eos>", -2.0),
    ]


@pytest.mark.parametrize("stop", [[], ["zz"]])
def test_text_without_stop_strings_is_released_at_once(stop: list[str]) -> None:
    detokenizer = Detokenizer(BYTE_LEVEL, stop)
    tokens = BYTE_LEVEL.encode("the cat", add_special_tokens=False)
    assert all(detokenizer.feed(token).text for token in tokens)


def test_a_special_token_is_shown_where_it_is_asked_for() -> None:
    for shown, text in ((["<eos>"], "a<eos>a"), ([], "aa"), (["<unknown>"], "aa")):
        detokenizer = Detokenizer(BYTE_LEVEL, [], shown)
        tokens = [*BYTE_LEVEL.encode("a", add_special_tokens=False), EOS]
        tokens += BYTE_LEVEL.encode("a", add_special_tokens=False)
        assert text_of([*(detokenizer.feed(token) for token in tokens), detokenizer.finish()]) == text
