"""What an output may be: grammars as they are asked for, and how a generation is kept to one."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from gemma_mtp.errors import SettingsError

Masks = NDArray[np.uint32]
"""[rows, words]: bit t % 32 of word t // 32 says whether token t may be sampled."""


@dataclass(frozen=True)
class Grammar:
    """What an output must be; make it with one of the class methods. It is compiled when a generation starts, which
    needs the package llguidance (the extra `server`).

    >>> model.generate(prompt, SamplingParams(grammar=Grammar.regex(r"[A-Z][a-z]+")))
    """

    kind: Literal["json", "regex", "lark"]
    source: str

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any] | bool) -> "Grammar":
        """JSON that a schema describes, `oneOf` being taken for `anyOf`. Raises SettingsError for what is no JSON."""
        try:
            return cls("json", json.dumps(schema))
        except (TypeError, ValueError, RecursionError) as fault:
            raise SettingsError(f"The JSON schema is not made of JSON: {fault}.") from None

    @classmethod
    def json_object(cls) -> "Grammar":
        """Any JSON object."""
        return cls("json", '{"type": "object"}')

    @classmethod
    def regex(cls, pattern: str) -> "Grammar":
        """What a regular expression matches as a whole: Rust's syntax, so without look-around and back references."""
        return cls("regex", pattern)

    @classmethod
    def lark(cls, source: str) -> "Grammar":
        """What llguidance's form of a Lark grammar derives from its rule `start`."""
        return cls("lark", source)

    @classmethod
    def choice(cls, texts: Sequence[str]) -> "Grammar":
        """One of these texts."""
        if not texts or not all(texts):
            raise SettingsError("A choice needs at least one text, and none that is empty.")
        return cls("lark", "start: TEXT\nTEXT: " + " | ".join(json.dumps(text, ensure_ascii=False) for text in texts))


class Constraint(Protocol):
    """Keeps one generation to what is allowed. It is told the tokens as they are decided; drafts do not change it.

    What it says is a function of the tokens decided, and of the drafts where it is given any, so it is the same however
    the tokens are spread over passes.
    """

    @property
    def ended(self) -> bool:
        """Whether nothing may follow."""

    def forced(self, most: int) -> list[int]:
        """Tokens that are the only ones allowed next, at most so many."""

    def allow(self, drafts: Sequence[int]) -> tuple[list[int], Masks]:
        """The first drafts, up to one that is not allowed where it stands, and what may be sampled: in the place of
        each of those, and after the last."""

    def advance(self, token: int) -> None:
        """Appends a decided token."""
