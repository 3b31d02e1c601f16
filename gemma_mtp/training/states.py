"""What a target computes of texts, kept on disk for its drafter to learn from, in shards that a later run goes on from.

Shard NNNNN.safetensors holds `tokens` int32 [texts, length], `hidden` float16 [texts, length, hidden], `top` int32
[texts, length, TOP], the target's likeliest next tokens, and of each cache layer I that drafters read `I.k` and `I.v`
float16 [texts, length, kv_heads * head_dim]. Probabilities are computed from `hidden` when they are needed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from gemma_mtp.checkpoints.files import written_whole
from gemma_mtp.config import ModelConfig
from gemma_mtp.decoding.sampling import SamplingParams
from gemma_mtp.engine.engine import Engine
from gemma_mtp.engine.interface import Part
from gemma_mtp.ops.torch import PassCache
from gemma_mtp.training.data import Windows
from gemma_mtp.training.distill import Lesson
from gemma_mtp.training.evaluate import in_loop

TOP = 16
TEXTS_A_SHARD = 16
WHOLE_VOCABULARY = 8192  # up to so many tokens all are compared, above only likely ones and some at random
RANDOM_CANDIDATES = 2048
_WAYS = ((0.0, 0, 1.0), (1.0, 0, 1.0), (1.0, 64, 0.95))  # temperature, top-k, top-p


def sources(config: ModelConfig) -> list[int]:
    """The cache layers that drafters read."""
    return [layer for kind in ("sliding", "full") if (layer := config.kv_source(kind)) is not None]


def bytes_a_token(config: ModelConfig) -> int:
    """What a token of a shard takes on disk."""
    kept = [config.layers[layer] for layer in sources(config)]
    return 4 + 2 * config.hidden + 4 * TOP + sum(4 * layer.kv_heads * layer.head_dim for layer in kept)


@dataclass(frozen=True)
class Recipe:
    """What the texts of the shards are: a quarter from the data, the others written by the target from how texts of the
    data begin, or from nothing.

    A third each is written at temperature 1, at temperature 1 from the likeliest tokens, and greedily. A beginning is
    an eighth or half of a text at most: what is asked at the end of a long prompt must be seen. from_nothing: a third
    of those that are written, none of them greedily, which would be one text; what the target says unasked is what it
    knows.
    """

    length: int  # tokens of a text, its prompt included
    seed: int
    from_nothing: bool = False

    @staticmethod
    def is_read(number: Any) -> Any:
        """Whether a text is one from the data, by its number."""
        return number % 4 == 0

    def text(self, number: int, tokens: NDArray[np.int64], end: int) -> tuple[int, SamplingParams]:
        """How many of a text's tokens are from the data, at most those before an `end`, and how others are chosen."""
        given = self.length
        temperature, top_k, top_p = _WAYS[number % len(_WAYS)]
        if self.from_nothing and number % 4 == 3:
            given, temperature = 1, 1.0
        elif not self.is_read(number):
            ends = np.flatnonzero(tokens == end)
            most = self.length // (8 if number % 24 < 12 else 2)  # 12: all ways and all places of four meet both
            given = min(most, int(ends[0]) if len(ends) and ends[0] else self.length)
        seed = self.seed * 1_000_003 + number
        return given, SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed, logprobs=TOP)


def make_shards(folder: Path, count: int, engine: Engine, windows: Windows, recipe: Recipe) -> Iterator[int]:
    """Makes the shards that are not there yet and yields how many there are after each."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn, end = (windows.batch, windows.openings), engine.config.eos[0]
    for number in range(count):
        path = folder / f"{number:05}.safetensors"
        # Drawn for shards that are there too: the data is that of one seed.
        texts = np.where(recipe.is_read(np.arange(TEXTS_A_SHARD))[:, None], *(of(TEXTS_A_SHARD) for of in drawn))
        if not path.exists():
            how = [recipe.text(number * TEXTS_A_SHARD + row, texts[row], end) for row in range(TEXTS_A_SHARD)]
            shard = write(engine, texts, how)
            with written_whole(path) as out:
                out.write(save(shard))
        yield number + 1


def write(engine: Engine, texts: NDArray[np.int64], how: Sequence[tuple[int, SamplingParams]]) -> dict[str, Tensor]:
    """The tensors of a shard, for int64 [texts, length] of which all but the first tokens are written over.

    how: of each text, how many of its tokens are read as they are, and how the engine chooses the others. All texts are
    written at once, a token of each in a pass. Greedily a small model soon repeats itself, and there is little to learn
    from that: there the text goes on as the data does, up to where that ends or for an eighth of a text.
    """
    shard = _Shard(engine, texts, [given for given, _ in how])
    rests = {
        row: _Rest(texts[row, given:].tolist(), engine.config.eos[0], texts.shape[1] // 8)
        for row, (given, params) in enumerate(how)
        if params.temperature == 0
    }
    sequences = [engine.create() for _ in texts]
    try:
        for row, (given, params) in enumerate(how):
            for start in range(0, given, engine.max_outputs):
                end = min(start + engine.max_outputs, given)
                part = Part(sequences[row], texts[row, start:end].tolist(), end - start, params)
                shard.run([(row, start, end)], [part])
        length = texts.shape[1]
        for at in range(min(given for given, _ in how), length):
            rows = [row for row, (given, _) in enumerate(how) if given <= at]
            parts = [Part(sequences[row], [int(texts[row, at])], 1, how[row][1]) for row in rows]
            shard.run([(row, at, at + 1) for row in rows], parts)
            for row in rests.keys() & rows if at + 1 < length else ():
                texts[row, at + 1] = rests[row].instead(texts[row, : at + 2])
    finally:
        for sequence in sequences:
            engine.release(sequence)
    return shard.tensors()


class _Rest:
    """What comes after a text's beginning in the data, for where the target repeats itself."""

    def __init__(self, tokens: list[int], end: int, most: int):
        self._tokens, self._end, self._most = deque(tokens), end, most
        self._due = 0

    def instead(self, written: NDArray[np.int64]) -> int:
        """The token that the newest is to be: itself, or one of the data."""
        if not self._due and in_loop(written):
            self._due = self._most
        if not self._due or not self._tokens:
            return int(written[-1])
        token = self._tokens.popleft()
        self._due = 0 if self._tokens and self._tokens[0] == self._end else self._due - 1
        return token


