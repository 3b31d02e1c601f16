"""Grammars compiled to masks over a vocabulary, by llguidance."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterable, Sequence
from threading import Lock
from typing import Any

import numpy as np

from gemma_mtp.decoding.grammar import Grammar, Masks
from gemma_mtp.errors import SettingsError
from gemma_mtp.text.tokenizer import Tokenizer

# Between the parts of a JSON value: a space, or a line with its indent. Without a bound a model can go on for ever.
_JSON = {"whitespace_pattern": r"( |\n {0,16})?", "coerce_one_of": True}


def parts_of(grammar: Grammar) -> dict[str, Any]:
    """A grammar as llguidance takes it: an entry of its list of grammars."""
    guidance = _llguidance()
    if grammar.kind == "lark":
        return {"lark_grammar": grammar.source}
    try:
        if grammar.kind == "regex":
            compiled = guidance.LLMatcher.grammar_from_regex(grammar.source)
        else:
            compiled = guidance.LLMatcher.grammar_from_json_schema(grammar.source, defaults=_JSON)
    except ValueError as fault:  # a lone surrogate among them
        raise _refused(str(fault)) from None
    return json.loads(compiled)["grammars"][0]


class Guide:
    """Compiles grammars for one vocabulary.

    vocab: how many logits a row has. ends: the tokens that end a text. markup: spellings of further tokens that a
    grammar must name to allow. Making one takes about a second for a vocabulary of 262,144 tokens.
    """

    def __init__(self, tokenizer: Tokenizer, vocab: int, ends: Iterable[int], markup: Iterable[str]):
        self._tokenizer, self._vocab, self._ends = tokenizer, vocab, sorted(ends)
        self._markup = {id for text in markup if (id := self.token(text)) is not None}
        self._lock = Lock()
        self._library: Any = None

    def token(self, text: str) -> int | None:
        """The one token that is spelled so."""
        ids = self._tokenizer.encode(text, bos=False)
        return ids[0] if len(ids) == 1 else None

    def constraint(self, grammars: Sequence[dict[str, Any]]) -> GuidedText:
        """Keeps a generation to the first of these grammars, which may name the others. Raises SettingsError."""
        guidance = _llguidance()
        if not self._ends:
            raise SettingsError("This model has no token that ends a text, without which no grammar can be kept to.")
        try:
            source = json.dumps({"grammars": grammars})
        except RecursionError:
            raise _refused("it is nested too deeply") from None
        matcher = guidance.LLMatcher(self._vocabulary(guidance), source, log_level=0)
        if matcher.is_error():
            raise _refused(matcher.get_error())
        return GuidedText(matcher, self._vocab, self._ends)

    def _vocabulary(self, guidance: Any) -> Any:
        with self._lock:
            if self._library is None:
                self._library = guidance.LLTokenizer(
                    guidance.TokenizerWrapper(_Vocabulary(self._tokenizer, self._vocab, self._ends, self._markup)),
                    eos_token=self._ends,
                )
            return self._library


class GuidedText:
    """Implements Constraint."""

    def __init__(self, matcher: Any, vocab: int, ends: Sequence[int]):
        self._matcher, self._ends = matcher, frozenset(ends)
        self._words = (vocab + 31) // 32
        self._fill = importlib.import_module("llguidance.numpy").fill_next_token_bitmask

    @property
    def ended(self) -> bool:
        return self._matcher.is_stopped()

    def forced(self, most: int) -> list[int]:
        return self._matcher.compute_ff_tokens()[:most]

    def allow(self, drafts: Sequence[int]) -> tuple[list[int], Masks]:
        masks = np.empty((len(drafts) + 1, self._words), np.int32)
        kept = 0
        while True:
            self._fill(self._matcher, masks, kept)
            self._check()
            # What ends the text is left for the target to sample: nothing can be drafted after it.
            if kept == len(drafts) or drafts[kept] in self._ends or not _allows(masks[kept], drafts[kept]):
                break
            self._matcher.consume_token(drafts[kept])
            kept += 1
        self._matcher.rollback(kept)
        return list(drafts[:kept]), masks[: kept + 1].view(np.uint32)

    def advance(self, token: int) -> None:
        self._matcher.consume_token(token)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise _refused(self._matcher.get_error())


class _Vocabulary:
    """A tokenizer as llguidance reads it."""

    def __init__(self, tokenizer: Tokenizer, vocab: int, ends: Sequence[int], markup: set[int]):
        self._tokenizer = tokenizer
        self.eos_token_id, self.bos_token_id = ends[0], tokenizer.bos_id
        known = min(vocab, tokenizer.vocab_size)
        self.tokens = [tokenizer.token_bytes(id) for id in range(known)] + [b""] * (vocab - known)
        self.special_token_ids = sorted(id for id in tokenizer.special_ids | markup | set(ends) if id < known)

    def __call__(self, text: bytes) -> list[int]:
        """Called with whole characters."""
        return self._tokenizer.encode(text.decode(), bos=False, parse_special=False)


def _allows(mask: np.ndarray, token: int) -> bool:
    return bool(int(mask[token // 32]) >> token % 32 & 1)


def _llguidance() -> Any:
    try:
        return importlib.import_module("llguidance")
    except ImportError:
        raise SettingsError(
            "Grammars need the package llguidance: install it, or gemma-mtp with the extra 'server'."
        ) from None


def _refused(fault: str) -> SettingsError:
    """In one sentence: the library's message can have lines, with the place of the fault and the source around it."""
    told = [line.strip() for line in fault.splitlines() if line.strip()]
    cause = next((line.removeprefix("error: ") for line in told if line.startswith("error: ")), told[0] if told else "")
    return SettingsError(f"The grammar cannot be used: {cause[:200].rstrip('.:')}.")
