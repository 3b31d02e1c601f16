"""Checks that what `gemma-mtp convert` writes is what llama.cpp takes it for.

usage: python benchmarks/interchange.py --llama-cpp DIR [--gemma4-vocab FILE] [--keep FOLDER]

DIR holds llama-server. Random models with every switch of their family set, a small Gemma 3 and a small Gemma 4 like
E2B with its drafter, are saved by transformers, converted to f32 and f16 GGUF by the command, and decoded greedily by
it, by llama.cpp and by gemma-mtp. Their vocabularies are real: Gemma 3's is the demo's, Gemma 4's lies in llama.cpp's
sources (models/ggml-vocab-gemma-4.gguf). Prints a line a check, one JSON object at the end; exit 1 if anything differs.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import transformers
from llama_server import LlamaServer, version
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from transformers import AutoConfig, AutoModelForCausalLM

from gemma_mtp import Model, SamplingParams
from gemma_mtp.checkpoints.demo import demo_path
from gemma_mtp.checkpoints.gguf import GGUF

STEPS = 32
EXACT = ["-fa", "off", "-ctk", "f32", "-ctv", "f32", "-t", "2"]  # in float32 where the weights do not say otherwise
TEXTS = [
    "The quick brown fox jumps over the lazy dog.",
    "def fibonacci(n):\n    return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)\n",
    "Übergrößenträger kosten 3.141,59 €;   drei  Leerzeichen,\n\n\nzwei Leerzeilen, 你好, 🦙 und <div>.",
]
PATTERN = ["sliding_attention"] * 4 + ["full_attention"]
GEMMA3 = {
    "model_type": "gemma3_text", "hidden_size": 256, "num_hidden_layers": 7, "intermediate_size": 512,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "query_pre_attn_scalar": 64,
    "sliding_window": 16, "max_position_embeddings": 1024,
}  # fmt: skip
GEMMA4 = {
    "model_type": "gemma4_text", "hidden_size": 256, "num_hidden_layers": 10, "layer_types": PATTERN * 2,
    "intermediate_size": 512, "use_double_wide_mlp": True, "num_attention_heads": 4, "num_key_value_heads": 1,
    "head_dim": 64, "global_head_dim": 128, "num_kv_shared_layers": 5, "hidden_size_per_layer_input": 32,
    "sliding_window": 16, "max_position_embeddings": 1024, "final_logit_softcapping": 30.0,
}  # fmt: skip
DRAFTER_LAYERS = {
    "num_hidden_layers": 4, "layer_types": PATTERN[1:], "hidden_size": 128, "hidden_size_per_layer_input": 0,
    "num_kv_shared_layers": 4, "use_double_wide_mlp": False, "vocab_size_per_layer_input": 0,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama-cpp", type=Path, required=True, help="folder with bin/llama-server")
    parser.add_argument("--gemma4-vocab", type=Path, help="default: found in llama.cpp's sources beside or above DIR")
    parser.add_argument("--keep", type=Path, help="leave the models in this folder")
    options = parser.parse_args()
    server = options.llama_cpp / "bin" / "llama-server"
    vocab = options.gemma4_vocab or find_vocab(options.llama_cpp)
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.keep or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        found = check(server, vocab, folder)
    print(json.dumps(found))
    sys.exit(0 if all(check["agrees"] for check in found["checks"]) else 1)


def check(server: Path, vocab: Path, folder: Path) -> dict:
    found = {
        "llama.cpp": version(server),
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "checks": [],
    }
    for name, config, source in (("gemma3", GEMMA3, demo_path()), ("gemma4", GEMMA4, vocab)):
        tokenizer = library_tokenizer(source)
        config = config | {"vocab_size": tokenizer.get_vocab_size()}
        if name == "gemma4":
            config["vocab_size_per_layer_input"] = config["vocab_size"]
        make_folder(folder / name, config, tokenizer)
        for kind in ("f32", "f16"):
            file = folder / f"{name}.{kind}.gguf"
            convert(folder / name, file, kind)
            with LlamaServer(server, file, EXACT) as peer:
                tokens = compare(found, f"{name} {kind}", peer, tokenizer, reference(folder / name, kind), file)
    make_drafter(folder / "drafter", config, library_tokenizer(vocab))
    convert(folder / "drafter", folder / "drafter.gguf", "f16")
    drafting = ["-md", str(folder / "drafter.gguf"), "--spec-type", "draft-mtp", "--spec-draft-n-max", "4"]
    with LlamaServer(server, folder / "gemma4.f16.gguf", EXACT + drafting) as peer:
        for text, expected in zip(TEXTS, tokens, strict=True):
            answer = peer.complete([2, *tokenizer.encode(text, add_special_tokens=False).ids], STEPS)
            drafted = answer["timings"].get("draft_n", 0)
            more = {"drafted": drafted, "accepted": answer["timings"].get("draft_n_accepted", 0)}
            report(found, "gemma4 f16 with drafter", answer["tokens"] == expected and drafted > 0, **more)
    return found


def compare(
    found: dict, name: str, peer: LlamaServer, tokenizer: Tokenizer, model: torch.nn.Module, file: Path
) -> list[list[int]]:
    """Compares tokens of text and of greedy decoding; returns llama.cpp's."""
    decoded = []
    ours = Model.load(file, drafter="none", dtype="f32")
    for text in TEXTS:
        ids = [2, *tokenizer.encode(text, add_special_tokens=False).ids]
        report(found, f"{name} tokens of {text[:20]!r}", peer.tokenize(text) == ids)
        theirs = peer.complete(ids, STEPS)["tokens"]
        with torch.inference_mode():
            whole = model.generate(torch.tensor([ids]), max_new_tokens=STEPS, do_sample=False, eos_token_id=None)
            expected = whole[0, len(ids) :].tolist()
            logits = model(whole).logits[0, len(ids) - 1 : -1].topk(2).values
        closest = float((logits[:, 0] - logits[:, 1]).min())
        more = {"different_tokens": len(set(expected)), "closest_call": round(closest, 4)}
        for engine, tokens in (
            ("llama.cpp", theirs),
            ("gemma-mtp", ours.generate(ids, SamplingParams(max_tokens=STEPS, ignore_eos=True), draft="off").tokens),
        ):
            agreed = next((i for i, (a, b) in enumerate(zip(expected, tokens, strict=False)) if a != b), STEPS)
            report(found, f"{name} greedy, {engine}", tokens == expected, agreed=agreed, **more)
        decoded.append(theirs)
    return decoded


