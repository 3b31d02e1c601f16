"""gemma-mtp bench: what a pass of T rows costs, prompt and decode speed, memory; with --mtp what drafting gains."""

import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gemma_mtp.cli import drafting_report, options
from gemma_mtp.errors import SettingsError

if TYPE_CHECKING:
    from gemma_mtp import Model

WIDTHS = (1, 2, 3, 4, 5, 6, 7, 8, 16)
PROMPT_LENGTHS = (128, 512)
DECODED = 64


def bench(
    first: options.ModelArgument = None,
    model: options.ModelOption = None,
    drafter: options.Drafter = "auto",
    threads: options.Threads = None,
    ctx: options.Context = None,
    backend: options.Backend = "native",
    device: options.Device = "auto",
    dtype: options.Dtype = None,
    kv: options.Kv = None,
    drafter_dtype: options.DrafterDtype = None,
    repeats: Annotated[int, typer.Option("--repeats", "-r", metavar="N", min=1, help="Medians of N.")] = 3,
    after: Annotated[
        list[int] | None,
        typer.Option("--after", metavar="N", min=1, help="Also a pass of one row after N tokens.", show_default=False),
    ] = None,
    mtp: Annotated[bool, typer.Option("--mtp", help="What drafting gains, on nine kinds of prompt.")] = False,
    tokens: Annotated[int, typer.Option("--max-tokens", "-n", metavar="N", min=2, help="Of a text, with --mtp.")] = 128,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="OUT.svg", help="Draw what --mtp measures.", show_default=False)
    ] = None,
    project: Annotated[
        bool, typer.Option("--project", help="With --mtp: what its costs would make of the real Gemma 4.")
    ] = False,
    as_json: options.Json = False,
) -> None:
    """Measure a model on this machine.

    Seconds of a pass that checks T = 1 to 16 tokens, and of a step of the drafter if there is one; prompt speed at 128
    and 512 tokens, plain decode speed over 64 tokens; all medians; the peak memory of the process. --after 100 --after
    8000: how a long text slows decoding down, from passes in turns.

    With --mtp, instead, for nine kinds of prompt, greedy and at temperature 1 with top-k 64 and top-p 0.95: acceptance
    at depths 1 to 3, with and without loops; the speed of automatic drafting over plain decoding, measured in turns;
    and the cost of passes of 1 to 8 rows.
    """
    from gemma_mtp import Model

    if not mtp and (plot or project):
        raise SettingsError(f"{'--plot' if plot else '--project'} is about what --mtp measures: give that too.")
    name = options.only_model(first, model)
    loaded = Model.load(
        name,
        drafter=drafter,
        backend=backend,
        threads=threads,
        context=ctx,
        dtype=dtype,
        kv=kv,
        drafter_dtype=drafter_dtype,
        device=device,
    )
    if mtp:
        drafting_report.bench_drafting(loaded, tokens, repeats, plot, project, as_json)
        return
    found = measure(loaded, repeats, after or [])
    print(json.dumps(found) if as_json else table(found))


def measure(model: "Model", repeats: int, after: Sequence[int] = ()) -> dict[str, Any]:
    """Every figure of this command: seconds by pass width, tokens per second, bytes."""
    from gemma_mtp import SamplingParams
    from gemma_mtp.measuring.cost import measure_after, measure_costs, measured_text
    from gemma_mtp.prompts import NINE_KINDS

    ids = measured_text(model, max(PROMPT_LENGTHS))
    long = measure_after(model, after, repeats)
    costs = measure_costs(model, WIDTHS, repeats)
    prompts: dict[int, list[float]] = {length: [] for length in PROMPT_LENGTHS}
    decodes: list[float] = []
    for _ in range(repeats):
        for length, rates in prompts.items():
            stats = model.generate(model.detokenize(ids[:length]), SamplingParams(max_tokens=1), draft="off").stats
            rates.append(stats.prompt_tokens / stats.seconds_prompt)
        stats = model.generate(NINE_KINDS["story"], SamplingParams(max_tokens=DECODED), draft="off").stats
        decodes.append(stats.tokens_per_second)
    return {
        "model": model.name,
        "threads": model.threads,
        "repeats": repeats,
        "pass_seconds": costs.passes,
        "prompt_tokens_per_second": {length: statistics.median(rates) for length, rates in prompts.items()},
        "decode_tokens_per_second": statistics.median(decodes),
        "pass_seconds_after": long,
        "draft_step_seconds": costs.draft_step,
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
    if (step := found["draft_step_seconds"]) is not None:
        lines.append(f"draft step {step * 1e3:7.2f} {step / one:10.3f}")
    lines.append("")
    lines += [f"prompt of {n:4}  {rate:7.1f} tokens/s" for n, rate in found["prompt_tokens_per_second"].items()]
    lines += [f"a pass after {n:5} tokens {1e3 * after:7.2f} ms" for n, after in found["pass_seconds_after"].items()]
    lines.append(f"plain decoding  {found['decode_tokens_per_second']:7.1f} tokens/s")
    lines.append(f"peak memory     {found['peak_memory_bytes'] / 1e6:7.0f} MB")
    return "\n".join(lines)
