"""The start of a process, in turns: an ordinary checkpoint packed as it is loaded, from the cache, and a packed one.

    python benchmarks/start.py [MODEL] [--threads N] [--repeats N] [--json OUT]

For each: seconds from the start of the process to the first character of the answer, processor seconds of the process,
and its peak resident memory (pages of the mapped file included), medians; files are in the page cache. The cache and
the packed file are made in a temporary folder first, and the seconds that making the cache took are given too.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

from peers import CONTEXT, OURS, PROMPT, output


def main() -> None:
    parser = argparse.ArgumentParser(description="The start of a process, with packed weights and without.")
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write the figures to a file")
    args = parser.parse_args()
    from gemma_mtp.checkpoints.hub import resolve

    model = resolve(args.model)
    with tempfile.TemporaryDirectory() as folder:
        packed = Path(folder) / "packed.safetensors"
        output([*OURS, "convert", str(model), str(packed), "--type", "packed"])
        common = ["-t", str(args.threads), "-c", str(CONTEXT), "-p", PROMPT, "--draft", "off", "-n", "1"]
        ways = {
            "packed as it is loaded": [*OURS, "run", "-m", str(model), *common, "--no-cache"],
            "from the cache": [*OURS, "run", "-m", str(model), *common, "--cache"],
            "a packed checkpoint": [*OURS, "run", "-m", str(packed), *common],
        }
        environment = os.environ | {"XDG_CACHE_HOME": folder}
        first = measure(ways["from the cache"], environment)["first token s"]
        samples: dict[str, dict[str, list[float]]] = {way: defaultdict(list) for way in ways}
        for repeat in range(args.repeats):
            for way, command in ways.items():
                for key, value in measure(command, environment).items():
                    samples[way][key].append(value)
            print(f"repeat {repeat + 1} of {args.repeats} done", file=sys.stderr)
    medians = {way: {key: statistics.median(values) for key, values in of.items()} for way, of in samples.items()}
    base = medians["packed as it is loaded"]
    print(f"{model.name}, {args.threads} threads, medians of {args.repeats}")
    print(f"The start that fills the cache: {first:.2f} s")
    print("\n| | " + " | ".join(f"{key} | ratio" for key in base) + " |\n|---|" + "---|---|" * len(base))
    for way, of in medians.items():
        print(f"| {way} | " + " | ".join(f"{of[key]:.3g} | {of[key] / base[key]:.2f}" for key in base) + " |")
    if args.json:
        args.json.write_text(json.dumps({"first": first, "medians": medians, "samples": samples}, indent=1) + "\n")


def measure(command: list[str], environment: dict[str, str]) -> dict[str, float]:
    start = time.perf_counter()
    seconds = 0.0
    quiet = {"stdin": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, bufsize=0, env=environment, **quiet)
    assert process.stdout is not None
    while chunk := process.stdout.read(4096):
        if not seconds and chunk.strip():
            seconds = time.perf_counter() - start
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode or not seconds:
        sys.exit(f"{' '.join(command)}\nfailed with status {process.returncode}.")
    used = usage.ru_utime + usage.ru_stime
    return {
        "first token s": seconds,
        "processor s": used,
        "peak memory MB": usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6,
    }


if __name__ == "__main__":
    main()
