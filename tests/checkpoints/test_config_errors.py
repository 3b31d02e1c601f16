"""What a configuration gets wrong is said in one sentence, for both formats."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_mtp.checkpoints.demo import demo_path
from gemma_mtp.checkpoints.gguf import GGUF
from gemma_mtp.checkpoints.gguf_config import config_from_gguf
from gemma_mtp.checkpoints.hf_config import config_from_hf
from gemma_mtp.checkpoints.load import open_checkpoint
from gemma_mtp.errors import CheckpointError

from .tiny import DRAFTER, TARGETS, write_gguf

SHARED = TARGETS["E2B"]
EXPERTS = TARGETS["26B-A4B"]

HF = {
    "no model type": ({}, "lacks the key 'model_type'"),
    "another model": ({"model_type": "llama"}, "kind 'llama', but only gemma3, gemma3_text, gemma4"),
    "type not a text": ({"model_type": 3}, "not a text"),
    "text config a list": ({"model_type": "gemma3", "text_config": []}, "not an object"),
    "hidden 0": ({**SHARED, "hidden_size": 0}, "'hidden_size' set to 0"),
    "hidden negative": ({**SHARED, "hidden_size": -64}, "'hidden_size' set to -64"),
    "hidden a fraction": ({**SHARED, "hidden_size": 64.5}, "not a whole number"),
    "hidden true": ({**SHARED, "hidden_size": True}, "'hidden_size' set to True"),
    "hidden absurd": ({**SHARED, "hidden_size": 10**30}, "not a whole number from 1"),
    "layers absurd": ({**SHARED, "num_hidden_layers": 10**9}, "'num_hidden_layers' set to 1000000000"),
    "eps 0": ({**SHARED, "rms_norm_eps": 0.0}, "not a number above 0"),
    "eps beyond all numbers": ({**SHARED, "rms_norm_eps": 10**400}, "not a number above 0"),
    "eps a text": ({**SHARED, "rms_norm_eps": "1e-6"}, "not a number above 0"),
    "layer types short": ({**SHARED, "layer_types": ["full_attention"]}, "'layer_types' that does not name"),
    "layer types unknown": ({**SHARED, "layer_types": ["linear_attention"] * 9}, "'layer_types' that does not name"),
    "layer types nested": ({**SHARED, "layer_types": [["full_attention"]] * 9}, "'layer_types' that does not name"),
    "heads uneven": ({**SHARED, "num_key_value_heads": 3}, "4 heads cannot share 3 key/value heads"),
    "head odd": ({**SHARED, "head_dim": 15}, "head dimension 15 is odd"),
    "all layers shared": ({**SHARED, "num_kv_shared_layers": 9}, "9 of 9 layers cannot take"),
    "nothing to share": ({**SHARED, "num_kv_shared_layers": 7}, "no layer of full attention has keys"),
    "layer override": ({**SHARED, "per_layer_config": {"3": {"hidden_size": 3}}}, "set for one layer"),
    "rope unknown": ({**SHARED, "rope_parameters": {"full_attention": {"rope_type": "yarn"}}}, "set to 'yarn'"),
    "rope not an object": ({**SHARED, "rope_parameters": 3}, "not an object"),
    "rope partial": (
        {**SHARED, "rope_parameters": {"full_attention": {"rope_type": "default", "partial_rotary_factor": 0.5}}},
        "does not allow",
    ),
    "experts beyond count": ({**EXPERTS, "top_k_experts": 9}, "9 active experts are more than the 8"),
    "experts missing": ({**EXPERTS, "num_experts": None}, "lacks the key 'num_experts'"),
    "activation": ({**SHARED, "hidden_activation": "silu"}, "other than gelu_pytorch_tanh"),
    "bias": ({**SHARED, "attention_bias": True}, "bias"),
    "encoder": ({**TARGETS["gemma3"], "use_bidirectional_attention": True}, "encoder"),
    "eos outside": ({**SHARED, "eos_token_id": [1, 256]}, "eos token 256 is outside the vocabulary of 256"),
    "eos a text": ({**SHARED, "eos_token_id": "1"}, "'eos_token_id' set to '1'"),
    "centroids uneven": ({**DRAFTER, "num_centroids": 100}, "100 centroids cannot share 256 tokens"),
    "centroids few": ({**DRAFTER, "num_centroids": 16}, "32 active centroids are more than the 16"),
}


def assert_one_sentence(message: str) -> None:
    assert message.endswith(".")
    assert message.isprintable()
    assert "Traceback" not in message


@pytest.mark.parametrize("name", HF)
def test_a_fault_of_config_json_is_said(name: str) -> None:
    config, fault = HF[name]
    with pytest.raises(CheckpointError, match=fault) as caught:
        config_from_hf(config, "somewhere/config.json")
    assert str(caught.value).startswith("somewhere/config.json ")
    assert_one_sentence(str(caught.value))


GGUF_FAULTS = {
    "no architecture": ("general.architecture", None, "lacks the key 'general.architecture'"),
    "another architecture": (
        "general.architecture",
        "llama",
        "kind 'llama', but only gemma3, gemma4, gemma4-assistant",
    ),
    "no layers": ("gemma3.block_count", None, "lacks the key 'gemma3.block_count'"),
    "layers 0": ("gemma3.block_count", 0, "'gemma3.block_count' set to 0"),
    "layers a text": ("gemma3.block_count", "18", "'gemma3.block_count' set to '18'"),
    "layers an array": ("gemma3.block_count", np.arange(3), "not a whole number"),
    "heads for fewer layers": ("gemma3.attention.head_count", np.array([4, 4]), "with 2 values for 18 layers"),
    "heads a fraction": ("gemma3.attention.head_count", 4.0, "'gemma3.attention.head_count' set to 4.0"),
    "no window": ("gemma3.attention.sliding_window", None, "lacks the key"),
    "value length": ("gemma3.attention.value_length", 128, "another size"),
    "pattern short": (
        "gemma3.attention.sliding_window_pattern",
        np.array([True]),
        "one flag for each of the 18 layers",
    ),
    "pattern of numbers": ("gemma3.attention.sliding_window_pattern", np.arange(18), "one flag for each"),
    "scaling kind": ("gemma3.rope.scaling.type", "yarn", "set to 'yarn', but only linear"),
    "theta not a number": ("gemma3.rope.freq_base", float("nan"), "not a number above 0"),
    "theta infinite": ("gemma3.rope.freq_base", float("inf"), "not a number above 0"),
    "vocabulary": ("tokenizer.ggml.tokens", ["a", "b"], "embeddings of 262144 tokens, but a vocabulary of 2"),
    "bos outside": ("tokenizer.ggml.bos_token_id", 262_144, "bos token 262144 is outside"),
}


@pytest.mark.parametrize("name", GGUF_FAULTS)
def test_a_fault_of_gguf_metadata_is_said(name: str) -> None:
    key, value, fault = GGUF_FAULTS[name]
    file = GGUF.open(demo_path())
    metadata = {**file.metadata, key: value}
    with pytest.raises(CheckpointError, match=fault) as caught:
        config_from_gguf(metadata, file.tensors, "model.gguf")
    assert str(caught.value).startswith("model.gguf ")
    assert_one_sentence(str(caught.value))


@pytest.mark.parametrize("factors", [[2.0] * 32, [1e30] * 32, [1.0] * 8, [1e30] * 4 + [1.0] * 28, [float("nan")] * 32])
def test_rotation_factors_of_another_kind_are_said(tmp_path: Path, factors: list[float]) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, config_from_hf(SHARED))
    file = GGUF.open(path)
    info = file.tensors["rope_freqs.weight"]
    data = np.array(factors, np.float32)
    changed = type(info)(info.name, data.shape, "F32", data.view(np.uint8), 0, info.file)
    with pytest.raises(CheckpointError, match=r"'rope_freqs\.weight' that is not 32 times 1, then 1e30"):
        config_from_gguf(file.metadata, {**file.tensors, info.name: changed}, path)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from([1, 2, 4, 8, 10**400]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=300, deadline=None)
@given(kind=st.sampled_from(sorted(TARGETS)), key=st.integers(0, 10**6), value=JSON)
def test_any_value_of_any_key_is_accepted_or_said(kind: str, key: int, value: object) -> None:
    config = {**TARGETS[kind], "rope_parameters": None, "per_layer_config": None, "eos_token_id": None}
    config = {**config, sorted(config)[key % len(config)]: value}
    try:
        config_from_hf(config)
    except CheckpointError as error:
        assert_one_sentence(str(error))


def test_faults_of_a_folder_are_said(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no model"):
        open_checkpoint(tmp_path)
    config = tmp_path / "config.json"
    for text, fault in [
        ("", "JSON that cannot be read"),
        ("[]", "not an object with keys"),
        ('{"a": 1, "a": 2}', "same key twice"),
        ("[" * 100_000, "JSON that cannot be read"),
        ("1" * 5000, "JSON that cannot be read"),
        (json.dumps(TARGETS["gemma3"]), r"model\.safetensors does not exist"),
    ]:
        config.write_text(text)
        with pytest.raises(CheckpointError, match=fault) as caught:
            open_checkpoint(tmp_path)
        assert_one_sentence(str(caught.value))
