"""What drafting may be expected to gain on the real Gemma 4, from costs measured on another model.

With acceptance a at every depth, a round of depth d yields 1 + a + ... + a^d tokens and costs C(1 + d) and d draft
steps, so the speed-up over plain decoding is (1 + a + ... + a^d) / (C(1 + d)/C(1) + d D/C(1)).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from gemma_mtp.errors import SettingsError
from gemma_mtp.measuring.cost import Costs

ACCEPTANCE = (0.66, 0.89)  # the lowest and the highest published for Gemma 4 and Google's drafters


@dataclass(frozen=True)
class Mixture:
    """How many experts there are, how many a token takes, and the share of these in what a one-row pass reads."""

    experts: int
    active: int
    share: float

    def growth(self, rows: int) -> float:
        """Weights that a pass reads over those of a pass of one row, if every row chose its experts independently."""
        met = self.experts * (1 - (1 - self.active / self.experts) ** rows)
        return 1 + self.share * (met / self.active - 1)


MODELS: dict[str, Mixture | None] = {
    "Gemma 4 E2B": None,
    "Gemma 4 E4B": None,
    "Gemma 4 26B-A4B": Mixture(128, 8, share=0.37),  # 30 layers of 8 x 3 x 704 x 2816 weights, of 3.8 G active
    "Gemma 4 31B": None,
}


@dataclass(frozen=True)
class Projected:
    """The best depth at one acceptance, and the speed-up over plain decoding there; depth 0 is plain."""

    model: str
    acceptance: float
    depth: int
    speed_up: float

    def as_json(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "acceptance": self.acceptance,
            "depth": self.depth,
            "projected speed-up": self.speed_up,
        }


def project(costs: Costs) -> list[Projected]:
    """For every model, at the lowest and the highest acceptance, from the costs of passes of 1, 2, ... rows.

    Raises SettingsError where no draft step was timed.
    """
    if (step := costs.draft_share) is None:
        raise SettingsError("A projection needs the cost of a draft step: give a model with a drafter.")
    measured = list(accumulate(costs.over_one.values(), max))  # a wider pass is not cheaper, whatever the noise says
    found = []
    for model, mixture in MODELS.items():
        curve = [ratio * (mixture.growth(rows) if mixture else 1.0) for rows, ratio in enumerate(measured, 1)]
        for acceptance in ACCEPTANCE:
            speeds = [speed_up(curve, step, acceptance, depth) for depth in range(len(curve))]
            depth = max(range(len(speeds)), key=speeds.__getitem__)
            found.append(Projected(model, acceptance, depth, speeds[depth]))
    return found


def speed_up(curve: list[float], step: float, acceptance: float, depth: int) -> float:
    """Over plain decoding. curve: C(T)/C(1) of T = 1, 2, ... rows; step: a draft step over C(1)."""
    tokens = sum(acceptance**kept for kept in range(depth + 1))
    return tokens / (curve[depth] + depth * step)
