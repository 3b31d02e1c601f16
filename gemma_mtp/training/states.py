"""What a target computes of texts, kept on disk for its drafter to learn from, in shards that a later run goes on from.

Shard NNNNN.safetensors holds `tokens` int32 [texts, length], `hidden` float16 [texts, length, hidden], `top` int32
[texts, length, TOP], the target's likeliest next tokens, and of each cache layer I that drafters read `I.k` and `I.v`
float16 [texts, length, kv_heads * head_dim]. Probabilities are computed from `hidden` when they are needed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from gemma_mtp.checkpoints.files import written_whole
from gemma_mtp.config import ModelConfig
from gemma_mtp.decoding.sampling import SamplingParams
from gemma_mtp.model import Model
from gemma_mtp.ops.torch import PassCache, TorchWeights
from gemma_mtp.training.data import Windows
from gemma_mtp.training.distill import Lesson
from gemma_mtp.training.evaluate import generate
from gemma_mtp.training.pretrain import run_target

TOP = 32
TEXTS_A_SHARD = 16
WHOLE_VOCABULARY = 8192  # up to so many tokens all are compared, above only likely ones and some at random
RANDOM_CANDIDATES = 2048


def sources(config: ModelConfig) -> list[int]:
    """The cache layers that drafters read."""
    return [layer for kind in ("sliding", "full") if (layer := config.kv_source(kind)) is not None]


def bytes_a_token(config: ModelConfig) -> int:
    """What a token of a shard takes on disk."""
    kept = [config.layers[layer] for layer in sources(config)]
    return 4 + 2 * config.hidden + 4 * TOP + sum(4 * layer.kv_heads * layer.head_dim for layer in kept)


@dataclass(frozen=True)
class Recipe:
    """What the texts of the shards are: a quarter from the data; of the others a third greedy, the rest sampled."""

    length: int  # tokens of a text, its prompt included
    seed: int


def make_shards(
    folder: Path, count: int, model: Model, weights: TorchWeights, windows: Windows, recipe: Recipe
) -> Iterator[int]:
    """Makes the shards that are not there yet and yields how many there are after each.

    model: the target, whose native engine writes the texts; weights: the same for PyTorch, which gives its states.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        path = folder / f"{number:05}.safetensors"
        texts = windows.batch(TEXTS_A_SHARD)  # drawn for shards that are there too: the data is that of one seed
        if not path.exists():
            for row in range(TEXTS_A_SHARD):
                if row % 4:
                    texts[row] = _continued(model, texts[row], recipe, number * TEXTS_A_SHARD + row)
            shard = compute(weights, model.config, torch.from_numpy(texts))
            with written_whole(path) as out:
                out.write(save(shard))
        yield number + 1


def _continued(model: Model, text: NDArray[np.int64], recipe: Recipe, number: int) -> NDArray[np.int64]:
    """A text of the target's own after the first tokens of `text`, of the same length."""
    prompt = text[: 16 + 16 * (number % 3)].tolist()
    params = SamplingParams(
        max_tokens=recipe.length - len(prompt),
        temperature=0.0 if number % 3 == 0 else 1.0,
        seed=recipe.seed * 1_000_003 + number,
        ignore_eos=True,
    )
    return np.array(prompt + generate(model, prompt, params).tokens, np.int64)


@torch.no_grad()
def compute(weights: TorchWeights, config: ModelConfig, texts: Tensor) -> dict[str, Tensor]:
    """The tensors of a shard, of int64 [texts, length]; one text at a time, for the logits take the most memory."""
    parts: dict[str, list[Tensor]] = {}
    for text in texts:
        decoded, cache = run_target(weights, config, text[None])
        found = {"tokens": text.int(), "hidden": decoded.hidden.half()}
        found["top"] = decoded.logits.topk(min(TOP, config.vocab)).indices.int()
        for layer in sources(config):
            k, v = cache.read(layer, 0, len(text))
            found |= {f"{layer}.k": k.half(), f"{layer}.v": v.half()}
        for name, value in found.items():
            parts.setdefault(name, []).append(value.cpu())
    return {name: torch.stack(values) for name, values in parts.items()}


class Lessons:
    """Lessons drawn from shards at random.

    output_embedding: float32 [vocab, hidden] of the target, which turns its hidden states into logits.
    """

    def __init__(self, folder: Path, config: ModelConfig, output_embedding: Tensor, texts: int, seed: int = 0):
        self._paths = sorted(folder.glob("*.safetensors"))
        self._config, self._embedding, self._texts = config, output_embedding, texts
        self._rng = np.random.default_rng(seed)

    @torch.no_grad()
    def next(self) -> Lesson:
        path = self._paths[self._rng.integers(len(self._paths))]
        first = int(self._rng.integers(TEXTS_A_SHARD - self._texts + 1))
        device = self._embedding.device
        with safe_open(path, "pt") as file:
            part = {name: file.get_slice(name)[first : first + self._texts].to(device) for name in file.keys()}  # noqa: SIM118
        cache = PassCache(self._texts)
        for layer in sources(self._config):
            cache.write(layer, 0, *(part[f"{layer}.{name}"].flatten(0, 1).float() for name in "kv"))
        candidates = self._candidates(part["top"])
        hidden = part["hidden"].float()
        logits = hidden @ (self._embedding if candidates is None else self._embedding[candidates]).T
        if cap := self._config.logit_softcap:
            logits = cap * torch.tanh(logits / cap)
        return Lesson(part["tokens"].long(), hidden, cache, logits.softmax(-1), candidates)

    def _candidates(self, top: Tensor) -> Tensor | None:
        vocab = self._config.vocab
        if vocab <= WHOLE_VOCABULARY:
            return None
        others = torch.from_numpy(self._rng.integers(0, vocab, RANDOM_CANDIDATES)).to(top.device)
        return torch.cat([top.flatten().long(), others]).unique()
