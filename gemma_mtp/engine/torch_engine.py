"""One model in memory, run by PyTorch: passes over sequences, and its drafter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from threading import RLock

import numpy as np
import torch
from numpy.typing import NDArray

from gemma_mtp import _native
from gemma_mtp.checkpoints.tensors import TensorInfo
from gemma_mtp.config import AnyDrafterConfig, DrafterConfig, HeadsConfig, ModelConfig
from gemma_mtp.decoding.drafting import Draft, Ends, GrowingDraft
from gemma_mtp.decoding.grammar import Masks
from gemma_mtp.decoding.progress import PROMPT_CHUNK, Rows, TokenLogprobs
from gemma_mtp.decoding.sampling import SamplingParams
from gemma_mtp.engine.interface import choosing, choosing_by, logprob_of, one_at_a_time
from gemma_mtp.errors import PromptError, SettingsError
from gemma_mtp.models.assistant import draft_step
from gemma_mtp.models.decoder import Decoded, decode
from gemma_mtp.models.heads import draft_heads
from gemma_mtp.ops.torch import FIXED_ROWS, GrowingCache, Pass, TorchOps, TorchWeights

_DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


@dataclass
class TorchSequence:
    """One sequence: the tokens in its cache, and the last hidden states of the rows that its last pass sampled."""

    tokens: list[int] = field(default_factory=list)
    cache: GrowingCache = field(default_factory=GrowingCache)
    hidden: torch.Tensor | None = None  # float32 [rows, hidden]
    prompt: int = 0  # how many of the tokens are the prompt's, as the last pass was told


@dataclass(frozen=True)
class _Drafter:
    config: AnyDrafterConfig
    weights: TorchWeights


class TorchEngine:
    """Runs a target with PyTorch. Implements AnyEngine.

    context: the most tokens a sequence may hold. threads: of PyTorch's pool, in this whole process (None: as it is).
    dtype: f32, bf16 or f16, of products with weights and of the cache; "as-is" (and None)
    is f32 on a CPU and bf16 elsewhere, whatever the file has. device: "auto" is the first there is of cuda, mps, cpu.

    Passes of at most 16 tokens give each row the same bits whatever rows are beside it, so a round can draft 15.
    """

    max_depth = FIXED_ROWS - 1  # tokens a round can draft

    def __init__(
        self,
        config: ModelConfig,
        tensors: Mapping[str, TensorInfo],
        *,
        context: int,
        threads: int | None = None,
        dtype: str | None = None,
        device: str = "auto",
    ):
        self.config, self.context, self.lock = config, context, RLock()
        self.device = _device(device)
        if threads is not None:
            torch.set_num_threads(threads)
        self.weights = TorchWeights(tensors, self.device, _dtype(dtype, self.device))
        self._drafter: _Drafter | None = None
        self._sampler = _native.Sampler()
        self._last_logits = np.empty((0, config.vocab), np.float32)
        self._last_draft: list[tuple[NDArray[np.float32], torch.Tensor]] = []  # logits and state of each step

    @property
    def threads(self) -> int:
        """Threads of PyTorch's pool, which all its users in this process share."""
        return torch.get_num_threads()

    @property
    def drafts(self) -> bool:
        return self._drafter is not None

    def attach(
        self, config: AnyDrafterConfig, tensors: Mapping[str, TensorInfo], dtype: str | None = None
    ) -> None:
        """Adds a drafter, in place of an earlier one, in `dtype` (None: the target's).

        Raises PairError when it does not belong to this target.
        """
        config.check_target(self.config)
        # A drafter is fed the target's input embedding; heads score with its output embedding.
        untied = isinstance(config, HeadsConfig) and not self.config.tied_embedding
        shared = {"target_embed": self.weights["lm_head" if untied else "embed"]}
        precision = _dtype(dtype, self.device) if dtype else self.weights.dtype
        self._drafter = _Drafter(config, TorchWeights(tensors, self.device, precision, shared))

    def create(self) -> TorchSequence:
        """A new, empty sequence; to be given back with `release`."""
        return TorchSequence()

    def release(self, sequence: TorchSequence) -> None:
        """Frees the sequence's cache; it is empty afterwards."""
        sequence.tokens, sequence.cache, sequence.hidden = [], GrowingCache(), None

    @one_at_a_time
    @torch.inference_mode()
    def step(
        self,
        sequence: TorchSequence,
        tokens: Sequence[int],
        rows: int,
        params: SamplingParams,
        prompt: int = 0,
        scored: Sequence[int] = (),
        allowed: Masks | None = None,
    ) -> Rows:
        """See Target.step. Raises PromptError for a token outside the vocabulary or a full context."""
        decoded = self._forward(sequence, tokens, rows)
        sequence.hidden, sequence.prompt = decoded.hidden[len(scored) :], prompt
        last = self._last_logits = _numpy(decoded.logits)
        first = len(sequence.tokens) - rows + 1  # index of the first sampled token
        seen, drafted = sequence.tokens[:first], sequence.tokens[first:]
        masks = [None] * rows if allowed is None else [*[None] * (rows - len(allowed)), *allowed]
        choices = [
            self._sample(logits, first + i, params, seen, drafted[:i], prompt, masks[i])
            for i, logits in enumerate(last)
        ]
        logprobs = [TokenLogprobs(chosen, top) for _, chosen, top in choices] if params.logprobs else None
        for row, token in enumerate(scored):
            assert logprobs is not None, "what is scored has settings that ask for log probabilities"
            (best, of_best), logits = logprobs[row].top[0], last[row]
            logprobs[row] = logprobs[row]._replace(chosen=logprob_of(logits[token], logits[best], of_best))
        return Rows([token for token, _, _ in choices], logprobs)

    def truncate(self, sequence: TorchSequence, length: int) -> None:
        del sequence.tokens[length:]

    @one_at_a_time
    @torch.inference_mode()
    def draft(
        self,
        sequence: TorchSequence,
        row: int,
        token: int,
        depth: int,
        params: SamplingParams,
        ends: Ends | None = None,
    ) -> Draft:
        """At most `depth` tokens to follow `token`, the newest one, which is not in the sequence's cache yet.

        row: which of the rows that the sequence's last pass sampled chose it. Each token is sampled for its place with
        `params`, as the target will sample there.
        """
        if self._drafter is None:
            raise SettingsError("There is no drafter to draft with: attach one.")
        if sequence.hidden is None:
            raise SettingsError("A sequence needs a pass before its first draft.")
        config, weights = self._drafter.config, self._drafter.weights
        cached = len(sequence.tokens)
        state = sequence.hidden[row : row + 1]
        seen = [*sequence.tokens, token]
        growing = GrowingDraft(depth, ends)
        self._last_draft = []

        def propose(logits: torch.Tensor) -> None:
            scores, position = _numpy(logits), len(seen) + len(growing.tokens)
            chosen = self._sample(scores[0], position, params, seen, growing.tokens, sequence.prompt)[0]
            probability = (logits[0].float() / (params.temperature or 1.0)).softmax(-1)[chosen].item()
            self._last_draft.append((scores, state))
            growing.add(chosen, _native.sureness(probability))

        if isinstance(config, DrafterConfig):
            while growing.goes_on:
                rows = Pass([*seen, *growing.tokens][-1:], cached, sequence.cache, outputs=1, hidden=state)
                drafted = draft_step(TorchOps(weights, config.eps, rows), config, self.config)
                state = drafted.hidden
                propose(drafted.logits)
        else:
            ops = TorchOps(weights, config.eps, Pass([token], cached, sequence.cache, outputs=1, hidden=state))
            heads = draft_heads(ops, config)
            while growing.goes_on and (logits := next(heads, None)) is not None:
                propose(logits)
        return growing.draft

    def logits(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """float32 [len(tokens), vocab]: row i is of the token after tokens[i]."""
        return np.concatenate([_numpy(decoded.logits) for decoded in self._all_rows(tokens)])

    def hidden(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """float32 [len(tokens), hidden]: the last hidden states, after the final norm."""
        return np.concatenate([_numpy(decoded.hidden) for decoded in self._all_rows(tokens)])

    def last_logits(self) -> NDArray[np.float32]:
        """float32 [rows, vocab] of the rows that the last pass sampled."""
        return self._last_logits

    def last_draft(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Of each token of the last draft: its logits [drafts, vocab], and the state passed on from there.

        States are float32 [drafts, hidden]; parallel heads pass none on, and theirs is the target's.
        """
        logits, states = zip(*self._last_draft, strict=True)
        return np.concatenate(logits), np.concatenate([_numpy(state) for state in states])

    def _forward(self, sequence: TorchSequence, tokens: Sequence[int], outputs: int) -> Decoded[torch.Tensor]:
        """Appends tokens to a sequence; the results of the last `outputs` of them."""
        start = len(sequence.tokens)
        for token in tokens:
            if not 0 <= token < self.config.vocab:
                fault = f"token {token} is outside the vocabulary of {self.config.vocab}"
                raise PromptError(f"The tokens cannot be run: {fault}.")
        if start + len(tokens) > self.context:
            raise PromptError(f"The tokens cannot be run: the context of {self.context} tokens is full.")
        rows = Pass(tokens, start, sequence.cache, outputs, invariant=len(tokens) <= FIXED_ROWS)
        decoded = decode(TorchOps(self.weights, self.config.eps, rows), self.config)
        sequence.tokens.extend(tokens)
        return Decoded(rows.wanted(decoded.logits), rows.wanted(decoded.hidden))

    @one_at_a_time
    @torch.inference_mode()
    def _all_rows(self, tokens: Sequence[int]) -> list[Decoded[torch.Tensor]]:
        sequence = self.create()
        parts = [tokens[start : start + PROMPT_CHUNK] for start in range(0, len(tokens), PROMPT_CHUNK)]
        return [self._forward(sequence, part, len(part)) for part in parts]

    def _sample(
        self,
        logits: NDArray[np.float32],
        position: int,
        params: SamplingParams,
        seen: Sequence[int],
        drafted: Sequence[int],
        prompt: int,
        allowed: NDArray[np.uint32] | None = None,
    ) -> tuple[int, float, list[tuple[int, float]]]:
        """The token at an index of a sequence whose tokens before it are `seen`, then `drafted`; of these the first
        `prompt` were not generated. allowed: the mask of what may be sampled."""
        with choosing():
            return self._sampler.sample(
                logits,
                position,
                **choosing_by(params),
                seen=seen if params.counts else [],
                drafted=drafted if params.counts else [],
                prompt=prompt,
                allowed=allowed,
            )


def _numpy(x: torch.Tensor) -> NDArray[np.float32]:
    return x.float().cpu().numpy()


def _dtype(asked: str | None, device: torch.device) -> torch.dtype:
    if asked is None or asked == "as-is":
        asked = "f32" if device.type == "cpu" else "bf16"
    if asked not in _DTYPES:
        raise SettingsError(f"The torch backend has no dtype '{asked}': use as-is, {', '.join(_DTYPES)}.")
    return _DTYPES[asked]


def _device(asked: str) -> torch.device:
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if asked == "auto":
        return torch.device(next(name for name in there if there[name]))
    if not there.get(asked):
        raise SettingsError(f"The device is {asked!r}, which PyTorch does not find here: use auto or cpu.")
    return torch.device(asked)
