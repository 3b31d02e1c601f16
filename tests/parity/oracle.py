"""What transformers computes for a tiny checkpoint, to hold an engine against."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from ..checkpoints.tiny import DRAFTER


def load(folder: Path) -> PreTrainedModel:
    """The model of a folder in float32; every weight of the folder must have its place, and every place a weight."""
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity(logging.ERROR)
    model, found = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(found.values()), found
    return model.eval()


def drafter_for(target: Mapping[str, Any], *, centroids: bool, hidden: int = 48) -> dict[str, Any]:
    """config.json of a drafter that fits a tiny Gemma 4 target."""
    unified = "unified" in target["model_type"]
    of_target = ("num_attention_heads", "num_key_value_heads", "num_global_key_value_heads", "attention_k_eq_v")
    text = {
        **DRAFTER["text_config"],
        **{key: target[key] for key in of_target if key in target},
        "model_type": target["model_type"],
        "hidden_size": hidden,
    }
    if unified:
        del text["hidden_size_per_layer_input"], text["vocab_size_per_layer_input"]
    return {
        **DRAFTER,
        "model_type": "gemma4_unified_assistant" if unified else "gemma4_assistant",
        "backbone_hidden_size": target["hidden_size"],
        "use_ordered_embeddings": centroids,
        "text_config": text,
    }


class Run(NamedTuple):
    """One pass over a text: logits float32 [tokens, vocab], last hidden states after the final norm [tokens, hidden]."""

    logits: np.ndarray
    hidden: np.ndarray


@torch.no_grad()
def run(model: PreTrainedModel, tokens: Sequence[int]) -> Run:
    outputs = model(torch.tensor([tokens]), output_hidden_states=True, use_cache=False)
    return Run(outputs.logits[0].numpy(), outputs.hidden_states[-1][0].numpy())


class Drafted(NamedTuple):
    """A draft step by step: its tokens, their logits [steps, vocab], the state after each [steps, backbone hidden].

    Logits of tokens that a centroid head leaves out are -inf.
    """

    tokens: list[int]
    logits: np.ndarray
    hidden: np.ndarray


@torch.no_grad()
def draft(target: PreTrainedModel, drafter: PreTrainedModel, tokens: Sequence[int], depth: int) -> Drafted:
    """What a drafter proposes greedily after `tokens`, the last of which the target has not run yet.

    As SinglePositionMultiTokenCandidateGenerator of transformers drives it, but for the keys it sees. That hands over
    what the target's cache returned, cut to len(tokens), and its mask keeps the last window + 1 of a sliding layer's
    keys. Here these are the keys of the tokens before the newest, and of a sliding layer those in the window of the
    newest token's own position p: p + 1 - window to p - 1.
    """
    outputs = target(
        torch.tensor([tokens[:-1]]), output_hidden_states=True, return_shared_kv_states=True, use_cache=False
    )
    window = drafter.config.get_text_config().sliding_window
    seen = {"full_attention": len(tokens) - 1, "sliding_attention": window - 1}
    shared = {kind: (k[:, :, -seen[kind] :], v[:, :, -seen[kind] :]) for kind, (k, v) in outputs.shared_kv_states.items()}
    token, hidden = torch.tensor([[tokens[-1]]]), outputs.hidden_states[-1][:, -1:]
    embed = target.get_input_embeddings()
    chosen, logits, states = [], [], []
    for _ in range(depth):
        step = drafter(
            inputs_embeds=torch.cat([embed(token), hidden], dim=-1),
            position_ids=torch.tensor([[len(tokens) - 1]]),
            shared_kv_states=shared,
            use_cache=False,
        )
        token, hidden = step.logits.argmax(dim=-1), step.last_hidden_state
        chosen.append(token.item())
        logits.append(step.logits[0, 0].numpy())
        states.append(hidden[0, 0].numpy())
    scores = np.stack(logits)
    if drafter.config.use_ordered_embeddings:  # transformers gives what it leaves out the lowest score less 1
        scores[scores == scores.min(axis=1, keepdims=True)] = -np.inf
    return Drafted(chosen, scores, np.stack(states))


def error(found: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference between two arrays, relative to the largest value; infinities must be in the same places."""
    finite = np.isfinite(expected)
    assert np.array_equal(np.isfinite(found), finite)
    return float(np.abs(found[finite] - expected[finite]).max() / np.abs(expected[finite]).max())
