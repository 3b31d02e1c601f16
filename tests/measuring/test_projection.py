"""Projections are the formula's, and say nothing where it cannot be used."""

import pytest

from gemma_mtp.errors import SettingsError
from gemma_mtp.measuring.cost import Costs
from gemma_mtp.measuring.projection import MODELS, Mixture, project, speed_up

COSTS = Costs({rows: 0.010 * (1 + 0.1 * (rows - 1)) for rows in range(1, 9)}, draft_step=0.0005)


def test_speed_up_is_tokens_over_costs():
    # Depth 2: 1 + 0.5 + 0.25 tokens for a pass of 1.2 and two steps of 0.05.
    assert speed_up([1.0, 1.1, 1.2], 0.05, 0.5, 2) == pytest.approx(1.75 / 1.3)
    assert speed_up([1.0, 1.1], 0.05, 0.9, 0) == 1.0


def test_each_model_gets_its_best_depth_at_the_lowest_and_the_highest_acceptance():
    found = {(row.model, row.acceptance): row for row in project(COSTS)}
    assert set(found) == {(model, acceptance) for model in MODELS for acceptance in (0.66, 0.89)}
    for acceptance in (0.66, 0.89):
        row = found["Gemma 4 31B", acceptance]
        every = [
            sum(acceptance**kept for kept in range(depth + 1)) / (1 + 0.1 * depth + 0.05 * depth) for depth in range(8)
        ]
        assert row.speed_up == pytest.approx(max(every))
        assert row.depth == every.index(max(every))
    assert found["Gemma 4 31B", 0.66].depth < found["Gemma 4 31B", 0.89].depth


def test_a_mixture_gains_less_because_more_rows_read_more_experts():
    found = {(row.model, row.acceptance): row.speed_up for row in project(COSTS)}
    assert 1.0 <= found["Gemma 4 26B-A4B", 0.89] < found["Gemma 4 E4B", 0.89]
    mixture = Mixture(experts=4, active=2, share=0.5)
    assert mixture.growth(1) == 1.0
    assert mixture.growth(2) == 1.25  # three of four experts are met instead of two


def test_where_nothing_pays_plain_decoding_is_projected():
    dear = Costs({rows: 0.01 * rows for rows in range(1, 9)}, draft_step=0.005)
    assert {(row.depth, row.speed_up) for row in project(dear)} == {(0, 1.0)}


def test_noise_does_not_make_wider_passes_cheaper():
    noisy = Costs({1: 0.010, 2: 0.002, 3: 0.003}, draft_step=0.0)
    best = max(row.speed_up for row in project(noisy))
    assert best == pytest.approx(1 + 0.89 + 0.89**2)


def test_without_a_draft_step_there_is_no_projection():
    with pytest.raises(SettingsError, match="a model with a drafter"):
        project(Costs({1: 0.01, 2: 0.011}, draft_step=None))
