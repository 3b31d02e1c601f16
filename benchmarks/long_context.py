"""A long generation and a long prompt on the demo, each in a process of its own: speed, and peak memory.

    python benchmarks/long_context.py
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

OURS = [sys.executable, "-P", "-m", "gemma_mtp"]
PROMPT_TOKENS = 32_000  # of sentences; a little less when they are joined
CONTEXT = 32_768


def main() -> None:
    inspect = subprocess.check_output([*OURS, "inspect", "demo", "--json", "--ctx", str(CONTEXT)])
    memory = json.loads(inspect)["memory"]
    sizes = [f"{name} {memory[name] / 1e6:.0f} MB" for name in ("weights", "kv cache", "sum")]
    print(f"inspect at a context of {CONTEXT:,}: {', '.join(sizes)}")
    run = ["run", "demo", "--json", "--temp", "1", "--seed", "1", "-c", str(CONTEXT)]
    report("2,000 tokens at temperature 1", [*run, "-p", "Once upon a time", "-n", "2000", "--ignore-eos"])
    with tempfile.TemporaryDirectory() as folder:
        prompt = Path(folder) / "prompt.txt"
        prompt.write_text(long_text())
        report("a long prompt", [*run, "-f", str(prompt), "-n", "64"])


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


def long_text() -> str:
    """Sentences that never repeat as a whole, about PROMPT_TOKENS tokens of them."""
    from gemma_mtp import Model

    tokenize = Model.load("demo").tokenize
    sentences, count, number = [], 0, 0
    while count < PROMPT_TOKENS:
        number += 1
        letter, house = number * 7919 % 10007, number * 104729 % 9973
        sentences.append(f"Letter {letter} came from house {house}, and nobody answered it. ")
        count += len(tokenize(sentences[-1])) - 1
    return "".join(sentences[:-1])


if __name__ == "__main__":
    main()
