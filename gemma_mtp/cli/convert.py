"""gemma-mtp convert: any supported checkpoint to a GGUF file that llama.cpp loads too, or packed to start at once."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gemma_mtp.errors import SettingsError

if TYPE_CHECKING:
    from gemma_mtp.training.calibrate import Moments


def convert(
    source: Annotated[str, typer.Argument(metavar="IN", help="'demo', a path, or owner/name[:file] on the hub.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The file to write.")],
    kind: Annotated[
        str | None,
        typer.Option(
            "--type",
            metavar="TYPE",
            help="Of matrices: f32, f16, bf16, q8_0, q6_k, q5_1, q5_0, q4_k, q4_1 or q4_0; or packed.",
            show_default=False,
        ),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option("--target", metavar="MODEL", help="Of a compact drafter: its target.", show_default=False),
    ] = None,
    calibrate: Annotated[
        list[Path] | None,
        typer.Option(
            "--calibrate",
            metavar="PATH",
            help="With --type q4_0: text to be exact on, best what the model writes or reads; files or folders.",
            show_default=False,
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT if it exists.")] = False,
) -> None:
    """Convert a checkpoint to GGUF, or pack it, with its tokenizer and chat template.

    Takes a Hugging Face folder or a GGUF file. Without --type each matrix keeps its type; vectors and routers become
    f32. A drafter's centroid head, which llama.cpp cannot read, goes into OUT's neighbour NAME.centroids.safetensors.

    --type packed writes a file that starts at once and whose memory processes share: each matrix with the type it has,
    as this program's kernels read it.

    --calibrate rounds weights so that each makes up for the errors of those before it, as far as they matter on the
    text (GPTQ): a better Q4_0 file, read by every runtime that reads Q4_0. It needs PyTorch, the model in float32 in
    memory, and minutes.
    """
    from gemma_mtp.checkpoints.convert import PACKED
    from gemma_mtp.checkpoints.convert import convert as write
    from gemma_mtp.checkpoints.hub import resolve
    from gemma_mtp.checkpoints.quantization import TYPES

    if kind is not None and kind.lower() not in (*TYPES, PACKED):
        raise SettingsError(f"There is no type '{kind}' to convert to: use one of {', '.join(TYPES)} or {PACKED}.")
    moments = None
    if calibrate:
        if (kind or "").lower() != "q4_0":
            raise SettingsError("--calibrate rounds to q4_0 only: give --type q4_0 with it.")
        moments = _moments(source, calibrate)
    of_target = resolve(target) if target else None
    for path in write(resolve(source), out, kind and kind.lower(), force, of_target, moments):
        print(f"{path}: {path.stat().st_size / 1e6:,.1f} MB")


def _moments(source: str, paths: list[Path]) -> "Moments":
    """What the model's matrices are multiplied with in the texts at `paths`."""
    try:
        from gemma_mtp.training.calibrate import calibrate
        from gemma_mtp.training.data import read_texts
    except ModuleNotFoundError as missing:
        if missing.name != "torch":
            raise
        raise SettingsError("--calibrate needs PyTorch: run `pip install 'gemma-mtp[train]'`.") from None
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("reading the text"), BarColumn(), TimeRemainingColumn()
    texts = read_texts(paths)
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=1.0)
        return calibrate(source, texts, lambda share: progress.update(task, completed=share))
