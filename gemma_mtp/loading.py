"""From the name of a model to all that runs it."""

from __future__ import annotations

import hashlib
import logging
import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from gemma_mtp import _native
from gemma_mtp.checkpoints.cache import MOST_BYTES, UNASKED_BYTES, cached_matrices
from gemma_mtp.checkpoints.compact import open_drafter
from gemma_mtp.checkpoints.hub import find_assistant, resolve
from gemma_mtp.checkpoints.load import Checkpoint, open_checkpoint
from gemma_mtp.checkpoints.quantization import DTYPES, Dtype
from gemma_mtp.checkpoints.tensors import TensorInfo
from gemma_mtp.config import AnyDrafterConfig, ModelConfig
from gemma_mtp.engine.interface import AnyEngine
from gemma_mtp.errors import CheckpointError, PairError, SettingsError
from gemma_mtp.text.chat import ChatTemplate
from gemma_mtp.text.tokenizer import Tokenizer

DEFAULT_CONTEXT = 8192
CACHE_VARIABLE = "GEMMA_MTP_CACHE"
BYTES_A_THREAD = 16 << 20
"""Less than this a thread reads in less time than threads take to wait for each other, above all on a busy machine."""

LIMITS = {"on": MOST_BYTES, "auto": UNASKED_BYTES, "off": 0}
"""The most bytes of packed weights that are kept, by what CACHE_VARIABLE says."""

_log = logging.getLogger("gemma_mtp")


@dataclass(frozen=True)
class Settings:
    """How to run a model: see Model.load for what each means."""

    backend: str = "native"
    threads: int | None = None
    context: int | None = None
    dtype: str | None = None
    drafter_dtype: str | None = None
    isa: str = "auto"
    device: str = "auto"
    cache: bool | None = None
    kv: str | None = None


@dataclass(frozen=True)
class Loaded:
    """A model's parts."""

    engine: AnyEngine
    tokenizer: Tokenizer
    template: ChatTemplate
    name: str
    drafter_name: str | None
    cost_key: str | None
    """Says all that the cost of a pass depends on (engine/cost_shape.py); None where nothing is to be kept."""


def load(model: str | Path, drafter: str | Path, settings: Settings) -> Loaded:
    """Opens a target and its drafter and makes them ready. Raises CheckpointError, PairError, SettingsError."""
    target = open_checkpoint(resolve(str(model)))
    if not isinstance(target.config, ModelConfig):
        raise CheckpointError(f"{target.path} is a drafter: give it with its target.")
    if skipped := target.skipped:
        _log.warning("%s %s", target.path, skipped)
    tokenizer = tokenizer_of(target)
    drafter_path = _drafter_path(drafter, model, target.path)
    assistant = open_drafter(drafter_path, target) if drafter_path else None
    if assistant and isinstance(assistant.config, ModelConfig):
        raise PairError(f"{assistant.path} is a target, not a drafter: give it as the model.")
    engine = _engine(target, target.config, assistant, settings)
    return Loaded(
        engine,
        tokenizer,
        _template(target, tokenizer),
        _name(target, model),
        _name(assistant, drafter_path) if assistant and drafter_path else None,
        _cost_key(target, settings, engine.threads) if _cached(settings) != "off" else None,
    )


def _engine(
    target: Checkpoint, config: ModelConfig, assistant: Checkpoint | None, settings: Settings
) -> AnyEngine:
    context = settings.context or min(DEFAULT_CONTEXT, config.context)
    if settings.context is not None and not 1 <= context <= config.context:
        raise SettingsError(f"The context is {context}: it must be between 1 and the model's {config.context}.")
    threads = _threads(settings.threads, sum(tensor.nbytes for tensor in target.weights.values()))
    drafter: AnyDrafterConfig | None = None
    if assistant:
        assert not isinstance(assistant.config, ModelConfig)
        drafter = assistant.config
        drafter.check_target(config)
    if settings.backend == "native":
        from gemma_mtp.engine.engine import Engine, KvDtype

        kv = next((known for known in get_args(KvDtype) if known == settings.kv), None)
        if kv != settings.kv:
            raise SettingsError(f"There is no KV cache of type '{settings.kv}': use {', '.join(get_args(KvDtype))}.")
        if settings.device not in ("auto", "cpu"):
            raise SettingsError(f"The native backend runs on the CPU, not on '{settings.device}': use --backend torch.")
        dtype = _dtype(settings.dtype)
        drafter_dtype = _drafter_dtype(settings.drafter_dtype, dtype, assistant)
        engine = Engine(
            config,
            target.weights,
            threads=threads,
            context=context,
            dtype=dtype,
            isa=settings.isa,
            packed=_packed(target, dtype, threads, settings),
            kv=kv,
        )
        if assistant and drafter:
            packed = _packed(assistant, drafter_dtype, threads, settings)
            engine.attach(drafter, assistant.weights, drafter_dtype, packed)
        return engine
    if settings.backend != "torch":
        raise SettingsError(f"There is no backend '{settings.backend}': use native or torch.")
    if settings.kv is not None:
        raise SettingsError("The torch backend keeps keys and values in its dtype: give a type of KV cache to native.")
    try:
        from gemma_mtp.engine.torch_engine import TorchEngine
    except ImportError:
        raise SettingsError("The torch backend needs PyTorch: run `pip install 'gemma-mtp[torch]'`.") from None
    run_by_torch = TorchEngine(
        config,
        target.weights,
        threads=settings.threads and threads,
        context=context,
        dtype=settings.dtype,
        device=settings.device,
    )
    if assistant and drafter:
        run_by_torch.attach(drafter, assistant.weights, settings.drafter_dtype)
    return run_by_torch


