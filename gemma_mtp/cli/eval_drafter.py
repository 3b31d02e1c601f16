"""gemma-mtp eval-drafter: how often a drafter is right, and what that gains."""

import json
from typing import Annotated, Any

import typer

from gemma_mtp.cli import options


def eval_drafter(
    target: Annotated[str, typer.Argument(metavar="TARGET", help="The model.")],
    drafter: Annotated[str, typer.Argument(metavar="DRAFTER", help="Its drafter: a folder, a file, or a name.")],
    depth: Annotated[int, typer.Option("--depth", metavar="N", min=1, max=15, help="Tokens a round drafts.")] = 3,
    tokens: Annotated[int, typer.Option("--max-tokens", metavar="N", min=2, help="Of each generation.")] = 128,
    threads: options.Threads = None,
    as_json: options.Json = False,
) -> None:
    """Measure a drafter on nine kinds of prompt: acceptance at each depth, and speed over plain decoding.

    Greedy, and at temperature 1 with top-k 64 and top-p 0.95. Acceptance is also given without loops, that is up to
    where a text repeats 16 tokens of itself. The speed-up is of `--draft auto`, prompt lookup included.
    """
    from gemma_mtp import Model, SamplingParams
    from gemma_mtp.prompts import NINE_KINDS
    from gemma_mtp.training.evaluate import acceptance, speed_up

    model = Model.load(target, drafter=drafter, threads=threads)
    rows: list[dict[str, Any]] = []
    for name, settings in (("greedy", {}), ("sampled", {"temperature": 1.0, "top_k": 64, "top_p": 0.95})):
        params = SamplingParams(max_tokens=tokens, **settings)  # type: ignore[arg-type]
        for kind, prompt in NINE_KINDS.items():
            ids = [model.tokenize(prompt)]
            rows.append(
                {
                    "decoding": name,
                    "kind": kind,
                    "acceptance": acceptance(model, ids, params, depth).rates,
                    "without loops": acceptance(model, ids, params, depth, loops=False).rates,
                    "speed-up": speed_up(model, ids[0], params),
                }
            )
    if as_json:
        print(json.dumps({"target": model.name, "drafter": model.drafter_name, "rows": rows}))
        return
    print(f"{'':20}  acceptance at depth 1 to {depth:<3} without loops{'':12} speed-up")
    for row in rows:
        every, some = (" ".join(f"{rate:.2f}" for rate in row[key]) for key in ("acceptance", "without loops"))
        print(f"{row['decoding']:8} {row['kind']:11}  {every:27} {some:25} {row['speed-up']:.2f}")
