"""How good a drafter is: acceptance at each depth, measured by decoding with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from gemma_mtp.decoding.sampling import SamplingParams
from gemma_mtp.generation import Generation
from gemma_mtp.model import Draft, Model

REPEAT = 16  # tokens: a text that says so many again is in a loop, which any drafter follows


@dataclass(frozen=True)
class Acceptance:
    """Counts over generations: rounds that drafted an i-th token and kept the ones before, and those that kept it."""

    tried: list[int]
    accepted: list[int]

    @classmethod
    def of_all(cls, parts: Sequence[Acceptance]) -> Acceptance:
        """Of the rounds of all parts, which are of one depth."""
        tried, accepted = zip(*((part.tried, part.accepted) for part in parts), strict=True)
        return cls([sum(of) for of in zip(*tried, strict=True)], [sum(of) for of in zip(*accepted, strict=True)])

    @property
    def rates(self) -> list[float]:
        """Acceptance at depths 1, 2, ...; 0 where nothing was tried."""
        return [kept / tried if tried else 0.0 for kept, tried in zip(self.accepted, self.tried, strict=True)]


def generate(model: Model, prompt: Sequence[int], params: SamplingParams, draft: Draft = "auto") -> Generation:
    """As Model.generate, but Ctrl-C ends not only this generation."""
    generation = model.generate(prompt, params, draft)
    if generation.finish_reason == "cancelled":
        raise KeyboardInterrupt
    return generation


def acceptance(
    model: Model, prompts: Sequence[Sequence[int]], params: SamplingParams, depth: int = 3, loops: bool = True
) -> Acceptance:
    """Of the model's drafter at a fixed depth. loops: also count text from where it repeats REPEAT tokens of itself."""
    tried, accepted = [0] * depth, [0] * depth
    for number, prompt in enumerate(prompts):
        own = replace(params, seed=params.seed + number, ignore_eos=True)
        generation = generate(model, prompt, own, draft=depth)
        if not loops and (length := before_loop(generation.tokens)) < len(generation.tokens):
            generation = generate(model, prompt, replace(own, max_tokens=length), draft=depth)
        for i, (kept, of) in enumerate(
            zip(generation.stats.accepted_per_depth, generation.stats.tried_per_depth, strict=True)
        ):
            tried[i] += of
            accepted[i] += kept
    return Acceptance(tried, accepted)


def before_loop(tokens: Sequence[int]) -> int:
    """How many tokens come before the first REPEAT of them that occurred before."""
    seen: set[tuple[int, ...]] = set()
    for end in range(REPEAT, len(tokens) + 1):
        run = tuple(tokens[end - REPEAT : end])
        if run in seen:
            return end - REPEAT
        seen.add(run)
    return len(tokens)


def in_loop(tokens: NDArray[np.int64]) -> bool:
    """Whether the last REPEAT tokens occurred before."""
    return len(tokens) > REPEAT and (sliding_window_view(tokens[:-1], REPEAT) == tokens[-REPEAT:]).all(1).any().item()
