"""Depth for many sequences, against simulated machines: near the best fixed depth, and never much below plain."""

import numpy as np
import pytest

from gemma_mtp.decoding import AutoDepth, Draft, Offer
from gemma_mtp.decoding.acceptance import DEPTHS
from gemma_mtp.decoding.costs import PassCost
from gemma_mtp.decoding.depth import Round
from gemma_mtp.decoding.economy import CostShape, Shared

LIMIT = 8
OFFER = Offer("test", Draft([0] * LIMIT, [0] * LIMIT))


def cost(fixed: float, rows: int) -> float:
    """Seconds of a pass: reading the weights, and arithmetic for each row."""
    return fixed + 0.01 * rows


def rate(sequences: int, fixed: float, right: float, depth: int | None, noise: float = 0.1, passes: int = 600) -> float:
    """Tokens a second of all sequences at a fixed depth, or at those that AutoDepth chooses (None)."""
    rng = np.random.default_rng(0)
    shared = Shared(CostShape([cost(fixed, rows) / cost(fixed, 1) for rows in range(1, 2 + DEPTHS)]))
    shared.sequences = sequences
    controls = [AutoDepth(shared) for _ in range(sequences)]
    tokens, seconds = 0, 0.0
    for _ in range(passes):
        drafted = [control.choose([OFFER], LIMIT)[1] if depth is None else depth for control in controls]
        rows = sequences + sum(drafted)
        true = cost(fixed, rows)
        seen = true * float(np.exp(noise * rng.standard_normal()))
        given = 0
        for control, drafts in zip(controls, drafted, strict=True):
            accepted = int(np.argmin([*(rng.random(drafts) < right), False]))
            control.update(Round("test", drafts, drafts, accepted, 0.0, seen, [0] * drafts))
            given += 1 + accepted
        shared.measure(sequences, rows, given, seen, seen)
        tokens, seconds = tokens + given, seconds + true
    return tokens / seconds


@pytest.mark.parametrize("right", [0.0, 0.3, 0.6, 0.9])
@pytest.mark.parametrize("sequences", [1, 4, 16])
@pytest.mark.parametrize("fixed", [0.02, 0.2])
def test_it_is_near_the_best_fixed_depth_and_not_below_plain(fixed: float, sequences: int, right: float) -> None:
    chosen = rate(sequences, fixed, right, None)
    assert chosen > 0.97 * rate(sequences, fixed, right, 0)
    assert chosen > 0.9 * max(rate(sequences, fixed, right, depth) for depth in range(LIMIT + 1))


def test_nothing_is_drafted_before_a_pass_was_timed() -> None:
    shared = Shared()
    assert AutoDepth(shared).choose([OFFER], LIMIT)[:2] == (0, 0)
    shared.measure(1, 1, 1, 0.1, 0.1)
    assert AutoDepth(shared).choose([OFFER], LIMIT)[1] > 0


def test_the_fuller_the_machine_the_less_it_drafts() -> None:
    def drafted(sequences: int) -> float:
        shared = Shared()
        shared.sequences = sequences
        controls = [AutoDepth(shared) for _ in range(sequences)]
        depths = []
        for _ in range(200):
            chosen = [control.choose([OFFER], LIMIT)[1] for control in controls]
            for control, depth in zip(controls, chosen, strict=True):
                control.update(Round("test", depth, depth, depth // 2, 0.0, 0.0, [0] * depth))
            rows = sequences + sum(chosen)
            shared.measure(sequences, rows, rows - sum(chosen) // 2, cost(0.05, rows), cost(0.05, rows))
            depths += chosen
        return float(np.mean(depths))

    few, some, many = drafted(1), drafted(8), drafted(32)
    assert DEPTHS >= few > some >= many


def test_a_row_costs_what_passes_of_several_sizes_say() -> None:
    rng = np.random.default_rng(1)
    measured = PassCost(0.1)
    assert measured.per_row == 0
    measured.measure(1, 0.1)
    assert 0 < measured.per_row < 0.1 * 0.2
    for _ in range(300):
        rows = int(rng.integers(4, 12))
        measured.measure(rows, cost(0.05, rows) * float(np.exp(0.1 * rng.standard_normal())))
    assert measured.per_row == pytest.approx(0.01, rel=0.3)
    measured.measure(8, 5.0)  # something else had the machine
    assert measured.per_row == pytest.approx(0.01, rel=0.3)
