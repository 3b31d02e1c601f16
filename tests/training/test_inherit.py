"""A drafter as wide as its target starts as the target's last layers, with a first matrix fitted to them."""

from dataclasses import replace

import pytest
import torch

from gemma_mtp.checkpoints.hf_config import config_from_hf
from gemma_mtp.config import DrafterConfig, ModelConfig
from gemma_mtp.training.drafter import PROJECTION, drafter_config, first_weights, inherited_layers, with_embedding
from gemma_mtp.training.fitting import fit_first_matrix
from gemma_mtp.training.optimise import initial_weights, on_device

from ..checkpoints.tiny import TARGETS

pytestmark = pytest.mark.usefixtures("one_torch_thread")


def pair(kind: str, **options: int) -> tuple[ModelConfig, DrafterConfig]:
    target = config_from_hf(TARGETS[kind])
    assert isinstance(target, ModelConfig)
    drafter = config_from_hf(drafter_config(target, **options))
    assert isinstance(drafter, DrafterConfig)
    return target, drafter


@pytest.mark.parametrize("kind", ["gemma3", "E2B", "31B"])
def test_the_last_layers_of_its_kinds_are_inherited(kind: str) -> None:
    target, drafter = pair(kind)
    layers = inherited_layers(drafter, target)
    assert layers is not None
    kinds = [layer.kind for layer in target.layers]
    full = max(i for i, kind in enumerate(kinds) if kind == "full")
    assert layers == [max(i for i in range(full) if kinds[i] == "sliding"), full]
    of_target = on_device(initial_weights(target))
    weights = first_weights(drafter, target, of_target)
    for own, i in enumerate(layers):
        for name in ("q", "o", "gate", "up", "down", "post_ffn_norm"):
            assert torch.equal(weights[f"{own}.{name}"], of_target[f"{i}.{name}"])
    assert PROJECTION not in weights
    assert torch.equal(with_embedding(weights, of_target["embed"])["embed"], of_target["embed"])


def test_layers_of_other_sizes_or_with_experts_are_not() -> None:
    assert inherited_layers(*reversed(pair("gemma3", hidden=32))) is None
    assert inherited_layers(*reversed(pair("26B-A4B"))) is None
    target, drafter = pair("gemma3")
    wider = tuple(replace(layer, mlp_width=layer.mlp_width + 16) for layer in drafter.layers)
    assert inherited_layers(replace(drafter, layers=wider), target) is None


def test_the_first_matrix_is_fitted_to_what_a_layer_is_given() -> None:
    """Of the first layer it must be a copy of the embedding; of a deeper one it explains a part."""
    target, _ = pair("gemma3")
    of_target = on_device(initial_weights(target))
    texts = torch.randint(0, 256, (40, 24), generator=torch.Generator().manual_seed(1))
    matrix, explained = fit_first_matrix(0, target, of_target, texts.split(10))
    # The first layer is given the newest token's embedding: half of what the matrix sees, so it can copy it.
    width = target.hidden
    assert explained > 0.999
    torch.testing.assert_close(matrix[:, :width], torch.eye(width), atol=0.02, rtol=0)
    torch.testing.assert_close(matrix[:, width:], torch.zeros(width, width), atol=0.02, rtol=0)
    _, explained = fit_first_matrix(len(target.layers) - 1, target, of_target, texts.split(10))
    assert 0.1 < explained < 0.999
