"""Draft-length control in simulated time: cost curves, drafts and acceptances are given, nothing is measured."""

import numpy as np
import pytest

from gemma_mtp import _native
from gemma_mtp.decoding import AutoDepth, Draft, FixedDepth, Offer
from gemma_mtp.decoding.depth import Round
from gemma_mtp.decoding.economy import Alone, CostShape, Experts
from gemma_mtp.errors import SettingsError

STEEP = [1, 1.9, 2.7, 3, 3.4, 3.9, 4.4, 4.9, 5.4]
FLAT = [1, 1.05, 1.1, 1.3, 1.5, 1.7, 1.9, 2.1, 2.3]
KINK = [1, 1.5, 1.55, 1.6, 1.65, 1.7, 1.75, 1.8, 1.85]
CURVES = {"steep": STEEP, "flat": FLAT, "kink": KINK}


LONGEST = 8


def at_hand(*sureness, source="test"):
    return Offer(source, Draft([0] * len(sureness), sureness))


ALIKE = at_hand(*[0] * LONGEST)


def simulate(control, curve, acceptance, tokens=2000, seed=0, noise=0.0, levels=1):
    """Seconds for so many tokens with drafts at hand, the tokens of each being of one of so many sureness levels.
    acceptance(token, level) is the chance of each token there."""
    rng = np.random.default_rng(seed)
    done, seconds, depths = 0, 0.0, []
    while done < tokens:
        level = int(rng.integers(levels))
        offer = at_hand(*[level] * (len(curve) - 1))
        depth = control.choose([offer], len(curve) - 1).depth
        made = offer.draft.cut(depth)
        right = 0
        while right < len(made.made) and rng.random() < acceptance(done, level):
            right += 1
        cost = curve[depth] * np.exp(noise * rng.standard_normal())
        if noise and rng.random() < 0.02:
            cost *= 4  # another process took the core
        round = Round("test", depth, depth, right, 0.0, cost, made.sureness)
        control.update(round)
        if not depth:
            control.observe("test", [level], min(right, 1))
        done += 1 + round.accepted
        seconds += curve[depth]  # judged without the noise
        depths.append(depth)
    return seconds * tokens / done, depths


def auto(curve):
    return AutoDepth(Alone(CostShape([seconds / curve[0] for seconds in curve]), seconds=curve[0]))


def best_fixed(curve, acceptance, **options):
    return min(simulate(FixedDepth(d), curve, acceptance, **options)[0] for d in range(len(curve)))


@pytest.mark.parametrize("curve", CURVES)
@pytest.mark.parametrize("noise", [0.0, 0.05])
@pytest.mark.parametrize("tokens", [200, 5000])
@pytest.mark.parametrize("levels", [1, 4])
def test_text_that_never_accepts_costs_next_to_nothing(curve, noise, tokens, levels):
    curve = CURVES[curve]
    seconds, _ = simulate(auto(curve), curve, lambda *_: 0.0, tokens=tokens, noise=noise, levels=levels)
    assert tokens / seconds >= 0.98


@pytest.mark.parametrize("curve", CURVES)
@pytest.mark.parametrize("noise", [0.0, 0.05])
@pytest.mark.parametrize("share", [0.3, 0.5, 0.7, 0.85, 0.95, 1.0])
def test_near_the_best_fixed_depth(curve, noise, share):
    curve = CURVES[curve]
    options = {"acceptance": lambda *_: share, "tokens": 3000}
    fixed = best_fixed(curve, **options)
    runs = [simulate(auto(curve), curve, noise=noise, seed=seed, **options)[0] for seed in range(6)]
    # A gain of a few per cent is told late from none.
    assert np.mean(runs) < (1.05 if fixed < 0.9 * 3000 else 1.08) * fixed
    assert max(runs) < 1.15 * fixed


@pytest.mark.parametrize("share", [0.5, 0.7])
def test_a_curve_like_llama_cpps_is_not_drafted_on(share):
    curve = STEEP[:4]
    seconds, depths = simulate(auto(curve), curve, lambda *_: share)
    assert seconds < 1.015 * 2000
    assert np.mean(np.array(depths[100:]) > 0) < 0.1  # probes


