"""Constrained decoding over a target without a model: drafts, right or wrong, allowed or not, change nothing."""

import zlib

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_mtp.decoding import AutoDepth, FixedDepth, Progress, PromptLookup, SamplingParams, draft_and_verify
from gemma_mtp.decoding.economy import Alone, CostShape

from .fake_target import VOCAB, FakeTarget, FakeText, OracleDrafts

PROMPT = [3, 1, 4, 1, 5]
WORDS = (VOCAB + 31) // 32


class Rule:
    """Implements Constraint: what is allowed is a function of all tokens before; every third place or so is forced."""

    def __init__(self, length: int):
        self.tokens: list[int] = []
        self._length = length

    @property
    def ended(self) -> bool:
        return len(self.tokens) >= self._length

    def forced(self, most: int) -> list[int]:
        found: list[int] = []
        while len(found) < most and len(choices := self._choices([*self.tokens, *found])) == 1:
            found += choices
        return found

    def allow(self, drafts):
        kept, masks = [], []
        for draft in [*drafts, None]:
            choices = self._choices([*self.tokens, *kept])
            bits = np.zeros(32 * WORDS, bool)
            bits[choices] = True
            masks.append(np.packbits(bits, bitorder="little").view(np.uint32))
            if draft not in choices:
                break
            kept.append(draft)
        return kept, np.stack(masks)

    def advance(self, token: int) -> None:
        assert token in self._choices(self.tokens)
        self.tokens.append(token)

    def _choices(self, before: list[int]) -> list[int]:
        rng = np.random.default_rng(zlib.crc32(bytes(before)))
        count = 1 if rng.random() < 0.4 else int(rng.integers(2, VOCAB))
        return sorted(rng.choice(VOCAB, count, replace=False).tolist())


def run(params, length, sources=(), depth=None):
    sequence: list[int] = []
    progress = Progress(
        PROMPT, params, text=FakeText(), context=1000, sources=sources, depth=depth, constraint=Rule(length)
    )
    text = "".join(piece.text for piece in draft_and_verify(FakeTarget(), sequence, progress))
    assert sequence == [*PROMPT, *progress.tokens[:-1]]
    return progress, (progress.tokens, text, progress.finish_reason)


@given(st.integers(1, 60), st.integers(0, 9), st.sampled_from([0.0, 1.0]), st.integers(1, 50), st.booleans())
@settings(max_examples=60, deadline=None)
def test_drafts_change_nothing(length, seed, temperature, most, scored):
    params = SamplingParams(
        max_tokens=most, seed=seed, temperature=temperature, logprobs=int(scored), prompt_logprobs=scored
    )
    plain, expected = run(params, length)
    assert len(plain.tokens) == min(length, most)
    assert plain.finish_reason == ("stop" if length <= most else "length")
    for control in (FixedDepth(3), FixedDepth(9), AutoDepth(Alone(CostShape([1, 1.05, 1.1, 1.2, 1.3]), seconds=1))):
        for share in (0.0, 0.6, 1.0):
            sources = [OracleDrafts(PROMPT, plain.tokens, share), PromptLookup()]
            drafted, outcome = run(params, length, sources, control)
            assert outcome == expected
            assert drafted.stats.rounds <= plain.stats.rounds
            assert drafted.prompt_logprobs == plain.prompt_logprobs
