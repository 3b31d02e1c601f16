"""Makes a small but real Gemma 4 and its drafter from the Python library's sources, on a CPU, in minutes.

    python examples/small_gemma4.py small-gemma4 --minutes 10
    gemma-mtp run small-gemma4 "def main("

Everything is trained here, the tokenizer too. The target has every switch of Gemma 4: per-layer embeddings, layers
that share keys and values and have a double-wide MLP, sliding and full attention with heads of two sizes, proportional
RoPE, a soft-cap, a scalar a layer. Its drafter learns from text that the target wrote and from the sources.

OUT is the target as a Hugging Face folder, OUT/assistant its drafter, OUT/gguf both as GGUF. OUT/log.jsonl holds the
figures of the run, OUT/training.json how it was made. With --minutes 1 the pair is poor but works. A run that was
stopped goes on with --resume, and one that has ended does too, given more minutes: OUT/progress is kept for that.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from gemma_mtp import Model, SamplingParams
from gemma_mtp.checkpoints.convert import convert
from gemma_mtp.checkpoints.hf_config import config_from_hf
from gemma_mtp.config import DrafterConfig, ModelConfig
from gemma_mtp.training.data import Text, Windows, python_library, split, token_stream
from gemma_mtp.training.distill import distill, lesson_of
from gemma_mtp.training.drafter import (
    drafter_config,
    first_weights,
    inherited_layers,
    output_embedding,
    with_embedding,
)
from gemma_mtp.training.evaluate import acceptance
from gemma_mtp.training.export import rounded, widened, write_folder
from gemma_mtp.training.fitting import fit_first_matrix
from gemma_mtp.training.optimise import Budget, Log, initial_weights, load_progress, on_device, save_progress
from gemma_mtp.training.pretrain import pretrain
from gemma_mtp.training.states import TOP, write

VOCAB = 4096
LENGTH = 384  # tokens of a training window
SEQUENCES = 3  # windows a step
TOGETHER = 16  # texts that the target writes at once
DRAFTER_WIDTH = 224  # of its files: see widened
FITTED = 16  # steps' texts that the first matrix of the drafter is fitted to
RATE = 1e-3  # of the drafter's learning
SHARES = {"target": 0.6, "sampling": 0.1, "drafter": 0.3}  # of the time
SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>"]
PAD, EOS, BOS = 0, 1, 2
_SLIDING, _FULL = "sliding_attention", "full_attention"
TARGET: dict[str, Any] = {
    "architectures": ["Gemma4ForCausalLM"],
    "model_type": "gemma4_text",
    "vocab_size": VOCAB,
    "hidden_size": 192,
    "intermediate_size": 320,
    "num_hidden_layers": 6,
    "layer_types": [_SLIDING, _SLIDING, _SLIDING, _FULL, _SLIDING, _FULL],
    "num_kv_shared_layers": 2,
    "use_double_wide_mlp": True,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "global_head_dim": 64,
    "sliding_window": 128,
    "hidden_size_per_layer_input": 32,
    "vocab_size_per_layer_input": VOCAB,
    "final_logit_softcapping": 30.0,
    "max_position_embeddings": 2048,
    "rope_parameters": {
        _FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6},
        _SLIDING: {"rope_type": "default", "rope_theta": 1e4},
    },
    "tie_word_embeddings": True,
    "pad_token_id": PAD,
    "eos_token_id": EOS,
    "bos_token_id": BOS,
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a small Gemma 4 and its drafter from scratch.")
    parser.add_argument("out", type=Path, metavar="OUT", help="the folder to make; an earlier pair in it is replaced")
    parser.add_argument("--minutes", type=float, default=10, help="how long to train (default 10)")
    parser.add_argument("--threads", type=int, help="of PyTorch; on a machine with other work 1 is fastest")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="go on with the run in OUT")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    make_pair(args.out, args.minutes, args.seed, args.resume)


def make_pair(out: Path, minutes: float, seed: int, resume: bool = False) -> None:
    """Trains both models and writes all files."""
    (out / "assistant").mkdir(parents=True, exist_ok=True)
    if not resume:
        (out / "log.jsonl").unlink(missing_ok=True)
        shutil.rmtree(out / "progress", ignore_errors=True)
    with Log(out / "log.jsonl", tell=print) as log:
        train_pair(out, minutes, seed, log)
    made = {"minutes": minutes, "seed": seed, "shares": SHARES, "length": LENGTH, "sequences": SEQUENCES}
    versions = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    (out / "training.json").write_text(json.dumps(made | versions, indent=2) + "\n")


def train_pair(out: Path, minutes: float, seed: int, log: Log) -> None:
    started = time.perf_counter()
    seconds = {part: 60 * minutes * share for part, share in SHARES.items()}
    texts, held_out_texts = split(python_library())
    kept = out / "progress"
    made = out / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(made)) if kept.exists() and made.exists() else train_tokenizer(texts)
    write_tokenizer(tokenizer, out)
    write_tokenizer(tokenizer, out / "assistant")
    tokens, held_out = (
        token_stream(part, lambda text: tokenizer.encode(text, add_special_tokens=False).ids, EOS)
        for part in (texts, held_out_texts)
    )
    log.write("data", files=len(texts), tokens=len(tokens), held_out_tokens=len(held_out))

    target = config_from_hf(TARGET)
    assert isinstance(target, ModelConfig)
    weights, done = load_progress(kept / "target.pt") or (initial_weights(target, seed), None)
    pretrain(
        target,
        weights,
        Windows(tokens, LENGTH, BOS, seed + (done.steps if done else 0)),
        Windows(held_out, LENGTH, BOS, seed),
        Budget(seconds["target"]),
        log,
        sequences=SEQUENCES,
        done=done,
        save=lambda progress: save_progress(kept / "target.pt", weights, progress),
    )
    write_folder(out, TARGET, weights)

    windows = Windows(tokens, LENGTH, BOS, seed + 1)
    own = Windows(written_by(out, windows, seconds["sampling"], log), LENGTH, BOS, seed)
    described = drafter_config(target)  # with a full head, as llama.cpp has it
    drafter = config_from_hf(described)
    assert isinstance(drafter, DrafterConfig)
    target_weights = rounded(weights)
    running = on_device(target_weights)

    def texts_to_learn() -> torch.Tensor:
        return torch.from_numpy(np.concatenate([own.batch(SEQUENCES - 1), windows.batch(1)]))

    drafter_weights, done = load_progress(kept / "drafter.pt") or (first_weights(drafter, target, running, seed), None)
    if not done:
        first, _ = inherited_layers(drafter, target) or ()
        texts_to_fit = (texts_to_learn() for _ in range(FITTED))
        drafter_weights["pre_projection"], explained = fit_first_matrix(first, target, running, texts_to_fit)
        log.write("drafter started as the target's last layers", explained=explained)

    distill(
        drafter,
        drafter_weights,
        target,
        running,
        lambda: lesson_of(running, target, texts_to_learn()),
        Budget(seconds["drafter"]),
        log,
        rate=RATE,
        done=done,
        save=lambda progress: save_progress(kept / "drafter.pt", drafter_weights, progress),
    )
    whole = with_embedding(drafter_weights, output_embedding(running, target))
    write_folder(out / "assistant", *widened(described, whole, DRAFTER_WIDTH))
    (out / "gguf").mkdir(exist_ok=True)
    convert(out, out / "gguf" / "small-gemma4.gguf", force=True)
    convert(out / "assistant", out / "gguf" / "small-gemma4-assistant.gguf", force=True)

    report(out, held_out, log)
    files = [file for folder in (out, out / "assistant") for file in folder.iterdir() if file.is_file()]
    total = sum(file.stat().st_size for file in files)
    log.write("files", megabytes=total / 1e6, minutes=round((time.perf_counter() - started) / 60, 1))


def train_tokenizer(texts: list[Text]) -> Tokenizer:
    """A byte-pair tokenizer in Gemma 4's form: spaces as '▁', bytes for what is rare, no splitting before merges.

    It is learned on words, numbers, runs of spaces, of line ends and of signs, so that no token crosses these.
    """
    learner = Tokenizer(models.BPE())
    learner.normalizer = normalizers.Replace(" ", "▁")
    pieces = Regex(r"▁?[\p{L}_]+|\p{N}|\n+|▁+|▁?[^\p{L}\p{N}_▁\n]+")
    learner.pre_tokenizer = pre_tokenizers.Split(pieces, "isolated")
    fixed = SPECIAL + [f"<0x{value:02X}>" for value in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=fixed, limit_alphabet=120, max_token_length=16, show_progress=False
    )
    learner.train_from_iterator((text.content for text in texts), trainer)
    learned = json.loads(learner.to_str())["model"]
    merges = [tuple(merge) for merge in learned["merges"]]
    tokenizer = Tokenizer(
        models.BPE(vocab=learned["vocab"], merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL])
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    if tokenizer.get_vocab_size() != VOCAB:
        raise SystemExit(f"The texts gave {tokenizer.get_vocab_size()} tokens instead of {VOCAB}.")
    return tokenizer


def write_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    settings = {f"{token[1:-1]}_token": token for token in SPECIAL}
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def written_by(folder: Path, windows: Windows, seconds: float, log: Log) -> np.ndarray:
    """int32 [tokens]: how the target goes on from pieces of its texts, a third nearly greedily, the rest sampled."""
    engine = Model.load(folder, drafter="none", threads=1).engine  # more only wait for each other at this size
    parts: list[np.ndarray] = []
    start = time.perf_counter()
    while time.perf_counter() - start < seconds or not parts:
        numbers = range(TOGETHER * len(parts), TOGETHER * (len(parts) + 1))
        how = [
            (
                16 + 16 * (number % 3),
                SamplingParams(temperature=0.3 if number % 3 == 0 else 1.0, seed=number, logprobs=TOP),
            )
            for number in numbers
        ]
        parts.append(write(engine, windows.batch(TOGETHER), how)["tokens"].numpy().flatten())
    tokens = np.concatenate(parts)
    log.write("target wrote", tokens=len(tokens), seconds=round(time.perf_counter() - start, 1))
    return tokens


def report(folder: Path, held_out: np.ndarray, log: Log) -> None:
    """Acceptance at depths 1 to 3 on code the models have not seen, greedy and at temperature 1."""
    model = Model.load(folder, threads=1)
    windows = Windows(held_out, 64, BOS, seed=1)
    prompts = windows.batch(32).tolist()
    for name, temperature in (("greedy", 0.0), ("temperature 1", 1.0)):
        params = SamplingParams(max_tokens=128, temperature=temperature, seed=1)
        every = acceptance(model, prompts, params).rates
        log.write(f"acceptance on held-out code, {name}", rates=every)
        if not temperature:
            log.write("the same without loops", rates=acceptance(model, prompts, params, loops=False).rates)


if __name__ == "__main__":
    main()
