"""gemma-mtp inspect: what a checkpoint is and what it takes to run it, or what this CPU runs."""

import json
import math
import os
import platform
from collections import Counter, defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gemma_mtp.cli import options
from gemma_mtp.errors import SettingsError

if TYPE_CHECKING:
    from gemma_mtp.checkpoints.load import Checkpoint
    from gemma_mtp.config import LayerConfig

CACHE_BYTES = 2  # the KV cache is fp16


def inspect(
    path: Annotated[
        str | None,
        typer.Argument(
            metavar="PATH", help="A GGUF file, a Hugging Face folder, 'demo' or owner/name[:file].", show_default=False
        ),
    ] = None,
    ctx: Annotated[
        int | None,
        typer.Option(
            "--ctx", "-c", metavar="N", min=1, help="Context in tokens; by default the model's own.", show_default=False
        ),
    ] = None,
    cpu: Annotated[bool, typer.Option("--cpu", help="Tell which build of the kernels this CPU uses.")] = False,
    as_json: options.Json = False,
) -> None:
    """Tell what a checkpoint, a target or a drafter, is.

    Architecture, sizes, quantisation, tokenizer, and the memory that weights and KV cache take at a context length (of
    its own, or --ctx). With --cpu: which build of the kernels this CPU uses.
    """
    if (path is None) != cpu:
        raise SettingsError("inspect takes the path of a model or --cpu, one of them.")
    if path is None:
        found = describe_cpu()
    else:
        from gemma_mtp.checkpoints.hub import resolve

        found = describe(path, resolve(path), ctx)
    print(json.dumps(found, ensure_ascii=False) if as_json else lines(found))


def describe_cpu() -> dict[str, Any]:
    """The machine and the instruction-set builds of the kernels it can run, the one in use first."""
    from gemma_mtp import _native

    isas = _native.isas()
    return {"machine": platform.machine(), "cores": os.cpu_count(), "kernels": isas[0], "can run": isas}


def describe(name: str, path: Path, context: int | None) -> dict[str, Any]:
    """What the checkpoint at `path` is and what it takes; sizes in bytes. `name`: what the user called it.

    Raises CheckpointError.
    """
    from gemma_mtp.checkpoints.load import open_checkpoint
    from gemma_mtp.config import DrafterConfig, HeadsConfig, ModelConfig

    checkpoint = open_checkpoint(path)
    config = checkpoint.config
    origin = of_folder(name, checkpoint) if checkpoint.metadata is None else of_gguf(checkpoint)
    tensors = origin.pop("tensors")
    mix: dict[str, list[int]] = defaultdict(list)  # type -> bytes of each tensor
    for tensor in tensors:
        mix[tensor.type].append(tensor.nbytes)
    types = {kind: {"tensors": len(sizes), "bytes": sum(sizes)} for kind, sizes in mix.items()}
    found = {
        "path": str(checkpoint.path),
        **origin,
        "role": "target" if isinstance(config, ModelConfig) else "drafter",
        "parameters": sum(math.prod(tensor.shape) for tensor in tensors),
    }
    if isinstance(config, HeadsConfig):
        found |= {"heads": config.count, "target hidden": config.backbone_hidden}
    else:
        found |= {"layers": len(config.layers), "attention": layer_kinds(config.layers), "hidden": config.hidden}
    if isinstance(config, DrafterConfig):
        found |= {"target hidden": config.backbone_hidden, "centroids": config.centroids and config.centroids.count}
    found |= {"vocabulary": config.vocab, "types": dict(sorted(types.items(), key=lambda item: -item[1]["bytes"]))}
    if checkpoint.packed:
        found["layout"] = "packed"
    if checkpoint.ignored:
        found["tensors left aside"] = len(checkpoint.ignored)  # text does not need them
    weights = sum(of["bytes"] for of in types.values())
    memory = {"weights": weights, "sum": weights}
    if isinstance(config, ModelConfig):  # a drafter has no cache of its own
        context = context or config.context
        cache = config.kv_values(context) * CACHE_BYTES
        memory = {"context": context, "weights": weights, "kv cache": cache, "sum": weights + cache}
        found["trained context"] = config.context
    return found | {"memory": memory}


def of_gguf(checkpoint: "Checkpoint") -> dict[str, Any]:
    """What a GGUF file says of itself, and the `tensors` that are used."""
    metadata = checkpoint.metadata or {}
    return {
        "name": metadata.get("general.name"),
        "architecture": metadata["general.architecture"],
        "tokenizer": metadata.get("tokenizer.ggml.model"),
        "chat template": "tokenizer.chat_template" in metadata,
        "tensors": list(checkpoint.weights.values()),
    }


def of_folder(name: str, checkpoint: "Checkpoint") -> dict[str, Any]:
    """The same of a Hugging Face folder."""
    from gemma_mtp.checkpoints.keys import read_json
    from gemma_mtp.checkpoints.safetensors import open_folder
    from gemma_mtp.text.chat import folder_template

    folder, ignored = checkpoint.path, set(checkpoint.ignored)
    return {
        "name": Path(name).name or folder.resolve().name,
        "architecture": read_json(folder / "config.json")["model_type"],
        "tokenizer": "tokenizer.json" if (folder / "tokenizer.json").is_file() else None,
        "chat template": folder_template(folder) is not None,
        # As they are stored: those of an open checkpoint may be converted.
        "tensors": [tensor for name, tensor in open_folder(folder).items() if name not in ignored],
    }


def layer_kinds(layers: "tuple[LayerConfig, ...]") -> dict[str, int]:
    """How many layers attend in each way, e.g. `{"sliding 512": 15, "full": 3}`."""
    return dict(Counter(f"{layer.kind} {layer.window}" if layer.window else layer.kind for layer in layers))


def lines(found: dict[str, Any]) -> str:
    """The same for reading: a line for each fact."""
    shown = []
    for key, value in found.items():
        if key == "types":
            value = ", ".join(f"{kind} x{of['tensors']} ({megabytes(of['bytes'])})" for kind, of in value.items())
        elif key == "attention":
            value = ", ".join(f"{count} layers {kind}" for kind, count in value.items())
        elif key == "memory":
            parts = f"{megabytes(value['weights'])} weights"
            if "context" in value:
                parts += f", {megabytes(value['kv cache'])} KV cache of {value['context']:,} tokens"
            value = f"{megabytes(value['sum'])} ({parts})"
        elif isinstance(value, list):
            value = ", ".join(map(str, value))
        elif isinstance(value, bool):
            value = "yes" if value else "no"
        elif isinstance(value, int):
            value = f"{value:,}"
        shown.append(f"{key:16} {'-' if value is None else value}")
    return "\n".join(shown)


def megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
