import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_mtp.decoding import (
    AutoDepth,
    FixedDepth,
    Progress,
    PromptLookup,
    SamplingParams,
    accept,
    draft_and_verify,
)
from gemma_mtp.decoding.economy import Alone, CostShape
from gemma_mtp.errors import PromptError

from .fake_target import VOCAB, FakeTarget, FakeText, OracleDrafts

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]
SETTINGS = {
    "greedy": {},
    "sampled": {"temperature": 1.0, "seed": 7},
    "penalised": {"temperature": 1.0, "presence_penalty": 0.5, "frequency_penalty": 0.7, "logit_bias": {7: -100}},
    "filtered": {"temperature": 0.8, "top_k": 12, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.3, "seed": 1},
}
SOURCES = {
    "never": lambda output: OracleDrafts(PROMPT, output, 0.0),
    "always": lambda output: OracleDrafts(PROMPT, output, 1.0),
    "sometimes": lambda output: OracleDrafts(PROMPT, output, 0.6),
    "lookup": lambda output: PromptLookup(),
}


def run(params, source=None, depth=None, target=None, context=10_000, eos_ids=(), prompt=PROMPT):
    sequence = []
    progress = Progress(
        prompt,
        params,
        text=FakeText(),
        context=context,
        sources=[source] if source else [],
        depth=depth,
        eos_ids=eos_ids,
    )
    pieces = list(draft_and_verify(target or FakeTarget(), sequence, progress))
    assert [t for piece in pieces for t in piece.tokens] == progress.tokens
    assert sequence == [*prompt, *progress.tokens[:-1]]
    assert progress.stats.tokens == len(progress.tokens)
    return progress, "".join(piece.text for piece in pieces), pieces


def outcome(progress, text):
    return progress.tokens, text, progress.finish_reason


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("params", SETTINGS)
def test_every_source_and_depth_gives_the_plain_text(params, source):
    params = SamplingParams(max_tokens=70, **SETTINGS[params])
    plain, text, _ = run(params)
    assert plain.finish_reason == "length"
    controls = [FixedDepth(n) for n in range(9)] + [AutoDepth(Alone(CostShape([1, 1.05, 1.1, 1.2, 1.3]), seconds=1))]
    for control in controls:
        drafted, drafted_text, _ = run(params, SOURCES[source](plain.tokens), control)
        assert outcome(drafted, drafted_text) == outcome(plain, text)


def test_repetitive_text_is_looked_up_and_accepted():
    target = FakeTarget(order=1)  # greedy over one token of memory runs into a loop
    params = SamplingParams(max_tokens=300)
    plain, text, _ = run(params, target=target)
    drafted, drafted_text, _ = run(params, PromptLookup(), FixedDepth(6), target)
    assert outcome(drafted, drafted_text) == outcome(plain, text)
    assert drafted.stats.accepted > 200
    assert drafted.stats.rounds < 80


class Free(OracleDrafts):
    """What costs nothing to ask."""

    name, free = "free", True


class FirstSource(FixedDepth):
    """Takes the first source, every third round nothing, and notes what it is told of the others."""

    def __init__(self, depth):
        super().__init__(depth)
        self.rounds, self.told = 0, []

    def choose(self, offers, limit):
        self.rounds += 1
        return super().choose(offers, limit if self.rounds % 3 else 0)

    def observe(self, source, sureness, right):
        self.told.append((source, len(sureness), right))


@pytest.mark.parametrize("right", [0.0, 1.0])
def test_free_proposals_that_are_not_taken_are_judged_by_what_came(right):
    params = SamplingParams(max_tokens=60)
    plain, *_ = run(params)
    control = FirstSource(3)
    first, other = OracleDrafts(PROMPT, plain.tokens, 0.7), Free(PROMPT, plain.tokens, right)
    progress = Progress(PROMPT, params, text=FakeText(), context=10_000, sources=[first, other], depth=control)
    list(draft_and_verify(FakeTarget(), [], progress))
    assert progress.tokens == plain.tokens
    assert len(control.told) == control.rounds
    assert all(asked >= 1 and accepted == right * asked for _, asked, accepted in control.told)
    assert max(asked for _, asked, _ in control.told) > 1


