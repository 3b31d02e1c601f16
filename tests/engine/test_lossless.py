"""The same tokens with drafting off, on and at any depth, greedy and sampled, on the real model."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from gemma_mtp import Model, PromptError, SamplingParams, SettingsError
from gemma_mtp.prompts import NINE_KINDS

SAMPLED = {"temperature": 1.0, "top_k": 64, "top_p": 0.95}
PENALISED = {"presence_penalty": 0.5, "frequency_penalty": 0.3, "logit_bias": {107: -2.0, 236764: 1.0}}


@pytest.mark.parametrize("kind", list(NINE_KINDS))
def test_drafting_never_changes_the_tokens(demo: Model, kind: str) -> None:
    accepted = rejected = 0
    for settings in ({}, {**SAMPLED, "seed": 7}, PENALISED):
        params = SamplingParams(max_tokens=32, **settings)  # type: ignore[arg-type]
        plain = demo.generate(NINE_KINDS[kind], params, draft="off")
        for draft in (1, 4, "auto"):
            drafted = demo.generate(NINE_KINDS[kind], params, draft=draft)
            assert drafted.tokens == plain.tokens, f"draft {draft}, {settings}"
            assert drafted.text == plain.text
            accepted += drafted.stats.accepted
            rejected += drafted.stats.drafted - drafted.stats.accepted
    assert accepted > 0 or rejected > 0, "nothing was drafted, so nothing was tested"


def test_the_text_streams_in_pieces_that_join_to_the_whole(demo: Model) -> None:
    stream = demo.stream(NINE_KINDS["translate"], SamplingParams(max_tokens=48))
    pieces = list(stream)
    assert "".join(piece.text for piece in pieces) == stream.generation.text
    assert [token for piece in pieces for token in piece.tokens] == stream.generation.tokens
    assert {piece.origin for piece in pieces} <= {"target", "draft"}


def test_logprobs_report_the_chosen_token_and_the_likeliest(demo: Model) -> None:
    generation = demo.generate("The capital of France is", SamplingParams(max_tokens=4, logprobs=3))
    assert generation.logprobs is not None
    assert len(generation.logprobs) == 4
    for token, row in zip(generation.tokens, generation.logprobs, strict=True):
        assert row.top[0] == (token, row.chosen)  # greedy takes the likeliest
        assert len(row.top) == 3


def test_logprobs_of_a_prompt_are_those_of_its_logits(demo: Model) -> None:
    prompt = demo.tokenize(NINE_KINDS["cpp"])
    settings = {"logprobs": 2, "temperature": 1.0, "seed": 3, "repetition_penalty": 1.1}
    scored = SamplingParams(max_tokens=12, prompt_logprobs=True, **settings)  # type: ignore[arg-type]
    generation = demo.generate(prompt, scored)
    assert generation.prompt_logprobs is not None
    logits = demo.logits(prompt).astype(np.float64)[:-1]
    logits -= logits.max(1, keepdims=True)
    expected = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    assert [one.chosen for one in generation.prompt_logprobs] == pytest.approx(
        [row[token] for row, token in zip(expected, prompt[1:], strict=True)], abs=1e-4
    )
    assert [one.top[0][0] for one in generation.prompt_logprobs] == logits.argmax(1).tolist()
    plain = demo.generate(prompt, SamplingParams(max_tokens=12, **settings), "off")  # type: ignore[arg-type]
    assert generation.tokens == plain.tokens
    assert generation.logprobs == plain.logprobs
    # What is scored after being generated has the very log probabilities that it was generated with.
    again = demo.generate([*prompt, *plain.tokens], SamplingParams(max_tokens=0, logprobs=2, prompt_logprobs=True))
    assert (again.tokens, again.finish_reason) == ([], "length")
    assert again.prompt_logprobs is not None
    assert again.prompt_logprobs[-12:] == plain.logprobs


def test_a_prediction_is_drafted_from_and_does_not_show(demo: Model) -> None:
    params = SamplingParams(max_tokens=40, temperature=1.0, seed=11)
    plain = demo.generate(NINE_KINDS["story"], params, "off")
    right = demo.generate(NINE_KINDS["story"], params, 8, prediction=plain.text)
    wrong = demo.generate(NINE_KINDS["story"], params, 8, prediction=NINE_KINDS["facts"])
    assert plain.tokens == right.tokens == wrong.tokens
    assert right.stats.prompt_tokens == plain.stats.prompt_tokens
    assert right.stats.rounds < 10  # 39 tokens at up to 9 a round, and the text need not split into tokens alike
    assert wrong.stats.rounds > 2 * right.stats.rounds


def test_a_prediction_ends_where_its_tokens_are_none_of_the_models(
    demo: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = SamplingParams(max_tokens=8)
    plain = demo.generate("The capital of France is", params, "off")
    encode = demo.tokenizer.encode
    monkeypatch.setattr(
        demo.tokenizer, "encode", lambda text, **how: [*encode(text, **how), *([demo.config.vocab] * (text == "Paris"))]
    )  # as of a folder whose tokenizer has added tokens
    asked = demo.ask("The capital of France is", params, 2, prediction="Paris")
    assert asked.prediction == encode("Paris", bos=False)
    assert demo.generate("The capital of France is", params, 2, prediction="Paris").tokens == plain.tokens


def test_a_prompt_no_tokens_can_hold_is_refused_before_it_is_encoded(
    demo: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert demo.tokenizer.longest == 31
    monkeypatch.setattr(demo.tokenizer, "encode", None)
    for prompt in ("x" * (31 * demo.context + 1), [{"role": "user", "content": "x" * 31 * demo.context}]):
        with pytest.raises(PromptError, match=rf"at least \d+ tokens, more than the context of {demo.context}:"):
            demo.ask(prompt)


def test_threads_can_share_a_model(demo: Model) -> None:
    params = SamplingParams(max_tokens=24)
    kinds = {"facts": 3, "python": "auto", "story": "auto"}
    alone = [demo.generate(NINE_KINDS[kind], params, "off").tokens for kind in kinds]
    with ThreadPoolExecutor(3) as threads:
        together = [threads.submit(demo.generate, NINE_KINDS[kind], params, draft) for kind, draft in kinds.items()]
    assert [done.result().tokens for done in together] == alone


def test_a_full_context_ends_the_generation(demo: Model) -> None:
    small = Model.load("demo", context=16)
    generation = small.generate("One two three four", SamplingParams(max_tokens=100, ignore_eos=True))
    assert generation.finish_reason == "length"
    assert generation.stats.prompt_tokens + len(generation.tokens) == 17  # the last token needs no place


@pytest.mark.parametrize("draft", [-1, 33, "often"])
def test_a_draft_length_out_of_range_is_refused(demo: Model, draft: int | str) -> None:
    with pytest.raises(SettingsError, match="draft length"):
        demo.generate("x", draft=draft)


def test_tokens_outside_the_vocabulary_are_refused(demo: Model) -> None:
    with pytest.raises(PromptError, match="outside the vocabulary"):
        demo.generate([2, 262144])


def test_memory_is_given_back_after_every_generation(demo: Model) -> None:
    stream = demo.stream("Once upon a time", SamplingParams(max_tokens=64))
    next(stream)
    stream.close()
    assert demo.engine.cache.bytes_in_use == 0
    assert stream.generation.finish_reason == "cancelled"
