"""The native sampler against a slow reference, on every instruction set this CPU runs."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_mtp import _native

ISAS = _native.isas()
SAMPLERS = {isa: _native.Sampler(isa) for isa in ISAS}
BEST = SAMPLERS[ISAS[0]]
M32 = 0xFFFFFFFF
M64 = (1 << 64) - 1


def splitmix(x):
    x = (x + 0x9E3779B97F4A7C15) & M64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & M64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & M64
    return x ^ (x >> 31)


def mix(x):
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & M32
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & M32
    return x ^ (x >> 16)


def reference_noise(seed, position, token):
    key = splitmix(splitmix(seed) ^ position)
    bits = mix((mix(token ^ (key & M32)) + (key >> 32)) & M32) >> 1
    v = (np.float32(bits) + np.float32(0.5)) * np.float32(2.0**-31)  # the one place where rounding is part of it
    return -np.log(-np.log1p(-min(float(v), 1 - 2.0**-25)))


def ranking(logits):
    return np.lexsort((np.arange(len(logits)), -logits))


def reference_kept(logits, temperature, top_k, top_p, min_p):
    """The kept tokens, in the order of the ranking."""
    order = ranking(logits)
    if 0 < top_k < len(order):
        order = order[:top_k]
    weights = np.exp((logits[order].astype(np.float64) - logits.max()) / temperature)
    if top_p < 1:
        before = np.cumsum(weights) - weights
        order = order[(before < top_p * weights.sum()) | (np.arange(len(order)) == 0)]
    weights = np.exp((logits[order].astype(np.float64) - logits.max()) / temperature)
    return order[weights >= min_p * weights[0]]


def reference_sample(logits, position, temperature, top_k=0, top_p=1.0, min_p=0.0, seed=0):
    kept = reference_kept(logits, temperature, top_k, top_p, min_p)
    noise = BEST.gumbel(seed, position, len(logits))
    scores = (logits[kept].astype(np.float64) - logits.max()) / temperature + noise[kept]
    return int(kept[np.argmax(scores)])


def rows(max_size):
    """Rows of logits on a grid of eighths, so that ties are common."""
    return st.lists(st.integers(-64, 64), min_size=1, max_size=max_size).map(lambda v: np.asarray(v, np.float32) / 8)


@given(rows(300))
@settings(deadline=None)
def test_greedy_takes_the_largest_logit_and_the_lowest_id(logits):
    for sampler in SAMPLERS.values():
        assert sampler.sample(logits, 0)[0] == int(np.argmax(logits))


@given(
    rows(300),
    st.integers(0, 10_000),
    st.sampled_from([0.1, 0.7, 1.0, 3.0]),
    st.sampled_from([0, 1, 2, 5, 40, 299, 1000]),
    st.sampled_from([0.0001, 0.3, 0.9, 0.99, 1.0]),
    st.sampled_from([0.0, 0.01, 0.21, 0.9]),
    st.integers(0, 2**64 - 1),
)
@settings(max_examples=400, deadline=None)
def test_samples_equal_the_reference(logits, position, temperature, top_k, top_p, min_p, seed):
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p, "seed": seed}
    expected = reference_sample(logits, position, **options)
    for sampler in SAMPLERS.values():
        assert sampler.sample(logits, position, **options)[0] == expected


@pytest.mark.parametrize("spread", [0.01, 1.0, 4.0])
@pytest.mark.parametrize("top_p", [0.5, 0.95, 0.9999])
def test_wide_nuclei_equal_the_reference(spread, top_p):
    logits = (spread * np.random.default_rng(5).standard_normal(20_000)).astype(np.float32)
    for position in range(30):
        expected = reference_sample(logits, position, 1.0, top_p=top_p)
        assert BEST.sample(logits, position, temperature=1.0, top_p=top_p)[0] == expected


def test_a_nucleus_of_equal_logits_keeps_the_lowest_ids():
    logits = np.zeros(5000, np.float32)
    drawn = {BEST.sample(logits, p, temperature=1.0, top_p=0.5)[0] for p in range(3000)}
    assert max(drawn) < 2500
    assert len(drawn) > 1500


@pytest.mark.parametrize("top_k", [1, 64, 2000, 100_000])
def test_a_vocabulary_of_real_size(top_k):
    logits = np.round(np.random.default_rng(1).standard_normal(262_144) * 3, 2).astype(np.float32)
    for position in range(5):
        for top_p in (0.8, 1.0):
            expected = reference_sample(logits, position, 1.5, top_k=top_k, top_p=top_p)
            assert BEST.sample(logits, position, temperature=1.5, top_k=top_k, top_p=top_p)[0] == expected


@pytest.mark.parametrize("size", [1, 15, 16, 17, 1023, 1024, 1025, 262_208])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 1.0},
        {"temperature": 1.0, "top_k": 7},
        {"temperature": 2.0, "top_p": 0.97},
        {"temperature": 1.0, "min_p": 0.02},
    ],
    ids=lambda o: "-".join(o) or "greedy",
)
def test_every_instruction_set_gives_the_same_bits(size, options):
    logits = (3 * np.random.default_rng(size).standard_normal(size)).astype(np.float32)
    for position in range(3):
        results = [s.sample(logits, position, logprobs=4, seed=9, **options) for s in SAMPLERS.values()]
        assert all(r == results[0] for r in results)


def test_filters_are_those_of_transformers():
    torch = pytest.importorskip("torch")
    from transformers.generation import logits_process as hf

    logits = (2 * np.random.default_rng(3).standard_normal(500)).astype(np.float32)
    for temperature, top_k, top_p, min_p in [(1.0, 50, 0.9, 0.02), (0.7, 500, 0.5, 0.0), (1.5, 20, 1.0, 0.1)]:
        scores = torch.from_numpy(logits)[None] / temperature
        scores = hf.TopKLogitsWarper(top_k)(None, scores)
        if top_p < 1:
            scores = hf.TopPLogitsWarper(top_p)(None, scores)
        scores = hf.MinPLogitsWarper(min_p)(None, scores)
        kept = torch.isfinite(scores[0]).nonzero()[:, 0].tolist()
        assert kept == sorted(reference_kept(logits, temperature, top_k, top_p, min_p))


@pytest.mark.parametrize("isa", ISAS)
def test_noise_is_what_is_written_down(isa):
    for seed, position in [(0, 0), (1, 0), (0, 1), (2**64 - 1, 32_768)]:
        noise = SAMPLERS[isa].gumbel(seed, position, 1000)
        expected = [reference_noise(seed, position, token) for token in range(1000)]
        np.testing.assert_allclose(noise, expected, rtol=0, atol=2e-5)


def test_noise_is_standard_gumbel_also_in_its_tail():
    noise = np.sort(np.concatenate([BEST.gumbel(1, p, 262_144) for p in range(8)]).astype(np.float64))
    cdf = np.exp(-np.exp(-noise))
    steps = np.arange(len(noise)) / len(noise)
    assert np.abs(cdf - steps).max() < 2 / np.sqrt(len(noise))  # Kolmogorov-Smirnov
    for bound in (8, 10, 12):
        expected = len(noise) * -np.expm1(-np.exp(-bound))
        assert abs((noise > bound).sum() - expected) < 5 * np.sqrt(expected)
    assert np.isfinite(noise).all()


def test_noise_of_different_positions_seeds_and_tokens_is_independent():
    count = 100_000
    limit = 5 / np.sqrt(count)

    def uniform(seed, position, tokens):
        return np.exp(-np.exp(-BEST.gumbel(seed, position, tokens).astype(np.float64)))

    keys = [(seed, position) for seed in (0, 1, 2**32) for position in (0, 1, 2, 255, 65_536)]
    noise = np.array([uniform(*key, count) for key in keys])
    between = np.corrcoef(noise) - np.eye(len(keys))
    assert np.abs(between).max() < limit
    for row in noise:
        for lag in (1, 2, 16, 64, 1024):
            assert abs(np.corrcoef(row[lag:], row[:-lag])[0, 1]) < limit
    # The same token at successive positions.
    along = np.array([uniform(3, position, 4) for position in range(20_000)])
    for token in range(4):
        assert abs(np.corrcoef(along[1:, token], along[:-1, token])[0, 1]) < 5 / np.sqrt(20_000)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_samples_follow_the_softmax(temperature):
    draws, size = 20_000, 50
    logits = np.random.default_rng(0).standard_normal(size).astype(np.float32)
    counts = np.bincount(
        [BEST.sample(logits, p, temperature=temperature, seed=4)[0] for p in range(draws)], minlength=size
    )
    weights = np.exp(logits.astype(np.float64) / temperature)
    expected = draws * weights / weights.sum()
    direct = np.random.default_rng(1).multinomial(draws, weights / weights.sum())
    limit = (size - 1) + 4 * np.sqrt(2 * (size - 1))
    assert ((counts - expected) ** 2 / expected).sum() < limit
    both = counts + direct
    assert ((counts - direct)[both > 0] ** 2 / both[both > 0]).sum() < limit  # two samples of one distribution


def test_coupled_samples_agree_as_often_as_their_distributions_allow():
    rng = np.random.default_rng(2)
    target = (2 * rng.standard_normal(200)).astype(np.float32)
    drafter = (target + 0.3 * rng.standard_normal(200)).astype(np.float32)
    p, q = (np.exp(x.astype(np.float64)) / np.exp(x.astype(np.float64)).sum() for x in (target, drafter))
    distance = np.abs(p - q).sum() / 2
    agree = np.mean(
        [
            BEST.sample(target, i, temperature=1.0, seed=5)[0] == BEST.sample(drafter, i, temperature=1.0, seed=5)[0]
            for i in range(5000)
        ]
    )
    bound = (1 - distance) / (1 + distance)  # Daliri, Musco, Suresh 2024: what Gumbel sampling reaches at least
    assert agree > bound - 4 * np.sqrt(bound * (1 - bound) / 5000)


@given(
    rows(60).filter(lambda row: len(row) > 1),
    st.lists(st.integers(-5, 80), max_size=30),
    st.integers(0, 30),
    st.sampled_from([0.5, 1.1, 2.0]),
)
@settings(deadline=None)
def test_repetition_penalty_counts_a_token_once_and_passes_over_foreign_ids(logits, seen, cut, penalty):
    penalised = logits.copy()
    for token in {t for t in seen if 0 <= t < len(logits)}:
        penalised[token] = (
            logits[token] * np.float32(penalty) if logits[token] < 0 else logits[token] / np.float32(penalty)
        )
    for options in ({}, {"temperature": 1.0, "top_k": 5}, {"temperature": 1.0}):
        got = BEST.sample(logits, 1, repetition_penalty=penalty, seen=seen[:cut], drafted=seen[cut:], **options)
        assert got == BEST.sample(penalised, 1, **options)


@given(
    rows(60),
    st.lists(st.integers(-5, 80), max_size=30),
    st.integers(0, 30),
    st.integers(0, 40),
    st.dictionaries(st.integers(0, 80), st.integers(-8, 8).map(float), max_size=6),
    st.sampled_from([(0.0, 0.0), (0.5, 0.0), (0.0, 0.25), (-1.0, 0.75)]),
    st.sampled_from([1.0, 2.0]),
)
@settings(deadline=None)
def test_penalties_count_what_was_generated_and_biases_are_added(
    logits, text, cut, prompt, biases, penalties, repetition
):
    presence, frequency = penalties
    adjusted = logits.copy()
    for token in {t for t in text if 0 <= t < len(logits)}:
        adjusted[token] = logits[token] * repetition if logits[token] < 0 else logits[token] / repetition
    generated = text[prompt:]
    for token in range(len(logits)):  # on grids of quarters and halves float32 is exact
        count = generated.count(token)
        adjusted[token] -= presence * (count > 0) + frequency * count
        adjusted[token] += biases.get(token, 0)
    for options in ({}, {"temperature": 1.0, "top_k": 5}, {"temperature": 1.0}):
        got = BEST.sample(
            logits,
            1,
            repetition_penalty=repetition,
            presence_penalty=presence,
            frequency_penalty=frequency,
            logit_bias=list(biases.items()),
            seen=text[:cut],
            drafted=text[cut:],
            prompt=prompt,
            **options,
        )
        assert got == BEST.sample(adjusted, 1, **options)


def test_logprobs_are_of_the_models_own_distribution():
    logits = (4 * np.random.default_rng(8).standard_normal(3000)).astype(np.float32)
    token, chosen, top = BEST.sample(
        logits, 3, temperature=2.0, top_k=40, repetition_penalty=1.5, seen=list(range(1000)), logprobs=20
    )
    expected = logits.astype(np.float64) - np.log(np.exp(logits.astype(np.float64)).sum())
    assert chosen == pytest.approx(expected[token], abs=1e-5)
    assert [t for t, _ in top] == list(ranking(logits)[:20])
    assert [p for _, p in top] == pytest.approx(expected[ranking(logits)[:20]], abs=1e-5)


def test_masked_tokens_are_never_drawn():
    logits = np.full(2000, -np.inf, np.float32)
    logits[[3, 1500]] = 0
    for options in ({}, {"top_k": 50}, {"top_p": 0.999}, {"min_p": 0.001}):
        drawn = {BEST.sample(logits, p, temperature=1.0, **options)[0] for p in range(200)}
        assert drawn == {3, 1500}


@pytest.mark.parametrize("temperature", [1e-30, 1e-3, 1e6])
def test_extreme_temperatures(temperature):
    logits = np.array([0, 1, 2, 1.5], np.float32)
    drawn = {BEST.sample(logits, p, temperature=temperature)[0] for p in range(300)}
    assert drawn == ({2} if temperature < 1 else {0, 1, 2, 3})


@pytest.mark.parametrize("value", [np.nan, -np.inf, np.inf])
def test_logits_without_a_finite_maximum_are_refused(value):
    with pytest.raises(_native.InputError, match="not finite"):
        BEST.sample(np.full(100, value, np.float32), 0)


def test_an_unknown_instruction_set_is_refused():
    with pytest.raises(_native.InputError, match="sse9"):
        _native.Sampler("sse9")


@given(st.integers(0, 2**32), st.sampled_from([1, 31, 32, 33, 1000, 5000]), st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_a_mask_leaves_what_the_others_were_never_there_for(seed, vocab, kind):
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 3, vocab).astype(np.float32)
    allowed = rng.random(vocab) < rng.choice([0.01, 0.5, 0.99])
    allowed[rng.integers(vocab)] = True
    filtered = [{"temperature": 0.7, "top_k": 5, "top_p": 0.9}, {"temperature": 2.0, "min_p": 0.1}]
    how = [{}, {"temperature": 1.0}, *filtered][kind] | {"seed": seed, "logit_bias": [(0, 1.5)]}
    bits = np.packbits(allowed, bitorder="little")
    words = np.pad(bits, (0, -len(bits) % 4)).view(np.uint32)
    without = np.where(allowed, logits, -np.inf).astype(np.float32)
    for sampler in SAMPLERS.values():
        masked = sampler.sample(logits, 9, allowed=words, **how)
        assert masked[0] == sampler.sample(without, 9, **how)[0]
        assert allowed[masked[0]]
        told = sampler.sample(logits, 9, allowed=words, logprobs=3, **how)
        assert (told[0], told[2]) == (masked[0], sampler.sample(logits, 9, logprobs=3, **how)[2])
    with pytest.raises(_native.InputError, match="a bit for each token"):
        BEST.sample(np.zeros(32 * len(words) + 1, np.float32), 0, allowed=words)
