"""What is measured of drafting, on the demo with prompt lookup: real counts of real generations."""

from dataclasses import replace

import pytest

from gemma_mtp import Model
from gemma_mtp.measuring.cost import measure_costs
from gemma_mtp.measuring.speed import DECODINGS, Gain, measure_gain, summaries
from gemma_mtp.training.evaluate import Acceptance

COUNT = "One, two, three, one, two, three, one, two, three, one, two"


@pytest.fixture(scope="module")
def lookup() -> Model:
    return Model.load("demo", drafter="none", threads=2)


def test_a_text_that_repeats_itself_is_drafted_well_and_is_all_loop(lookup: Model) -> None:
    params = replace(DECODINGS["greedy"], max_tokens=40)
    gain = measure_gain(lookup, "greedy", "count", COUNT, params, depth=3, repeats=1)
    assert gain.same
    assert min(gain.acceptance.rates) > 0.9
    assert sum(gain.without_loops.tried) < sum(gain.acceptance.tried)
    counted = lookup.generate(COUNT, params, draft=3).stats
    assert gain.acceptance.tried == counted.tried_per_depth
    assert gain.acceptance.accepted == counted.accepted_per_depth
    assert gain.speed_up == gain.auto / gain.plain
    assert gain.plain > 0


def test_costs_are_those_of_the_widths_asked_for(lookup: Model) -> None:
    costs = measure_costs(lookup, (1, 2, 8, 1000), repeats=1)
    assert list(costs.passes) == [1, 2, 8]
    assert costs.over_one[1] == 1.0
    assert costs.over_one[8] == costs.passes[8] / costs.passes[1] > 1.0
    assert costs.draft_step is costs.draft_share is None


def test_a_summary_counts_rounds_and_averages_speed_ups() -> None:
    few, many = Acceptance([1, 0], [0, 0]), Acceptance([9, 6], [6, 3])
    gains = [
        Gain("greedy", "a", few, few, plain=100.0, auto=400.0, same=True),
        Gain("greedy", "b", many, few, plain=100.0, auto=100.0, same=True),
        Gain("sampled", "a", few, few, plain=100.0, auto=90.0, same=True),
    ]
    found = summaries(gains)
    assert list(found) == ["greedy", "sampled"]
    assert found["greedy"].acceptance.rates == [0.6, 0.5]
    assert found["greedy"].without_loops.tried == [2, 0]
    assert (found["greedy"].mean, found["greedy"].worst) == (pytest.approx(2.0), 1.0)
    assert found["sampled"].worst == 0.9
