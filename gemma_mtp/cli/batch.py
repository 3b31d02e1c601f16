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
    resume: Annotated[bool, typer.Option("--resume", help="Keep the answers of a run that was stopped.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT.jsonl if it exists.")] = False,
) -> None:
    """Answer a file of requests as OpenAI's batches have them, and as `serve` would.

    A line of IN.jsonl has custom_id, method, url and body; OUT.jsonl gets a line for each in the same order, with the
    status and the body of the answer. Until all are there, OUT.jsonl.part holds those that are; --resume goes on there.
    """
    try:
        from gemma_mtp.server.batch import answered_before, read_tasks
    except ImportError as error:
        raise SettingsError("Batches need more packages: run `pip install 'gemma-mtp[server]'`.") from error
    tasks = read_tasks(source)
    check_target(source, target, force)
    part = target.with_name(target.name + ".part")
    if part.exists() and not resume:
        raise SettingsError(f"{part} has the answers of a run that was stopped: go on with --resume, or delete it.")
    statuses = answered_before(part, tasks) if part.exists() else []

    from gemma_mtp import AsyncEngine, Model
    from gemma_mtp.server.schema import MAX_CHOICES

    name = model or options.DEMO
    loaded = Model.load(name, drafter=drafter, threads=threads, context=ctx, dtype=dtype, kv=kv)
    engine = AsyncEngine(loaded, parallel=parallel, max_queue=parallel * MAX_CHOICES)
    try:
        asyncio.run(_run(engine, alias or served_name(name), tasks, statuses, part, parallel))
    except KeyboardInterrupt:
        print(f"Stopped. What is answered is in {part}: go on with --resume.", file=sys.stderr)
        raise typer.Exit(130) from None
    os.replace(part, target)
    answered = statuses.count(200)
    rest = "" if answered == len(tasks) else "; the others have errors"
    print(f"{answered} of {len(tasks)} requests were answered{rest}.", file=sys.stderr)


def check_target(source: Path, target: Path, force: bool) -> None:
    """Raises SettingsError if the answers should not or cannot go there: before any is computed."""
    if not target.absolute().parent.is_dir():
        raise SettingsError(f"{target} cannot be written: there is no folder {target.absolute().parent}.")
    if target.is_dir() or not target.name:
        raise SettingsError(f"{target} is a folder: name a file for the answers.")
    if target.exists() and target.samefile(source):
        raise SettingsError(f"{target} holds the requests: give another file for the answers.")
    if target.exists() and not force:
        raise SettingsError(f"{target} exists: give another name, or --force to replace it.")


async def _run(
    engine: "AsyncEngine", name: str, tasks: "list[Task]", statuses: list[int], part: Path, parallel: int
) -> None:
    """Adds the answers to a file, and their statuses to those of the first tasks, which it has already."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from gemma_mtp.server.app import create_app
    from gemma_mtp.server.batch import answers

    app = create_app(engine, name, max_body=sys.maxsize)
    done, console = len(statuses), Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    async with engine:
        with Progress(*columns, console=console, disable=not console.is_terminal) as bar, part.open("a") as out:
            shown = bar.add_task("Answered", total=len(tasks), completed=done)
            async for answer in answers(app, tasks[done:], parallel):
                out.write(json.dumps(answer) + "\n")
                out.flush()
                statuses.append(answer["response"]["status_code"])
                bar.advance(shown)
