"""gemma-mtp and llama.cpp side by side: the same files and number of threads, one run, repeats in turns, medians.

    python benchmarks/peers.py --llama-cpp DIR [--model FILE...] [--types q4_0 q8_0] [--repeats N] [--json OUT]

DIR holds bin/llama-bench, bin/llama-batched-bench, bin/llama-completion and bin/llama-quantize. What is compared:

decode        plain decoding: 64 tokens, drafting off; llama-bench -p 0 -n 64
prompt        128 and 512 tokens; llama-bench -p 128,512 -n 0
cost of T     seconds of a pass of T rows over those of one row; llama-batched-bench with T sequences (what verifying T
              rows costs there)
a long text   decoding after 8,000 tokens over decoding after 100: passes in turns; llama-bench -p 0 -n 64 -d 100,8000
first token   from the start of the process to the first character of the answer, file in the page cache;
              llama-completion --no-warmup
memory        peak resident memory of the process that generated 64 tokens, mapped file included
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

PROMPT = "The capital of France is"
WIDTHS = range(1, 9)
LENGTHS = (100, 8000)
CONTEXT = 4096  # but where a long text is measured
A_LONG_TEXT = f"decode after {LENGTHS[1]} over {LENGTHS[0]}"
OURS = [sys.executable, "-P", "-m", "gemma_mtp"]  # the installed package, not a checkout without its extension


def main() -> None:
    parser = argparse.ArgumentParser(description="gemma-mtp and llama.cpp side by side on one file.")
    parser.add_argument("--llama-cpp", type=Path, required=True, metavar="DIR", help="folder with bin/llama-bench")
    parser.add_argument("--model", nargs="+", default=["demo"], help="GGUF files (default: the demo model)")
    requantised = "also the demo, requantised to these by llama-quantize"
    parser.add_argument("--types", nargs="+", default=[], metavar="TYPE", help=requantised)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write the figures to a file")
    args = parser.parse_args()
    models = [demo_path() if model == "demo" else model for model in args.model]
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for kind in args.types:
            models.append(str(Path(folder) / f"demo-{kind}.gguf"))
            quantize = str(args.llama_cpp / "bin" / "llama-quantize")
            output([quantize, "--allow-requantize", demo_path(), models[-1], kind])
        for model in models:
            results.append(compare(model, args.llama_cpp / "bin", args.threads, args.repeats))
            print(table(results[-1]), end="\n\n", flush=True)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


def compare(model: str, binaries: Path, threads: int, repeats: int) -> dict:
    """Medians and samples of every figure of both programs, which take turns."""
    engines = {"gemma-mtp": GemmaMtp(model, threads), "llama.cpp": LlamaCpp(binaries, model, threads)}
    samples: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in engines}
    bandwidths = []
    for repeat in range(repeats):
        bandwidths.append(read_bandwidth(threads))
        for name, engine in engines.items():
            for key, value in engine.measure().items():
                samples[name][key].append(value)
        print(f"{Path(model).name}: repeat {repeat + 1} of {repeats} done", file=sys.stderr)
    return {
        "machine": cpu_name(),
        "threads": threads,
        "repeats": repeats,
        "model": Path(model).name,
        "read_bandwidth_gb_s": statistics.median(bandwidths),
        "medians": {name: {key: statistics.median(v) for key, v in values.items()} for name, values in samples.items()},
        "samples": samples,
    }


class GemmaMtp:
    def __init__(self, model: str, threads: int) -> None:
        self.model, self.threads = model, threads

    def measure(self) -> dict[str, float]:
        common = ["-m", self.model, "-t", str(self.threads)]
        after = [option for length in LENGTHS for option in ("--after", str(length))]
        bench = [*OURS, "bench", *common, "-c", str(LENGTHS[-1] + 64), *after, "--repeats", "1", "--json"]
        found = json.loads(output(bench))
        seconds = list(found["pass_seconds_after"].values())
        run = [*OURS, "run", *common, "-c", str(CONTEXT), "-p", PROMPT, "--draft", "off"]
        return {
            "decode tok/s": found["decode_tokens_per_second"],
            **{f"prompt {n} tok/s": rate for n, rate in found["prompt_tokens_per_second"].items()},
            **cost_curve({int(width): seconds for width, seconds in found["pass_seconds"].items()}),
            A_LONG_TEXT: seconds[0] / seconds[1],
            "first token s": seconds_to_first_text([*run, "-n", "1"]),
            "peak memory MB": peak_megabytes([*run, "-n", "64"]),
        }


class LlamaCpp:
    def __init__(self, binaries: Path, model: str, threads: int) -> None:
        self.binaries, self.model, self.threads = binaries.resolve(), model, threads

    def command(self, program: str, *arguments: object) -> list[str]:
        return [str(self.binaries / program), "-m", self.model, "-t", str(self.threads), *map(str, arguments)]

    def measure(self) -> dict[str, float]:
        bench = json.loads(output(self.command("llama-bench", "-p", "128,512", "-n", 64, "-r", 1, "-o", "json")))
        rates = {(entry["n_prompt"], entry["n_gen"]): entry["avg_ts"] for entry in bench}
        depths = ",".join(map(str, LENGTHS))
        long = json.loads(output(self.command("llama-bench", "-p", 0, "-n", 64, "-d", depths, "-r", 1, "-o", "json")))
        after = {entry["n_depth"]: entry["avg_ts"] for entry in long}
        widths = ",".join(map(str, WIDTHS))
        settings = ("-c", CONTEXT, "-b", 512, "-ub", 512, "-npp", 64, "-ntg", 32, "-npl", widths)
        batched = output(self.command("llama-batched-bench", *settings, "--output-format", "jsonl"))
        lines = [json.loads(line) for line in batched.splitlines() if line.startswith("{")]
        quiet = ("-no-cnv", "--no-warmup", "--no-display-prompt")
        run = self.command("llama-completion", "-c", CONTEXT, "-p", PROMPT, "--temp", 0, *quiet)
        return {
            "decode tok/s": rates[0, 64],
            "prompt 128 tok/s": rates[128, 0],
            "prompt 512 tok/s": rates[512, 0],
            **cost_curve({line["pl"]: line["t_tg"] for line in lines}),
            A_LONG_TEXT: after[LENGTHS[1]] / after[LENGTHS[0]],
            "first token s": seconds_to_first_text([*run, "-n", "1"]),
            "peak memory MB": peak_megabytes([*run, "-n", "64"]),
        }


def cost_curve(seconds: dict[int, float]) -> dict[str, float]:
    return {f"C({width})/C(1)": seconds[width] / seconds[1] for width in WIDTHS if width > 1}


def demo_path() -> str:
    from gemma_mtp.checkpoints.hub import resolve

    return str(resolve("demo"))


def output(command: Sequence[str]) -> str:
    """What a command writes to standard output; its errors are shown only if it fails."""
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\nfailed with status {done.returncode}: {done.stderr[-2000:]}")
    return done.stdout


def seconds_to_first_text(command: Sequence[str]) -> float:
    """From the start of the process to the first character on standard output that is no white space."""
    start = time.perf_counter()
    quiet = {"stdin": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, stdout=subprocess.PIPE, bufsize=0, **quiet) as process:
        while chunk := process.stdout.read(4096):
            if chunk.strip():
                seconds = time.perf_counter() - start
                while process.stdout.read(4096):
                    pass
                return seconds
    sys.exit(f"{' '.join(command)}\nprinted no text.")


def peak_megabytes(command: Sequence[str]) -> float:
    """Peak resident memory of a process, in MB."""
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{' '.join(command)}\nfailed with status {process.returncode}.")
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6


def read_bandwidth(threads: int) -> float:
    """Read bandwidth of the machine in GB/s, by benchmarks/bandwidth.cpp."""
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "bandwidth"
        source = Path(__file__).with_name("bandwidth.cpp")
        flags = ["-O3", "-march=native", "-std=c++20", "-pthread"]
        output([os.environ.get("CXX", "c++"), *flags, "-o", str(program), str(source)])
        return float(output([str(program), str(threads)]))


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()


def table(result: dict) -> str:
    """The medians as a Markdown table, the ratio last: what gemma-mtp has over what llama.cpp has."""
    ours, theirs = result["medians"]["gemma-mtp"], result["medians"]["llama.cpp"]
    lines = [
        f"{result['model']} on {result['machine']}, {result['threads']} threads, medians of {result['repeats']}, "
        f"read bandwidth {result['read_bandwidth_gb_s']:.1f} GB/s",
        "",
        "| | gemma-mtp | llama.cpp | ratio |",
        "|---|---|---|---|",
    ]
    for key in theirs:
        digits = 2 if key.startswith(("C(", "first", A_LONG_TEXT)) else 0
        lines.append(f"| {key} | {ours[key]:.{digits}f} | {theirs[key]:.{digits}f} | {ours[key] / theirs[key]:.2f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
