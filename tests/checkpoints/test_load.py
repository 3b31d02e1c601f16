import dataclasses
import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, Gemma3Config, Gemma3ForConditionalGeneration

from gemma_mtp.checkpoints.demo import demo_path
from gemma_mtp.checkpoints.gguf import GGUF
from gemma_mtp.checkpoints.gguf_config import config_from_gguf
from gemma_mtp.checkpoints.hf_config import config_from_hf
from gemma_mtp.checkpoints.load import Checkpoint, open_checkpoint
from gemma_mtp.config import CentroidsConfig, DrafterConfig, ModelConfig
from gemma_mtp.errors import CheckpointError, PairError

from .tiny import DRAFTER, TARGETS, drafter_for, write_gguf


def random_model(config: dict, seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=torch.bfloat16)


def assert_same_weights(checkpoint: Checkpoint, state: dict[str, torch.Tensor], hf_names: dict[str, str]) -> None:
    for canonical, name in hf_names.items():
        info = checkpoint.weights[canonical]
        expected = state[name].contiguous().view(torch.uint8).numpy().reshape(-1)
        np.testing.assert_array_equal(info.data, expected, canonical)


@pytest.mark.parametrize("kind", TARGETS)
def test_a_folder_saved_by_transformers_opens(tmp_path: Path, kind: str) -> None:
    model = random_model(TARGETS[kind])
    model.save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.ignored == []
    assert sum(np.prod(info.shape) for info in checkpoint.weights.values()) == model.num_parameters() + sum(
        buffer.numel() for name, buffer in model.named_buffers() if name.endswith("layer_scalar")
    )
    names = {"embed": "model.embed_tokens.weight", "2.q": "model.layers.2.self_attn.q_proj.weight"}
    assert_same_weights(checkpoint, model.state_dict(), names)
    assert checkpoint.weights["embed"].type == "BF16"


@pytest.mark.parametrize("kind", TARGETS)
def test_the_same_model_as_gguf_has_the_same_configuration(tmp_path: Path, kind: str) -> None:
    config = config_from_hf(json.loads(AutoConfig.for_model(**TARGETS[kind]).to_json_string()))
    assert isinstance(config, ModelConfig)
    write_gguf(tmp_path / "model.gguf", config)
    found = open_checkpoint(tmp_path / "model.gguf").config
    assert isinstance(found, ModelConfig)
    assert found.eps == pytest.approx(config.eps)
    assert dataclasses.replace(found, eps=config.eps) == config


