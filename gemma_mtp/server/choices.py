"""What an answer is made of while it comes, and what writes it."""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from gemma_mtp.generation import Generation, Piece
from gemma_mtp.server.errors import ApiError


class Choice:
    """One choice of an answer, as far as it has come."""

    def __init__(self, index: int, generation: Generation):
        self.index, self.generation = index, generation
        self.pieces: list[Piece] = []  # kept where the answer is sent whole
        self.tool_calls = 0
        self.offset = 0  # of the next token's spelling among all of them
        self.echoed = False
        self.reasoning_tokens = 0

    def count(self, piece: Piece) -> None:
        if piece.channel == "reasoning":
            self.reasoning_tokens += len(piece.tokens)


class Writer(Protocol):
    """Writes one answer, in the form that its API has: whole, or as events of a stream."""

    id: str
    stream: bool

    def whole(self, choices: Sequence[Choice]) -> dict[str, Any]: ...

    def opening(self, choices: Sequence[Choice]) -> Iterator[str]:
        """What a stream starts with."""

    def piece(self, choice: Choice, piece: Piece) -> Iterator[str]: ...

    def ended(self, choice: Choice, choices: Sequence[Choice], last: bool) -> Iterator[str]:
        """What a stream says when a choice has ended. last: all of them have now."""

    def closing(self, choices: Sequence[Choice]) -> Iterator[str]:
        """What a stream ends with."""

    def failure(self, error: ApiError) -> str:
        """What a stream ends with when something went wrong after its status was sent."""
