"""What each way of storing a model's weights costs and loses: bytes, passes of 1 and 4 rows, perplexity, divergence.

    python benchmarks/quantisation.py [--model MODEL] [--data PATH...] [--windows N] [--repeats N] [--json OUT]

The reference is what the model's file holds, run in float32. The demo's is Q4_K_M with an embedding of Q8_0: there is
no other original, so its "as shipped" shows what 8-bit activations and the fp16 cache lose alone, and every other row
what rounding these weights once more loses on top. "Calibrated" is GPTQ as `convert --calibrate` does it. Texts are the
data (Python's library by default), most of it for calibration and some held out, by the names of the files; and, for
what calibration has not seen the like of, documentation of Python's in English prose. Perplexity and mean divergence
(KL, in nats a token, from the reference to the row) are of both held-out texts.

--wide adds 4 bits in blocks of 64 and 128 (narrower where these do not divide a row), for which there are no kernels:
weights are rounded likewise, then run in float32, so that their loss is that of rounding alone.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
from numpy.typing import NDArray
from roofline import PROMPT, seconds_of_pass, weights_read

from gemma_mtp import Model, SamplingParams
from gemma_mtp.checkpoints.convert import convert
from gemma_mtp.checkpoints.hub import resolve
from gemma_mtp.checkpoints.load import Checkpoint, open_checkpoint
from gemma_mtp.checkpoints.packing import read_rows
from gemma_mtp.checkpoints.rounding import ROWS_AT_ONCE, compensation, rounded
from gemma_mtp.checkpoints.tensors import MappedFile, TensorInfo
from gemma_mtp.engine.engine import Engine
from gemma_mtp.loading import tokenizer_of
from gemma_mtp.training.calibrate import Moments, input_moments, windows_of
from gemma_mtp.training.data import python_library, read_texts, split, token_stream

SOME = 40  # files of the data for calibration, and of those held out
CONTEXT = 512
TEXTS = ("data", "prose")
WINDOW = 256  # tokens that are scored together


class _InMemory(MappedFile):
    """Stands for the file of a tensor that is in none."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def release(self, start: int, length: int) -> None:
        """There are no pages of a file to let go."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--data", type=Path, nargs="+", metavar="PATH")
    parser.add_argument("--windows", type=int, default=8, help=f"of {WINDOW} tokens, of each held-out text (default 8)")
    parser.add_argument("--repeats", type=int, default=25)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--wide", action="store_true", help="also blocks of 64 and 128, in float32")
    parser.add_argument("--json", type=Path, metavar="OUT")
    args = parser.parse_args()
    checkpoint = open_checkpoint(resolve(args.model))
    seen, held_out = split(read_texts(args.data) if args.data else python_library())
    encode = partial(tokenizer_of(checkpoint).encode, bos=False)
    bos, end = checkpoint.config.bos, checkpoint.config.eos[0]
    rng = np.random.default_rng(0)
    some = [token_stream(rng.permutation(texts)[:SOME], encode, end) for texts in (seen, held_out)]
    moments = input_moments(checkpoint.config, checkpoint.weights, windows_of(some[0], bos))
    prose = np.array(encode("\n\n".join(topics.values())))
    texts = {"data": windows(some[1], bos, args.windows), "prose": windows(prose, bos, args.windows)}
    load = partial(Model.load, drafter="none", threads=args.threads, context=CONTEXT)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "calibrated.gguf"
        convert(checkpoint.path, path, "q4_0", moments=moments)
        engines = {"as shipped": load(args.model).engine}
        for name, dtype in (("Q8_0", "q8_0"), ("Q4_K", "q4_k"), ("Q4_0", "q4_0")):
            engines[name] = load(args.model, dtype=dtype).engine
        engines["Q4_0 calibrated"] = load(path).engine
    found = {name: sizes(engine) for name, engine in engines.items()}
    for name, seconds in costs(engines, texts["prose"][0][:PROMPT], args.repeats).items():
        found[name] |= seconds
    for block in (64, 128) if args.wide else ():
        name = f"4 bits, blocks of {block}, calibrated"
        engines[name] = in_float32(checkpoint, moments, block, args.threads)
        found[name] = {"bits": bits_of_blocks(checkpoint, moments, block)}
    reference = load(args.model, dtype="f32").engine
    for name, losses in quality(reference, engines, texts).items():
        found[name] = found.get(name, {}) | losses
    print(table(found))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


def in_float32(checkpoint: Checkpoint, moments: Moments, block: int, threads: int) -> Engine:
    """The model with the matrices of 4 bits that have blocks of `fitting` columns."""
    tensors = {
        name: blocks_of(checkpoint, name, moments.get(name), fitting(block, tensor))
        for name, tensor in checkpoint.weights.items()
    }
    return Engine(checkpoint.config, tensors, threads=threads, context=CONTEXT, dtype="f32")


def fitting(block: int, tensor: TensorInfo) -> int:
    """The widest block up to `block` that divides a row of the tensor."""
    return math.gcd(block, tensor.shape[-1])


def bits_of_blocks(checkpoint: Checkpoint, moments: Moments, block: int) -> float:
    """Of a weight, with its share of an fp16 scale."""
    tensors = [checkpoint.weights[name] for name in moments]
    counts = [math.prod(tensor.shape) for tensor in tensors]
    scales = sum(count / fitting(block, tensor) for count, tensor in zip(counts, tensors, strict=True))
    return 4 + 16 * scales / sum(counts)


def sizes(engine: Engine) -> dict[str, float]:
    """Bits of a weight as it lies in memory, and the megabytes that a pass of one row reads."""
    read, macs = weights_read(engine)
    return {"bits": 8 * read / sum(macs.values()), "MB read": read / 1e6}


def blocks_of(
    checkpoint: Checkpoint, name: str, moments: Sequence[NDArray[np.float32]] | None, block: int
) -> TensorInfo:
    """A tensor as float32; one that has moments rounded to 4 bits with a scale for each `block` columns."""
    tensor = checkpoint.weights[name]
    if moments is None:
        return tensor
    factors, slabs = [compensation(part) for part in moments], []
    for first in range(0, tensor.shape[0], ROWS_AT_ONCE):
        values = read_rows(tensor, first, min(ROWS_AT_ONCE, tensor.shape[0] - first))
        assert len(factors) == 1, "no matrix is wider than a span"
        scales, codes = rounded(values, factors[0], block)
        slabs.append(np.repeat(scales.astype(np.float32), block, 1) * codes)
    data = np.concatenate(slabs).reshape(-1).view(np.uint8)
    return replace(tensor, type="F32", data=data, file=_InMemory(checkpoint.path))


def windows(tokens: NDArray[np.int_], bos: int, count: int) -> list[list[int]]:
    """`count` pieces of the tokens, evenly spread, each after a beginning-of-sequence token."""
    starts = np.linspace(0, len(tokens) - WINDOW, count).astype(int)
    return [[bos, *tokens[start : start + WINDOW - 1].tolist()] for start in starts]


def quality(
    reference: Engine, engines: Mapping[str, Engine], texts: Mapping[str, list[list[int]]]
) -> dict[str, dict[str, float]]:
    losses: dict[tuple[str, str], list[float]] = defaultdict(list)
    for text, pieces in texts.items():
        for piece in pieces:
            exact = log_softmax(reference.logits(piece))
            probability, following = np.exp(exact), (np.arange(len(piece) - 1), piece[1:])
            losses["float32", f"perplexity, {text}"].append(-float(exact[following].mean()))
            for name, engine in engines.items():
                found = log_softmax(engine.logits(piece))
                losses[name, f"perplexity, {text}"].append(-float(found[following].mean()))
                found -= exact
                losses[name, f"divergence, {text}"].append(-float(np.einsum("ij,ij->i", probability, found).mean()))
    result: dict[str, dict[str, float]] = defaultdict(dict)
    for (name, what), values in losses.items():
        mean = float(np.mean(values))
        result[name][what] = float(np.exp(mean)) if what.startswith("perplexity") else mean
    return result


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """In place."""
    logits -= logits.max(1, keepdims=True)
    logits -= np.log(np.exp(logits).sum(1, keepdims=True, dtype=np.float64)).astype(np.float32)
    return logits


def costs(engines: Mapping[str, Engine], text: Sequence[int], repeats: int) -> dict[str, dict[str, float]]:
    """Medians of passes of 1 and 4 rows in milliseconds, after a text, the engines taking turns."""
    tokens = [int(token) for token in text]
    sequences = {name: engine.create() for name, engine in engines.items()}
    taken: dict[tuple[str, int], list[float]] = {(name, rows): [] for name in engines for rows in (1, 4)}
    for name, engine in engines.items():
        engine.step(sequences[name], tokens, 1, SamplingParams())
    for _ in range(repeats):
        for (name, rows), seconds in taken.items():
            seconds.append(seconds_of_pass(engines[name], sequences[name], tokens[:rows]))
    medians = {key: statistics.median(seconds) * 1e3 for key, seconds in taken.items()}
    return {name: {f"ms, T={rows}": medians[name, rows] for rows in (1, 4)} for name in engines}


def table(found: Mapping[str, Mapping[str, float]]) -> str:
    kinds = {"bits": 2, "MB read": 1, "ms, T=1": 2, "ms, T=4": 2}
    kinds |= {f"{what}, {text}": digits for what, digits in (("perplexity", 3), ("divergence", 5)) for text in TEXTS}
    lines = ["| | " + " | ".join(kinds) + " |", "|---" * (len(kinds) + 1) + "|"]
    for name, figures in found.items():
        cells = [f"{figures[kind]:.{digits}f}" if kind in figures else "" for kind, digits in kinds.items()]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
