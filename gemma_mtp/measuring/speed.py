"""What drafting gains on nine kinds of prompt, greedy and sampled."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from gemma_mtp.decoding.sampling import SamplingParams
from gemma_mtp.model import Model
from gemma_mtp.prompts import NINE_KINDS
from gemma_mtp.training.evaluate import Acceptance, acceptance, generate

DECODINGS = {
    "greedy": SamplingParams(ignore_eos=True),
    "sampled": SamplingParams(temperature=1.0, top_k=64, top_p=0.95, ignore_eos=True),
}


@dataclass(frozen=True)
class Gain:
    """What was measured of one kind of prompt. acceptance: of the drafter at a fixed depth; without_loops: only up to
    where the text repeats itself. plain, auto: tokens per second, medians. same: whether all tokens were equal."""

    decoding: str
    kind: str
    acceptance: Acceptance
    without_loops: Acceptance
    plain: float
    auto: float
    same: bool

    @property
    def speed_up(self) -> float:
        return self.auto / self.plain

    def as_json(self) -> dict[str, Any]:
        return {
            "decoding": self.decoding,
            "kind": self.kind,
            "acceptance": self.acceptance.rates,
            "without loops": self.without_loops.rates,
            "plain tokens per second": self.plain,
            "auto tokens per second": self.auto,
            "speed-up": self.speed_up,
            "same tokens": self.same,
        }


@dataclass(frozen=True)
class Summary:
    """Of all kinds of one decoding: acceptance over all rounds, the geometric mean speed-up and the worst."""

    acceptance: Acceptance
    without_loops: Acceptance
    mean: float
    worst: float

    def as_json(self) -> dict[str, Any]:
        return {
            "acceptance": self.acceptance.rates,
            "without loops": self.without_loops.rates,
            "mean speed-up": self.mean,
            "worst speed-up": self.worst,
        }


def gains(model: Model, tokens: int, depth: int, repeats: int) -> Iterator[Gain]:
    """Measures each kind and decoding: texts of `tokens` tokens (at least 2), and drafts of `depth` for acceptance."""
    for decoding, settings in DECODINGS.items():
        for kind, prompt in NINE_KINDS.items():
            yield measure_gain(model, decoding, kind, prompt, replace(settings, max_tokens=tokens), depth, repeats)


def measure_gain(
    model: Model, decoding: str, kind: str, prompt: str, params: SamplingParams, depth: int, repeats: int
) -> Gain:
    """One of `gains`. Plain and drafted generations take turns, so that a machine that slows down slows down both."""
    ids = model.tokenize(prompt)
    speeds: dict[str, list[float]] = {"off": [], "auto": []}
    texts = set()
    for _ in range(repeats):
        for draft, rates in speeds.items():
            generation = generate(model, ids, params, draft)
            rates.append(generation.stats.tokens_per_second)
            texts.add(tuple(generation.tokens))
    return Gain(
        decoding,
        kind,
        acceptance(model, [ids], params, depth),
        acceptance(model, [ids], params, depth, loops=False),
        statistics.median(speeds["off"]),
        statistics.median(speeds["auto"]),
        len(texts) == 1,
    )


def summaries(measured: Sequence[Gain]) -> dict[str, Summary]:
    """By decoding."""
    found = {}
    for decoding in dict.fromkeys(gain.decoding for gain in measured):
        of = [gain for gain in measured if gain.decoding == decoding]
        speed_ups = [gain.speed_up for gain in of]
        found[decoding] = Summary(
            Acceptance.of_all([gain.acceptance for gain in of]),
            Acceptance.of_all([gain.without_loops for gain in of]),
            statistics.geometric_mean(speed_ups),
            min(speed_ups),
        )
    return found
