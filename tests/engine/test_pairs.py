"""Every kind of target with its drafter: drafting changes no token, whatever becomes of the drafts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from gemma_mtp import _native
from gemma_mtp.checkpoints.load import open_checkpoint
from gemma_mtp.decoding import DraftSource, FixedDepth, Progress, SamplingParams, TrainedDrafter, draft_and_verify
from gemma_mtp.decoding.drafting import Draft, Ends
from gemma_mtp.engine.engine import Engine, SequenceState
from gemma_mtp.engine.scheduler import Request, Scheduler, Update
from gemma_mtp.errors import CheckpointError

from ..checkpoints.tiny import HEADS, TARGETS, drafter_for, write_folder, write_gguf

PROMPT = np.random.default_rng(2).integers(3, 256, 50).tolist()  # past the window of 32
TOKENS = 60
WINDOW = 32
SAMPLINGS = {
    "greedy": {},
    "sampled": {"temperature": 1.0, "top_k": 40, "top_p": 0.95, "seed": 3},
    "penalised": {"temperature": 0.7, "frequency_penalty": 0.4, "logit_bias": {7: -100}, "seed": 4},
}
DRAFTERS = ("full head", "centroid head", "parallel heads")
PAIRS = [
    (kind, drafter)
    for kind, config in TARGETS.items()
    for drafter in DRAFTERS
    if drafter == "parallel heads" or "gemma4" in config["model_type"]  # Google's drafters are for Gemma 4
]


class Spelled:
    """Text is of no interest here."""

    ended = False

    def push(self, token: int) -> str:
        return ""

    def flush(self) -> str:
        return ""


class OftenRight:
    """Proposes what is to come, with a wrong token now and then; asks the engine too, so that its drafter runs."""

    def __init__(self, drafter: TrainedDrafter, text: Sequence[int]):
        self._drafter, self._text, self.name, self.free = drafter, text, "often right", False
        self._rng = np.random.default_rng(0)
        self._at = -len(PROMPT)

    def propose(self, depth: int, ends: Ends | None = None) -> Draft:
        proposed = self._drafter.propose(depth, ends)
        assert all(0 <= token < 256 for token in proposed.tokens)
        coming = list(self._text[self._at : self._at + depth])
        drafted = [token if self._rng.random() < 0.7 else (token + 1) % 256 for token in coming]
        return Draft(drafted, [0] * len(drafted))

    def advance(self, tokens: Sequence[int]) -> None:
        self._at += len(tokens)
        self._drafter.advance(tokens)


class Outcomes(Counter):
    """What became of the rounds: drafts all kept, some, none; and how many of the last two fell past the window."""

    def source(self, inner: DraftSource, start: int) -> DraftSource:
        outcomes = self

        class Watched:
            name, free = "watched", False
            drafted = 0
            at = start

            def propose(self, depth: int, ends: Ends | None = None) -> Draft:
                draft = inner.propose(depth, ends)
                self.drafted = len(draft.tokens)
                return draft

            def advance(self, tokens: Sequence[int]) -> None:
                if self.drafted:
                    kept = len(tokens) - 1
                    outcomes["all" if kept == self.drafted else "some" if kept else "none"] += 1
                    outcomes["cut past the window"] += kept < self.drafted and self.at > WINDOW + 64
                self.at += len(tokens)
                self.drafted = 0
                inner.advance(tokens)

        return Watched()


def decode(engine: Engine, params: SamplingParams, depth: int = 0, source=None) -> list[int]:
    sequence = engine.create()
    sources = [source(sequence)] if source else []
    options = {"sources": sources, "depth": FixedDepth(depth)} if depth else {}
    progress = Progress(PROMPT, params, text=Spelled(), context=engine.context, **options)
    list(draft_and_verify(engine, sequence, progress))
    engine.release(sequence)
    return progress.tokens


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory):
    made: dict[str, Path] = {}

    def folder(config) -> Path:
        key = repr(config)
        if key not in made:
            made[key] = tmp_path_factory.mktemp("model")
            write_folder(made[key], config)
        return made[key]

    return folder


@pytest.fixture(scope="module")
def quantised(tmp_path_factory: pytest.TempPathFactory, folder_of):
    """The same target as a GGUF file in Q4_0, so that integer kernels and their activations are under test."""

    def file(config) -> Path:
        checkpoint = open_checkpoint(folder_of(config))
        weights = {
            name: tensor.data.view("<f4").reshape(tensor.shape) for name, tensor in checkpoint.weights.items()
        }
        path = tmp_path_factory.mktemp("gguf") / "model.gguf"
        write_gguf(path, checkpoint.config, weights, kind="Q4_0")
        return path

    return file


def test_what_the_kernels_cannot_run_is_said(folder_of) -> None:
    target = open_checkpoint(folder_of(TARGETS["E2B"]))
    engine = Engine(target.config, target.weights, threads=1, context=64)
    odd = open_checkpoint(folder_of(drafter_for(TARGETS["E2B"], centroids=True, hidden=40)))
    with pytest.raises(CheckpointError, match="native backend cannot run this model: a norm"):
        engine.attach(odd.config, odd.weights)


@pytest.mark.parametrize(("kind", "drafter"), PAIRS)
@pytest.mark.parametrize("weights", ["float", "Q4_0"])
def test_drafting_never_changes_the_tokens(folder_of, quantised, kind: str, drafter: str, weights: str) -> None:
    target = open_checkpoint((folder_of if weights == "float" else quantised)(TARGETS[kind]))
    config = HEADS if drafter == "parallel heads" else drafter_for(TARGETS[kind], centroids=drafter == "centroid head")
    drafts = open_checkpoint(folder_of(config))
    outcomes, reference = Outcomes(), {}
    for threads in (1, 2):
        engine = Engine(target.config, target.weights, threads=threads, context=256)
        engine.attach(drafts.config, drafts.weights)
        for settings in SAMPLINGS.values():
            params = SamplingParams(max_tokens=TOKENS, **settings)

            def drafted(sequence: SequenceState, params=params, engine=engine) -> DraftSource:
                return outcomes.source(TrainedDrafter(engine, sequence, params), len(PROMPT))

            plain = decode(engine, params)
            assert plain == reference.setdefault(params.seed, plain), "another number of threads"

            def often_right(sequence: SequenceState, params=params, engine=engine, plain=plain) -> DraftSource:
                return outcomes.source(OftenRight(TrainedDrafter(engine, sequence, params), plain), len(PROMPT))

            for depth in (1, 3, 8):
                assert decode(engine, params, depth, drafted) == plain, f"{settings}, depth {depth}"
                assert decode(engine, params, depth, often_right) == plain, f"{settings}, depth {depth}, often right"
    assert min(outcomes[name] for name in ("all", "some", "none", "cut past the window")) > 5, dict(outcomes)


@pytest.mark.parametrize("drafter", DRAFTERS)
def test_a_drafter_drafts_the_same_in_passes_with_others(folder_of, drafter: str) -> None:
    target = open_checkpoint(folder_of(TARGETS["E4B"]))
    config = HEADS if drafter == "parallel heads" else drafter_for(TARGETS["E4B"], centroids=drafter == "centroid head")
    drafts = open_checkpoint(folder_of(config))
    engine = Engine(target.config, target.weights, threads=1, context=256)
    engine.attach(drafts.config, drafts.weights)
    proposed: dict[tuple[int, ...], list[int]] = {}
    draft = engine.draft

    def watched(
        sequence: SequenceState, row: int, token: int, depth: int, params: SamplingParams, ends: Ends | None
    ) -> Draft:
        made = draft(sequence, row, token, depth, params, ends)
        place = (params.seed, *sequence.tokens, token)
        common = min(len(made.tokens), len(proposed.get(place, made.tokens)))
        assert made.tokens[:common] == proposed.setdefault(place, made.tokens)[:common]
        return made

    engine.draft = watched  # type: ignore[method-assign]

    def run(count: int) -> list[list[int]]:
        """The tokens of six generations, `count` at a time."""
        told: list[list[Update]] = [[] for _ in range(6)]
        scheduler = Scheduler(engine, count)
        for i, updates in enumerate(told):
            params = SamplingParams(max_tokens=20 + i, temperature=float(i % 2), seed=i)
            scheduler.add(Request(PROMPT[: 50 - 7 * i], params, Spelled(), (), 3, updates.append))
        while scheduler.running or scheduler.waiting:
            scheduler.step()
        return [[t for update in updates for piece in update.pieces for t in piece.tokens] for updates in told]

    alone = run(1)
    places = len(proposed)
    assert run(6) == alone
    assert len(proposed) == places > 100, "other places were drafted from"


@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize("temperature", [0.0, 0.2])
def test_a_draft_ends_where_it_becomes_too_unlikely(folder_of, drafter: str, temperature: float) -> None:
    target = open_checkpoint(folder_of(TARGETS["E4B"]))
    config = HEADS if drafter == "parallel heads" else drafter_for(TARGETS["E4B"], centroids=drafter == "centroid head")
    drafts = open_checkpoint(folder_of(config))
    engine = Engine(target.config, target.weights, threads=1, context=256)
    engine.attach(drafts.config, drafts.weights)
    params = SamplingParams(temperature=temperature, seed=3)
    sequence = engine.create()
    token = engine.step(sequence, PROMPT, 1, params).tokens[0]
    whole = engine.draft(sequence, 0, token, 3, params)
    assert len(whole.tokens) == len(whole.sureness) == 3
    assert whole.left_out is None
    chances = np.linspace(0.3, 0.9, 3 * _native.SURENESS_LEVELS, dtype=np.float32).reshape(3, -1)
    together = np.cumprod([chances[depth, level] for depth, level in enumerate(whole.sureness)])
    none = np.zeros(3, np.float32)
    for kept in range(3):
        bar = np.array([0, 0, 0], np.float32)
        bar[kept] = together[kept] * 1.01
        left_out = Draft(whole.tokens[:kept], whole.sureness[: kept + 1], whole.tokens[kept])
        assert engine.draft(sequence, 0, token, 3, params, Ends(chances, bar, none)) == left_out
        assert engine.draft(sequence, 0, token, 3, params, Ends(chances, bar * 0.98, none)) == whole
        made = 3 if drafter == "parallel heads" else kept  # which are all made at once
        unmade = Draft(whole.tokens[:made], whole.sureness[:made])
        bar[kept] = (together[kept - 1] if kept else 1.0) * 1.01
        expected = unmade if kept else Draft([], [])
        assert engine.draft(sequence, 0, token, 3, params, Ends(chances, none, bar)) == expected
