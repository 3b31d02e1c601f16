"""What passes of several rows cost over one of one row, measured once a machine and model."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np
import platformdirs

from gemma_mtp.checkpoints.files import written_whole
from gemma_mtp.decoding.acceptance import DEPTHS
from gemma_mtp.decoding.economy import GUESSED_SHAPE, CostShape, Experts
from gemma_mtp.decoding.sampling import SamplingParams
from gemma_mtp.engine.interface import AnyEngine
from gemma_mtp.errors import CheckpointError

SECONDS = 0.2  # that measuring may take
ROUNDS = 8  # of all passes, where the time allows
STEADY = 1.5  # times the quickest pass of a kind: if half of them take longer, something else uses the machine
_WIDTHS = (1, 4, 2, 8)  # in the order of what they tell
_PROMPT = 16  # tokens

_log = logging.getLogger("gemma_mtp")


def cost_shape(engine: AnyEngine, key: str | None, folder: Path | None = None) -> CostShape:
    """What passes of up to 1 + DEPTHS rows cost: as it was measured before, or measured now and kept; a guess for a
    model whose passes are too long for that.

    key: says all that it depends on; None: it is not to be kept. folder: by default in the user's cache folder. Where
    it cannot be kept, the log says so.
    """
    path = (folder or platformdirs.user_cache_path("gemma-mtp") / "costs") / f"{key}.json" if key is not None else None
    if path and (kept := _read(path)) is not None:
        return kept
    measured = measured_shape(engine)
    if measured is None:
        return GUESSED_SHAPE
    if path and measured.lasts:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with written_whole(path) as out:
                out.write(json.dumps(measured.shape._asdict()).encode())
        except (OSError, CheckpointError) as fault:
            _log.warning("What passes cost is measured again at the next start: %s", fault)
    return measured.shape


class Measured(NamedTuple):
    shape: CostShape
    lasts: bool
    """Whether later starts can rely on it: passes of a kind took about as long as each other, and all kinds ran."""


class _Kind(NamedTuple):
    """Of passes: their rows, whether all are of one token, and whether a prompt's tokens come before them."""

    rows: int
    alike: bool = False
    after_prompt: bool = False


def measured_shape(engine: AnyEngine, seconds: float = SECONDS) -> Measured | None:
    """What passes of up to 1 + DEPTHS rows cost, the widths between those measured by interpolation; None where two
    widths cannot be measured in the time.

    The quickest of each kind of pass counts: what else the machine does makes passes longer, never shorter. Tokens are
    random, so that further rows wake as many experts as they can. What one expert costs is told by passes of as many
    rows with one token over and over, which wake fewer.
    """
    tokens = np.random.default_rng(0).integers(engine.config.vocab, size=1 + _PROMPT + max(_WIDTHS)).tolist()
    taken: dict[_Kind, list[float]] = {}
    read: dict[_Kind, int] = {}  # experts
    sequence, params = engine.create(), SamplingParams()
    kinds = [_Kind(rows) for rows in _WIDTHS if rows <= engine.max_depth + 1]
    if any(layer.experts for layer in engine.config.layers):
        kinds.insert(2, _Kind(kinds[1].rows, alike=True))
    kinds.append(_Kind(1, after_prompt=True))
    fitting = [kind for kind in kinds if 1 + kind.rows + kind.after_prompt * _PROMPT <= engine.context]
    try:
        start = time.perf_counter()
        engine.step(sequence, tokens[:1], 1, params)  # which finds its memory, and counts for nothing
        if (now := time.perf_counter()) - start > seconds:
            return None
        end = now + seconds
        for kind in ROUNDS * fitting:
            count = kind.rows + kind.after_prompt * _PROMPT
            known = min(taken.get(kind) or [(1 + count / 8) * seconds for seconds in taken.get(_Kind(1), [0.0])])
            if time.perf_counter() + known > end:
                break
            engine.truncate(sequence, 1)
            start = time.perf_counter()
            run = count * tokens[1:2] if kind.alike else tokens[1 : 1 + count]
            found = engine.step(sequence, run, kind.rows, params)
            taken.setdefault(kind, []).append(time.perf_counter() - start)
            read[kind] = found.experts
    finally:
        engine.release(sequence)
    quickest = {kind: min(of) for kind, of in taken.items()}
    one = quickest.get(_Kind(1), 0.0)
    widths = {kind.rows: of for kind, of in quickest.items() if kind == _Kind(kind.rows)}
    if len(widths) < 2:
        return None
    shape = CostShape(_interpolated({rows: of / one for rows, of in widths.items()}))
    for kind, of in quickest.items():
        if kind.after_prompt:
            shape = shape._replace(prompt=round(max(0.0, of - one) / one / _PROMPT, 4))
        elif kind.alike:
            fewer = read[_Kind(kind.rows)] - read[kind]
            each = max(0.0, (widths[kind.rows] - of) / one / fewer) if fewer > 0 else 0.0
            shape = shape._replace(experts=Experts(_interpolated({w: float(read[_Kind(w)]) for w in widths}), each))
    steady = all(median(of) < STEADY * quickest[kind] for kind, of in taken.items())
    return Measured(shape, steady and fitting == kinds)


def _interpolated(measured: dict[int, float]) -> list[float]:
    """At 1 to 1 + DEPTHS rows, never falling: on lines between those measured, and on the last line beyond."""
    widths = sorted(measured)
    values = np.maximum.accumulate([measured[rows] for rows in widths])
    inside = np.interp(np.arange(1, 2 + DEPTHS), widths, values)
    slope = (values[-1] - values[-2]) / (widths[-1] - widths[-2])
    beyond = np.maximum(0, np.arange(1, 2 + DEPTHS) - widths[-1])
    return [round(float(value), 4) for value in inside + slope * beyond]


def _read(path: Path) -> CostShape | None:
    """What was kept; None if nothing was, or nothing that makes sense."""
    try:
        kept = json.loads(path.read_text())
        rows, experts, prompt = kept["rows"], kept["experts"], kept["prompt"]
        read, each = experts or ([0.0] * len(rows), 0.0)
    except (OSError, ValueError, TypeError, KeyError):
        return None
    numbers = [*rows, *read, each, prompt or 0.0]
    if len(rows) != 1 + DEPTHS or len(read) != len(rows) or not all(isinstance(one, float) for one in numbers):
        return None
    if not all(1 <= ratio < 100 for ratio in rows) or not all(0 <= count < 1e6 for count in read) or not 0 <= each < 1:
        return None
    if not 0 <= (prompt or 0.0) < 100:
        return None
    return CostShape(rows, Experts(read, each) if experts else None, prompt)
