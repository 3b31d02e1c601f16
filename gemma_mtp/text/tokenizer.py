"""Text to token ids and back, with the vocabulary that a checkpoint brings along."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Any, Protocol

import numpy as np

from gemma_mtp._native import BytePairEncoder, InputError, StringArray
from gemma_mtp.errors import CheckpointError, PromptError

_SPACE = "\u2581".encode()  # how the vocabularies spell a space
_CONTROL, _USER_DEFINED = 3, 4  # in tokenizer.ggml.token_type
_BYTE_TOKENS = {f"<0x{value:02X}>".encode(): bytes([value]) for value in range(256)}


class Encoder(Protocol):
    """What a Tokenizer asks of a vocabulary."""

    def encode(self, text: bytes, parse_control: bool) -> list[int]:
        """Token ids of a UTF-8 text."""

    def token(self, id: int) -> bytes:
        """A token's spelling as UTF-8. Raises IndexError."""

    def __len__(self) -> int: ...


class Tokenizer:
    """Encodes and decodes text.

    `vocab_size`; `bos_id` and `pad_id` (None: the checkpoint has none); `eos_ids`, all tokens that the checkpoint says
    end a generation; `special_ids`, the control tokens; `added_ids`, those and all others that are found whole in a
    text before it is split; `add_bos`, whether a prompt starts with `bos_id`.
    """

    def __init__(
        self,
        encoder: Encoder,
        *,
        special_ids: Iterable[int],
        added_ids: Iterable[int],
        eos_ids: Iterable[int],
        bos_id: int | None,
        pad_id: int | None = None,
        add_bos: bool = True,
    ) -> None:
        self._encoder = encoder
        self.vocab_size = len(encoder)
        self.special_ids = frozenset(special_ids)
        self.added_ids = frozenset(added_ids)
        self.eos_ids = frozenset(eos_ids)
        self.bos_id = bos_id
        self.pad_id = pad_id
        self.add_bos = add_bos and bos_id is not None
        named = {*self.eos_ids, *(id for id in (bos_id, pad_id) if id is not None)}
        if outside := sorted(id for id in named if not 0 <= id < self.vocab_size):
            raise CheckpointError(
                f"The tokenizer names the token {outside[0]}, but its vocabulary has {self.vocab_size} tokens."
            )

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> Tokenizer:
        """From a GGUF file's `tokenizer.ggml.*` keys: kind 'llama' (Gemma 3) or 'gemma4'. Raises CheckpointError."""
        kind = _key(metadata, "model")
        if not isinstance(kind, str) or kind not in ("llama", "gemma4"):
            raise CheckpointError(
                f"The tokenizer is of the kind {kind!r}, but only 'llama' and 'gemma4' are supported."
            )
        if _flag(metadata, "add_space_prefix", False):
            raise CheckpointError("The tokenizer puts a space before every text, which no tokenizer of Gemma's does.")
        kinds = np.asarray(_key(metadata, "token_type"))
        if kinds.ndim != 1 or kinds.dtype.kind not in "iu":
            raise CheckpointError("The tokenizer's key 'tokenizer.ggml.token_type' is not a list of whole numbers.")
        tokens = _strings(metadata, "tokens")
        merges = _strings(metadata, "merges") if kind == "gemma4" else StringArray([])
        if kind == "gemma4" and len(merges) == 0:
            raise CheckpointError("The tokenizer's list 'tokenizer.ggml.merges' is empty.")
        try:
            encoder = BytePairEncoder(tokens, kinds.astype(np.int32), merges)
        except InputError as fault:
            raise CheckpointError(str(fault)) from None

        def named(name: str) -> int | None:
            id = metadata.get(f"tokenizer.ggml.{name}_token_id")
            if id is not None and not isinstance(id, int):
                raise CheckpointError(f"The tokenizer's key 'tokenizer.ggml.{name}_token_id' is not a whole number.")
            return id

        ends = (named(name) for name in ("eos", "eot", "eom"))
        return cls(
            encoder,
            special_ids=np.flatnonzero(kinds == _CONTROL).tolist(),
            added_ids=np.flatnonzero((kinds == _CONTROL) | (kinds == _USER_DEFINED)).tolist(),
            eos_ids=(id for id in ends if id is not None),
            bos_id=named("bos"),
            pad_id=named("padding"),
            add_bos=_flag(metadata, "add_bos_token", True),
        )

    @classmethod
    def from_folder(cls, folder: str | Path) -> Tokenizer:
        """From a Hugging Face folder's tokenizer.json and, where they are there, tokenizer_config.json,
        generation_config.json and config.json. Raises CheckpointError."""
        folder = Path(folder)
        encoder = LibraryEncoder(folder / "tokenizer.json")
        settings = read_json(folder / "tokenizer_config.json")

        def named(key: str) -> int | None:
            token = settings.get(key)
            text = token.get("content") if isinstance(token, dict) else token
            return encoder.library.token_to_id(text) if isinstance(text, str) else None

        added = encoder.library.get_added_tokens_decoder()
        generation, config = read_json(folder / "generation_config.json"), read_json(folder / "config.json")
        ends = generation.get("eos_token_id", config.get("eos_token_id", named("eos_token")))
        return cls(
            encoder,
            special_ids=(id for id, token in added.items() if token.special),
            added_ids=added,
            eos_ids=ends if isinstance(ends, list) else [] if ends is None else [ends],
            bos_id=named("bos_token"),
            pad_id=named("pad_token"),
            add_bos=settings.get("add_bos_token", True),
        )

    def encode(self, text: str, *, bos: bool = True, parse_special: bool = True) -> list[int]:
        """Token ids of `text`, after `bos_id` if `bos` is set and the checkpoint wants it. `parse_special`: control
        tokens spelled out in the text become those tokens. Raises PromptError."""
        try:
            ids = self._encoder.encode(text.encode(), parse_special)
        except UnicodeEncodeError as fault:
            raise PromptError(
                f"The text has a lone surrogate (U+{ord(text[fault.start]):04X}) at character {fault.start + 1}, which "
                "is no character: decode its bytes as UTF-8."
            ) from None
        except InputError as fault:
            raise PromptError(str(fault)) from None
        return [self.bos_id, *ids] if bos and self.add_bos and self.bos_id is not None else ids

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """The text of `ids`. Bytes that are not UTF-8 become U+FFFD. Raises PromptError."""
        detokenizer = self.stream(skip_special=skip_special)
        return detokenizer.push(ids) + detokenizer.flush()

    def stream(self, *, skip_special: bool = False, keep: Iterable[str] = ()) -> Detokenizer:
        """Decodes ids as they come. `keep`: control tokens, as they are spelled, that are not skipped."""
        kept = {ids[0] for text in keep if len(ids := self.encode(text, bos=False)) == 1}
        return Detokenizer(self, self.special_ids - kept if skip_special else frozenset())

    @cached_property
    def longest(self) -> int | None:
        """The most characters of a text that a token stands for; None where a tokenizer.json may turn more into it."""
        if isinstance(self._encoder, LibraryEncoder):
            return None
        return max(len(self.token_text(id)) for id in range(self.vocab_size))

    def token_text(self, id: int) -> str:
        """A token as the vocabulary spells it: '▁the', '<0x0A>'. Raises PromptError."""
        return self._spelling(id).decode(errors="replace")

    def token_bytes(self, id: int) -> bytes:
        """What a token adds to the text, as UTF-8 or a part of it. Raises PromptError."""
        spelling = self._spelling(id)
        return _BYTE_TOKENS.get(spelling) or spelling.replace(_SPACE, b" ")

    def _spelling(self, id: int) -> bytes:
        try:
            if not 0 <= id < self.vocab_size:  # the encoder's own ids have 32 bits
                raise IndexError(id)
            return self._encoder.token(id)
        except IndexError:
            raise PromptError(f"The token {id} is outside the vocabulary of {self.vocab_size} tokens.") from None


