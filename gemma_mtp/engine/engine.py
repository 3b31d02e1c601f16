"""One model in memory: its plan, its cache, and passes over sequences."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import RLock
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from gemma_mtp import _native
from gemma_mtp.checkpoints.packing import Packer, uses_of
from gemma_mtp.checkpoints.quantization import Dtype
from gemma_mtp.checkpoints.tensors import TensorInfo
from gemma_mtp.config import AnyDrafterConfig, DrafterConfig, ModelConfig
from gemma_mtp.decoding.drafting import Draft, Ends
from gemma_mtp.decoding.grammar import Masks
from gemma_mtp.decoding.progress import PROMPT_CHUNK, Rows, TokenLogprobs
from gemma_mtp.decoding.sampling import SamplingParams
from gemma_mtp.engine.interface import Memory, Part, choosing, choosing_by, logprob_of, one_at_a_time
from gemma_mtp.engine.prefixes import PAGE, page_names
from gemma_mtp.errors import CheckpointError, PromptError, SettingsError
from gemma_mtp.models.assistant import draft_step
from gemma_mtp.models.decoder import Decoded, decode
from gemma_mtp.models.heads import draft_heads
from gemma_mtp.ops.native import NativeOps, NativeWeights

KvDtype = Literal["f16", "q8_0", "f32"]

MAX_DEPTH = 32  # tokens a round can draft
_MAX_OUTPUTS = 64
_ANY = np.empty((0, 0), np.uint32)  # no masks


@dataclass
class SequenceState:
    """One sequence: its place in the cache, its tokens, and what a drafter needs of its last pass."""

    handle: int
    tokens: list[int] = field(default_factory=list)
    hidden: NDArray[np.float32] | None = None
    """float32 [rows, hidden]: the last hidden states of the rows that the last pass sampled."""
    prompt: int = 0
    """How many of its tokens are the prompt's, as the last pass was told."""
    names: list[bytes] = field(default_factory=list)
    """Of its first pages, those that others can share."""


