"""A tokenizer of any size, so that a model of random weights can be served: byte-level BPE without training.

Its tokens after the bytes are strings of printable ASCII, shortest first, so that whatever token a random
model picks shows as text.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from mixbit.engine.errors import UserError

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_tokenizer(directory: Path, vocab_size: int) -> None:
    """Write tokenizer.json, its config with a chat template, and generation_config.json.

    Raises UserError for fewer tokens than 256 bytes and the special ones.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    least = len(SPECIAL_TOKENS) + len(alphabet)
    if vocab_size < least:
        raise UserError(f"vocab_size is {vocab_size}; a tokenizer of bytes needs {least}")
    merges = list(_merges(vocab_size - least))
    names = [*SPECIAL_TOKENS, *alphabet, *(first + second for first, second in merges)]
    tokenizer = Tokenizer(models.BPE({name: number for number, name in enumerate(names)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in SPECIAL_TOKENS])
    tokenizer.save(str(directory / "tokenizer.json"), pretty=False)
    end = SPECIAL_TOKENS[2]
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": end,
        "pad_token": SPECIAL_TOKENS[0],
        "chat_template": _CHAT_TEMPLATE,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": SPECIAL_TOKENS.index(end)}) + "\n")


def _merges(count: int) -> Iterator[tuple[str, str]]:
    """The first `count` pairs (token, character): every token of n characters before any of n + 1."""
    characters = [chr(code) for code in range(0x21, 0x7F)]  # stand for themselves in byte-level vocabularies
    tokens = list(characters)
    for token in tokens:  # grows while it is read
        for character in characters:
            if count == 0:
                return
            count -= 1
            tokens.append(token + character)
            yield token, character
