"""A small vocabulary of Gemma's kind, and the tokenizers library's own tokenizer over it."""

import json
from functools import cache

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, trainers

from .corpus import CORPUS

CONTROL = ["<pad>", "<eos>", "<bos>", "<unk>", "<|turn>", "<turn|>", "<turn|>>"]
USER_DEFINED = ["[x]", "<|channel>", "<channel|>", "<|ch", "\n", "\n\n", "\n\n\n"]
BYTES = [f"<0x{value:02X}>" for value in range(256)]
NORMAL, CONTROL_KIND, USER_DEFINED_KIND, BYTE_KIND = 1, 3, 4, 6


@cache
def trained() -> tuple[list[str], list[tuple[str, str]]]:
    """Tokens and merges learned from the corpus."""
    learner = Tokenizer(models.BPE())
    learner.normalizer = normalizers.Replace(" ", "▁")
    learner.train_from_iterator(
        [line for text in CORPUS for line in text.split("\n")] * 2,
        trainers.BpeTrainer(vocab_size=2500, show_progress=False, max_token_length=12),
    )
    model = json.loads(learner.to_str())["model"]

    def kept(token: str) -> bool:
        """Some characters are left to the byte tokens, and the tokens above are not learned once more."""
        return not set(token) & set("🦙śጵ𓀀你\n") and token not in CONTROL + USER_DEFINED + BYTES

    learned = [token for token in sorted(model["vocab"], key=model["vocab"].get) if kept(token)]
    merges = [(left, right) for left, right in model["merges"] if kept(left) and kept(right) and kept(left + right)]
    return CONTROL + USER_DEFINED + BYTES + learned, merges


def metadata(kind: str) -> dict:
    """What a GGUF file says of this vocabulary; kind: 'llama' or 'gemma4'."""
    tokens, merges = trained()
    kinds = dict.fromkeys(CONTROL, CONTROL_KIND)
    kinds |= dict.fromkeys(USER_DEFINED, USER_DEFINED_KIND) | dict.fromkeys(BYTES, BYTE_KIND)
    said = {
        "tokenizer.ggml.model": kind,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [kinds.get(token, NORMAL) for token in tokens],
        "tokenizer.ggml.bos_token_id": 2,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.eot_token_id": 5,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_space_prefix": False,
    }
    return said | ({"tokenizer.ggml.merges": [" ".join(pair) for pair in merges]} if kind == "gemma4" else {})


@cache
def reference(kind: str) -> Tokenizer:
    """The library's tokenizer, set up as transformers does for Gemma."""
    tokens, merges = trained()
    ids = {token: id for id, token in enumerate(tokens)}
    if kind == "llama":
        splits = (
            (id, -at, token[:at], token[at:])
            for token, id in ids.items()
            if token not in CONTROL + USER_DEFINED + BYTES  # they are found whole, or not at all
            for at in range(1, len(token))
            if token[:at] in ids and token[at:] in ids
        )
        merges = [(left, right) for _, _, left, right in sorted(splits)]
    library = Tokenizer(models.BPE(vocab=ids, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    library.normalizer = normalizers.Replace(" ", "▁")
    library.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    library.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in CONTROL])
    library.add_tokens([AddedToken(token, normalized=False, special=False) for token in USER_DEFINED])
    return library
