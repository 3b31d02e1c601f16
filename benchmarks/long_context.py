"""A long generation and long prompts on the demo, each in a process of its own: speed, and peak memory.

    python benchmarks/long_context.py [--kv f16 q8_0] [--prompts 8000 32000]

For each length of prompt the types of KV cache take turns.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

OURS = [sys.executable, "-P", "-m", "gemma_mtp"]
CONTEXT = 32_768


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kv", nargs="+", default=["f16"], choices=["f16", "q8_0", "f32"])
    parser.add_argument("--prompts", nargs="+", type=int, default=[32_000], help="tokens (default 32000)")
    args = parser.parse_args()
    inspect = subprocess.check_output([*OURS, "inspect", "demo", "--json", "--ctx", str(CONTEXT)])
    memory = json.loads(inspect)["memory"]
    sizes = [f"{name} {memory[name] / 1e6:.0f} MB" for name in ("weights", "kv cache", "sum")]
    print(f"inspect at a context of {CONTEXT:,}: {', '.join(sizes)}")
    run = ["run", "demo", "--json", "--temp", "1", "--seed", "1", "-c", str(CONTEXT)]
    for kv in args.kv:
        written = [*run, "--kv", kv, "-p", "Once upon a time", "-n", "2000", "--ignore-eos"]
        report(f"2,000 tokens at temperature 1, {kv}", written)
    with tempfile.TemporaryDirectory() as folder:
        prompt = Path(folder) / "prompt.txt"
        for tokens in args.prompts:
            prompt.write_text(long_text(tokens))
            for kv in args.kv:
                report(f"a long prompt, {kv}", [*run, "--kv", kv, "-f", str(prompt), "-n", "64", "--draft", "off"])


def report(title: str, arguments: list[str]) -> None:
    with tempfile.TemporaryFile() as out:
        process = subprocess.Popen([*OURS, *arguments], stdin=subprocess.DEVNULL, stdout=out)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            sys.exit(f"{title}: failed with status {process.returncode}.")
        out.seek(0)
        stats = json.load(out)["stats"]
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6
    print(
        f"{title}: prompt {stats['prompt_tokens']:,} tokens in {stats['seconds_prompt']:.1f} s, "
        f"then {stats['tokens']:,} at {stats['tokens_per_second']:.0f} a second; peak memory {peak:.0f} MB"
    )


def long_text(tokens: int) -> str:
    """Sentences that never repeat as a whole, of about so many tokens; a little less when they are joined."""
    from gemma_mtp import Model

    tokenize = Model.load("demo").tokenize
    sentences, count, number = [], 0, 0
    while count < tokens:
        number += 1
        letter, house = number * 7919 % 10007, number * 104729 % 9973
        sentences.append(f"Letter {letter} came from house {house}, and nobody answered it. ")
        count += len(tokenize(sentences[-1])) - 1
    return "".join(sentences[:-1])


if __name__ == "__main__":
    main()
