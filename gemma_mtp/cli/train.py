"""gemma-mtp train: a drafter for a target."""

import os
from pathlib import Path
from typing import Annotated, Literal

import typer

from gemma_mtp.cli import drafting_report
from gemma_mtp.errors import SettingsError


def train(
    target: Annotated[str, typer.Option("--target", metavar="MODEL", help="The model to train a drafter for.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Where the drafter goes.")],
    kind: Annotated[
        Literal["assistant", "heads"],
        typer.Option("--kind", help="Google's MTP drafter, or three parallel heads on the target's last hidden state."),
    ] = "assistant",
    data: Annotated[
        list[Path] | None,
        typer.Option(
            "--data",
            metavar="PATH",
            help="Text, sources, JSONL; python (default): its library; itself: also what the model says unasked.",
        ),
    ] = None,
    more: Annotated[
        list[Path] | None,
        typer.Argument(metavar="PATH", help="More data: --data takes any number of paths.", show_default=False),
    ] = None,
    tokens: Annotated[int, typer.Option("--tokens", metavar="N", min=1, help="Tokens to learn from.")] = 400_000,
    disk: Annotated[float, typer.Option("--disk", metavar="GB", min=0, help="The most its states may take.")] = 4.0,
    minutes: Annotated[float, typer.Option("--minutes", metavar="N", min=0, help="Of training.")] = 30.0,
    hidden: Annotated[
        int | None,
        typer.Option(
            "--hidden",
            metavar="N",
            min=2,
            help="The drafter's width (heads: their MLP's); by default the model's.",
            show_default=False,
        ),
    ] = None,
    layers: Annotated[int, typer.Option("--layers", metavar="N", min=2, max=64, help="The drafter's layers.")] = 2,
    centroids: Annotated[
        int | None,
        typer.Option("--centroids", metavar="N", min=0, help="Of its head; 0: a full head.", show_default=False),
    ] = None,
    active: Annotated[int, typer.Option("--active", metavar="N", min=1, help="Centroids looked into a step.")] = 32,
    length: Annotated[int, typer.Option("--length", metavar="N", min=64, help="Tokens of a text.")] = 384,
    accumulate: Annotated[
        int, typer.Option("--accumulate", metavar="N", min=1, help="Batches of an update, one after another.")
    ] = 1,
    init: Annotated[
        str | None,
        typer.Option("--init", metavar="DIR", help="A drafter to go on from.", show_default=False),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", metavar="N", min=0)] = 0,
    threads: Annotated[int | None, typer.Option("--threads", "-t", metavar="N", min=1, show_default=False)] = None,
    gguf: Annotated[bool, typer.Option("--gguf", help="Also write the drafter as GGUF.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the training in DIR.")] = False,
    speed: Annotated[
        bool, typer.Option("--speed/--no-speed", help="At the end, measure what it gains by kind of prompt.")
    ] = True,
    plan: Annotated[bool, typer.Option("--plan", help="Only say what would be done.")] = False,
) -> None:
    """Train a drafter for a target.

    The target continues pieces of the data, its states are kept in DIR/states, and a drafter learns to say what it
    says. Ctrl-C keeps what there is; --resume goes on. DIR becomes a folder that transformers loads too.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    # PyTorch's threads otherwise spin while they wait, and with other work on the machine that is most of the time.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        from gemma_mtp import Model
        from gemma_mtp.training.train import Training, TrainSettings
    except ModuleNotFoundError as missing:
        if missing.name != "torch":
            raise
        raise SettingsError("Training needs PyTorch: run `pip install 'gemma-mtp[train]'`.") from None

    settings = TrainSettings(
        target=target,
        kind=kind,
        data=tuple(str(path) for path in (*(data or ()), *(more or ()))),
        tokens=tokens,
        gigabytes=disk,
        minutes=minutes,
        hidden=hidden,
        layers=layers,
        centroids=centroids,
        active=active,
        length=length,
        accumulate=accumulate,
        seed=seed,
        threads=threads,
        init=init,
    )
    if more and not data:
        raise SettingsError(f"What is '{more[0]}'? Give data after --data.")
    if gguf and kind == "heads":
        raise SettingsError("GGUF has no form for parallel heads: leave --gguf out.")
    training = Training(settings, out)
    console = Console(stderr=True)
    print(training.plan())
    if plan:
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:.0f}%"),
        TimeRemainingColumn(),
    )
    try:
        with Progress(*columns, console=console) as bar:
            tasks: dict[str, int] = {}

            def show(what: str, share: float) -> None:
                if what not in tasks:
                    tasks[what] = bar.add_task(what, total=1.0)
                bar.update(tasks[what], completed=share)  # type: ignore[arg-type]

            training.run(resume, show, lambda line: console.print(line, highlight=False))
        if speed:
            training.add_to_card(drafting_report.card_section(Model.load(target, drafter=out, threads=threads)))
    except KeyboardInterrupt:
        print(f"Stopped. What there is was kept in {out}: go on with --resume.")
        raise typer.Exit(130) from None
    for path in training.gguf() if gguf else ():
        print(path)
    print(f"{out} is a drafter: gemma-mtp run {target} --drafter {out}")