class Engine:
    """Runs a target natively, with a drafter if one is attached. Implements AnyEngine. Threads may share it.

    threads: of a pass; context: the most tokens a sequence may hold; isa: the instruction-set build, "auto" the best.
    split_head: read an output embedding of Q8_0 in two parts (docs/decisions/0004-split-head.md): the same tokens.
    packed: matrices that lie packed with that dtype already, in place of the tensors' (checkpoints/cache.py).
    kv: how keys and values are kept; None: f32 if dtype is, otherwise f16.
    """

    max_depth = MAX_DEPTH
    max_rows, max_outputs = PROMPT_CHUNK, _MAX_OUTPUTS

    def __init__(
        self,
        config: ModelConfig,
        tensors: Mapping[str, TensorInfo],
        *,
        threads: int,
        context: int,
        dtype: Dtype = "as-is",
        isa: str = "auto",
        split_head: bool = True,
        packed: Mapping[str, TensorInfo] | None = None,
        kv: KvDtype | None = None,
    ):
        self.config, self.context, self.threads, self.dtype = config, context, threads, dtype
        self._tensors, self._isa = tensors, isa
        self.lock = RLock()
        try:
            self._pool = _native.ThreadPool(threads)
        except _native.InputError as fault:
            raise SettingsError(f"The model cannot run: {fault}.") from None
        uses = uses_of(config)
        self._split_head = split_head
        packer = Packer(self._pool, dtype, uses.heads if split_head else ())
        self.weights = NativeWeights({**tensors, **(packed or {})}, packer, uses.looked_up)
        self.plan = _native.Plan(self._pool, isa, PROMPT_CHUNK, _MAX_OUTPUTS)
        with _refusing():
            decoded: Decoded[int] = decode(NativeOps(self.plan, self.weights, config.eps), config)
        layers = [
            (layer.kv_heads if layer.shares_kv_with is None else 0, layer.head_dim, layer.window or 0)
            for layer in config.layers
        ]
        kv = kv or ("f32" if dtype == "f32" else "f16")
        with _refusing():
            self.cache = _native.KvCache(kv, layers, context, rollback=2 * MAX_DEPTH)
        self._runner = _native.Runner(self.plan, self.cache, decoded.logits, decoded.hidden, config.vocab)
        self.drafter: _native.Drafter | None = None
        self._exact = _native.SampleParams(logprobs=1)  # settings that read every logit, as a masked row does

    def attach(
        self,
        config: AnyDrafterConfig,
        tensors: Mapping[str, TensorInfo],
        dtype: Dtype = "as-is",
        packed: Mapping[str, TensorInfo] | None = None,
    ) -> None:
        """Adds a drafter, whose precision is its own. Raises PairError when it does not belong to the target."""
        config.check_target(self.config)
        plan = _native.Plan(self._pool, self._isa, 1, 1)
        embed = "embed" if isinstance(config, DrafterConfig) or self.config.tied_embedding else "lm_head"
        shared, looked_up = {}, set()
        if embed == "embed" and not self.config.tied_embedding:
            looked_up.add("target_embed")
        else:
            shared["target_embed"] = self.weights.matrix(embed)
        tensors = {**tensors, **(packed or {}), "target_embed": self._tensors[embed]}
        packer = Packer(self._pool, dtype, uses_of(config).heads if self._split_head else ())
        ops = NativeOps(plan, NativeWeights(tensors, packer, looked_up, shared), config.eps)
        with _refusing():
            if isinstance(config, DrafterConfig):
                step = draft_step(ops, config, self.config)
                logits, following = [step.logits], step.hidden
            else:
                logits, following = list(draft_heads(ops, config)), -1
        self.drafter = _native.Drafter(plan, self.cache, ops.state, logits, following, config.vocab)

    @property
    def drafts(self) -> bool:
        return self.drafter is not None

    @one_at_a_time
    def create(self) -> SequenceState:
        """A new, empty sequence; to be given back with `release`."""
        return SequenceState(self.cache.create())

    @one_at_a_time
    def release(self, sequence: SequenceState) -> None:
        self.cache.release(sequence.handle)

    @property
    def memory(self) -> Memory:
        return Memory(self.cache.bytes_in_use, self.cache.bytes_allocated, self.cache.limit)

    @one_at_a_time
    def limit_memory(self, size: int) -> None:
        """See BatchEngine."""
        self.cache.set_limit(size)

    def memory_for(self, tokens: int) -> int:
        """See BatchEngine."""
        return self.cache.bytes_for(tokens, self.max_rows)

    @one_at_a_time
    def fits(self, wanted: Sequence[tuple[SequenceState, int]]) -> bool:
        """See BatchEngine."""
        return self.cache.fits([(sequence.handle, count) for sequence, count in wanted], self.max_rows)

    @one_at_a_time
    def share(self, sequence: SequenceState) -> None:
        """See BatchEngine."""
        if len(sequence.tokens) >= (len(sequence.names) + 1) * PAGE:
            names = page_names(sequence.tokens, sequence.names)
            self.cache.name(sequence.handle, len(sequence.names), names)
            sequence.names += names

    @one_at_a_time
    def adopt(self, sequence: SequenceState, tokens: Sequence[int]) -> int:
        """See BatchEngine."""
        names = page_names(tokens)
        length = self.cache.adopt(sequence.handle, names)
        sequence.tokens, sequence.names = list(tokens[:length]), names[: length // PAGE]
        return length

    def step(
        self,
        sequence: SequenceState,
        tokens: Sequence[int],
        rows: int,
        params: SamplingParams,
        prompt: int = 0,
        scored: Sequence[int] = (),
        allowed: Masks | None = None,
    ) -> Rows:
        """See Target.step. Raises PromptError for a token outside the vocabulary or a full context."""
        return self.run([Part(sequence, tokens, rows, params, prompt, scored, allowed)])[0]

    @one_at_a_time
    def run(self, parts: Sequence[Part]) -> list[Rows]:
        """One pass over several sequences, each of them once: `step` for each of the parts.

        It has at most max_rows tokens, and at most max_outputs rows to sample.
        """
        settings = [_native_params(part.params) for part in parts]
        self._forward(parts, settings)
        hidden = self._runner.hidden() if self.drafter else None
        how = [
            (native, _seen(part), part.prompt, _ANY if part.allowed is None else part.allowed)
            for native, part in zip(settings, parts, strict=True)
        ]
        with choosing():
            choices = self._runner.choose(how)
        results, at, experts = [], 0, self._runner.experts_read()
        for part in parts:
            own, end = choices[at : at + part.rows], at + part.rows
            if part.rows and hidden is not None:
                part.sequence.hidden = hidden[at + len(part.scored) : end]
            logprobs = [TokenLogprobs(chosen, top) for _, chosen, top in own] if part.params.logprobs else None
            for row, token in enumerate(part.scored):
                assert logprobs is not None, "what is scored has settings that ask for log probabilities"
                best, of_best = logprobs[row].top[0]
                logit, largest = (self._runner.logit(at + row, which) for which in (token, best))
                logprobs[row] = logprobs[row]._replace(chosen=logprob_of(logit, largest, of_best))
            at = end
            results.append(Rows([token for token, _, _ in own], logprobs, experts))
        return results

    @one_at_a_time
    def draft(
        self,
        sequence: SequenceState,
        row: int,
        token: int,
        depth: int,
        params: SamplingParams,
        ends: Ends | None = None,
    ) -> Draft:
        """See Drafting.draft."""
        assert self.drafter is not None, "nothing drafts until a drafter is attached"
        assert sequence.hidden is not None, "a token is decided by a pass, which leaves its hidden states"
        seen = np.array([*sequence.tokens, token] if params.counts else [], np.int32)
        native, hidden = _native_params(params), sequence.hidden[row]
        with choosing():
            drafted = self.drafter.draft(sequence.handle, token, hidden, depth, native, seen, sequence.prompt, ends)
        return Draft(*drafted)

    @one_at_a_time
    def truncate(self, sequence: SequenceState, length: int) -> None:
        self.cache.truncate(sequence.handle, length)
        del sequence.tokens[length:]
        del sequence.names[length // PAGE :]

    def logits(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """float32 [len(tokens), vocab]: row i is of the token after tokens[i]."""
        return self._all_rows(tokens, self._runner.logits)

    def hidden(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """float32 [len(tokens), hidden]: the last hidden states, after the final norm."""
        return self._all_rows(tokens, self._runner.hidden)

    def last_logits(self) -> NDArray[np.float32]:
        """float32 [rows, vocab] of the rows that the last pass sampled, with settings that ask for logprobs.

        Without, only the largest may have been computed exactly, and this raises InputError.
        """
        return self._runner.logits()

    def last_hidden(self) -> NDArray[np.float32]:
        """float32 [rows, hidden] of the rows that the last pass sampled, after the final norm."""
        return self._runner.hidden()

    @one_at_a_time
    def keys_and_values(
        self, sequence: SequenceState, layer: int, start: int, end: int
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Of a layer that keeps a cache, at positions [start, end): float32 [positions, kv_heads * head_dim] each.

        Raises InputError for positions that are not held, as those before a sliding window.
        """
        return self.cache.read(sequence.handle, layer, start, end)

    def _forward(self, parts: Sequence[Part], settings: Sequence[_native.SampleParams]) -> None:
        exact = self._exact
        feeds = [
            (
                part.sequence.handle,
                np.array(part.tokens, np.int32),
                part.rows,
                native if part.allowed is None else exact,
            )
            for part, native in zip(parts, settings, strict=True)
        ]
        try:
            self._runner.forward(feeds)
        except _native.InputError as fault:
            raise PromptError(f"The tokens cannot be run: {fault}.") from None
        for part in parts:
            part.sequence.tokens.extend(part.tokens)
            part.sequence.prompt = part.prompt

    @one_at_a_time
    def _all_rows(self, tokens: Sequence[int], read: Callable[[], NDArray[np.float32]]) -> NDArray[np.float32]:
        sequence = self.create()
        try:
            parts = []
            for start in range(0, len(tokens), _MAX_OUTPUTS):
                part = tokens[start : start + _MAX_OUTPUTS]
                self._forward([Part(sequence, part, len(part), SamplingParams())], [self._exact])
                parts.append(read())
            return np.concatenate(parts)
        finally:
            self.release(sequence)


def _seen(part: Part) -> NDArray[np.int32]:
    """What penalties count, up to the first sampled row's own token."""
    if not part.rows or not part.params.counts:
        return np.empty(0, np.int32)
    return np.array(part.sequence.tokens[: len(part.sequence.tokens) - part.rows + 1], np.int32)


@contextmanager
def _refusing() -> Iterator[None]:
    """Says in a sentence what the kernels cannot do with a model while it is recorded."""
    try:
        yield
    except _native.InputError as fault:
        raise CheckpointError(f"The native backend cannot run this model: {fault}.") from None


def _native_params(params: SamplingParams) -> _native.SampleParams:
    return _native.SampleParams(**choosing_by(params))
