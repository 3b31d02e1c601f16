"""gemma-mtp bench: what a pass of T rows costs, prompt and decode speed, memory."""

import json
import statistics
import sys
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gemma_mtp.cli import options
from gemma_mtp.errors import SettingsError

if TYPE_CHECKING:
    from gemma_mtp import Model

WIDTHS = (1, 2, 3, 4, 5, 6, 7, 8, 16)
PROMPT_LENGTHS = (128, 512)
DECODED = 64


def bench(
    first: options.ModelArgument = None,
    model: options.ModelOption = None,
    threads: options.Threads = None,
    ctx: options.Context = None,
    backend: options.Backend = "native",
    device: options.Device = "auto",
    dtype: options.Dtype = None,
    repeats: Annotated[int, typer.Option("--repeats", "-r", metavar="N", min=1, help="Medians of N.")] = 3,
    as_json: options.Json = False,
) -> None:
    """Measure a model on this machine.

    Seconds of a pass of T = 1 to 16 rows, prompt speed at 128 and 512 tokens, plain decode speed over 64 tokens, all
    medians, and the peak memory of the process.
    """
    from gemma_mtp import Model

    name = options.only_model(first, model)
    loaded = Model.load(name, drafter="none", backend=backend, threads=threads, context=ctx, dtype=dtype)
    found = measure(loaded, repeats)
    print(json.dumps(found) if as_json else table(found))


def measure(model: "Model", repeats: int) -> dict[str, Any]:
    """Every figure of this command: seconds by pass width, tokens per second, bytes."""
    from gemma_mtp import SamplingParams
    from gemma_mtp.prompts import NINE_KINDS

    ids = model.tokenize("\n\n".join(NINE_KINDS.values()))
    ids *= -(-max(PROMPT_LENGTHS) // len(ids))
    model.logits(ids[:1])  # pages the weights in
    passes: dict[int, list[float]] = {width: [] for width in WIDTHS}
    prompts: dict[int, list[float]] = {length: [] for length in PROMPT_LENGTHS}
    decodes: list[float] = []
    for _ in range(repeats):
        for width, seconds in passes.items():
            start = time.perf_counter()
            for _ in range(8):
                model.logits(ids[:width])
            seconds.append((time.perf_counter() - start) / 8)
        for length, rates in prompts.items():
            stats = model.generate(model.detokenize(ids[:length]), SamplingParams(max_tokens=1), draft="off").stats
            rates.append(stats.prompt_tokens / stats.seconds_prompt)
        stats = model.generate(NINE_KINDS["story"], SamplingParams(max_tokens=DECODED), draft="off").stats
        decodes.append(stats.tokens_per_second)
    return {
        "model": model.name,
        "threads": model.threads,
        "repeats": repeats,
        "pass_seconds": {width: statistics.median(seconds) for width, seconds in passes.items()},
        "prompt_tokens_per_second": {length: statistics.median(rates) for length, rates in prompts.items()},
        "decode_tokens_per_second": statistics.median(decodes),
        "peak_memory_bytes": peak_memory(),
    }


def peak_memory() -> int:
    """Peak resident memory of this process in bytes, mapped files included."""
    if sys.platform == "win32":
        raise SettingsError("bench measures memory by getrusage, which Windows lacks; run it under WSL.")
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def table(found: dict[str, Any]) -> str:
    """The figures for reading."""
    one = found["pass_seconds"][1]
    lines = [
        f"{found['model']}, {found['threads']} threads, medians of {found['repeats']}",
        "",
        "rows   ms a pass   over 1",
    ]
    lines += [
        f"{width:4} {seconds * 1e3:11.2f} {seconds / one:8.2f}" for width, seconds in found["pass_seconds"].items()
    ]
    lines.append("")
    lines += [f"prompt of {n:4}  {rate:7.1f} tokens/s" for n, rate in found["prompt_tokens_per_second"].items()]
    lines.append(f"plain decoding  {found['decode_tokens_per_second']:7.1f} tokens/s")
    lines.append(f"peak memory     {found['peak_memory_bytes'] / 1e6:7.0f} MB")
    return "\n".join(lines)
