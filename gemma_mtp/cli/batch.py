"""gemma-mtp batch: a file of requests answered without a server."""

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gemma_mtp.cli import options
from gemma_mtp.cli.serve import served_name
from gemma_mtp.errors import SettingsError

if TYPE_CHECKING:
    from gemma_mtp import AsyncEngine
    from gemma_mtp.server.batch import Task


def batch(
    source: Annotated[Path, typer.Argument(metavar="IN.jsonl", help="The requests, one a line.", show_default=False)],
    target: Annotated[Path, typer.Argument(metavar="OUT.jsonl", help="Where the answers go.", show_default=False)],
    model: options.ModelOption = None,
    drafter: options.Drafter = "auto",
    alias: Annotated[
        str | None,
        typer.Option("--alias", metavar="NAME", help="The model's name in the requests.", show_default=False),
    ] = None,
    parallel: Annotated[
        int, typer.Option("--parallel", metavar="N", help="Requests that run at once, each with a context of its own.")
    ] = 8,
    threads: options.Threads = None,
    ctx: options.Context = None,
    dtype: options.Dtype = None,
    kv: options.Kv = None,
) -> None:
    """Answer a file of requests as OpenAI's batches have them, and as `serve` would.

    A line of IN.jsonl has custom_id, method, url and body; OUT.jsonl gets a line for each in the same order, with the
    status and the body of the answer. Until all are there, OUT.jsonl.part holds those that are.
    """
    try:
        from gemma_mtp.server.batch import read_tasks
    except ImportError as error:
        raise SettingsError("Batches need more packages: run `pip install 'gemma-mtp[server]'`.") from error
    tasks = read_tasks(source)
    if not target.absolute().parent.is_dir():
        raise SettingsError(f"{target} cannot be written: there is no folder {target.absolute().parent}.")

    from gemma_mtp import AsyncEngine, Model
    from gemma_mtp.server.schema import MAX_CHOICES

    name = model or options.DEMO
    loaded = Model.load(name, drafter=drafter, threads=threads, context=ctx, dtype=dtype, kv=kv)
    engine = AsyncEngine(loaded, parallel=parallel, max_queue=parallel * MAX_CHOICES)
    answered = asyncio.run(_run(engine, alias or served_name(name), tasks, target, parallel))
    rest = "" if answered == len(tasks) else "; the others have errors"
    print(f"{answered} of {len(tasks)} requests were answered{rest}.", file=sys.stderr)


async def _run(engine: "AsyncEngine", name: str, tasks: "list[Task]", target: Path, parallel: int) -> int:
    """Writes the answers; how many of them are no errors."""
    from gemma_mtp.server.app import create_app
    from gemma_mtp.server.batch import answers

    app = create_app(engine, name, max_body=sys.maxsize)
    part, answered = target.with_name(target.name + ".part"), 0
    async with engine:
        with part.open("w", encoding="utf-8") as out:
            async for answer in answers(app, tasks, parallel):
                out.write(json.dumps(answer) + "\n")
                out.flush()
                answered += answer["response"]["status_code"] == 200
    os.replace(part, target)
    return answered
