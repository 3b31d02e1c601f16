"""What the native code refuses, and that nothing is lost by it."""

import subprocess
import sys

import pytest

from gemma_mtp import Model, PromptError, SamplingParams, SettingsError, _native
from gemma_mtp.checkpoints.hub import resolve
from gemma_mtp.checkpoints.load import open_checkpoint
from gemma_mtp.engine.engine import Engine

THREADS = """
import resource
from gemma_mtp import _native
resource.setrlimit(resource.RLIMIT_AS, (600 << 20, 600 << 20))  # room for the stacks of a few
try:
    _native.ThreadPool(1024)
except _native.InputError as error:
    print(error)
"""


@pytest.mark.parametrize("layer", [(1, 48, 0), (1, 16, 0), (1, 0, 0), (-1, 64, 0), (1, 64, -1), (0, 64, 0)])
def test_layers_that_no_kernel_is_for(layer: tuple[int, int, int]) -> None:
    with pytest.raises(_native.InputError, match=r"multiple of 32|keeps keys and values"):
        _native.KvCache("f16", [layer], 256)
    _native.KvCache("f16", [(1, 64, 0), (0, 64, 0)], 256)


def test_a_sequence_that_finds_no_memory_takes_none() -> None:
    checkpoint = open_checkpoint(resolve("demo"))
    engine = Engine(checkpoint.config, checkpoint.weights, threads=1, context=512)
    engine.limit_memory(engine.memory_for(1) - 1)  # enough for the first layers' page, not for the others'
    sequence = engine.create()
    with pytest.raises(PromptError, match="KV cache is full"):
        engine.step(sequence, [2, 5, 7], 1, SamplingParams())
    assert engine.memory.held == 0
    engine.limit_memory(0)
    assert engine.step(sequence, [2, 5, 7], 1, SamplingParams()).tokens
    engine.release(sequence)


@pytest.mark.skipif(sys.platform != "linux", reason="a limit of addresses")
def test_threads_that_cannot_be_started_are_said() -> None:
    done = subprocess.run([sys.executable, "-c", THREADS], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("of 1024 threads only ")


def test_a_model_says_so_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(threads: int) -> None:
        raise _native.InputError("of 4 threads only 1 could be started (no)")

    monkeypatch.setattr(_native, "ThreadPool", none)
    with pytest.raises(SettingsError, match=r"of 4 threads only 1 could be started \(no\)\.$"):
        Model.load("demo", threads=4, cache=False)
