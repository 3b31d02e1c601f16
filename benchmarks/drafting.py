"""Drafting against plain decoding on nine kinds of prompt, in one run: speed-up, acceptance, equality, Python's share.

    python benchmarks/drafting.py                     # the demo: greedy, and temperature 1 with top-k 64, top-p 0.95

Plain and drafted generations of a prompt take turns, and of each the fastest of --repeats counts. "worst" is what
matters for "never slower than plain"; on a text that repeats nothing, prompt lookup can only break even.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

from gemma_mtp import Generation, Model, SamplingParams
from gemma_mtp.prompts import NINE_KINDS

SAMPLINGS = {"greedy": {}, "sampled": {"temperature": 1.0, "top_k": 64, "top_p": 0.95, "seed": 1}}


def main() -> None:
    parser = argparse.ArgumentParser(description="Drafting against plain decoding, side by side.")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--drafter", default="auto")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--tokens", type=int, default=192)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write the figures to a file")
    args = parser.parse_args()
    model = Model.load(args.model, drafter=args.drafter, threads=args.threads)
    rows = [
        compare(model, kind, sampling, args.tokens, args.repeats) for sampling in SAMPLINGS for kind in NINE_KINDS
    ]
    share = python_share(model, args.tokens)
    print(table(rows))
    print(f"\nPython's share of a plain decode step: {100 * share:.1f} %")
    if args.json:
        args.json.write_text(json.dumps({"rows": rows, "python_share": share}, indent=1) + "\n")


def compare(model: Model, kind: str, sampling: str, tokens: int, repeats: int) -> dict[str, Any]:
    params = SamplingParams(max_tokens=tokens, ignore_eos=True, **SAMPLINGS[sampling])
    plain: list[Generation] = []
    drafted: list[Generation] = []
    for _ in range(repeats):
        plain.append(model.generate(NINE_KINDS[kind], params, draft="off"))
        drafted.append(model.generate(NINE_KINDS[kind], params, draft="auto"))
    best = max(drafted, key=speed)
    return {
        "kind": kind,
        "sampling": sampling,
        "plain": max(map(speed, plain)),
        "drafted": speed(best),
        "speed-up": speed(best) / max(map(speed, plain)),
        "tokens a round": (best.stats.tokens - 1) / best.stats.rounds,
        "accepted": best.stats.accepted,
        "of": best.stats.drafted,
        "same": all(generation.tokens == plain[0].tokens for generation in plain + drafted),
    }


def speed(generation: Generation) -> float:
    return generation.stats.tokens_per_second


def python_share(model: Model, tokens: int) -> float:
    """Share of a plain generation's decode time that is not spent inside the native runner."""
    runner = model.engine._runner
    model.engine._runner = timed = Timed(runner)
    try:
        stream = model.stream(NINE_KINDS["story"], SamplingParams(max_tokens=tokens, ignore_eos=True), draft="off")
        next(stream)  # the prompt
        timed.seconds = 0.0
        stats = [stream.generation for _ in stream][-1].stats
    finally:
        model.engine._runner = runner
    return 1 - timed.seconds / stats.seconds_decode


class Timed:
    """Passes calls on to an object and adds up their seconds."""

    def __init__(self, target: Any) -> None:
        self._target, self.seconds = target, 0.0

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._target, name)

        def call(*arguments: Any) -> Any:
            start = time.perf_counter()
            try:
                return method(*arguments)
            finally:
                self.seconds += time.perf_counter() - start

        return call


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| | plain tok/s | drafted tok/s | speed-up | tokens a round | accepted | same tokens |", "|---" * 7 + "|"]
    for row in rows:
        lines.append(
            f"| {row['sampling']}, {row['kind']} | {row['plain']:.0f} | {row['drafted']:.0f} | {row['speed-up']:.2f} "
            f"| {row['tokens a round']:.2f} | {row['accepted']} of {row['of']} | {'yes' if row['same'] else 'NO'} |"
        )
    for sampling in SAMPLINGS:
        ratios = [row["speed-up"] for row in rows if row["sampling"] == sampling]
        mean, worst = statistics.geometric_mean(ratios), min(ratios)
        lines.append(f"| {sampling}: mean, worst | | | {mean:.2f}, {worst:.2f} | | | |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