def report(found: dict, name: str, agrees: bool, **more: object) -> None:
    found["checks"].append({"name": name, "agrees": agrees, **more})
    print(f"{'agrees ' if agrees else 'DIFFERS'} {name} {more or ''}", flush=True)


def convert(source: Path, out: Path, kind: str) -> None:
    command = [sys.executable, "-m", "gemma_mtp", "convert", source, out, "--type", kind, "--force"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def make_folder(folder: Path, config: dict, tokenizer: Tokenizer) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=torch.float32)
    save(model, folder, tokenizer)


def make_drafter(folder: Path, target: dict, tokenizer: Tokenizer) -> None:
    text = target | DRAFTER_LAYERS
    torch.manual_seed(1)
    config = AutoConfig.for_model(
        "gemma4_assistant", backbone_hidden_size=target["hidden_size"], text_config=text, use_ordered_embeddings=True
    )
    save(AutoModelForCausalLM.from_config(config, dtype=torch.float32), folder, tokenizer)


def save(model: torch.nn.Module, folder: Path, tokenizer: Tokenizer) -> None:
    """Saves the model with random weights in every place, those that start out as ones and zeros too."""
    gemma3 = model.config.model_type.startswith("gemma3")
    with torch.no_grad():
        for name, weight in [*model.named_parameters(), *model.named_buffers()]:
            if not weight.is_floating_point() or "inv_freq" in name or "embed_scale" in name:
                continue
            if weight.ndim > 1:
                weight.normal_(0, 1 / math.sqrt(weight.shape[-1]))
            elif weight.ndim == 1:
                factor = weight.uniform_(0.5, 1.5)
                if name.endswith("model.norm.weight"):  # a tied embedding likes its own token best: turn that round
                    factor.neg_()
                if gemma3:
                    factor.sub_(1)
            # Tokens of different weight, so that the best logits lie further apart than two ways of rounding.
            if name.endswith("embed_tokens.weight"):
                weight.mul_(torch.randn(len(weight), 1).mul_(0.3 if gemma3 else 0.5).exp_())
    model.save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))


def reference(folder: Path, kind: str) -> torch.nn.Module:
    """The model in float32, its matrices rounded as in the GGUF file."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    if kind == "f16":
        with torch.no_grad():
            for weight in model.parameters():
                if weight.ndim > 1:
                    weight.copy_(weight.half())
    return model


def library_tokenizer(path: Path) -> Tokenizer:
    """The vocabulary of a GGUF file as the tokenizers library has it, set up as transformers does for Gemma."""
    said = GGUF.open(path).metadata
    tokens, kinds = said["tokenizer.ggml.tokens"].tolist(), said["tokenizer.ggml.token_type"].tolist()
    ids = {token: id for id, token in enumerate(tokens)}
    if said["tokenizer.ggml.model"] == "gemma4":
        merges = [tuple(merge.split(" ")) for merge in said["tokenizer.ggml.merges"].tolist()]
    else:  # every way to put a token together, in the order of the tokens
        merges = [
            (token[:at], token[at:])
            for token, kind in zip(tokens, kinds, strict=True)
            if kind == 1
            for at in range(1, len(token))
            if token[:at] in ids and token[at:] in ids
        ]
    library = Tokenizer(models.BPE(vocab=ids, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    library.normalizer = normalizers.Replace(" ", "▁")
    library.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == 3]
    others = [token for token, kind in zip(tokens, kinds, strict=True) if kind == 4]
    library.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    library.add_tokens([AddedToken(token, normalized=False, special=False) for token in others])
    return library


def find_vocab(binaries: Path) -> Path:
    place = "models/ggml-vocab-gemma-4.gguf"
    for folder in (binaries, *binaries.resolve().parents):
        for file in (folder / place, folder / "src" / place):
            if file.is_file():
                return file
    sys.exit("ggml-vocab-gemma-4.gguf is not near --llama-cpp: give it with --gemma4-vocab.")


if __name__ == "__main__":
    main()
