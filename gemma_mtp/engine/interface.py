"""What every engine does, whichever executor runs its passes."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import wraps
from typing import Any, Concatenate, NamedTuple, ParamSpec, Protocol, TypeVar, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from gemma_mtp import _native
from gemma_mtp.config import ModelConfig
from gemma_mtp.decoding.drafting import Draft, Ends
from gemma_mtp.decoding.grammar import Masks
from gemma_mtp.decoding.progress import Rows
from gemma_mtp.decoding.sampling import SamplingParams
from gemma_mtp.errors import CheckpointError

P = ParamSpec("P")
R = TypeVar("R")


class Shared(Protocol):
    """What threads share, each having it alone while it holds the lock."""

    @property
    def lock(self) -> AbstractContextManager[Any]: ...


E = TypeVar("E", bound=Shared)


class Part(NamedTuple):
    """What a pass does for one sequence: the arguments of `AnyEngine.step`."""

    sequence: Any
    tokens: Sequence[int]
    rows: int
    params: SamplingParams
    prompt: int = 0
    scored: Sequence[int] = ()
    allowed: Masks | None = None


class Memory(NamedTuple):
    """Bytes of the KV cache: what sequences hold, what there is with cached prefixes, and the most there may be."""

    held: int
    allocated: int
    limit: int


def logprob_of(logit: float, largest: float, of_largest: float) -> float:
    """A token's log probability from its logit, the largest one, and that one's log probability; all float32, and
    rounded as the sampler rounds it."""
    return float(np.float32(logit) - np.float32(largest) + np.float32(of_largest))


def choosing_by(params: SamplingParams) -> dict[str, Any]:
    """What the native sampler is told of the settings."""
    return {
        "temperature": params.temperature,
        "top_k": params.top_k,
        "top_p": params.top_p,
        "min_p": params.min_p,
        "repetition_penalty": params.repetition_penalty,
        "seed": params.seed,
        "logprobs": params.logprobs,
        "presence_penalty": params.presence_penalty,
        "frequency_penalty": params.frequency_penalty,
        "logit_bias": params.biases,
    }


@contextmanager
def choosing() -> Iterator[None]:
    """Makes of logits by which no token can be chosen the fault of the checkpoint that it is."""
    try:
        yield
    except _native.InputError as fault:
        raise CheckpointError(str(fault)) from None


def one_at_a_time(method: Callable[Concatenate[E, P], R]) -> Callable[Concatenate[E, P], R]:
    """Of an engine's methods that use its threads or what it keeps: threads of Python take turns."""

    @wraps(method)
    def locked(self: E, *args: P.args, **options: P.kwargs) -> R:
        with self.lock:
            return method(self, *args, **options)

    return locked


class AnyEngine(Shared, Protocol):
    """A target in memory, with a drafter if there is one. Its sequences are its own kind of handle. Threads can share
    it."""

    @property
    def config(self) -> ModelConfig: ...

    @property
    def context(self) -> int:
        """The most tokens a sequence may hold."""

    @property
    def threads(self) -> int: ...

    @property
    def max_depth(self) -> int:
        """The most tokens a round can draft."""

    @property
    def drafts(self) -> bool:
        """Whether a drafter is attached."""

    def create(self) -> Any:
        """A new, empty sequence; to be given back with `release`."""

    def release(self, sequence: Any) -> None: ...

    def step(
        self,
        sequence: Any,
        tokens: Sequence[int],
        rows: int,
        params: SamplingParams,
        prompt: int = 0,
        scored: Sequence[int] = (),
        allowed: Masks | None = None,
    ) -> Rows:
        """See decoding.verification.Target. Raises PromptError for a token outside the vocabulary or a full context."""

    def truncate(self, sequence: Any, length: int) -> None:
        """See decoding.verification.Target."""

    def draft(
        self, sequence: Any, row: int, token: int, depth: int, params: SamplingParams, ends: Ends | None = None
    ) -> Draft:
        """See decoding.drafting.Drafting."""

    def logits(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """float32 [len(tokens), vocab]: row i is of the token after tokens[i]."""

    def hidden(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """float32 [len(tokens), hidden]: the last hidden states, after the final norm."""

    def last_logits(self) -> NDArray[np.float32]:
        """float32 [rows, vocab] of the rows that the last pass sampled, with settings that ask for logprobs."""


@runtime_checkable
class BatchEngine(AnyEngine, Protocol):
    """An engine that runs several sequences in one pass, each giving the very bits that it gives alone."""

    @property
    def max_rows(self) -> int:
        """The most tokens of a pass."""

    @property
    def max_outputs(self) -> int:
        """The most rows that a pass samples."""

    def run(self, parts: Sequence[Part]) -> list[Rows]:
        """One pass over several sequences, each of them once: `step` for each of the parts."""

    @property
    def memory(self) -> Memory: ...

    def limit_memory(self, size: int) -> None:
        """Bounds the KV cache, in bytes. Only with a bound are prefixes kept for `adopt` when no sequence holds them;
        0: no bound."""

    def memory_for(self, tokens: int) -> int:
        """The most bytes that a sequence of so many tokens holds."""

    def fits(self, wanted: Sequence[tuple[Any, int]]) -> bool:
        """Whether there is memory for so many further tokens of these sequences, all together."""

    def share(self, sequence: Any) -> None:
        """Lets others adopt what the sequence holds now. It cannot be cut to less than that any more."""

    def adopt(self, sequence: Any, tokens: Sequence[int]) -> int:
        """Starts an empty sequence with what is cached of `tokens`; how many of them that is."""
