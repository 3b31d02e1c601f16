"""What passes and draft steps cost."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from gemma_mtp.decoding.progress import PROMPT_CHUNK
from gemma_mtp.decoding.sampling import SamplingParams
from gemma_mtp.errors import SettingsError
from gemma_mtp.model import Model
from gemma_mtp.prompts import NINE_KINDS

PROMPT = 64  # tokens before the pass that is timed
TIMINGS = 8  # of each width, for one repeat
STRETCH = 8  # passes between those after one text and those after another
DRAFT = 4  # tokens of a draft that is timed


@dataclass(frozen=True)
class Costs:
    """Seconds of a pass by its rows, one row always among them, and of a step of the drafter (None: there is none)."""

    passes: dict[int, float]
    draft_step: float | None

    @property
    def over_one(self) -> dict[int, float]:
        """C(T)/C(1) by T."""
        return {rows: seconds / self.passes[1] for rows, seconds in self.passes.items()}

    @property
    def draft_share(self) -> float | None:
        """A step of the drafter over a pass of one row."""
        return None if self.draft_step is None else self.draft_step / self.passes[1]


def measured_text(model: Model, tokens: int) -> list[int]:
    """At least so many tokens: the nine prompts, again and again where they do not suffice."""
    ids = model.tokenize("\n\n".join(NINE_KINDS.values()))
    return ids * max(1, -(-tokens // len(ids)))


def measure_costs(model: Model, widths: Sequence[int], repeats: int) -> Costs:
    """Medians of TIMINGS * repeats, widths taking turns; of the widths (1 among them) those that the engine runs."""
    ids = measured_text(model, PROMPT)
    passes: dict[int, list[float]] = {rows: [] for rows in widths if rows <= model.engine.max_depth + 1}
    steps: list[float] = []
    with _after_prompt(model, ids[:PROMPT]) as sequence:
        for turn in range(TIMINGS * repeats + 1):
            taken = {rows: _seconds_of_pass(model, sequence, PROMPT, ids[:rows]) for rows in passes}
            step = _seconds_of_draft_step(model, sequence, ids[0]) if model.engine.drafts else None
            if turn == 0:  # in which memory is touched for the first time
                continue
            for rows, seconds in taken.items():
                passes[rows].append(seconds)
            if step is not None:
                steps.append(step)
    medians = {rows: statistics.median(seconds) for rows, seconds in passes.items()}
    return Costs(medians, statistics.median(steps) if steps else None)


def measure_after(model: Model, lengths: Sequence[int], repeats: int) -> dict[int, float]:
    """Seconds of a pass of one row after so many tokens: medians of STRETCH * TIMINGS * repeats, lengths taking turns.
    Raises SettingsError for a length that does not fit the context."""
    if lengths and max(lengths) >= model.context:
        raise SettingsError(f"A pass after {max(lengths)} tokens does not fit the context of {model.context}.")
    ids = measured_text(model, max(lengths, default=0))
    found: dict[int, list[float]] = {length: [] for length in lengths}
    with ExitStack() as stack:
        sequences = {length: stack.enter_context(_after_prompt(model, ids[:length])) for length in found}
        for _ in range(TIMINGS * repeats):
            for length, seconds in found.items():
                seconds += [_seconds_of_pass(model, sequences[length], length, ids[:1]) for _ in range(STRETCH)]
    return {length: statistics.median(seconds) for length, seconds in found.items()}


@contextmanager
def _after_prompt(model: Model, prompt: list[int]) -> Iterator[Any]:
    """A sequence of the engine's that holds a prompt."""
    sequence = model.engine.create()
    try:
        for begin in range(0, len(prompt), PROMPT_CHUNK):
            model.engine.step(sequence, prompt[begin : begin + PROMPT_CHUNK], 1, SamplingParams())
        yield sequence
    finally:
        model.engine.release(sequence)


def _seconds_of_pass(model: Model, sequence: Any, length: int, tokens: list[int]) -> float:
    """Of a pass that checks these tokens after a sequence of that length, sampling after each, as a round does."""
    start = time.perf_counter()
    model.engine.step(sequence, tokens, len(tokens), SamplingParams())
    model.engine.truncate(sequence, length)
    return time.perf_counter() - start


def _seconds_of_draft_step(model: Model, sequence: Any, token: int) -> float:
    """Of one token of a draft after the prompt."""
    start = time.perf_counter()
    drafted = model.engine.draft(sequence, 0, token, DRAFT, SamplingParams())
    return (time.perf_counter() - start) / len(drafted.tokens)
