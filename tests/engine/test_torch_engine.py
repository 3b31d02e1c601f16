"""The PyTorch engine: the same bits whatever rows share a pass, the same tokens whatever is drafted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gemma_mtp import PairError, PromptError, SamplingParams, SettingsError, _native
from gemma_mtp.checkpoints.load import open_checkpoint
from gemma_mtp.decoding import DraftSource, FixedDepth, Progress, TrainedDrafter, draft_and_verify
from gemma_mtp.decoding.depth import Round
from gemma_mtp.decoding.drafting import Draft, Ends
from gemma_mtp.engine.torch_engine import TorchEngine, TorchSequence

from ..checkpoints.tiny import TARGETS, Weights, drafter_for, write_folder
from ..decoding.fake_target import FakeText, OracleDrafts

pytestmark = pytest.mark.usefixtures("one_torch_thread")
GREEDY = SamplingParams()
SETTINGS = {
    "greedy": {},
    "sampled": {"temperature": 1.0, "seed": 7, "repetition_penalty": 1.2},
    "penalised": {"temperature": 0.5, "presence_penalty": 0.5, "frequency_penalty": -0.7, "logit_bias": {9: -100}},
}
HEADS = {
    "model_type": "gemma_mtp_heads",
    "backbone_hidden_size": 64,
    "vocab_size": 256,
    "num_heads": 3,
    "intermediate_size": 40,
}
ASSISTANTS = {kind: drafter_for(TARGETS[kind], centroids=True) for kind in ("E2B", "E4B", "26B-A4B")}
TOKENS = np.random.default_rng(5).integers(3, 256, 120).tolist()


@pytest.fixture(scope="module")
def engine_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], TorchEngine]:
    engines: dict[str, TorchEngine] = {}

    def engine(kind: str) -> TorchEngine:
        if kind not in engines:
            path = tmp_path_factory.mktemp("model")
            write_folder(path, TARGETS[kind])
            checkpoint = open_checkpoint(path)
            engines[kind] = TorchEngine(checkpoint.config, checkpoint.weights, context=256, device="cpu")
        return engines[kind]

    return engine


def attach(engine: TorchEngine, path: Path, config: dict[str, Any]) -> Weights:
    weights = write_folder(path, config)
    checkpoint = open_checkpoint(path)
    engine.attach(checkpoint.config, checkpoint.weights)
    return weights


def started(engine: TorchEngine, tokens: Sequence[int]) -> TorchSequence:
    sequence = engine.create()
    engine.step(sequence, tokens, 1, GREEDY)
    return sequence


@pytest.mark.parametrize(("kind", "threads"), [*((kind, 1) for kind in TARGETS), ("E2B", 2), ("26B-A4B", 2)])
def test_rows_alone_and_together_give_the_same_bits(engine_of: Callable, kind: str, threads: int) -> None:
    torch.set_num_threads(threads)  # the fixture takes it back
    engine = engine_of(kind)
    prompt, coming = TOKENS[:50], TOKENS[50:66]
    alone, sequence = [], started(engine, prompt)
    for token in coming:
        engine.step(sequence, [token], 1, GREEDY)
        alone.append((engine.last_logits()[0], sequence.hidden[0].numpy()))
    for count in (2, 5, 16):
        sequence = started(engine, prompt)
        for start in range(0, len(coming), count):
            part = coming[start : start + count]
            engine.step(sequence, part, len(part), GREEDY)
            for row in range(len(part)):
                assert np.array_equal(engine.last_logits()[row], alone[start + row][0]), f"row {row} of {count}"
                assert np.array_equal(sequence.hidden[row].numpy(), alone[start + row][1])


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("inputs", "outputs"), [(640, 2048), (2048, 640), (640, 16384), (1000, 24)])
def test_products_of_16_rows_give_a_row_the_same_bits_in_every_place(
    inputs: int, outputs: int, dtype: torch.dtype, threads: int
) -> None:
    """What the engine builds on, at sizes of real models."""
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(outputs, inputs, generator=generator).to(dtype)
    x = torch.randn(16, inputs, generator=generator).to(dtype)
    together = torch.nn.functional.linear(x, weight)
    for row in range(16):
        padded = torch.zeros_like(x)
        padded[0] = x[row]
        assert torch.equal(torch.nn.functional.linear(padded, weight)[0], together[row]), f"row {row}"


@pytest.mark.parametrize("kind", ["E2B", "26B-A4B"])
def test_half_precision_keeps_near_and_rows_apart(engine_of: Callable, tmp_path: Path, kind: str) -> None:
    write_folder(tmp_path, TARGETS[kind])
    checkpoint = open_checkpoint(tmp_path)
    engine = TorchEngine(checkpoint.config, checkpoint.weights, context=256, dtype="bf16", device="cpu")
    exact = engine_of(kind).logits(TOKENS[:60])
    # The median, because a few rows' experts change with the rounding.
    assert np.median(np.abs(engine.logits(TOKENS[:60]) - exact)) < 0.1 * exact.std()
    sequence = started(engine, TOKENS[:40])
    engine.step(sequence, TOKENS[40:48], 8, GREEDY)
    together = engine.last_logits()
    engine.truncate(sequence, 40)
    for row in range(8):
        engine.step(sequence, TOKENS[40 + row : 41 + row], 1, GREEDY)
        assert np.array_equal(engine.last_logits()[0], together[row])


@pytest.mark.parametrize("kind", TARGETS)
def test_a_truncated_sequence_goes_on_as_if_never_drafted(engine_of: Callable, kind: str) -> None:
    engine = engine_of(kind)
    plain, drafted = started(engine, TOKENS[:60]), started(engine, TOKENS[:60])  # past the window of 32
    for start in range(60, 100, 4):
        engine.step(plain, TOKENS[start : start + 4], 4, GREEDY)
        expected = engine.last_logits()
        engine.step(drafted, [*TOKENS[start : start + 4], 9, 8, 7, 6, 5, 4, 3], 11, GREEDY)
        assert np.array_equal(engine.last_logits()[:4], expected)
        engine.truncate(drafted, start + 4)
    assert drafted.tokens == plain.tokens


class Counting(FixedDepth):
    """A fixed depth that counts what became of the drafts."""

    def __init__(self, depth: int, outcomes: dict[str, int]):
        super().__init__(depth)
        self.outcomes = outcomes

    def update(self, done: Round) -> None:
        if done.drafted:
            outcome = "accepted" if done.accepted == done.drafted else "partly" if done.accepted else "rejected"
            self.outcomes[outcome] += 1


def generate(
    engine: TorchEngine,
    params: SamplingParams,
    source: Callable[[TorchSequence], DraftSource] | None = None,
    depth: FixedDepth | None = None,
) -> list[int]:
    sequence = engine.create()
    progress = Progress(
        TOKENS[:40],
        params,
        text=FakeText(),
        context=engine.context,
        sources=[source(sequence)] if source else [],
        depth=depth,
    )
    list(draft_and_verify(engine, sequence, progress))
    return progress.tokens


def test_log_probabilities_of_a_prompt_are_those_it_is_generated_with(engine_of: Callable[[str], TorchEngine]) -> None:
    engine = engine_of("gemma3")
    params = SamplingParams(temperature=1.0, seed=2, logprobs=3)
    alone, scored = engine.create(), engine.create()
    one_by_one = [engine.step(alone, [token], 1, params) for token in TOKENS[:12]]
    # What was sampled after each token is given as what follows it.
    together = engine.step(scored, TOKENS[:12], 12, params, 12, [rows.tokens[0] for rows in one_by_one])
    assert together.logprobs == [row for rows in one_by_one for row in rows.logprobs or ()]


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("kind", ["gemma3", "E4B", "26B-A4B"])
def test_drafting_never_changes_the_tokens(engine_of: Callable, tmp_path: Path, kind: str, settings: str) -> None:
    engine = engine_of(kind)
    params = SamplingParams(max_tokens=48, **SETTINGS[settings])
    plain = generate(engine, params)
    attach(engine, tmp_path, HEADS if kind == "gemma3" else ASSISTANTS[kind])
    outcomes = dict.fromkeys(("accepted", "partly", "rejected"), 0)
    for depth in (1, 4, engine.max_depth):
        control = Counting(depth, outcomes)
        assert generate(engine, params, lambda _: OracleDrafts(TOKENS[:40], plain, right=0.75), control) == plain
        of_drafter = Counting(depth, dict.fromkeys(outcomes, 0))
        assert generate(engine, params, lambda s: TrainedDrafter(engine, s, params), of_drafter) == plain
        assert of_drafter.outcomes["rejected"] > 0  # a random drafter is nearly always wrong
    print(kind, settings, outcomes)
    assert all(outcomes.values()), outcomes


@pytest.mark.parametrize("config", [ASSISTANTS["E2B"], HEADS], ids=["assistant", "heads"])
def test_drafts_share_the_noise_of_the_places_they_are_for(
    engine_of: Callable, tmp_path: Path, config: dict[str, Any]
) -> None:
    engine = engine_of("E2B")
    attach(engine, tmp_path, config)
    params = SamplingParams(temperature=1.3, seed=11, repetition_penalty=1.5)
    sequence = started(engine, TOKENS[:60])
    drafts = engine.draft(sequence, 0, TOKENS[60], 3, params)
    logits, _ = engine.last_draft()
    expected: list[int] = []
    for i, row in enumerate(logits):
        sampled = _native.Sampler().sample(
            row,
            61 + i,
            temperature=1.3,
            seed=11,
            repetition_penalty=1.5,
            seen=TOKENS[:61],
            drafted=expected,
        )
        expected.append(sampled[0])
    assert drafts.tokens == expected
    assert len(set(drafts.tokens)) > 1


@pytest.mark.parametrize("config", [ASSISTANTS["E4B"], HEADS], ids=["assistant", "heads"])
def test_a_draft_goes_on_from_the_row_that_chose_the_newest_token(
    engine_of: Callable, tmp_path: Path, config: dict[str, Any]
) -> None:
    engine = engine_of("E4B")
    attach(engine, tmp_path, config)
    plain = started(engine, TOKENS[:60])
    for token in TOKENS[60:63]:
        engine.step(plain, [token], 1, GREEDY)
    engine.draft(plain, 0, TOKENS[63], 3, GREEDY)
    verified = started(engine, TOKENS[:60])
    engine.step(verified, [*TOKENS[60:63], 5, 6], 5, GREEDY)
    engine.truncate(verified, 63)
    expected = engine.last_draft()
    engine.draft(verified, 2, TOKENS[63], 3, GREEDY)
    for found, wanted in zip(engine.last_draft(), expected, strict=True):
        assert np.array_equal(found, wanted)


def test_interleaved_sequences_draft_from_their_own_states(engine_of: Callable, tmp_path: Path) -> None:
    engine = engine_of("E4B")
    attach(engine, tmp_path, ASSISTANTS["E4B"])
    sequence = started(engine, TOKENS[:60])
    expected = engine.draft(sequence, 0, TOKENS[60], 4, GREEDY)
    other = started(engine, TOKENS[7:70])
    assert engine.draft(other, 0, TOKENS[70], 4, GREEDY) != expected
    assert engine.draft(sequence, 0, TOKENS[60], 4, GREEDY) == expected


@pytest.mark.parametrize("config", [ASSISTANTS["E4B"], HEADS], ids=["assistant", "heads"])
def test_a_draft_ends_where_it_becomes_too_unlikely(
    engine_of: Callable, tmp_path: Path, config: dict[str, Any]
) -> None:
    engine = engine_of("E4B")
    attach(engine, tmp_path, config)
    sequence = started(engine, TOKENS[:60])
    whole = engine.draft(sequence, 0, TOKENS[60], 3, GREEDY)
    logits, _ = engine.last_draft()
    likely = [np.exp(row.max() - np.logaddexp.reduce(row.astype(np.float64))) for row in logits]
    assert whole.sureness == [_native.sureness(probability) for probability in likely]
    chances = np.linspace(0.3, 0.9, 3 * _native.SURENESS_LEVELS, dtype=np.float32).reshape(3, -1)
    together = np.cumprod([chances[depth, level] for depth, level in enumerate(whole.sureness)])
    none = np.zeros(3, np.float32)
    for kept in range(3):
        bar = none.copy()
        bar[kept] = together[kept] * 1.01
        left_out = Draft(whole.tokens[:kept], whole.sureness[: kept + 1], whole.tokens[kept])
        assert engine.draft(sequence, 0, TOKENS[60], 3, GREEDY, Ends(chances, bar, none)) == left_out
    if config is not HEADS:  # heads are made all at once
        bar[2] = together[1] * 1.01
        unmade = Draft(whole.tokens[:2], whole.sureness[:2])
        assert engine.draft(sequence, 0, TOKENS[60], 3, GREEDY, Ends(chances, none, bar)) == unmade


@pytest.mark.parametrize("head", [{}, {"num_centroids": 64, "centroid_intermediate_top_k": 32}], ids=len)
def test_parallel_heads_score_with_the_targets_embedding(
    engine_of: Callable, tmp_path: Path, head: dict[str, Any]
) -> None:
    engine = engine_of("gemma3")
    weights = attach(engine, tmp_path, {**HEADS, **head})
    sequence = started(engine, TOKENS[:60])
    state = engine.hidden(TOKENS[:60])[-1].astype(np.float64)
    embed = engine.weights["embed"].numpy()

    def norm(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        return x / np.sqrt((x * x).mean() + 1e-6) * weight

    def gelu(x: np.ndarray) -> np.ndarray:
        return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))

    drafts = engine.draft(sequence, 0, TOKENS[60], 2, GREEDY)
    logits, _ = engine.last_draft()
    assert len(drafts.tokens) == 2
    for i, found in enumerate(logits):
        y = norm(state, weights[f"{i}.ffn_norm"])
        y = weights[f"{i}.down"] @ (gelu(weights[f"{i}.gate"] @ y) * (weights[f"{i}.up"] @ y))
        y = norm(state + y, weights[f"{i}.head_norm"])
        expected = embed @ y
        if head:
            best = np.argsort(weights["centroids"] @ y)[-32:]
            tokens = weights["token_ordering"].reshape(64, -1)[best].reshape(-1)
            left_out = np.delete(np.arange(256), tokens)
            assert (found[left_out] == -np.inf).all()
            expected[left_out] = -np.inf
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
        assert drafts.tokens[i] == expected.argmax()


def test_mistakes_are_told_in_sentences(engine_of: Callable, tmp_path: Path) -> None:
    engine = engine_of("E2B")
    with pytest.raises(PromptError, match="token 256 is outside the vocabulary of 256"):
        engine.step(engine.create(), [5, 256], 1, GREEDY)
    with pytest.raises(PromptError, match="context of 256 tokens is full"):
        engine.step(started(engine, [5] * 256), [5], 1, GREEDY)
    with pytest.raises(PairError, match="hidden size 32"):
        attach(engine, tmp_path, {**ASSISTANTS["E2B"], "backbone_hidden_size": 32})
    if not torch.cuda.is_available():
        checkpoint = open_checkpoint(tmp_path)
        with pytest.raises(SettingsError, match="'cuda', which PyTorch does not find"):
            TorchEngine(engine.config, checkpoint.weights, context=8, device="cuda")
