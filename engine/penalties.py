"""Penalties on tokens that have been seen, and biases asked for."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from mixbit.engine.protocol import Sampling

Floats = npt.NDArray[np.float32]


class Penalties:
    """Changes logits as a request asks, at a cost that grows with its different tokens, not the vocabulary.

    repetition_penalty divides a positive logit, and multiplies a negative one, of every token of prompt or
    output (Keskar et al. 2019, as transformers does). presence_penalty is subtracted once for every token
    of the output, frequency_penalty once for each time it occurs (as OpenAI documents). Then logit_bias
    is added.
    """

    def __init__(self, sampling: Sampling, prompt: list[int]) -> None:
        self._sampling = sampling
        # Tokens that are penalized, each once; counts in the output. Only the first `_used` places are valid.
        self._ids = np.unique(np.array(prompt if sampling.repetition_penalty != 1 else [], dtype=np.intp))
        self._counts = np.zeros(len(self._ids), np.float32)
        self._used = len(self._ids)
        self._places = {int(token): place for place, token in enumerate(self._ids)}
        self._bias_ids = np.array(list(sampling.logit_bias), dtype=np.intp)
        self._bias = np.array(list(sampling.logit_bias.values()), dtype=np.float32)

    @classmethod
    def of(cls, sampling: Sampling, prompt: list[int]) -> Penalties | None:
        """The penalties of a request, or None if it asks for none."""
        neutral = sampling.repetition_penalty == 1 and not sampling.presence_penalty and not sampling.frequency_penalty
        return None if neutral and not sampling.logit_bias else cls(sampling, prompt)

    def count(self, token: int) -> None:
        """Note a token of the output."""
        place = self._places.get(token)
        if place is None:
            if self._used == len(self._ids):
                self._ids = np.resize(self._ids, 2 * self._used + 64)
                self._counts = np.resize(self._counts, len(self._ids))
            place = self._places[token] = self._used
            self._ids[place], self._counts[place] = token, 0
            self._used += 1
        self._counts[place] += 1

    def apply(self, logits: Floats) -> Floats:
        """A changed copy of logits [vocab]."""
        sampling = self._sampling
        logits = logits.copy()
        ids, counts = self._ids[: self._used], self._counts[: self._used]
        values = logits[ids]
        repetition = np.float32(sampling.repetition_penalty)
        if repetition != 1:
            values = np.where(values > 0, values / repetition, values * repetition)
        values -= np.float32(sampling.presence_penalty) * (counts > 0)
        values -= np.float32(sampling.frequency_penalty) * counts
        logits[ids] = values
        logits[self._bias_ids] += self._bias
        return logits