def test_drafts_of_each_sureness_have_a_depth_of_their_own():
    def acceptance(_, level):
        return (0.05, 0.95)[level]

    control = auto(FLAT)
    seconds, _ = simulate(control, FLAT, acceptance, levels=2)
    assert seconds < 0.95 * best_fixed(FLAT, acceptance, levels=2)
    assert control.choose([at_hand(*[0] * 8)], 8).depth <= 1
    assert control.choose([at_hand(*[1] * 8)], 8).depth >= 4
    assert control.choose([at_hand(1, 1, 0, 0, 0, 0, 0, 0)], 8).depth <= 3


def test_follows_a_text_that_changes():
    def acceptance(token, _):
        return 0.95 if token // 1000 % 2 else 0.0

    seconds, _ = simulate(auto(FLAT), FLAT, acceptance, tokens=6000)
    apart = 3000 + best_fixed(FLAT, lambda *_: 0.95, tokens=3000)
    assert seconds < 1.08 * apart  # five changes, each noticed after some dozens of rounds


def test_settles_on_one_depth():
    _, depths = simulate(auto(KINK), KINK, lambda *_: 0.8, tokens=5000)
    late = np.array(depths[300:])
    assert np.mean(late[1:] != late[:-1]) < 0.1


def test_a_wrong_start_curve_is_corrected():
    too_flat = [1 + 0.7 * (c - 1) for c in STEEP]
    seconds, _ = simulate(auto(too_flat), STEEP, lambda *_: 0.6, tokens=3000)
    assert seconds < 1.03 * 3000
    seconds, _ = simulate(auto(STEEP), FLAT, lambda *_: 0.9, tokens=3000)
    assert seconds < 1.2 * best_fixed(FLAT, lambda *_: 0.9, tokens=3000)


def test_recovers_after_a_spell_of_load():
    control = auto(FLAT)
    simulate(control, FLAT, lambda *_: 0.9)
    loaded = [3 * c * (1 + 0.2 * i) for i, c in enumerate(FLAT)]
    simulate(control, loaded, lambda *_: 0.9, tokens=500)
    simulate(control, FLAT, lambda *_: 0.9, tokens=2000)
    seconds, _ = simulate(control, FLAT, lambda *_: 0.9)
    assert seconds < 1.1 * best_fixed(FLAT, lambda *_: 0.9)


def test_an_expensive_drafter_is_not_asked():
    curve = FLAT
    control = auto(curve)
    assert simulate_sure(control, curve, [0], [0.5] * LEVELS, tokens=2000, draft=0.6) < 1.03 * 2000


def test_limits_are_kept():
    control = auto([1, 1, 1, 1])
    offers = [ALIKE]
    assert control.choose(offers, 8)[:2] == (0, 3)
    assert control.choose(offers, 1)[:2] == (0, 1)
    assert FixedDepth(5).choose(offers, 2)[:2] == (0, 2)
    assert control.choose([at_hand(0, 0)], 8)[:2] == (0, 2)
    assert auto([1.0]).choose(offers, 8)[:2] == (0, 0)


@pytest.mark.parametrize("better", [0, 1])
def test_the_source_that_gains_more_is_taken(better):
    """Two sources always on offer; what each would have gained is known from their acceptance alone."""
    control, rng = auto(FLAT), np.random.default_rng(0)
    offers, chances, taken = [at_hand(*[0] * LONGEST, source=name) for name in "ab"], [0.5, 0.5], []
    chances[better] = 0.9
    for _ in range(2000):
        which, depth = control.choose(offers, 8)[:2]
        accepted = 0
        while accepted < depth and rng.random() < chances[which]:
            accepted += 1
        control.update(Round("ab"[which], depth, depth, accepted, 0.0, FLAT[depth], [0] * depth))
        taken.append(which)
    assert np.mean(np.array(taken[500:]) == better) > 0.9


@pytest.mark.parametrize(
    "make",
    [lambda: FixedDepth(-1), lambda: Alone(CostShape([]), seconds=1), lambda: Alone(CostShape([1, 0]), seconds=1)],
)
def test_impossible_settings_are_refused(make):
    with pytest.raises(SettingsError):
        make()


