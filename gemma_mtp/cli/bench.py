"""gemma-mtp bench: what a pass of T rows costs, prompt and decode speed, memory."""

import json
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gemma_mtp.cli import options
from gemma_mtp.errors import SettingsError

if TYPE_CHECKING:
    from gemma_mtp import Model

WIDTHS = (1, 2, 3, 4, 5, 6, 7, 8, 16)
PROMPT_LENGTHS = (128, 512)
DECODED = 64
PASS_PROMPT = 64  # tokens before the pass that is timed
PASSES = 8  # timed at once


def bench(
    first: options.ModelArgument = None,
    model: options.ModelOption = None,
    drafter: options.Drafter = "auto",
    threads: options.Threads = None,
    ctx: options.Context = None,
    backend: options.Backend = "native",
    device: options.Device = "auto",
    dtype: options.Dtype = None,
    drafter_dtype: options.DrafterDtype = None,
    repeats: Annotated[int, typer.Option("--repeats", "-r", metavar="N", min=1, help="Medians of N.")] = 3,
    as_json: options.Json = False,
) -> None:
    """Measure a model on this machine.

    Seconds of a pass that checks T = 1 to 16 tokens, and of a step of the drafter if there is one; prompt speed at 128
    and 512 tokens, plain decode speed over 64 tokens; all medians; the peak memory of the process.
    """
    from gemma_mtp import Model

    name = options.only_model(first, model)
    loaded = Model.load(
        name,
        drafter=drafter,
        backend=backend,
        threads=threads,
        context=ctx,
        dtype=dtype,
        drafter_dtype=drafter_dtype,
        device=device,
    )
    found = measure(loaded, repeats)
    print(json.dumps(found) if as_json else table(found))


def measure(model: "Model", repeats: int) -> dict[str, Any]:
    """Every figure of this command: seconds by pass width, tokens per second, bytes."""
    from gemma_mtp import SamplingParams
    from gemma_mtp.prompts import NINE_KINDS

    ids = model.tokenize("\n\n".join(NINE_KINDS.values()))
    ids *= -(-max(PROMPT_LENGTHS) // len(ids))
    widths = [width for width in WIDTHS if width <= model.engine.max_depth + 1]
    passes: dict[int, list[float]] = {width: [] for width in widths}
    draft_steps: list[float] = []
    prompts: dict[int, list[float]] = {length: [] for length in PROMPT_LENGTHS}
    decodes: list[float] = []
    for _ in range(repeats):
        with after_prompt(model, ids[:PASS_PROMPT]) as sequence:
            for width, seconds in passes.items():
                seconds.append(seconds_of_pass(model, sequence, ids[:width]))
            if model.engine.drafts:
                draft_steps.append(seconds_of_draft_step(model, sequence, ids[0]))
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
        "draft_step_seconds": statistics.median(draft_steps) if draft_steps else None,
        "peak_memory_bytes": peak_memory(),
    }


@contextmanager
def after_prompt(model: "Model", prompt: list[int]) -> Iterator[Any]:
    """A sequence of the engine's that holds a prompt."""
    from gemma_mtp import SamplingParams

    sequence = model.engine.create()
    try:
        model.engine.step(sequence, prompt, 1, SamplingParams())
        yield sequence
    finally:
        model.engine.release(sequence)


def seconds_of_pass(model: "Model", sequence: Any, tokens: list[int]) -> float:
    """Of a pass that checks these tokens after the prompt, sampling after each, as a round does."""
    from gemma_mtp import SamplingParams

    start = time.perf_counter()
    for _ in range(PASSES):
        model.engine.step(sequence, tokens, len(tokens), SamplingParams())
        model.engine.truncate(sequence, PASS_PROMPT)
    return (time.perf_counter() - start) / PASSES


def seconds_of_draft_step(model: "Model", sequence: Any, token: int) -> float:
    """Of one token drafted after the prompt."""
    from gemma_mtp import SamplingParams

    start = time.perf_counter()
    drafted = sum(len(model.engine.draft(sequence, 0, token, PASSES, SamplingParams())) for _ in range(PASSES))
    return (time.perf_counter() - start) / drafted


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
    if (step := found["draft_step_seconds"]) is not None:
        lines.append(f"draft step {step * 1e3:7.2f} {step / one:10.3f}")
    lines.append("")
    lines += [f"prompt of {n:4}  {rate:7.1f} tokens/s" for n, rate in found["prompt_tokens_per_second"].items()]
    lines.append(f"plain decoding  {found['decode_tokens_per_second']:7.1f} tokens/s")
    lines.append(f"peak memory     {found['peak_memory_bytes'] / 1e6:7.0f} MB")
    return "\n".join(lines)
