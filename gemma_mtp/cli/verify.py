"""gemma-mtp verify: decodes in every drafting mode and says whether all agreed token by token."""

import json
from typing import Annotated

import typer

from gemma_mtp.cli import options

DRAFTS: tuple[str | int, ...] = ("off", 1, 2, 4, 8, "auto")
SEEDS = (1, 2, 3)
THREADS = (1, 2)


def verify(
    first: options.ModelArgument = None,
    model: options.ModelOption = None,
    drafter: options.Drafter = "auto",
    tokens: Annotated[int, typer.Option("--tokens", "-n", metavar="N", min=1, help="Tokens of each text.")] = 192,
    quick: Annotated[bool, typer.Option("--quick", help="Greedy and one seed, 32 tokens.")] = False,
    ctx: options.Context = None,
    backend: options.Backend = "native",
    device: options.Device = "auto",
    dtype: options.Dtype = None,
    kv: options.Kv = None,
    drafter_dtype: options.DrafterDtype = None,
    as_json: options.Json = False,
) -> None:
    """Check that drafting never changes a token.

    Decodes nine kinds of prompt with drafting off, at depths 1, 2, 4, 8 and auto, with 1 and 2 threads, greedy and
    sampled with three seeds, and compares every token. Exit 0: all agreed; 1: some did not.
    """
    from gemma_mtp import Model, SamplingParams
    from gemma_mtp.prompts import NINE_KINDS

    name = options.only_model(first, model)
    length = min(tokens, 32) if quick else tokens
    samplings = {"greedy": SamplingParams(max_tokens=length)}
    for seed in SEEDS[:1] if quick else SEEDS:
        samplings[f"seed {seed}"] = SamplingParams(max_tokens=length, temperature=1.0, seed=seed)
    reference: dict[tuple[str, str], list[int]] = {}  # the tokens that every other way has to give as well
    differences: list[str] = []
    compared = accepted = drafted = 0
    for threads in THREADS:
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
        for kind, prompt in NINE_KINDS.items():
            before = len(differences)
            for sampling, params in samplings.items():
                for draft in DRAFTS:
                    generation = loaded.generate(prompt, params, draft=draft)
                    drafted += generation.stats.drafted
                    accepted += generation.stats.accepted
                    if (kind, sampling) not in reference:
                        reference[kind, sampling] = generation.tokens
                        continue
                    compared += 1
                    at = first_difference(reference[kind, sampling], generation.tokens)
                    if at is not None:
                        differences.append(f"{kind}, {sampling}, draft {draft}, {threads} threads: token {at} differs")
            if not as_json:
                print(f"{threads} threads, {kind}: {'agrees' if len(differences) == before else 'DIFFERS'}", flush=True)
    if as_json:
        found = {"agreed": not differences, "compared": compared, "differences": differences}
        print(json.dumps(found | {"drafted": drafted, "accepted": accepted}))
    else:
        print(*differences, sep="\n", end="\n" if differences else "")
        outcome = f"{len(differences)} differ" if differences else "all agreed token by token"
        texts = f"{compared + len(reference)} texts of up to {length} tokens"
        print(f"{texts}, {accepted} of {drafted} drafted tokens accepted: {outcome}.")
    if differences:
        raise typer.Exit(1)


def first_difference(a: list[int], b: list[int]) -> int | None:
    """The first position at which two token lists differ, None if they are equal."""
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return None if len(a) == len(b) else min(len(a), len(b))
