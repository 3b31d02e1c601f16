"""Models of real size with random weights: their text is noise, their speed is real. Nothing is downloaded.

    python benchmarks/shaped.py FOLDER

writes E2B.gguf (2.6 GB) and its drafter, the folder E2B-assistant, for peers.py and gemma-mtp bench.

Matrices are windows of one file of random Q4_0 blocks, each window packed on its own, so that what a pass reads has the
size and the layout of the real model. The table of per-layer embeddings, of which a pass reads one row a token, is left
zero. The sizes of Gemma 4 E2B and its drafter are those of the configurations in transformers 5.21.0.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path

import numpy as np

from gemma_mtp import _native
from gemma_mtp.checkpoints.demo import demo_path
from gemma_mtp.checkpoints.gguf import GGUF
from gemma_mtp.checkpoints.gguf_keys import architecture, keys_from_config, rope_freqs
from gemma_mtp.checkpoints.gguf_writer import OutTensor, write_gguf
from gemma_mtp.checkpoints.hf_config import config_from_hf
from gemma_mtp.checkpoints.names import file_name, weight_shapes
from gemma_mtp.checkpoints.safetensors import encode_safetensors
from gemma_mtp.checkpoints.tensors import MappedFile, TensorInfo
from gemma_mtp.config import AnyConfig, DrafterConfig, ModelConfig
from gemma_mtp.engine.engine import Engine

_PATTERN = [*["sliding_attention"] * 4, "full_attention"]
_TEXT = {
    "model_type": "gemma4_text", "vocab_size": 262_144, "head_dim": 256, "global_head_dim": 512,
    "num_key_value_heads": 1, "max_position_embeddings": 131_072, "sliding_window": 512,
}  # fmt: skip
_E2B = {
    **_TEXT, "hidden_size": 1536, "intermediate_size": 6144, "num_hidden_layers": 35, "layer_types": _PATTERN * 7,
    "num_attention_heads": 8, "num_kv_shared_layers": 20, "use_double_wide_mlp": True,
    "hidden_size_per_layer_input": 256, "vocab_size_per_layer_input": 262_144, "final_logit_softcapping": 30.0,
}  # fmt: skip
_E2B_DRAFTER = {
    "model_type": "gemma4_assistant", "backbone_hidden_size": 1536, "use_ordered_embeddings": True,
    "num_centroids": 2048, "centroid_intermediate_top_k": 32,
    "text_config": {
        **_TEXT, "hidden_size": 256, "intermediate_size": 2048, "num_hidden_layers": 4,
        "layer_types": [*["sliding_attention"] * 3, "full_attention"], "num_attention_heads": 4,
        "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0,
    },
}  # fmt: skip
_WIDEST = 1 << 16  # values of the longest vector
_RANDOM = 256 << 20  # bytes of random blocks, more than any matrix that is multiplied with


def e2b(threads: int, context: int = 4096) -> Engine:
    """Gemma 4 E2B in Q4_0 with its drafter and centroid head: 1.3 GB in memory."""
    target, drafter = config_from_hf(_E2B), config_from_hf(_E2B_DRAFTER)
    assert isinstance(target, ModelConfig)
    assert isinstance(drafter, DrafterConfig)
    engine = Engine(target, _random_tensors(target), threads=threads, context=context)
    engine.attach(drafter, _random_tensors(drafter))
    return engine


def write_target(path: Path) -> None:
    """As GGUF, with the demo's tokenizer, whose vocabulary has the same size."""
    config = config_from_hf(_E2B)
    assert isinstance(config, ModelConfig)
    tokenizer = {key: value for key, value in GGUF.open(demo_path()).metadata.items() if key.startswith("tokenizer.")}
    keys = keys_from_config(config, _TEXT["max_position_embeddings"])
    factors = rope_freqs(config)
    assert factors is not None, "it is a Gemma 4"
    rotation = OutTensor("rope_freqs.weight", factors.shape, "F32", lambda: [factors.view(np.uint8)])
    matrices = [
        OutTensor(file_name(name, "gguf"), tensor.shape, tensor.type, lambda data=tensor.data: [data])
        for name, tensor in _random_tensors(config).items()
    ]
    write_gguf(path, {"general.architecture": architecture(config), **keys, **tokenizer}, [rotation, *matrices])


def write_drafter(folder: Path) -> None:
    """In float16, as Hugging Face has it."""
    config = config_from_hf(_E2B_DRAFTER)
    rng = np.random.default_rng(0)
    tensors = {}
    for name, shape in weight_shapes(config).items():
        if name == "token_ordering":
            tensors[name] = rng.permutation(config.vocab)
        elif len(shape) > 1:
            tensors[name] = (rng.standard_normal(shape, np.float32) / np.sqrt(shape[-1])).astype(np.float16)
        else:
            tensors[name] = np.ones(shape, np.float16)
    types = {np.dtype(np.int64): "I64", np.dtype(np.float16): "F16"}
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(_E2B_DRAFTER, indent=2) + "\n")
    with open(folder / "model.safetensors", "wb") as out:
        described = {file_name(name, "hf"): (types[tensor.dtype], tensor.shape) for name, tensor in tensors.items()}
        out.write(encode_safetensors(described))
        for tensor in tensors.values():
            out.write(tensor.data)


def _random_tensors(config: AnyConfig) -> dict[str, TensorInfo]:
    shapes = weight_shapes(config)
    sizes = {name: _nbytes(shape) for name, shape in shapes.items() if len(shape) > 1}
    rng = np.random.default_rng(0)
    with tempfile.NamedTemporaryFile(delete=False) as out:
        out.write(np.ones(_WIDEST, np.float32).tobytes())
        blocks = rng.integers(0, 256, (min(_RANDOM, max(sizes.values())) // 18, 18), dtype=np.uint8)
        blocks[:, :2] = np.frombuffer(np.float16(1 / (4.6 * np.sqrt(config.hidden))).tobytes(), np.uint8)
        out.write(blocks.tobytes())
        ordering = out.tell()
        out.write(rng.permutation(config.vocab).astype(np.int32).tobytes())
        out.truncate(max(out.tell(), 4 * _WIDEST + max(sizes.values())))
    file = MappedFile(Path(out.name))
    os.unlink(out.name)
    tensors = {}
    for name, shape in shapes.items():
        if name == "token_ordering":
            kind, start, size = "I32", ordering, 4 * config.vocab
        elif len(shape) > 1:
            kind, start, size = "Q4_0", 4 * _WIDEST, sizes[name]
        else:
            kind, start, size = "F32", 0, 4 * shape[0]
        tensors[name] = TensorInfo(name, shape, kind, file.bytes[start : start + size], start, file)
    return tensors


def _nbytes(shape: tuple[int, ...]) -> int:
    return _native.file_row_bytes("Q4_0", shape[-1]) * int(np.prod(shape[:-1], dtype=np.int64))


def main() -> None:
    parser = argparse.ArgumentParser(description="Writes a random Gemma 4 of the sizes of E2B, and its drafter.")
    parser.add_argument("folder", type=Path)
    folder: Path = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    write_target(folder / "E2B.gguf")
    write_drafter(folder / "E2B-assistant")


if __name__ == "__main__":
    main()