class Detokenizer:
    """Decodes ids as they come and holds back the bytes of a character that is not complete yet. All pieces together
    are the `decode` of all ids. `skipped`: ids that add nothing to the text."""

    def __init__(self, tokenizer: Tokenizer, skipped: frozenset[int] = frozenset()) -> None:
        self._tokenizer = tokenizer
        self._skipped = skipped
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, ids: Iterable[int]) -> str:
        """The text that these ids complete. Raises PromptError."""
        return self._utf8.decode(b"".join(self._tokenizer.token_bytes(id) for id in ids if id not in self._skipped))

    def flush(self) -> str:
        """What is left at the end: U+FFFD for an incomplete character, or nothing."""
        return self._utf8.decode(b"", final=True)


class LibraryEncoder:
    """A tokenizer.json, through the tokenizers library."""

    def __init__(self, path: Path) -> None:
        from tokenizers import Tokenizer as Library  # takes as long to import as all the rest of a short run

        if not path.is_file():
            raise CheckpointError(f"{path} does not exist: a Hugging Face folder needs its tokenizer there.")
        try:
            self.library = Library.from_file(str(path))
        except Exception as fault:  # the library raises Exception itself
            raise CheckpointError(f"{path} cannot be read as a tokenizer: {fault}.") from None
        if not getattr(self.library.model, "byte_fallback", False):
            raise CheckpointError(f"{path} is not a tokenizer of Gemma's: it has no byte tokens.")
        self._lock = Lock()  # encode_special_tokens is a setting of the library's object

    def encode(self, text: bytes, parse_control: bool) -> list[int]:
        with self._lock:
            self.library.encode_special_tokens = not parse_control
            return self.library.encode(text.decode(), add_special_tokens=False).ids

    def token(self, id: int) -> bytes:
        token = self.library.id_to_token(id) if id >= 0 else None
        if token is None:
            raise IndexError(id)
        return token.encode()

    def __len__(self) -> int:
        return self.library.get_vocab_size()


def _key(metadata: Mapping[str, Any], name: str) -> Any:
    try:
        return metadata[f"tokenizer.ggml.{name}"]
    except KeyError:
        raise CheckpointError(f"The checkpoint lacks the key 'tokenizer.ggml.{name}' of its tokenizer.") from None


def _flag(metadata: Mapping[str, Any], name: str, default: bool) -> bool:
    flag = metadata.get(f"tokenizer.ggml.{name}", default)
    if not isinstance(flag, bool):
        raise CheckpointError(f"The tokenizer's key 'tokenizer.ggml.{name}' is neither true nor false.")
    return flag


def _strings(metadata: Mapping[str, Any], name: str) -> StringArray:
    strings = _key(metadata, name)
    if isinstance(strings, StringArray):
        return strings
    if not isinstance(strings, list | tuple) or not all(isinstance(string, str) for string in strings):
        raise CheckpointError(f"The tokenizer's key 'tokenizer.ggml.{name}' is not a list of texts.")
    return StringArray(strings)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where there is no file."""
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (ValueError, OSError) as fault:
        raise CheckpointError(f"{path} cannot be read as JSON: {fault}.") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} does not hold a JSON object.")
    return content