@given(
    st.builds(
        dict,
        max_tokens=st.integers(1, 40),
        seed=st.integers(0, 5),
        temperature=st.sampled_from([0.0, 1.0]),
        stop=st.lists(st.text("abcde", min_size=1, max_size=4), max_size=3),
        stop_ids=st.lists(st.integers(0, VOCAB - 1), max_size=2),
        ignore_eos=st.booleans(),
    ),
    st.lists(st.integers(0, VOCAB - 1), max_size=2),
    st.integers(len(PROMPT), 50),
    st.integers(0, 8),
    st.sampled_from([0.0, 0.5, 0.9, 1.0]),
)
@settings(max_examples=150, deadline=None)
def test_every_way_to_stop_is_that_of_plain_decoding(options, eos_ids, context, depth, right):
    params = SamplingParams(**options)
    endless, _, _ = run(SamplingParams(max_tokens=60, temperature=params.temperature, seed=params.seed))
    plain, text, _ = run(params, context=context, eos_ids=eos_ids)
    source = OracleDrafts(PROMPT, endless.tokens, right)
    drafted, drafted_text, _ = run(params, source, FixedDepth(depth), context=context, eos_ids=eos_ids)
    assert outcome(drafted, drafted_text) == outcome(plain, text)

    # And plain decoding against a reading of the rules over the endless text.
    detokenizer, shown, expected = FakeText(), "", None
    ends = set(params.stop_ids) | (set() if params.ignore_eos else set(eos_ids))
    for count, token in enumerate(endless.tokens, 1):
        if token in ends:
            expected = (count, shown + detokenizer.flush(), "stop")
            break
        shown += detokenizer.push(token)
        found = [at for stop in params.stop if (at := shown.find(stop)) >= 0]
        if found:
            expected = (count, shown[: min(found)], "stop")
            break
        if count == params.max_tokens or len(PROMPT) + count > context:
            expected = (count, shown + detokenizer.flush(), "length")
            break
    count, shown, reason = expected
    # What was held back may complete a stop string at the very end.
    cut = min((at for stop in params.stop if (at := shown.find(stop)) >= 0), default=len(shown))
    assert outcome(plain, text) == (endless.tokens[:count], shown[:cut], reason)


def test_streamed_text_never_shows_the_beginning_of_a_stop_string():
    params = SamplingParams(max_tokens=60, temperature=1.0, seed=3)
    _, text, _ = run(params)
    stop = text[20:26]
    progress, shown, pieces = run(SamplingParams(max_tokens=60, temperature=1.0, seed=3, stop=stop))
    assert progress.finish_reason == "stop"
    assert shown == text[: text.find(stop)]
    for i in range(len(pieces)):
        assert shown.startswith("".join(p.text for p in pieces[:i]))


def test_pieces_tell_drafts_from_the_targets_own_tokens():
    params = SamplingParams(max_tokens=13)
    plain, _, _ = run(params)
    _, _, pieces = run(params, OracleDrafts(PROMPT, plain.tokens, 1.0), FixedDepth(3))
    assert [(p.origin, len(p.tokens)) for p in pieces] == [("target", 1), *[("draft", 3), ("target", 1)] * 3]


def test_stats_count_what_happened():
    params = SamplingParams(max_tokens=30)
    plain, _, _ = run(params)
    assert (plain.stats.rounds, plain.stats.drafted) == (29, 0)
    right, _, _ = run(params, OracleDrafts(PROMPT, plain.tokens, 1.0), FixedDepth(4))
    # 1 token from the prompt, 5 rounds of 4 + 1, then 4 wanted: 3 drafts and the target's own.
    assert (right.stats.rounds, right.stats.drafted, right.stats.accepted) == (6, 23, 23)
    assert right.stats.accepted_per_depth == [6, 6, 6, 5]
    wrong, _, _ = run(params, OracleDrafts(PROMPT, plain.tokens, 0.0), FixedDepth(4))
    assert (wrong.stats.rounds, wrong.stats.accepted) == (29, 0)
    assert wrong.stats.tried_per_depth[0] == 28  # the last token wanted is not drafted for
    assert wrong.stats.tried_per_depth[1:] == [0, 0, 0]
    mixed, _, _ = run(params, OracleDrafts(PROMPT, plain.tokens, 0.7), FixedDepth(4))
    assert mixed.stats.tokens == 1 + mixed.stats.rounds + mixed.stats.accepted
    assert sum(mixed.stats.accepted_per_depth) == mixed.stats.accepted
    assert all(0 <= a <= 1 for a in mixed.stats.acceptance[:2])


def test_rate_counts_rounds_only_and_not_the_reader():
    ticks = iter(range(1000))
    params = SamplingParams(max_tokens=5)
    progress = Progress(PROMPT, params, text=FakeText(), context=99, clock=lambda: next(ticks))
    for _ in draft_and_verify(FakeTarget(), [], progress):
        next(ticks)
    assert progress.stats.seconds_prompt == 1
    assert progress.stats.seconds_decode == 4 * 3
    assert progress.stats.tokens_per_second == 4 / 12


