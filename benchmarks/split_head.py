"""An output embedding read in two parts: what that gains, and how many bits the first part needs.

    python benchmarks/split_head.py [MODEL]             # default: the demo; the embedding must be Q8_0
    python benchmarks/split_head.py [MODEL] --bounds

The first compares engines that read it in two parts and whole, in turns in one process: plain decoding under several
settings, and passes of several rows. The second, for hidden states of mixed text: scores from the high bits of all
codes, how far they are off, the bound on that (the norm of a row's remainder times the norm of the state), and the
share of 16-row groups that hold a token which, by that bound, can still be the best, or among the best 64: against
the lower bounds alone, and once the tokens with the largest lower bounds have their exact logits.
"""

import argparse
import os
import statistics
import time

import numpy as np

from gemma_mtp import Model, SamplingParams
from gemma_mtp.checkpoints.hub import resolve
from gemma_mtp.checkpoints.load import open_checkpoint
from gemma_mtp.config import ModelConfig
from gemma_mtp.engine.engine import Engine
from gemma_mtp.prompts import NINE_KINDS

GROUP = 16
PROMPT, TOKENS, REPEATS = 64, 64, 8
SETTINGS = {
    "greedy": SamplingParams(),
    "top-k 64, top-p 0.95": SamplingParams(temperature=1.0, top_k=64, top_p=0.95),
    "temperature 1 alone": SamplingParams(temperature=1.0),
    "top-p 0.95 alone": SamplingParams(temperature=1.0, top_p=0.95),
}


def main() -> None:
    parser = argparse.ArgumentParser(description="An output embedding read in two parts.")
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--bounds", action="store_true", help="how many bits are enough, instead of what it gains")
    parser.add_argument("--isa", default="auto", help="the instruction-set build")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    args = parser.parse_args()
    if args.bounds:
        bounds(args.model)
    else:
        gains(args.model, args.threads, args.isa)


def gains(model: str, threads: int, isa: str) -> None:
    checkpoint = open_checkpoint(resolve(model))
    assert isinstance(checkpoint.config, ModelConfig)
    engines = [
        Engine(checkpoint.config, checkpoint.weights, threads=threads, context=512, isa=isa, split_head=split)
        for split in (True, False)
    ]
    text = Model.load(model, drafter="none").tokenize("\n\n".join(NINE_KINDS.values()))
    print("tokens a second in two parts over whole")
    for name, params in SETTINGS.items():
        print(f"{name:22} {ratio(engines, text, 1, params):.2f}")
    for rows in (2, 4, 8):
        print(f"{f'a pass of {rows}, greedy':22} {ratio(engines, text, rows, SamplingParams()):.2f}")


def ratio(engines: list[Engine], text: list[int], rows: int, params: SamplingParams) -> float:
    """The median over turns of what reading whole takes, over what reading in two parts takes."""
    turns = [[seconds(engine, text, rows, params) for engine in engines] for _ in range(REPEATS)]
    return statistics.median(whole / split for split, whole in turns)


def seconds(engine: Engine, text: list[int], rows: int, params: SamplingParams) -> float:
    """Of TOKENS / rows passes, after a prompt."""
    sequence = engine.create()
    engine.step(sequence, text[:PROMPT], 1, params)
    start = time.perf_counter()
    for at in range(PROMPT, PROMPT + TOKENS, rows):
        engine.step(sequence, text[at : at + rows], rows, params)
    passed = time.perf_counter() - start
    engine.release(sequence)
    return passed


def bounds(name: str) -> None:
    model = Model.load(name, drafter="none")
    hidden = model.hidden(model.tokenize("\n\n".join(NINE_KINDS.values()))[:500])[::12]
    tensor = open_checkpoint(resolve(name)).weights["embed"]
    vocab, width = tensor.shape
    blocks = tensor.data.reshape(vocab, width // 32, 34)
    scales = blocks[:, :, :2].copy().view(np.float16).astype(np.float32)
    codes = blocks[:, :, 2:].view(np.int8).astype(np.float32)
    norms = np.linalg.norm(hidden, axis=1, keepdims=True)
    exact = hidden @ (codes * scales).reshape(vocab, width).T
    print("bits read first | mean error | mean bound | groups for the best: by bounds, then exact | for the best 64")
    for bits in (4, 5, 6, 7):
        step = 2 ** (8 - bits)
        high = np.floor(codes / step) * step + (step - 1) / 2
        scores = hidden @ (high * scales).reshape(vocab, width).T
        bound = norms * np.linalg.norm((codes - high) * scales, axis=(1, 2))
        off = np.abs(exact - scores).mean()
        shares = " | ".join(read_in_full(exact, scores, bound, best) for best in (1, 64))
        print(f"{bits:15} | {off:10.2f} | {bound.mean():10.2f} | {shares}")


def read_in_full(exact: np.ndarray, scores: np.ndarray, bound: np.ndarray, best: int) -> str:
    """The share of groups that can hold a wanted token, by a threshold of lower bounds and by one of exact logits."""

    def grouped(tokens: np.ndarray) -> np.ndarray:
        return tokens.reshape(len(tokens), -1, GROUP).any(axis=2)

    first = np.partition(scores - bound, -best, axis=1)[:, -best, None]
    read = grouped(scores - bound >= first)
    logits = np.where(read.repeat(GROUP, axis=1), exact, -np.inf)
    second = np.partition(logits, -best, axis=1)[:, -best, None]
    by_bounds, then_exact = (grouped(scores + bound >= threshold).mean() for threshold in (first, second))
    return f"{by_bounds:.2%}, {then_exact:.2%}"


if __name__ == "__main__":
    main()
