"""What each way of storing the demo's weights costs and loses: bytes, passes of 1 and 4 rows, perplexity, divergence.

    python benchmarks/quantisation.py [--keep DIR] [--windows N] [--repeats N] [--threads N] [--json OUT]

The reference is what the demo's file holds (Q4_K_M with an embedding of Q8_0), run in float32: there is no other
original. So "as shipped" shows what 8-bit activations and the fp16 cache lose alone, and every other row what rounding
these weights once more loses on top. Held-out text: documentation of Python's that people wrote (perplexity and
divergence), and texts that the model writes itself at temperature 1 (divergence). "Calibrated" is GPTQ as
`convert --calibrate` does it, on texts that the model wrote with other seeds. Blocks of 64 and 128 have no kernels:
their weights are rounded likewise, then run in float32, so their loss is that of rounding alone.

--keep DIR keeps what the model writes and the calibrated file, and takes them from there if they are there.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import pydoc_data.topics
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from roofline import PROMPT, seconds_of_pass, weights_read

from gemma_mtp import Model, SamplingParams
from gemma_mtp.async_engine import AsyncEngine
from gemma_mtp.checkpoints.convert import convert
from gemma_mtp.checkpoints.hub import resolve
from gemma_mtp.checkpoints.load import Checkpoint, open_checkpoint
from gemma_mtp.checkpoints.packing import read_rows
from gemma_mtp.checkpoints.rounding import ROWS_AT_ONCE, compensation, rounded
from gemma_mtp.checkpoints.tensors import MappedFile, TensorInfo
from gemma_mtp.engine.engine import Engine
from gemma_mtp.prompts import NINE_KINDS
from gemma_mtp.training.calibrate import Moments, calibrate

WRITTEN, LENGTH = 3, 400  # texts of each kind for calibration, and tokens of each
WINDOW = 256  # tokens that are scored together


@dataclass
class Subject:
    """A way of storing the weights. bits: of a weight, with its share of scales."""

    engine: Engine
    bits: float
    has_kernel: bool = True


class _InMemory(MappedFile):
    """Stands for the file of a tensor that is in none."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def release(self, start: int, length: int) -> None:
        """There are no pages of a file to let go."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=Path, metavar="DIR")
    parser.add_argument("--windows", type=int, default=6, help=f"of {WINDOW} tokens, of each held-out text (default 6)")
    parser.add_argument("--repeats", type=int, default=25)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--wide", action="store_true", help="also blocks of 64 and 128 (2.2 GB of memory more)")
    parser.add_argument("--json", type=Path, metavar="OUT")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        texts = args.keep or Path(folder)
        shipped = Model.load("demo", "none", threads=args.threads, context=2048)
        for part, seeds in (("calibration", range(WRITTEN)), ("held out", range(100, 101))):
            write_texts(shipped, texts / part, seeds)
        subjects = all_subjects(shipped.engine, texts, args.threads, args.wide)
        prose = shipped.tokenize("\n\n".join(pydoc_data.topics.topics.values()))
        own = [id for path in sorted((texts / "held out").iterdir()) for id in shipped.tokenize(path.read_text())]
    reference = Model.load("demo", "none", threads=args.threads, dtype="f32", context=2048).engine
    held_out = {"prose": windows(prose, args.windows), "own": windows(own, args.windows)}
    found = quality(reference, subjects, held_out)
    for name, seconds in costs(subjects, args.repeats).items():
        found[name] |= seconds
    print(table(found))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


def write_texts(model: Model, folder: Path, seeds: Sequence[int]) -> None:
    """What the model writes after each of the nine prompts, once for each seed, in files that are not there yet."""
    folder.mkdir(parents=True, exist_ok=True)
    asked = {folder / f"{kind}-{seed}.txt": (prompt, seed) for kind, prompt in NINE_KINDS.items() for seed in seeds}

    async def write(engine: AsyncEngine, path: Path, prompt: str, seed: int) -> None:
        params = SamplingParams(max_tokens=LENGTH, temperature=1.0, seed=seed, ignore_eos=True)
        stream = engine.submit(prompt, params)
        path.write_text(prompt + "".join([piece.text async for piece in stream]))

    async def write_all() -> None:
        async with AsyncEngine(model, parallel=16) as engine:
            new = [(path, *how) for path, how in asked.items() if not path.exists()]
            await asyncio.gather(*(write(engine, *one) for one in new))

    asyncio.run(write_all())


def all_subjects(shipped: Engine, folder: Path, threads: int, wide: bool) -> dict[str, Subject]:
    checkpoint, path = open_checkpoint(resolve("demo")), folder / "calibrated.gguf"
    moments: Moments = {}
    if wide or not path.exists():
        moments = calibrate("demo", [folder / "calibration"])
    if not path.exists():
        convert(checkpoint.path, path, "q4_0", moments=moments)
    engines = {"as shipped": shipped}
    for name, dtype in (("Q8_0", "q8_0"), ("Q4_K", "q4_k"), ("Q4_0", "q4_0")):
        engines[name] = Model.load("demo", "none", threads=threads, dtype=dtype, context=2048).engine
    engines["Q4_0 calibrated"] = Model.load(path, "none", threads=threads, context=2048).engine
    subjects = {name: Subject(engine, bits(engine)) for name, engine in engines.items()}
    for block in (64, 128) if wide else ():
        tensors = {name: blocks_of(checkpoint, name, moments.get(name), block) for name in checkpoint.weights}
        engine = Engine(checkpoint.config, tensors, threads=threads, context=2048, dtype="f32")
        subjects[f"4 bits, blocks of {block}, calibrated"] = Subject(engine, 4 + 16 / block, has_kernel=False)
    return subjects


def bits(engine: Engine) -> float:
    """Of a weight, as it lies in memory."""
    weights = [engine.weights.matrix(name) for name, tensor in engine._tensors.items() if len(tensor.shape) > 1]
    return 8 * sum(weight.nbytes for weight in weights) / sum(weight.rows * weight.cols for weight in weights)


def blocks_of(
    checkpoint: Checkpoint, name: str, moments: Sequence[NDArray[np.float32]] | None, block: int
) -> TensorInfo:
    """A tensor as float32, rounded to 4 bits with a scale for each `block` columns if it has moments."""
    tensor = checkpoint.weights[name]
    if moments is None:
        return tensor
    factors, slabs = [compensation(part) for part in moments], []
    for first in range(0, tensor.shape[0], ROWS_AT_ONCE):
        values = read_rows(tensor, first, min(ROWS_AT_ONCE, tensor.shape[0] - first))
        assert len(factors) == 1, "the demo has no matrix wider than a span"
        scales, codes = rounded(values, factors[0], block)
        slabs.append(np.repeat(scales.astype(np.float32), block, 1) * codes)
    data = np.concatenate(slabs).reshape(-1).view(np.uint8)
    return replace(tensor, type="F32", data=data, file=_InMemory(checkpoint.path))


def windows(tokens: Sequence[int], count: int) -> list[list[int]]:
    """`count` pieces of the tokens, evenly spread, each after a beginning-of-sequence token."""
    starts = np.linspace(1, len(tokens) - WINDOW, count).astype(int)
    return [[tokens[0], *tokens[start : start + WINDOW - 1]] for start in starts]


def quality(
    reference: Engine, subjects: Mapping[str, Subject], held_out: Mapping[str, list[list[int]]]
) -> dict[str, dict[str, float]]:
    surprise: dict[str, list[float]] = {name: [] for name in ("float32", *subjects)}
    divergence: dict[tuple[str, str], list[float]] = {(name, text): [] for name in subjects for text in held_out}
    for text, pieces in held_out.items():
        for piece in pieces:
            exact = log_softmax(reference.logits(piece))
            chosen = np.arange(len(piece) - 1), piece[1:]
            if text == "prose":
                surprise["float32"].append(-float(exact[:-1][chosen].mean()))
            probability = np.exp(exact)
            for name, subject in subjects.items():
                found = log_softmax(subject.engine.logits(piece))
                if text == "prose":
                    surprise[name].append(-float(found[:-1][chosen].mean()))
                found -= exact
                divergence[name, text].append(-float(np.einsum("ij,ij->i", probability, found).mean()))
    result = {"float32": {"perplexity": float(np.exp(np.mean(surprise["float32"])))}}
    for name, subject in subjects.items():
        result[name] = {
            "bits": subject.bits,
            "perplexity": float(np.exp(np.mean(surprise[name]))),
            **{f"divergence, {text}": float(np.mean(divergence[name, text])) for text in held_out},
        }
    return result


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """In place."""
    logits -= logits.max(1, keepdims=True)
    logits -= np.log(np.exp(logits).sum(1, keepdims=True, dtype=np.float64)).astype(np.float32)
    return logits


def costs(subjects: Mapping[str, Subject], repeats: int) -> dict[str, dict[str, float]]:
    """Medians of passes of 1 and 4 rows, subjects taking turns, and the bytes that one row reads."""
    tokens = np.random.default_rng(0).integers(2, 262_000, PROMPT).tolist()
    engines = {name: subject.engine for name, subject in subjects.items() if subject.has_kernel}
    sequences = {name: engine.create() for name, engine in engines.items()}
    taken: dict[tuple[str, int], list[float]] = {(name, rows): [] for name in engines for rows in (1, 4)}
    for name, engine in engines.items():
        engine.step(sequences[name], tokens, 1, SamplingParams())
    for _ in range(repeats):
        for (name, rows), seconds in taken.items():
            seconds.append(seconds_of_pass(engines[name], sequences[name], tokens[:rows]))
    medians = {key: statistics.median(seconds) for key, seconds in taken.items()}
    return {
        name: {"MB read": weights_read(engine)[0] / 1e6}
        | {f"ms, T={rows}": medians[name, rows] * 1e3 for rows in (1, 4)}
        for name, engine in engines.items()
    }


def table(found: Mapping[str, Mapping[str, float]]) -> str:
    columns = ("bits", "MB read", "ms, T=1", "ms, T=4", "perplexity", "divergence, prose", "divergence, own")
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, figures in found.items():
        digits = {"MB read": 0, "divergence, prose": 4, "divergence, own": 4}
        cells = [f"{figures[key]:.{digits.get(key, 2)}f}" if key in figures else "" for key in columns]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