def test_logprobs_come_with_their_tokens():
    params = SamplingParams(max_tokens=20, temperature=1.0, logprobs=3, seed=2)
    plain, _, pieces = run(params)
    reference = [entry for piece in pieces for entry in piece.logprobs]
    _, _, drafted = run(params, OracleDrafts(PROMPT, plain.tokens, 0.7), FixedDepth(4))
    assert [entry for piece in drafted for entry in piece.logprobs] == reference
    target, prefix = FakeTarget(), list(PROMPT)
    for token, entry in zip(plain.tokens, reference, strict=True):
        logits = target.logits(prefix).astype(np.float64)
        expected = logits - np.log(np.exp(logits).sum())
        assert entry.chosen == pytest.approx(expected[token], abs=1e-5)
        assert [t for t, _ in entry.top] == list(np.argsort(-expected)[:3])
        prefix.append(token)


def test_long_prompts_run_in_chunks_and_cached_tokens_not_again():
    prompt = [i % VOCAB for i in range(1200)]
    whole = FakeTarget()
    plain, _, _ = run(SamplingParams(max_tokens=5), target=whole, prompt=prompt)
    assert whole.passes == [512, 512, 176, 1, 1, 1, 1]
    resumed, sequence = FakeTarget(), prompt[:1100]
    progress = Progress(prompt, SamplingParams(max_tokens=5), text=FakeText(), context=2000, cached=1100)
    list(draft_and_verify(resumed, sequence, progress))
    assert progress.tokens == plain.tokens
    assert resumed.passes == [100, 1, 1, 1, 1]


@pytest.mark.parametrize("at", [0, 1, 2, 3, 6])
def test_an_interrupt_keeps_the_text_so_far_and_a_clean_sequence(at):
    prompt = [i % VOCAB for i in range(1200)]
    params = SamplingParams(max_tokens=20)
    plain, _, _ = run(params, prompt=prompt)
    target, sequence = FakeTarget(), []
    target.interrupt_at = at
    source = OracleDrafts(prompt, plain.tokens, 0.5)
    progress = Progress(prompt, params, text=FakeText(), context=2000, sources=[source], depth=FixedDepth(3))
    pieces = []
    with pytest.raises(KeyboardInterrupt):
        pieces.extend(draft_and_verify(target, sequence, progress))
    assert progress.finish_reason == "cancelled"
    assert [t for piece in pieces for t in piece.tokens] == progress.tokens == plain.tokens[: len(progress.tokens)]
    assert sequence == (prompt + progress.tokens[:-1] if progress.tokens else prompt[: 512 * at])


def test_closing_the_stream_leaves_a_clean_sequence():
    sequence = []
    plain, _, _ = run(SamplingParams(max_tokens=20))
    progress = Progress(
        PROMPT,
        SamplingParams(max_tokens=20),
        text=FakeText(),
        context=99,
        sources=[OracleDrafts(PROMPT, plain.tokens, 1.0)],
        depth=FixedDepth(3),
    )
    stream = draft_and_verify(FakeTarget(), sequence, progress)
    for _ in range(3):
        next(stream)
    stream.close()
    assert progress.finish_reason == "cancelled"
    assert sequence == PROMPT + progress.tokens[:-1]


@pytest.mark.parametrize(("prompt", "word"), [([], "no tokens"), ([1] * 11, "11 tokens")])
def test_a_prompt_that_cannot_run_is_one_sentence(prompt, word):
    with pytest.raises(PromptError, match=word):
        Progress(prompt, SamplingParams(), text=FakeText(), context=10)


@given(st.lists(st.integers(0, 2), max_size=6), st.lists(st.integers(0, 2), max_size=7))
def test_accept_keeps_the_common_beginning(drafted, sampled):
    kept = accept(drafted, sampled)
    assert drafted[:kept] == sampled[:kept]
    assert kept == min(len(drafted), len(sampled)) or drafted[kept] != sampled[kept]


def test_drafted_samples_follow_the_distribution():
    target = FakeTarget(spread=1.0, order=0)  # every position has the same distribution
    params = SamplingParams(max_tokens=6000, temperature=1.0, seed=11)
    plain, _, _ = run(params, target=target)
    drafted, _, _ = run(params, OracleDrafts(PROMPT, plain.tokens, 0.7), FixedDepth(4), target)
    assert drafted.stats.accepted > 2000
    logits = target.logits([]).astype(np.float64)
    expected = 6000 * np.exp(logits) / np.exp(logits).sum()
    counts = np.bincount(drafted.tokens, minlength=VOCAB)
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert chi_square < (VOCAB - 1) + 4 * np.sqrt(2 * (VOCAB - 1))