class _Shard:
    """A shard while it is filled."""

    def __init__(self, engine: Engine, texts: NDArray[np.int64], given: Sequence[int]):
        config, shape = engine.config, texts.shape
        self._engine, self._texts, self._given, self._layers = engine, texts, given, sources(config)
        self._hidden = np.empty((*shape, config.hidden), np.float16)
        self._top = np.empty((*shape, min(TOP, config.vocab)), np.int32)
        self._kept: dict[str, NDArray[np.float16]] = {}
        for layer in self._layers:
            width = config.layers[layer].kv_heads * config.layers[layer].head_dim
            self._kept |= {f"{layer}.{name}": np.empty((*shape, width), np.float16) for name in "kv"}

    def run(self, places: Sequence[tuple[int, int, int]], parts: Sequence[Part]) -> None:
        """A pass over tokens [start, end) of some texts. What it chooses after all that are given goes to the text."""
        found = self._engine.run(parts)
        hidden, first = self._engine.last_hidden(), 0
        for (row, start, end), part, rows in zip(places, parts, found, strict=True):
            assert rows.logprobs is not None, "its settings ask for them"
            self._hidden[row, start:end] = hidden[first : first + end - start]
            self._top[row, start:end] = [[token for token, _ in of.top] for of in rows.logprobs]
            for layer in self._layers:
                keys, values = self._engine.keys_and_values(part.sequence, layer, start, end)
                self._kept[f"{layer}.k"][row, start:end], self._kept[f"{layer}.v"][row, start:end] = keys, values
            first += end - start
            if self._given[row] <= end < self._texts.shape[1]:
                self._texts[row, end] = rows.tokens[-1]

    def tensors(self) -> dict[str, Tensor]:
        arrays = {"tokens": self._texts.astype(np.int32), "hidden": self._hidden, "top": self._top, **self._kept}
        return {name: torch.from_numpy(array) for name, array in arrays.items()}


class Lessons:
    """Lessons drawn at random from all shards but the last, which is held out; a lone one is not.

    output_embedding: float32 [vocab, hidden] of the target, which turns its hidden states into logits. texts: of a
    lesson. drawn: how many an earlier run has drawn, after which others come.
    """

    def __init__(
        self,
        folder: Path,
        config: ModelConfig,
        output_embedding: Tensor,
        texts: int,
        seed: int = 0,
        drawn: int = 0,
    ):
        paths = sorted(folder.glob("*.safetensors"))
        self._paths = paths[:-1] or paths
        self._held_out = paths[len(self._paths) :]
        self._config, self._embedding, self._texts = config, output_embedding, texts
        self._seed, self._rng = seed, np.random.default_rng([seed, drawn])

    def texts(self, shards: int) -> Iterator[Tensor]:
        """int64 [texts, length] of each of some shards that `next` draws from."""
        for path in self._paths[:: -(-len(self._paths) // shards)]:
            with safe_open(path, "pt") as file:
                yield file.get_tensor("tokens").long().to(self._embedding.device)

    def next(self) -> Lesson:
        path = self._paths[self._rng.integers(len(self._paths))]
        return self._read(path, int(self._rng.integers(TEXTS_A_SHARD - self._texts + 1)), self._rng)

    def held_out(self) -> Iterator[Lesson]:
        """The texts that `next` never gives, in the same lessons at every call; none if there is but one shard."""
        rng = np.random.default_rng(self._seed)
        for path in self._held_out:
            for first in range(0, TEXTS_A_SHARD - self._texts + 1, self._texts):
                yield self._read(path, first, rng)

    @torch.no_grad()
    def _read(self, path: Path, first: int, rng: np.random.Generator) -> Lesson:
        """The lesson of `texts` texts of a shard."""
        device = self._embedding.device
        with safe_open(path, "pt") as file:
            part = {name: file.get_slice(name)[first : first + self._texts].to(device) for name in file.keys()}  # noqa: SIM118
        cache = PassCache(self._texts)
        for layer in sources(self._config):
            cache.write(layer, 0, *(part[f"{layer}.{name}"].flatten(0, 1).float() for name in "kv"))
        candidates = self._candidates(part["top"][..., :TOP], rng)
        hidden = part["hidden"].float()
        logits = hidden @ (self._embedding if candidates is None else self._embedding[candidates]).T
        if cap := self._config.logit_softcap:
            logits = cap * torch.tanh(logits / cap)
        return Lesson(part["tokens"].long(), hidden, cache, logits.softmax(-1), candidates)

    def _candidates(self, top: Tensor, rng: np.random.Generator) -> Tensor | None:
        vocab = self._config.vocab
        if vocab <= WHOLE_VOCABULARY:
            return None
        others = torch.from_numpy(rng.integers(0, vocab, RANDOM_CANDIDATES)).to(top.device)
        return torch.cat([top.flatten().long(), others]).unique()
