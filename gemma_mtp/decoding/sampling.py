"""How tokens are chosen and when to stop."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gemma_mtp.decoding.grammar import Grammar
from gemma_mtp.errors import SettingsError


@dataclass(frozen=True)
class SamplingParams:
    """Settings of one generation, checked when made (SettingsError).

    max_tokens: the most tokens to generate; 0, for the prompt's log probabilities alone, goes with `prompt_logprobs`.
    temperature: 0 takes the likeliest token; above, the text is a function of the prompt and `seed`.
    top_k, top_p, min_p: filters in that order after the temperature, each a first part of the tokens ranked by
        probability: exactly k; those with less than top_p of the probability ranked before them; those with at least
        min_p times the probability of the first. 0, 1 and 0 are off.
    repetition_penalty: divides positive logits of tokens that occur in prompt or output, multiplies negative ones.
    presence_penalty, frequency_penalty: taken from the logits of tokens that the output holds so far, the first once,
        the second as often as the token occurs there.
    logit_bias: {token id: number to add to its logit}, or such pairs; -100 keeps a token out.
    stop: strings that end the text before them. stop_ids: tokens that end it like the model's own end tokens.
    logprobs: how many of the likeliest tokens to report at each position, with natural-log probabilities of the model's
        distribution before penalties, biases, temperature and filters; 0 reports none.
    prompt_logprobs: report them for the prompt too, each token but the first after those before it; `logprobs` must be
        above 0.
    ignore_eos: go on past the model's end tokens.
    grammar: what the output must be. Only what it allows is sampled, drafted or not; a stop string or max_tokens can
        still end the output early.
    """

    max_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    stop: Sequence[str] = ()
    stop_ids: Sequence[int] = ()
    logprobs: int = 0
    ignore_eos: bool = False
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | Sequence[tuple[int, float]] = ()
    prompt_logprobs: bool = False
    grammar: Grammar | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        object.__setattr__(self, "stop_ids", tuple(self.stop_ids))
        pairs = self.logit_bias.items() if isinstance(self.logit_bias, Mapping) else self.logit_bias
        object.__setattr__(self, "logit_bias", tuple(pairs))
        fewest = 0 if self.prompt_logprobs else 1
        self._require("max_tokens", _is_int(self.max_tokens) and self.max_tokens >= fewest, "a whole number from 1")
        self._require("temperature", _in_range(self.temperature, 0, sys.float_info.max), "0 or more")
        self._require("top_k", _is_int(self.top_k) and 0 <= self.top_k < 2**31, "a whole number, or 0 for off")
        self._require("top_p", _in_range(self.top_p, 0, 1) and self.top_p > 0, "above 0 and at most 1")
        self._require("min_p", _in_range(self.min_p, 0, 1), "between 0 and 1")
        self._require("repetition_penalty", _in_range(self.repetition_penalty, 0.01, 100), "between 0.01 and 100")
        self._require("seed", _is_int(self.seed) and 0 <= self.seed < 2**64, "a whole number from 0 to 2^64 - 1")
        self._require("stop", all(isinstance(s, str) and s for s in self.stop), "made of strings that are not empty")
        self._require("stop_ids", all(_is_int(i) and i >= 0 for i in self.stop_ids), "made of token ids")
        self._require("logprobs", _is_int(self.logprobs) and 0 <= self.logprobs <= 1000, "a number from 0 to 1000")

        self._require("presence_penalty", _in_range(self.presence_penalty, -2, 2), "between -2 and 2")
        self._require("frequency_penalty", _in_range(self.frequency_penalty, -2, 2), "between -2 and 2")
        self._require("logit_bias", all(map(_is_bias, self.biases)), "made of token ids with numbers from -100 to 100")

        self._require("prompt_logprobs", not self.prompt_logprobs or self.logprobs > 0, "off, or given with logprobs")

    @property
    def biases(self) -> tuple[tuple[int, float], ...]:
        """`logit_bias` as (token, value)."""
        return self.logit_bias  # type: ignore[return-value]

    @property
    def counts(self) -> bool:
        """Whether a penalty counts the tokens before the one to choose."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    def _require(self, name: str, valid: bool, allowed: str) -> None:
        if not valid:
            raise SettingsError(f"The sampling setting {name} is {getattr(self, name)!r}: it must be {allowed}.")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_bias(pair: object) -> bool:
    if not isinstance(pair, tuple) or len(pair) != 2:
        return False
    token, value = pair
    return _is_int(token) and 0 <= token < 2**31 and _in_range(value, -100, 100)


def _in_range(value: object, low: float, high: float) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and low <= value <= high  # type: ignore[operator]
