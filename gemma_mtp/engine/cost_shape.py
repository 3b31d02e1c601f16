"""What passes of several rows cost over one of one row, measured once a machine and model."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from statistics import median

import numpy as np
import platformdirs

from gemma_mtp.checkpoints.files import written_whole
from gemma_mtp.decoding.acceptance import DEPTHS
from gemma_mtp.decoding.economy import GUESSED_SHAPE, CostShape, Experts
from gemma_mtp.decoding.sampling import SamplingParams
from gemma_mtp.engine.interface import AnyEngine

SECONDS = 0.2  # that measuring may take
ROUNDS = 8  # of all widths, where the time allows
_WIDTHS = (1, 4, 2, 8)  # in the order of what they tell

_log = logging.getLogger("gemma_mtp")


def cost_shape(engine: AnyEngine, key: str | None, folder: Path | None = None) -> CostShape:
    """What passes of up to 1 + DEPTHS rows cost: as it was measured before, or measured now and kept; a guess for a
    model whose passes are too long for that.

    key: says all that it depends on; None: it is not to be kept. folder: by default in the user's cache folder. Where
    it cannot be kept, the log says so.
    """
    if key is None:
        return measured_shape(engine) or GUESSED_SHAPE
    path = (folder or platformdirs.user_cache_path("gemma-mtp") / "costs") / f"{key}.json"
    if (kept := _read(path)) is not None:
        return kept
    shape = measured_shape(engine)
    if shape is None:
        return GUESSED_SHAPE
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(path) as out:
            out.write(json.dumps({"rows": shape.rows, "experts": shape.experts}).encode())
    except OSError as fault:
        _log.warning("What passes cost is measured again at the next start: %s", fault)
    return shape


def measured_shape(engine: AnyEngine, seconds: float = SECONDS) -> CostShape | None:
    """What passes of up to 1 + DEPTHS rows cost, the widths between those measured by interpolation; None where two
    widths cannot be measured in the time.

    Tokens are random, so that further rows wake as many experts as they can. What one expert costs is told by passes of
    as many rows with one token over and over, which wake fewer.
    """
    tokens = np.random.default_rng(0).integers(engine.config.vocab, size=1 + max(_WIDTHS)).tolist()
    taken: dict[tuple[int, bool], list[float]] = {}  # by rows, and whether they are of one token
    read: dict[tuple[int, bool], int] = {}  # experts
    sequence, params = engine.create(), SamplingParams()
    end = time.perf_counter() + seconds
    passes = [(rows, False) for rows in _WIDTHS if rows <= engine.max_depth + 1]
    if any(layer.experts for layer in engine.config.layers):
        passes.insert(2, (passes[1][0], True))
    try:
        engine.step(sequence, tokens[:1], 1, params)  # which finds its memory, and counts for nothing
        for rows, alike in ROUNDS * passes:
            known = taken.get((rows, alike)) or [(1 + rows / 8) * seconds for seconds in taken.get((1, False), [0.0])]
            if time.perf_counter() + median(known) > end:
                break
            engine.truncate(sequence, 1)
            start = time.perf_counter()
            found = engine.step(sequence, rows * tokens[1:2] if alike else tokens[1 : 1 + rows], rows, params)
            taken.setdefault((rows, alike), []).append(time.perf_counter() - start)
            read[rows, alike] = found.experts
    finally:
        engine.release(sequence)
    widths = {rows: median(of) for (rows, alike), of in taken.items() if not alike}
    if len(widths) < 2:
        return None
    shape = CostShape(_interpolated({rows: took / widths[1] for rows, took in widths.items()}))
    for rows in (rows for rows, alike in taken if alike):
        fewer = read[rows, False] - read[rows, True]
        cost = (widths[rows] - median(taken[rows, True])) / widths[1]
        each = max(0.0, cost / fewer) if fewer > 0 else 0.0
        shape = shape._replace(experts=Experts(_interpolated({w: float(read[w, False]) for w in widths}), each))
    return shape


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
        rows, experts = kept["rows"], kept["experts"]
        read, each = experts or ([0.0] * len(rows), 0.0)
    except (OSError, ValueError, TypeError, KeyError):
        return None
    numbers = [*rows, *read, each]
    if len(rows) != 1 + DEPTHS or len(read) != len(rows) or not all(isinstance(one, float) for one in numbers):
        return None
    if not all(1 <= ratio < 100 for ratio in rows) or not all(0 <= count < 1e6 for count in read) or not 0 <= each < 1:
        return None
    return CostShape(rows, Experts(read, each) if experts else None)