def _packed(checkpoint: Checkpoint, dtype: Dtype, threads: int, settings: Settings) -> dict[str, TensorInfo]:
    """What the cache holds of a checkpoint, if it is used."""
    if checkpoint.packed and dtype != "as-is":
        raise SettingsError(
            f"{checkpoint.path} is packed and runs with the types it has: for {dtype} give the checkpoint it is of."
        )
    limit = LIMITS[_cached(settings)]
    return cached_matrices(checkpoint, dtype, threads, limit) if limit else {}


def _cached(settings: Settings) -> str:
    """What is kept in the user's cache folder: "on", "auto" or "off"."""
    asked = os.environ.get(CACHE_VARIABLE, "auto").lower()
    if asked not in LIMITS:
        raise SettingsError(f"The variable {CACHE_VARIABLE} is '{asked}': it must be on, auto or off.")
    if settings.cache is not None:
        return "on" if settings.cache else "off"
    return asked


def _cost_key(target: Checkpoint, settings: Settings, threads: int) -> str:
    """Shapes and types, not values: fine-tunes of a model cost the same."""
    weights = sorted((name, tensor.type, tensor.shape) for name, tensor in target.weights.items())
    how = [settings.backend, settings.dtype, settings.isa, settings.device, settings.kv, threads, _kernels()]
    said = repr([target.config, weights, how, _processor()])
    return hashlib.sha256(said.encode()).hexdigest()[:16]


def _kernels() -> tuple[int, int]:
    """What tells one build of the native code from another."""
    stat = os.stat(_native.__file__)
    return stat.st_size, stat.st_mtime_ns


def _processor() -> str:
    try:
        told = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()
    return next((line for line in told.splitlines() if line.startswith("model name")), platform.processor())


def _dtype(asked: str | None) -> Dtype:
    chosen = next((known for known in DTYPES if known == (asked or "as-is").lower()), None)
    if chosen is None:
        raise SettingsError(f"There is no dtype '{asked}': use one of {', '.join(DTYPES)}.")
    return chosen


def _drafter_dtype(asked: str | None, of_target: Dtype, drafter: Checkpoint | None) -> Dtype:
    """What a drafter runs in if nobody says: floats in 8 bits, for what it proposes is checked, and a step is short."""
    if asked or not drafter or drafter.packed:
        return _dtype(asked)
    if of_target == "f32":
        return "f32"
    matrices = [tensor.type for tensor in drafter.weights.values() if len(tensor.shape) > 1]
    return "q8_0" if {"F32", "F16", "BF16"}.intersection(matrices) else "as-is"


def tokenizer_of(checkpoint: Checkpoint) -> Tokenizer:
    """The tokenizer that a checkpoint brings. Raises CheckpointError."""
    if checkpoint.metadata is None:
        return Tokenizer.from_folder(checkpoint.path)
    return Tokenizer.from_gguf(checkpoint.metadata)


def _template(checkpoint: Checkpoint, tokenizer: Tokenizer) -> ChatTemplate:
    if checkpoint.metadata is None:
        return ChatTemplate.from_folder(checkpoint.path, tokenizer)
    return ChatTemplate.from_gguf(checkpoint.metadata, tokenizer)


def _drafter_path(drafter: str | Path, model: str | Path, target: Path) -> Path | None:
    if str(drafter) == "none":
        return None
    if str(drafter) == "demo":  # which is a target's name too: here its drafter is meant
        return find_assistant("demo", target)
    return find_assistant(str(model), target) if str(drafter) == "auto" else resolve(str(drafter))


def _name(checkpoint: Checkpoint, model: str | Path) -> str:
    """What a GGUF file calls itself; of a folder, its name or the one it has on the hub."""
    if checkpoint.metadata is None:
        if checkpoint.path.parent.name == "snapshots":  # of the hub's cache: models--OWNER--NAME/snapshots/COMMIT
            return checkpoint.path.parents[1].name.rpartition("--")[2]
        return Path(model).name or checkpoint.path.resolve().name
    return str(checkpoint.metadata.get("general.name", checkpoint.path.stem))


def _threads(asked: int | None, weights: int) -> int:
    """As many as asked for, or one a core, but none for less than BYTES_A_THREAD of the weights' bytes."""
    if asked is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return min(cores, max(1, weights // BYTES_A_THREAD))
    if not 1 <= asked <= 1024:
        raise SettingsError(f"The number of threads is {asked}: it must be between 1 and 1024.")
    return asked
