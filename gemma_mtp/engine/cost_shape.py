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
from gemma_mtp.decoding.economy import GUESSED_SHAPE
from gemma_mtp.decoding.sampling import SamplingParams
from gemma_mtp.engine.interface import AnyEngine

SECONDS = 0.2  # that measuring may take
ROUNDS = 8  # of all widths, where the time allows
_WIDTHS = (1, 4, 2, 8)  # in the order of what they tell

_log = logging.getLogger("gemma_mtp")


def cost_shape(engine: AnyEngine, key: str | None, folder: Path | None = None) -> list[float]:
    """C(T)/C(1) for T = 1 to 1 + DEPTHS: as it was measured before, or measured now and kept; a guess for a model whose
    passes are too long for that.

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
            out.write(json.dumps([round(ratio, 4) for ratio in shape]).encode())
    except OSError as fault:
        _log.warning("What passes cost is measured again at the next start: %s", fault)
    return shape


def measured_shape(engine: AnyEngine, seconds: float = SECONDS) -> list[float] | None:
    """C(T)/C(1) for T = 1 to 1 + DEPTHS, the widths between those measured by interpolation; None where two widths
    cannot be measured in the time."""
    tokens = np.random.default_rng(0).integers(engine.config.vocab, size=1 + max(_WIDTHS)).tolist()
    taken: dict[int, list[float]] = {}
    sequence, params = engine.create(), SamplingParams()
    end = time.perf_counter() + seconds
    try:
        engine.step(sequence, tokens[:1], 1, params)  # which finds its memory, and counts for nothing
        for _ in range(ROUNDS):
            for rows in _WIDTHS:
                expected = median(taken[rows]) if rows in taken else median(taken.get(1, [0.0])) * (1 + rows / 8)
                if rows > engine.max_depth + 1:
                    continue
                if time.perf_counter() + expected > end:
                    return _interpolated({rows: median(of) for rows, of in taken.items()})
                engine.truncate(sequence, 1)
                start = time.perf_counter()
                engine.step(sequence, tokens[1 : 1 + rows], rows, params)
                taken.setdefault(rows, []).append(time.perf_counter() - start)
        return _interpolated({rows: median(of) for rows, of in taken.items()})
    finally:
        engine.release(sequence)


def _interpolated(seconds: dict[int, float]) -> list[float] | None:
    widths = sorted(seconds)
    if len(widths) < 2:
        return None
    ratios = np.maximum.accumulate([seconds[rows] / seconds[1] for rows in widths])
    inside = np.interp(np.arange(1, 2 + DEPTHS), widths, ratios)
    slope = (ratios[-1] - ratios[-2]) / (widths[-1] - widths[-2])
    beyond = np.maximum(0, np.arange(1, 2 + DEPTHS) - widths[-1])
    return [float(ratio) for ratio in inside + slope * beyond]


def _read(path: Path) -> list[float] | None:
    """What was kept; None if nothing was, or nothing that makes sense."""
    try:
        kept = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    sensible = isinstance(kept, list) and len(kept) == 1 + DEPTHS
    return kept if sensible and all(isinstance(ratio, float) and 1 <= ratio < 100 for ratio in kept) else None
