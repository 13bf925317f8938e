"""Small tokenizers of both kinds."""

from __future__ import annotations

from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as BaseTokenizer

from mixbit.engine.tokenizer import Tokenizer

EOS = 0  # "<eos>", special, in both


def byte_level() -> Tokenizer:
    """Byte-level BPE with a few merges, a special token and an added one that is shown."""
    base = BaseTokenizer(models.BPE())
    base.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    base.decoder = decoders.ByteLevel()
    text = ["the cat and the hat", "größer straße", "日本語 日本", "stop here, stop there"] * 3
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, initial_alphabet=alphabet, special_tokens=["<eos>"], show_progress=False
    )
    base.train_from_iterator(text, trainer)
    base.add_tokens([AddedToken("<tool call>", special=False, normalized=False)])
    return Tokenizer(base, frozenset({EOS}))


def byte_fallback() -> Tokenizer:
    """BPE in SentencePiece's manner: a few words, and a token for each byte."""
    names = ["<eos>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁the", "cat", "▁日", "a", "t"]
    base = BaseTokenizer(
        models.BPE(vocab={name: number for number, name in enumerate(names)}, merges=[], byte_fallback=True)
    )
    base.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    base.add_special_tokens([AddedToken("<eos>", special=True)])
    return Tokenizer(base, frozenset({EOS}))
