"""gemma-mtp inspect on folders, drafters and a model far larger than this machine's memory."""

import json
import struct
from pathlib import Path

import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from gemma_mtp.checkpoints.hf_config import config_from_hf
from gemma_mtp.checkpoints.names import file_name, weight_shapes
from gemma_mtp.cli.inspect import describe, lines

from ..checkpoints.gguf_files import ARRAY, BOOL, F32, U32, File, array, pair, scalar, tensor
from ..checkpoints.tiny import DRAFTER, TARGETS, write_folder, write_gguf

CHAT = {"chat_template": "{{ messages[0].content }}"}


def test_a_folder_says_what_it_is(tmp_path: Path) -> None:
    folder = tmp_path / "tiny"
    weights = write_folder(folder, TARGETS["gemma3"])
    (folder / "tokenizer_config.json").write_text(json.dumps(CHAT))
    found = describe("owner/tiny-gemma", folder, 100)
    parameters = sum(value.size for value in weights.values())
    assert (found["name"], found["architecture"], found["role"]) == ("tiny-gemma", "gemma3_text", "target")
    assert (found["chat template"], found["tokenizer"]) == (True, None)
    assert found["parameters"] == parameters
    assert found["types"] == {"F32": {"tensors": len(weights), "bytes": 4 * parameters}}
    assert found["attention"] == {"sliding 32": 6, "full": 1}
    # K and V of 2 heads of 32 values in fp16.
    assert found["memory"]["kv cache"] == (6 * 32 + 100) * 2 * 2 * 32 * 2


def test_a_multimodal_folder_says_what_text_leaves_aside(tmp_path: Path) -> None:
    config = {"model_type": "gemma3", "text_config": TARGETS["gemma3"]}
    weights = write_folder(tmp_path, config, extra={"model.vision_tower.x": np.ones((4, 4), np.float32)})
    found = describe("x", tmp_path, None)
    assert found["tensors left aside"] == 1
    assert found["parameters"] == sum(value.size for value in weights.values())


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_a_drafter_says_for_which_targets_it_is(tmp_path: Path, kind: str) -> None:
    if kind == "folder":
        path = tmp_path / "assistant"
        write_folder(path, DRAFTER)
    else:
        path = tmp_path / "assistant.gguf"
        write_gguf(path, config_from_hf(DRAFTER), kind="Q8_0")
    found = describe(str(path), path, None)
    assert (found["role"], found["target hidden"], found["centroids"], found["layers"]) == ("drafter", 96, 64, 3)
    assert found["memory"] == {"weights": found["memory"]["sum"], "sum": found["memory"]["weights"]}
    assert "drafter" in lines(found)


def test_parallel_heads_are_a_drafter(tmp_path: Path) -> None:
    sizes = {"backbone_hidden_size": 64, "vocab_size": 256, "num_heads": 3, "intermediate_size": 96}
    write_folder(tmp_path, {"model_type": "gemma_mtp_heads", **sizes})
    found = describe("heads", tmp_path, None)
    assert (found["role"], found["heads"], found["target hidden"]) == ("drafter", 3, 64)


# Gemma 4 31B as SPEC.md has it: every 6th layer is full, with 4 of the 16 key/value heads and its keys as values.
LARGE = {
    "model_type": "gemma4_text",
    "hidden_size": 5376,
    "vocab_size": 262_144,
    "num_hidden_layers": 60,
    "num_attention_heads": 32,
    "num_key_value_heads": 16,
    "num_global_key_value_heads": 4,
    "head_dim": 256,
    "global_head_dim": 512,
    "intermediate_size": 21_504,
    "sliding_window": 1024,
    "max_position_embeddings": 262_144,
    "hidden_size_per_layer_input": 0,
    "attention_k_eq_v": True,
    "final_logit_softcapping": 30.0,
}
CONTEXT = 32_768


def write_large(path: Path, kind: GGMLQuantizationType) -> None:
    """A GGUF file of such a model: its header and rotation factors, then a hole as large as its weights."""
    full = [i % 6 == 5 for i in range(60)]
    key = "gemma4.{}".format
    numbers = {
        "context_length": 262_144, "embedding_length": 5376, "block_count": 60, "attention.head_count": 32,
        "attention.key_length": 512, "attention.value_length": 512, "attention.key_length_swa": 256,
        "attention.value_length_swa": 256, "attention.sliding_window": 1024, "feed_forward_length": 21_504,
    }  # fmt: skip
    pairs = [scalar("general.architecture", 8, "gemma4")]
    pairs += [scalar(key(name), U32, value) for name, value in numbers.items()]
    pairs += [scalar(key("attention.layer_norm_rms_epsilon"), F32, 1e-6)]
    pairs += [scalar(key("final_logit_softcapping"), F32, 30.0)]
    pairs += [array(key("attention.head_count_kv"), U32, [4 if is_full else 16 for is_full in full])]
    sliding = struct.pack("<IQ60?", BOOL, 60, *(not is_full for is_full in full))
    pairs += [pair(key("attention.sliding_window_pattern"), ARRAY, sliding)]
    block, block_bytes = GGML_QUANT_SIZES[kind]
    infos, offset = [tensor("rope_freqs.weight", [256], 0, 0)], 1024
    for name, shape in weight_shapes(config_from_hf(LARGE)).items():
        matrix = len(shape) > 1
        infos.append(tensor(file_name(name, "gguf"), list(reversed(shape)), int(kind) if matrix else 0, offset))
        size = int(np.prod(shape)) // block * block_bytes if matrix else 4 * shape[0]
        offset += -(-size // 32) * 32
    factors = np.array([1.0] * 64 + [1e30] * 192, np.float32)
    header = bytes(File(pairs, infos))
    with path.open("wb") as file:
        file.write(header + factors.tobytes())
        file.truncate(len(header) + offset)


def test_a_31b_says_what_memory_it_takes(tmp_path: Path) -> None:
    path = tmp_path / "31b-Q4_0.gguf"
    write_large(path, GGMLQuantizationType.Q4_0)
    assert path.stat().st_blocks * 512 < 10_000_000
    found = describe(str(path), path, CONTEXT)
    mlp, hidden = 3 * 5376 * 21_504, 5376
    sliding = mlp + (2 * 32 + 2 * 16) * 256 * hidden
    full = mlp + (2 * 32 + 4) * 512 * hidden  # q and o of 32 heads, keys of 4, no values
    matrices = 262_144 * hidden + 50 * sliding + 10 * full
    assert found["attention"] == {"sliding 1024": 50, "full": 10}
    assert found["types"]["Q4_0"]["bytes"] == matrices // 32 * 18
    assert found["parameters"] == pytest.approx(matrices, rel=1e-3)
    cache = (50 * 1024 * 16 * 256 + 10 * CONTEXT * 4 * 512) * 2 * 2  # keys and values, 2 bytes each
    assert found["memory"]["kv cache"] == cache
    assert found["memory"]["sum"] == found["memory"]["weights"] + cache
    assert "memory           20,795.0 MB (17,271.8 MB weights, 3,523.2 MB KV cache of 32,768 tokens)" in lines(found)
