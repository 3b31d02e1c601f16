"""Gemma with multi-token prediction: more tokens per second, the very same tokens.

>>> from gemma_mtp import Model, SamplingParams
>>> model = Model.load("demo")
>>> model.generate("The capital of France is", SamplingParams(max_tokens=8)).text
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gemma_mtp.async_engine import AsyncEngine, AsyncStream
    from gemma_mtp.decoding.sampling import SamplingParams
    from gemma_mtp.errors import (
        BusyError,
        CheckpointError,
        GemmaMtpError,
        LateError,
        PairError,
        PromptError,
        SettingsError,
    )
    from gemma_mtp.generation import Generation, Stream
    from gemma_mtp.model import Model

__all__ = [
    "AsyncEngine",
    "AsyncStream",
    "BusyError",
    "CheckpointError",
    "GemmaMtpError",
    "Generation",
    "LateError",
    "Model",
    "PairError",
    "PromptError",
    "SamplingParams",
    "SettingsError",
    "Stream",
]

_HOMES = {
    "AsyncEngine": "async_engine",
    "AsyncStream": "async_engine",
    "SamplingParams": "decoding.sampling",
    "Generation": "generation",
    "Model": "model",
    "Stream": "generation",
}


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used, so that the command line can start without numpy and the kernels."""
    if name not in __all__:
        raise AttributeError(f"module 'gemma_mtp' has no attribute '{name}'")
    return getattr(import_module(f"gemma_mtp.{_HOMES.get(name, 'errors')}"), name)
