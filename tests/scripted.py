"""A tiny checkpoint that says by heart what a test wants it to say."""

import json
from itertools import pairwise
from pathlib import Path

from tokenizers import AddedToken, Tokenizer

from gemma_mtp.checkpoints.hf_config import config_from_hf

from .checkpoints.tiny import TARGETS, random_weights, write_folder
from .text.vocabulary import reference

MARKUP = ["<|tool_call>", "<tool_call|>", '<|"|>', "<|tool>", "<tool|>", "<|think|>"]

# Gemma 4's template in short. A generation starts after "[x]", or after an empty channel where there is no thinking.
TEMPLATE = """{{ bos_token }}
{%- for tool in tools or [] %}<|tool>{{ tool.function.name }}<tool|>{% endfor %}
{%- for message in messages %}<|turn>{{ message.role }}
{% for call in message.tool_calls %}<|tool_call>call:{{ call.function.name }}<tool_call|>{% endfor %}
{{- message.content }}<turn|>
{% endfor %}
{%- if add_generation_prompt %}<|turn>model
[x]{% if not enable_thinking %}<|channel>thought
<channel|>{% endif %}{% endif %}"""

# Its tokens, each of which stands but once: what follows it is then certain.
SCRIPT = [
    "[x]", "<|channel>", "thought\n", "Hmm,", " so", "<channel|>", "Hello", " there", " you",
    "<|tool_call>", "call:add{", "a:1,", 'b:<|"|>x', " y", '<|"|>', "}", "<tool_call|>", "<turn|>",
]  # fmt: skip
REASONING, ANSWER, CALL = "Hmm, so", "Hello there you", {"name": "add", "arguments": {"a": 1, "b": "x y"}}


def write_scripted(folder: Path, script: list[str] = SCRIPT, template: str | None = TEMPLATE) -> Path:
    """A Gemma 3 that goes on with `script` after any token of it.

    Its layers add nothing; the embeddings of the script's tokens are orthogonal, and the LM head of each is the
    embedding of the one before.
    """
    library = Tokenizer.from_str(reference("llama").to_str())
    library.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in MARKUP])
    words = [token for token in script if library.token_to_id(token) is None]
    library.add_tokens([AddedToken(token, normalized=False, special=False) for token in words])
    ids = library.encode("".join(script), add_special_tokens=False).ids
    assert len(ids) == len(set(ids)) == len(script)
    vocabulary, hidden = library.get_vocab_size(), 64
    config = TARGETS["gemma3"] | {
        "vocab_size": vocabulary, "hidden_size": hidden, "tie_word_embeddings": False, "num_hidden_layers": 6,
    }  # fmt: skip
    weights = random_weights(config_from_hf(config))
    for name, value in weights.items():
        value *= 0 if "." in name and not name.endswith("norm") else 1
    weights["final_norm"][:] = 1
    weights["embed"] *= 0
    weights["lm_head"] *= 0
    for row, token in enumerate(ids):
        weights["embed"][token, row] = 1
    for token, following in pairwise(ids):
        weights["lm_head"][following] = weights["embed"][token]
    write_folder(folder, config, weights, eos_token_id=[1])
    library.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "add_bos_token": True}
    if template is not None:
        settings["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder
