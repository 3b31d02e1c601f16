"""A Hugging Face folder's tokenizer as GGUF metadata, in the two kinds llama.cpp has for Gemma.

Gemma 3: kind "llama", where a token's score says how early it is merged. Gemma 4: kind "gemma4", with the merges.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from gemma_mtp.checkpoints.keys import read_json, shown
from gemma_mtp.config import DrafterConfig, ModelConfig
from gemma_mtp.errors import CheckpointError

_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 3, 4, 5, 6
_UNMERGED = -1000.0  # the score of what no merge makes
_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
# What Gemma 4's answers are read by: llama.cpp shows these tokens in its output, so they are not "control" there.
_VISIBLE = {
    "<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>", '<|"|>',
}  # fmt: skip


def keys_from_tokenizer(folder: Path, config: ModelConfig | DrafterConfig) -> dict[str, Any]:
    """The keys `tokenizer.*`, of as many tokens as the model has. Raises CheckpointError."""
    path = folder / "tokenizer.json"
    content = read_json(path)
    settings = read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
    ids, merges, added = _vocabulary(content, path)
    gemma3 = isinstance(config, ModelConfig) and config.family == "gemma3"
    tokens, kinds = _tokens(ids, added, config.vocab, gemma3)
    keys: dict[str, Any] = {"tokenizer.ggml.model": "llama" if gemma3 else "gemma4"}
    if gemma3:
        keys["tokenizer.ggml.pre"] = "default"
    keys["tokenizer.ggml.tokens"] = tokens
    scores = _scores(tokens, kinds, merges, path) if gemma3 else np.full(len(tokens), _UNMERGED, np.float32)
    keys["tokenizer.ggml.scores"] = scores
    keys["tokenizer.ggml.token_type"] = np.array(kinds, np.int32)
    if not gemma3:
        keys["tokenizer.ggml.merges"] = [f"{left} {right}" for left, right in merges]

    def named(name: str) -> int | None:
        token = settings.get(name)
        text = token.get("content") if isinstance(token, dict) else token
        return ids.get(text) if isinstance(text, str) else None

    special = {
        "bos": named("bos_token"),
        "unknown": named("unk_token") or ids.get(content["model"].get("unk_token") or ""),
        "padding": named("pad_token"),
        "mask": named("mask_token"),
    }
    if isinstance(config, ModelConfig):
        special |= {"bos": config.bos, "padding": config.pad}
        special |= dict(zip(("eos", "eot", "eom"), config.eos, strict=False))
    else:
        special["eos"] = named("eos_token")
    keys |= {f"tokenizer.ggml.{name}_token_id": id for name, id in special.items() if id is not None}
    keys["tokenizer.ggml.add_bos_token"] = bool(settings.get("add_bos_token", True))
    keys["tokenizer.ggml.add_space_prefix"] = False
    if template := _chat_template(folder, settings):
        keys["tokenizer.chat_template"] = template
    return keys


def _vocabulary(content: dict[str, Any], path: Path) -> tuple[dict[str, int], list[tuple[str, str]], dict[int, bool]]:
    """Ids by spelling, merges in order, and of the added tokens whether they are control tokens."""
    try:
        model = content["model"]
        ids: dict[str, int] = dict(model["vocab"])
        merges = [tuple(merge.split(" ", 1) if isinstance(merge, str) else merge) for merge in model["merges"]]
        added = {token["id"]: bool(token["special"]) for token in content["added_tokens"]}
        ids |= {token["content"]: token["id"] for token in content["added_tokens"]}
        sound = all(isinstance(id, int) and id >= 0 for id in ids.values()) and all(len(merge) == 2 for merge in merges)
    except (KeyError, TypeError, ValueError):
        sound = False
    if not sound or not model.get("byte_fallback"):
        raise CheckpointError(f"{path} is no tokenizer of Gemma's: it lacks a vocabulary with merges and byte tokens.")
    if spaced := next((merge for merge in merges if " " in merge[0] + merge[1]), None):
        raise CheckpointError(f"{path} has the merge {shown(spaced)} with a space, which GGUF cannot hold.")
    return ids, merges, added


def _tokens(ids: dict[str, int], added: dict[int, bool], count: int, gemma3: bool) -> tuple[list[str], list[int]]:
    """Spelling and kind of each of the model's `count` tokens; what the tokenizer has beyond them is left out."""
    tokens, kinds = [f"[PAD{i}]" for i in range(count)], [_UNUSED] * count
    for text, id in ids.items():
        if id >= count:
            continue
        if id in added and not (added[id] and (gemma3 or text not in _VISIBLE)):
            # Kind "llama" looks for these in the text before spaces are respelled.
            tokens[id], kinds[id] = text.replace("\u2581", " ") if gemma3 else text, _USER_DEFINED
        else:
            kind = _CONTROL if id in added else _BYTE if _BYTE_TOKEN.fullmatch(text) else _NORMAL
            tokens[id], kinds[id] = text, kind
    return tokens, kinds


def _scores(tokens: list[str], kinds: list[int], merges: list[tuple[str, str]], path: Path) -> np.ndarray:
    """float32 [tokens]: the earlier a token is merged, the higher. The kind "llama" orders tokens, not pairs."""
    first: dict[str, int] = {}
    for rank, (left, right) in enumerate(merges):
        first.setdefault(left + right, rank)
    ranks = [first.get(text) if kind == _NORMAL else None for text, kind in zip(tokens, kinds, strict=True)]
    merged = [rank for rank in ranks if rank is not None]
    if merged != sorted(merged):
        raise CheckpointError(f"{path} merges tokens in another order than that of their ids, as no Gemma 3 does.")
    return np.array([_UNMERGED if rank is None else -rank for rank in ranks], np.float32)


def _chat_template(folder: Path, settings: dict[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text("utf-8")
        except (OSError, ValueError) as fault:
            raise CheckpointError(f"{file} cannot be read: {fault}.") from None
    source = settings.get("chat_template")
    if isinstance(source, list):  # several templates by name
        source = next((entry["template"] for entry in source if entry.get("name") == "default"), None)
    return source if isinstance(source, str) else None
