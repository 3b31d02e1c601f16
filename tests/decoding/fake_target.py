"""A target without a model: its logits are a function of the whole prefix, so any slip in what it was fed shows."""

import zlib
from collections.abc import Sequence

import numpy as np

from gemma_mtp import _native
from gemma_mtp.decoding import Rows, SamplingParams, TokenLogprobs
from gemma_mtp.decoding.drafting import Draft, Ends
from gemma_mtp.decoding.grammar import Masks

VOCAB = 40


class FakeTarget:
    """Implements Target over sequences that are plain lists of the tokens in the cache."""

    def __init__(self, spread: float = 2.0, order: int | None = None):
        """order: how many last tokens the logits depend on; None for all."""
        self._sampler = _native.Sampler()
        self._spread = spread
        self._order = order
        self.passes: list[int] = []
        self.interrupt_at: int | None = None  # index of the pass that Ctrl-C falls into

    def logits(self, prefix: Sequence[int]) -> np.ndarray:
        seen = prefix if self._order is None else prefix[len(prefix) - self._order :]
        rng = np.random.default_rng(zlib.crc32(np.asarray(seen, np.int32).tobytes()))
        return (self._spread * rng.standard_normal(VOCAB)).astype(np.float32)

    def step(
        self,
        sequence: list[int],
        tokens: Sequence[int],
        rows: int,
        params: SamplingParams,
        prompt: int = 0,
        scored: Sequence[int] = (),
        allowed: Masks | None = None,
    ) -> Rows:
        assert tokens
        assert 0 <= rows <= len(tokens)
        self.passes.append(len(tokens))
        before = list(sequence)
        sequence.extend(tokens)
        if self.interrupt_at == len(self.passes) - 1:
            raise KeyboardInterrupt
        ids, logprobs = [], []
        for length in range(len(sequence) - rows + 1, len(sequence) + 1):
            row = length - 1 - len(sequence)  # from the last
            token, chosen, top = self._sampler.sample(
                self.logits(sequence[:length]),
                length,
                temperature=params.temperature,
                top_k=params.top_k,
                top_p=params.top_p,
                min_p=params.min_p,
                repetition_penalty=params.repetition_penalty,
                seed=params.seed,
                logprobs=params.logprobs,
                presence_penalty=params.presence_penalty,
                frequency_penalty=params.frequency_penalty,
                logit_bias=params.biases,
                allowed=None if allowed is None or row < -len(allowed) else allowed[row],
                seen=before,
                drafted=sequence[len(before) : length],
                prompt=prompt,
            )
            if len(ids) < len(scored):  # the first rows' tokens are known already
                chosen = self.logprob(sequence[:length], scored[len(ids)])
            ids.append(token)
            logprobs.append(TokenLogprobs(chosen, top))
        return Rows(ids, logprobs if params.logprobs else None)

    def logprob(self, prefix: Sequence[int], token: int) -> float:
        logits = self.logits(prefix).astype(np.float64)
        return float(logits[token] - np.log(np.exp(logits).sum()))

    def truncate(self, sequence: list[int], length: int) -> None:
        assert 0 <= length <= len(sequence)
        del sequence[length:]


class FakeText:
    """Letters a..e; every seventh token is half a character that the next token completes."""

    ended = False

    def __init__(self) -> None:
        self._half = ""

    def push(self, token: int) -> str:
        letter = "abcde"[token % 5]
        if token % 7 == 0:
            self._half += letter
            return ""
        text, self._half = self._half + letter, ""
        return text

    def flush(self) -> str:
        text, self._half = self._half, ""
        return text


class OracleDrafts:
    """Knows the text to come, and proposes it rightly with a given probability a token."""

    name, free = "oracle", False

    def __init__(self, prompt: Sequence[int], output: Sequence[int], right: float, seed: int = 0):
        self._text = [*prompt, *output]
        self._right = right
        self._rng = np.random.default_rng(seed)
        self.at = 0

    def propose(self, depth: int, ends: Ends | None = None) -> Draft:
        coming = (self._text[self.at : self.at + depth] + [0] * depth)[:depth]
        drafted = [t if self._rng.random() < self._right else (t + 1) % VOCAB for t in coming]
        return Draft(drafted, [0] * depth)

    def advance(self, tokens: Sequence[int]) -> None:
        if self._text[self.at : self.at + len(tokens)] != list(tokens):
            raise AssertionError("the source was told a token that plain decoding does not give")
        self.at += len(tokens)