def simulate_sure(control, curve, says, chances, tokens=4000, draft=0.02):
    """As `simulate`, of a source that says of each token how sure it is. The i-th token ahead is of sureness
    says[(done + i) % len(says)], and has the chance chances[sureness]."""
    rng = np.random.default_rng(0)
    done, seconds, offer = 0, 0.0, Offer("test")
    while done < tokens:
        choice = control.choose([offer], len(curve) - 1)
        ends, together = choice.ends, 1.0
        drafted, made = 0, []
        while drafted < choice.depth and (not ends or together >= ends.go_on[drafted]):
            made.append(says[(done + drafted) % len(says)])
            if ends:
                together *= ends.acceptance[drafted, made[-1]]
                if together < ends.keep[drafted]:
                    break
            drafted += 1
        right = 0
        while right < len(made) and rng.random() < chances[made[right]]:
            right += 1
        round = Round("test", choice.depth, drafted, right, len(made) * draft, curve[drafted], made)
        control.update(round)
        done += 1 + round.accepted
        seconds += curve[drafted] + len(made) * draft
    return seconds * tokens / done


STRAIGHT = [1, 1.2, 1.4, 1.6, 1.8, 2.0, 2.2, 2.4, 2.6]
LEVELS = _native.SURENESS_LEVELS


@pytest.mark.parametrize("curve", [FLAT, STRAIGHT], ids=["flat", "straight"])
def test_a_source_that_knows_when_it_is_unsure_gains_by_ending_drafts_early(curve):
    chances = [0.05] * 5 + [0.97] * 3
    says = [7] * 6 + [1] * 3
    fixed = min(simulate_sure(FixedDepth(depth), curve, says, chances) for depth in range(len(curve)))
    assert simulate_sure(auto(curve), curve, says, chances) < 0.95 * fixed


def test_what_a_source_says_is_learnt_and_not_believed():
    """Its surest tokens are never right, those that it is least sure of nearly always are."""
    chances = [0.95] * 4 + [0.0] * 4
    says = [0, 1, 2, 3, 7, 7, 7, 7]
    fixed = min(simulate_sure(FixedDepth(depth), FLAT, says, chances) for depth in range(len(FLAT)))
    assert simulate_sure(auto(FLAT), FLAT, says, chances) < 0.97 * fixed


@pytest.mark.parametrize("curve", [FLAT, STRAIGHT], ids=["flat", "straight"])
@pytest.mark.parametrize("chance", [0.0, 0.3, 0.6, 0.95])
def test_sureness_that_says_nothing_is_no_worse_than_a_fixed_depth(curve, chance):
    says = list(np.random.default_rng(1).integers(LEVELS, size=1000))
    fixed = min(simulate_sure(FixedDepth(depth), curve, says, [chance] * LEVELS) for depth in range(len(curve)))
    assert simulate_sure(auto(curve), curve, says, [chance] * LEVELS) < 1.1 * fixed


def test_the_curve_starts_with_the_first_plain_pass():
    control = AutoDepth(Alone(CostShape(FLAT)))
    assert control.choose([ALIKE], 8)[:2] == (0, 0)
    control.update(Round("test", 0, 0, 0, 0.0, 0.5))
    assert control.choose([ALIKE], 8).depth > 0


def test_the_experts_that_a_longer_draft_would_wake_have_their_price():
    """Rows cost what their experts do. A text's further rows wake 8 each, as when costs were measured; another's 1."""
    read = [8.0 * rows for rows in range(1, 10)]
    shape = CostShape([1 + 0.05 * (count - 8) for count in read], Experts(read, 0.05))

    def drafts(woken: int) -> float:
        control, rng, depths = AutoDepth(Alone(shape, seconds=1.0)), np.random.default_rng(0), []
        for _ in range(300):
            depth = control.choose([ALIKE], 8).depth
            accepted = int(np.argmin([*(rng.random(depth) < 0.7), False]))
            experts = 8 + woken * depth
            told = Round("test", depth, depth, accepted, 0.0, 1 + 0.05 * (experts - 8), [0] * depth, experts)
            control.update(told)
            depths.append(depth)
        return float(np.mean(depths[20:]))

    assert drafts(8) < 2
    assert drafts(1) > 4
