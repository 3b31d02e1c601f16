"""How far passes are from what the machine can do: seconds of T rows beside the limits of memory and arithmetic.

    python benchmarks/roofline.py [--threads N] [--repeats N] [--e2b] [--json OUT] [--picture OUT.svg]

Subjects: the demo model as shipped and requantised to Q4_0 and Q8_0; with --e2b also Gemma 4 E2B in Q4_0 with its
drafter, of real size with random weights (shaped.py; 1.3 GB more memory). In turns, so that a slow moment of the
machine hits all alike:

read               without a barrier or a product, of the bytes of a pass where they lie, by as many threads: the
                   memory limit of a pass
multiply-adds      best of 128 rows times a matrix that fits the cache, for each type the model has; a limit of our
                   kernels, not of the processor
pass of T rows     a pass that checks T tokens after a prompt of 64, greedily; medians. Of one row there are as many as
                   reads; their share of the bandwidth is the median over turns of a read's time over a pass's
bytes of a pass    of all packed matrices, once; of an output embedding in two parts the high one
draft step         one token of a draft of four, over a pass of one row
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from peers import cpu_name
from shaped import e2b

from gemma_mtp import Model, SamplingParams, _native
from gemma_mtp.charts import Line, LineChart, picture
from gemma_mtp.checkpoints.packing import uses_of
from gemma_mtp.engine.engine import Engine, SequenceState

WIDTHS = range(1, 17)
PROMPT, DRAFT = 64, 4
TEXT = """The river rises in the hills to the north of the town, and runs for forty miles through a wide valley
before it reaches the sea. For most of the year it is shallow enough to walk across, but in spring, when the snow
melts, it fills the whole of its bed and often floods the fields on either side. The first bridge was of wood."""
READS = 12  # in a turn
ROWS_AT_ONCE = 128  # of the product that shows the arithmetic limit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--e2b", action="store_true")
    parser.add_argument("--json", type=Path, metavar="OUT")
    parser.add_argument("--picture", type=Path, metavar="OUT.svg")
    args = parser.parse_args()
    subjects: dict[str, Callable[[], tuple[Engine, list[int]]]] = {
        f"Gemma 3 270M, {name}": partial(demo, args.threads, dtype)
        for name, dtype in (("as shipped", "as-is"), ("Q4_0", "q4_0"), ("Q8_0", "q8_0"))
    }
    if args.e2b:
        subjects["E2B-shaped, Q4_0"] = partial(noise, args.threads)
    found: dict[str, Any] = {
        "machine": cpu_name(),
        "isa": _native.isas()[0],
        "threads": args.threads,
        "repeats": args.repeats,
        "subjects": {},
    }
    for name, load in subjects.items():
        found["subjects"][name] = measure(load, args.threads, args.repeats)
        print(row(name, found["subjects"][name]), file=sys.stderr, flush=True)
    print(table(found))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    if args.picture:
        args.picture.write_text(drawn(found))


def demo(threads: int, dtype: str) -> tuple[Engine, list[int]]:
    """The model and a text of PROMPT tokens: of random ones, an output embedding in two parts would reach too many."""
    model = Model.load("demo", "none", threads=threads, dtype=dtype, context=1024)
    assert isinstance(model.engine, Engine)
    return model.engine, model.tokenizer.encode(TEXT)[:PROMPT]


def noise(threads: int) -> tuple[Engine, list[int]]:
    engine = e2b(threads, context=1024)
    return engine, np.random.default_rng(0).integers(2, engine.config.vocab, PROMPT).tolist()


def macs_per_second(kind: str, threads: int) -> float:
    rows, cols = 1024, 2048
    matrix = _native.pack(kind, np.full(rows * _native.file_row_bytes(kind, cols), 0x2B, np.uint8), rows, cols)
    seconds = min(_native.time_matmul(matrix, ROWS_AT_ONCE, threads, "auto", 40))
    return ROWS_AT_ONCE * rows * cols / seconds


def measure(load: Callable[[], tuple[Engine, list[int]]], threads: int, repeats: int) -> dict[str, Any]:
    engine, tokens = load()
    arrays, macs = weights_read(engine)
    matrices = sum(array.nbytes for array in arrays)
    rates = {kind: macs_per_second(kind, threads) for kind in macs}
    sequence = engine.create()
    engine.step(sequence, tokens, 1, SamplingParams())
    passes: dict[int, list[float]] = {rows: [] for rows in WIDTHS}
    reads, shares, steps = [], [], []
    for turn in range(repeats + 1):
        read = _native.time_read(arrays, threads, READS)
        tries = {rows: READS if rows == 1 else 1 for rows in WIDTHS}
        seconds = {n: [seconds_of_pass(engine, sequence, tokens[:n]) for _ in range(tries[n])] for n in WIDTHS}
        step = seconds_of_draft_step(engine, sequence, tokens[0]) if engine.drafts else None
        if turn == 0:  # in which memory is touched for the first time
            continue
        reads += read
        shares.append(statistics.median(read) / statistics.median(seconds[1]))
        for rows, taken in seconds.items():
            passes[rows] += taken
        if step is not None:
            steps.append(step)
    medians = {rows: statistics.median(taken) for rows, taken in passes.items()}
    return {
        "bytes_of_a_pass": matrices,
        "read_seconds": statistics.median(reads),
        "macs_per_row": sum(macs.values()),
        "macs_per_second": rates,
        "arithmetic_seconds_per_row": sum(count / rates[kind] for kind, count in macs.items()),
        "pass_seconds": medians,
        "share_of_bandwidth": statistics.median(shares),
        "cost": {rows: medians[rows] / medians[1] for rows in WIDTHS},
        "draft_step_share": statistics.median(steps) / medians[1] if steps else None,
    }


def weights_read(engine: Engine) -> tuple[list[np.ndarray], Counter[str]]:
    """What a pass of one row reads, and its multiply-adds by the type of the weights."""
    arrays, macs = [], Counter[str]()
    for name, tensor in engine._tensors.items():
        if len(tensor.shape) < 2 or name in uses_of(engine.config).looked_up:
            continue
        weight = engine.weights.matrix(name)
        size = weight.nbytes
        if size != _native.Weight.packed_bytes(weight.type, weight.rows, weight.cols):  # an embedding in two parts
            size = weight.rows * (weight.cols * 5 // 8 + weight.cols // 16)  # the high one comes first
        arrays.append(weight.data[:size])
        macs[weight.type] += weight.rows * weight.cols
    return arrays, macs


def seconds_of_pass(engine: Engine, sequence: SequenceState, tokens: list[int]) -> float:
    start = time.perf_counter()
    engine.step(sequence, tokens, len(tokens), SamplingParams())
    seconds = time.perf_counter() - start
    engine.truncate(sequence, PROMPT)
    return seconds


def seconds_of_draft_step(engine: Engine, sequence: SequenceState, token: int) -> float:
    start = time.perf_counter()
    drafted = engine.draft(sequence, 0, token, DRAFT, SamplingParams())
    return (time.perf_counter() - start) / len(drafted.tokens)


def table(found: dict[str, Any]) -> str:
    lines = [
        f"{found['machine']}, {found['isa']}, {found['threads']} threads, {found['repeats']} rounds",
        "",
        "| | MB a pass | ms at T = 1 | GB/s of the measured | C(2) | C(4) | C(8) | C(16) | draft step |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    return "\n".join([*lines, *(row(name, subject) for name, subject in found["subjects"].items())])


def row(name: str, subject: dict[str, Any]) -> str:
    """Of the table."""
    seconds, bandwidth = subject["pass_seconds"], subject["bytes_of_a_pass"] / subject["read_seconds"] / 1e9
    share, cost, step = subject["share_of_bandwidth"], subject["cost"], subject["draft_step_share"]
    cells = [
        name,
        f"{subject['bytes_of_a_pass'] / 1e6:.0f}",
        f"{seconds[1] * 1e3:.2f}",
        f"{share * bandwidth:.1f} of {bandwidth:.1f} ({share:.0%})",
        *(f"{cost[rows]:.2f}" for rows in (2, 4, 8, 16)),
        "" if step is None else f"{step:.1%}",
    ]
    return "| " + " | ".join(cells) + " |"


def drawn(found: dict[str, Any]) -> str:
    charts = []
    for name, subject in found["subjects"].items():
        arithmetic = subject["arithmetic_seconds_per_row"]
        limits = {
            "memory": [(rows, subject["read_seconds"] * 1e3) for rows in WIDTHS],
            "arithmetic": [(rows, arithmetic * rows * 1e3) for rows in WIDTHS],
        }
        lines = [Line("pass of T rows", [(rows, ms * 1e3) for rows, ms in subject["pass_seconds"].items()], 0)]
        for colour, (what, points) in enumerate(limits.items(), 1):
            lines.append(Line(f"limit of {what}", points, colour, dashed=True))
        charts.append(LineChart(f"{name}: milliseconds", "rows of a pass (T)", lines))
    return picture(f"Cost of passes on {found['machine']}, {found['threads']} threads", charts)


if __name__ == "__main__":
    main()
