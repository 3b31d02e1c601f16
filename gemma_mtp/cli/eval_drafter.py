"""gemma-mtp eval-drafter: how often a drafter is right, and what that gains."""

import json
from typing import Annotated

import typer

from gemma_mtp.cli import drafting_report, options


def eval_drafter(
    target: Annotated[str, typer.Argument(metavar="TARGET", help="The model.")],
    drafter: Annotated[str, typer.Argument(metavar="DRAFTER", help="Its drafter: a folder, a file, or a name.")],
    depth: Annotated[int, typer.Option("--depth", metavar="N", min=1, max=15, help="Tokens a round drafts.")] = 3,
    tokens: Annotated[int, typer.Option("--max-tokens", metavar="N", min=2, help="Of each generation.")] = 128,
    repeats: Annotated[int, typer.Option("--repeats", "-r", metavar="N", min=1, help="Medians of N.")] = 2,
    threads: options.Threads = None,
    as_json: options.Json = False,
) -> None:
    """Measure a drafter on nine kinds of prompt: acceptance at each depth, and speed over plain decoding.

    The table of `bench --mtp`: greedy, and at temperature 1 with top-k 64 and top-p 0.95. Acceptance is also given
    without loops, that is up to where a text repeats 16 tokens of itself. The speed-up is of `--draft auto`, prompt
    lookup included.
    """
    from gemma_mtp import Model

    model = Model.load(target, drafter=drafter, threads=threads)
    found, _, _ = drafting_report.report_gains(model, tokens, depth, repeats, as_json)
    if as_json:
        print(json.dumps(found))
