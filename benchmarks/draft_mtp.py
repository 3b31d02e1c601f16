"""The small Gemma 4 pair with its drafter, here and in llama.cpp (`--spec-type draft-mtp`): the same files and prompts.

    python benchmarks/draft_mtp.py PAIR --llama-cpp DIR

DIR holds llama-server; PAIR is a folder of examples/small_gemma4.py, whose target and drafter are converted to f16 GGUF
first. Prompts are pieces of the Python library that the pair was not trained on. Each is gone on from greedily and at
temperature 1, by both programs, with drafting off and on, in turns. Both draft the same number of tokens every round.

Acceptance is accepted over drafted; a speed-up is over the same program without drafting, all prompts together; a text
has changed if its tokens differ from those of the same program, prompt and seed without drafting.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_server import LlamaServer, version

from gemma_mtp import Model, SamplingParams
from gemma_mtp.checkpoints.convert import convert
from gemma_mtp.training.data import Windows, python_library, split, token_stream

TEMPERATURES = {"greedy": 0.0, "temperature 1": 1.0}
PROMPT = 64  # tokens


@dataclass(frozen=True)
class Answer:
    """tokens, and of the decoding alone: seconds, and tokens drafted and accepted."""

    tokens: list[int]
    seconds: float
    drafted: int
    accepted: int


Complete = Callable[[list[int], float, int], Answer]
"""Goes on from a prompt, at a temperature, with a seed."""


def main() -> None:
    parser = argparse.ArgumentParser(description="Drafting with the same pair, here and in llama.cpp.")
    parser.add_argument("pair", type=Path, metavar="PAIR", help="folder of the target, with the drafter in assistant/")
    parser.add_argument("--llama-cpp", type=Path, required=True, metavar="DIR", help="folder with bin/llama-server")
    parser.add_argument("--depth", type=int, default=3, help="tokens drafted a round (default 3)")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=128, help="of each answer")
    parser.add_argument("--threads", type=int, default=1, help="of both programs; more only wait at this size")
    parser.add_argument("--repeats", type=int, default=2, help="of all; the fastest of each answer counts")
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write the figures to a file")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        target, drafter = Path(scratch) / "target.gguf", Path(scratch) / "drafter.gguf"
        convert(args.pair, target, "f16")
        convert(args.pair / "assistant", drafter, "f16")
        found = measure(target, drafter, args)
    print(table(found["rows"]))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


def measure(target: Path, drafter: Path, args: argparse.Namespace) -> dict[str, Any]:
    model = Model.load(target, drafter=drafter, threads=args.threads)
    prompts = unseen_prompts(model, args.prompts)
    server, threads = args.llama_cpp / "bin" / "llama-server", ["-t", str(args.threads)]
    drafting = ["-md", str(drafter), "--spec-type", "draft-mtp", "--spec-draft-n-max", str(args.depth)]
    with (
        LlamaServer(server, target, threads) as plain,
        LlamaServer(server, target, threads + drafting) as mtp,
        LlamaServer(server, target, [*threads, *drafting, "--spec-draft-sampling", "probabilistic"]) as probabilistic,
    ):
        ways: dict[str, tuple[Complete, Complete]] = {
            "gemma-mtp": (ours(model, "off", args.tokens), ours(model, args.depth, args.tokens)),
            "gemma-mtp, auto": (ours(model, "off", args.tokens), ours(model, "auto", args.tokens)),
            "llama.cpp": (theirs(plain, args.tokens), theirs(mtp, args.tokens)),
            "llama.cpp, probabilistic": (theirs(plain, args.tokens), theirs(probabilistic, args.tokens)),
        }
        rows = [
            {"decoding": decoding, "program": name} | compare(*way, prompts, temperature, args.repeats)
            for decoding, temperature in TEMPERATURES.items()
            for name, way in ways.items()
            if temperature or way is not ways["llama.cpp, probabilistic"]  # which then is greedy as well
        ]
    how = {"depth": args.depth, "tokens": args.tokens, "prompts": args.prompts, "threads": args.threads}
    return {"llama.cpp": version(server), **how, "rows": rows}


def unseen_prompts(model: Model, count: int) -> list[list[int]]:
    _, held_out = split(python_library())
    stream = token_stream(held_out, lambda text: model.tokenize(text)[1:], model.config.eos[0])
    return Windows(stream, PROMPT, model.config.bos, seed=1).batch(count).tolist()


def ours(model: Model, draft: Any, tokens: int) -> Complete:
    def complete(prompt: list[int], temperature: float, seed: int) -> Answer:
        params = SamplingParams(max_tokens=tokens, temperature=temperature, seed=seed)
        generation = model.generate(prompt, params, draft)
        stats = generation.stats
        return Answer(generation.tokens, stats.seconds_decode, stats.drafted, stats.accepted)

    return complete


def theirs(server: LlamaServer, tokens: int) -> Complete:
    def complete(prompt: list[int], temperature: float, seed: int) -> Answer:
        how = {"temperature": temperature, "samplers": ["temperature"], "seed": seed} if temperature else {}
        answer = server.complete(prompt, tokens, **how)
        timings = answer["timings"]
        counts = timings.get("draft_n", 0), timings.get("draft_n_accepted", 0)
        return Answer(answer["tokens"], timings["predicted_ms"] / 1000, *counts)

    return complete


def compare(
    plain: Complete, drafting: Complete, prompts: Sequence[list[int]], temperature: float, repeats: int
) -> dict[str, Any]:
    seconds = {"plain": 0.0, "drafted": 0.0}
    tokens = {"plain": 0, "drafted": 0}
    drafted = accepted = changed = 0
    for seed, prompt in enumerate(prompts):
        turns = [(plain(prompt, temperature, seed), drafting(prompt, temperature, seed)) for _ in range(repeats)]
        for name, answers in zip(seconds, zip(*turns, strict=True), strict=True):
            fastest = min(answers, key=lambda answer: answer.seconds)
            seconds[name] += fastest.seconds
            tokens[name] += len(fastest.tokens)
        drafted += turns[0][1].drafted
        accepted += turns[0][1].accepted
        changed += turns[0][0].tokens != turns[0][1].tokens
    speeds = {name: tokens[name] / seconds[name] for name in seconds}
    return {
        "acceptance": accepted / drafted if drafted else 0.0,
        "drafted": drafted,
        "plain tok/s": speeds["plain"],
        "drafted tok/s": speeds["drafted"],
        "speed-up": speeds["drafted"] / speeds["plain"],
        "changed": changed,
        "texts": len(prompts),
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    head = "| | acceptance | plain tok/s | drafted tok/s | speed-up | texts changed |\n|---|---|---|---|---|---|\n"
    return head + "\n".join(
        f"| {row['decoding']}, {row['program']} | {row['acceptance']:.2f} | {row['plain tok/s']:.0f} | "
        f"{row['drafted tok/s']:.0f} | {row['speed-up']:.2f} | {row['changed']} of {row['texts']} |"
        for row in rows
    )


if __name__ == "__main__":
    main()
