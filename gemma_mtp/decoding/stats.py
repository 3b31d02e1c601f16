"""What a generation did and how long it took."""

from dataclasses import dataclass, field


@dataclass
class Stats:
    """Counts and seconds of one generation. The prompt's last pass gives the first token; later passes are rounds."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    """Of the prompt's, those that were in the cache when it started."""
    preemptions: int = 0
    """How often it gave its memory up to others, and went on later."""
    tokens: int = 0
    rounds: int = 0
    drafted: int = 0
    accepted: int = 0
    tried_per_depth: list[int] = field(default_factory=list)
    """[i - 1]: rounds that drafted an i-th token and kept the ones before."""
    accepted_per_depth: list[int] = field(default_factory=list)
    """[i - 1]: of those, the rounds that kept it."""
    seconds_prompt: float = 0.0
    """Until the first token."""
    seconds_decode: float = 0.0
    """Spent in rounds; what the reader of a stream does in between is not counted."""

    @property
    def tokens_per_second(self) -> float:
        """Of the rounds, so without the first token; 0 before any round."""
        return (self.tokens - 1) / self.seconds_decode if self.seconds_decode > 0 else 0.0

    @property
    def acceptance(self) -> list[float]:
        """Acceptance at each depth: accepted over tried."""
        return [kept / tried for kept, tried in zip(self.accepted_per_depth, self.tried_per_depth, strict=True)]

    def count_round(self, drafted: int, accepted: int, seconds: float) -> None:
        """Adds one round that drafted so many tokens and kept the first `accepted` of them."""
        self.rounds += 1
        self.drafted += drafted
        self.accepted += accepted
        self.seconds_decode += seconds
        while len(self.tried_per_depth) < drafted:
            self.tried_per_depth.append(0)
            self.accepted_per_depth.append(0)
        for i in range(accepted):
            self.tried_per_depth[i] += 1
            self.accepted_per_depth[i] += 1
        if accepted < drafted:
            self.tried_per_depth[accepted] += 1
