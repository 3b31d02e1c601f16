"""gemma-mtp convert: any supported checkpoint to a GGUF file that llama.cpp loads too, or packed to start at once."""

from pathlib import Path
from typing import Annotated

import typer

from gemma_mtp.errors import SettingsError


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
    force: Annotated[bool, typer.Option("--force", help="Replace OUT if it exists.")] = False,
) -> None:
    """Convert a checkpoint to GGUF, or pack it, with its tokenizer and chat template.

    Takes a Hugging Face folder or a GGUF file. Without --type each matrix keeps its type; vectors and routers become
    f32. A drafter's centroid head, which llama.cpp cannot read, goes into OUT's neighbour NAME.centroids.safetensors.

    --type packed writes a file that starts at once and whose memory processes share: each matrix with the type it has,
    as this program's kernels read it.
    """
    from gemma_mtp.checkpoints.convert import PACKED
    from gemma_mtp.checkpoints.convert import convert as write
    from gemma_mtp.checkpoints.hub import resolve
    from gemma_mtp.checkpoints.quantization import TYPES

    if kind is not None and kind.lower() not in (*TYPES, PACKED):
        raise SettingsError(f"There is no type '{kind}' to convert to: use one of {', '.join(TYPES)} or {PACKED}.")
    for path in write(resolve(source), out, kind and kind.lower(), force, resolve(target) if target else None):
        print(f"{path}: {path.stat().st_size / 1e6:,.1f} MB")