@pytest.mark.parametrize("kind", TARGETS)
def test_layers_are_those_transformers_builds(kind: str) -> None:
    reference = AutoConfig.for_model(**TARGETS[kind])
    model = AutoModelForCausalLM.from_config(reference)
    config = config_from_hf(json.loads(reference.to_json_string()))
    assert isinstance(config, ModelConfig)
    rotary = model.model.rotary_emb
    for layer, theirs in zip(config.layers, model.model.layers, strict=True):
        attention = theirs.self_attn
        assert layer.window == attention.sliding_window
        assert layer.head_dim == attention.head_dim
        assert layer.heads // layer.kv_heads == attention.num_key_value_groups
        assert layer.mlp_width == theirs.mlp.gate_proj.out_features
        assert (layer.shares_kv_with is not None) == getattr(attention, "is_kv_shared_layer", False)
        if layer.shares_kv_with is None:
            assert layer.value_is_key == (attention.v_proj is None)
        assert config.attention_scale == pytest.approx(attention.scaling)
        frequencies = getattr(rotary, f"{layer.kind}_attention_inv_freq")
        rope = layer.rope
        ours = [rope.theta ** (-2 * i / layer.head_dim) / rope.factor for i in range(rope.pairs)]
        ours += [0.0] * (layer.head_dim // 2 - rope.pairs)
        np.testing.assert_allclose(frequencies.numpy(), ours, rtol=1e-5)


def test_layers_share_keys_with_the_last_own_layer_of_their_kind() -> None:
    config = config_from_hf(TARGETS["E2B"])
    assert isinstance(config, ModelConfig)
    assert [layer.shares_kv_with for layer in config.layers] == [None] * 6 + [4, 4, 5]
    assert (config.kv_source("sliding"), config.kv_source("full")) == (4, 5)
    assert [layer.mlp_width for layer in config.layers] == [96] * 6 + [192] * 3
    own = 4 * 2 * 32 * 32 + 2 * 2 * 64 * 100  # sliding layers keep their window, full ones all 100 positions
    assert config.kv_values(100) == own


def test_earlier_and_later_spellings_of_a_config_mean_the_same() -> None:
    earlier = TARGETS["31B"]
    later = json.loads(AutoConfig.for_model(**earlier).to_json_string())
    assert "per_layer_config" in later
    assert "global_head_dim" not in later
    assert config_from_hf(earlier) == config_from_hf(later)


def test_a_multimodal_gemma_3_opens_as_its_text_part(tmp_path: Path) -> None:
    text = TARGETS["gemma3"]
    vision = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = Gemma3Config(text_config=text, vision_config={**vision, "image_size": 28, "patch_size": 14})
    Gemma3ForConditionalGeneration(config).save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    checkpoint = open_checkpoint(tmp_path)
    assert all("vision" in name or "projector" in name for name in checkpoint.ignored)
    assert len(checkpoint.ignored) > 10
    assert checkpoint.config.layers == config_from_hf(text).layers


def test_gemma_3_norms_come_with_the_factor_they_multiply_by(tmp_path: Path) -> None:
    model = random_model(TARGETS["gemma3"])
    norm = model.model.layers[0].input_layernorm.weight
    torch.nn.init.normal_(norm)
    model.save_pretrained(tmp_path)
    info = open_checkpoint(tmp_path).weights["0.attn_norm"]
    assert info.type == "F32"
    np.testing.assert_array_equal(info.data.view("<f4"), (1.0 + norm.float()).detach().numpy())


def test_a_drafter_opens_from_both_formats(tmp_path: Path) -> None:
    random_model(DRAFTER).save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    config = checkpoint.config
    assert isinstance(config, DrafterConfig)
    assert config.centroids == CentroidsConfig(64, 32)
    assert checkpoint.weights["token_ordering"].type == "I64"
    assert not {"0.k", "0.v", "lm_head"} & checkpoint.weights.keys()
    write_gguf(tmp_path / "drafter.gguf", config)
    assert dataclasses.replace(open_checkpoint(tmp_path / "drafter.gguf").config, eps=config.eps) == config


def test_a_drafter_knows_its_target() -> None:
    config = config_from_hf(TARGETS["E2B"])
    drafter = config_from_hf(drafter_for(TARGETS["E2B"], centroids=True))
    assert isinstance(config, ModelConfig)
    assert isinstance(drafter, DrafterConfig)
    drafter.check_target(config)
    with pytest.raises(PairError, match="hidden size 32"):
        dataclasses.replace(drafter, backbone_hidden=32).check_target(config)
    with pytest.raises(PairError, match="has 512 tokens"):
        dataclasses.replace(drafter, vocab=512).check_target(config)
    wide = tuple(dataclasses.replace(layer, head_dim=64) for layer in config.layers)
    with pytest.raises(PairError, match="reads keys of size 32, but the target's have 64"):
        drafter.check_target(dataclasses.replace(config, layers=wide))
    more = tuple(dataclasses.replace(layer, kv_heads=2) for layer in config.layers)
    with pytest.raises(PairError, match="reads 1 key/value heads; the target's have 2"):
        drafter.check_target(dataclasses.replace(config, layers=more))
    with pytest.raises(PairError, match="of which the target has none"):
        drafter.check_target(dataclasses.replace(config, layers=config.layers[:2]))


def test_a_gemma_3_of_62_layers_scales_attention_by_its_width() -> None:
    metadata = dict(GGUF.open(demo_path()).metadata)
    tensors = GGUF.open(demo_path()).tensors
    small = config_from_gguf(metadata, tensors)
    large = config_from_gguf({**metadata, "gemma3.block_count": 62}, tensors)
    assert isinstance(small, ModelConfig)
    assert isinstance(large, ModelConfig)
    assert small.attention_scale == 256**-0.5
    assert large.attention_scale == (640 / 4) ** -0.5


def test_the_demo_has_all_its_weights() -> None:
    checkpoint = open_checkpoint(demo_path())
    assert len(checkpoint.weights) == 236
    assert checkpoint.config.layers[5].kind == "full"
    assert [layer.kind for layer in checkpoint.config.layers].count("full") == 3


def rename(path: Path, old: str, new: str) -> None:
    data = path.read_bytes()
    assert len(old) == len(new)
    path.write_bytes(data.replace(old.encode(), new.encode()))


def test_missing_left_over_and_misshapen_weights_are_named(tmp_path: Path) -> None:
    config = config_from_hf(TARGETS["gemma3"])
    path = tmp_path / "model.gguf"
    write_gguf(path, config)
    rename(path, "blk.3.attn_q.weight", "blk.3.attn_x.weight")
    with pytest.raises(CheckpointError, match=r"lacks the tensor 'blk\.3\.attn_q\.weight'\.$"):
        open_checkpoint(path)
    write_gguf(path, dataclasses.replace(config, layers=config.layers[:6]))
    data = path.read_bytes()
    block_count = b"gemma3.block_count" + struct.pack("<II", 4, 6)
    assert block_count in data
    path.write_bytes(data.replace(block_count, block_count[:-4] + struct.pack("<I", 5)))
    with pytest.raises(CheckpointError, match=r"has the tensors 'blk\.5.* and 10 more, which this kind"):
        open_checkpoint(path)
    key_length = b"attention.key_length" + struct.pack("<II", 4, 32)
    value_length = key_length.replace(b"key", b"value")
    assert value_length.replace(b"value", b"key") in data
    wrong = data.replace(key_length, key_length[:-4] + struct.pack("<I", 64))
    path.write_bytes(wrong.replace(value_length, value_length[:-4] + struct.pack("<I", 64)))
    with pytest.raises(CheckpointError, match=r"'blk\.0\.attn_q\.weight' of shape .128, 64. where its .* .256, 64."):
        open_checkpoint(path)
