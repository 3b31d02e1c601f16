"""`gemma-mtp train`: from a target and data to a drafter's folder."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from gemma_mtp.checkpoints.convert import convert
from gemma_mtp.checkpoints.files import written_whole
from gemma_mtp.checkpoints.hf_config import config_from_hf
from gemma_mtp.checkpoints.hub import resolve
from gemma_mtp.checkpoints.keys import read_json
from gemma_mtp.checkpoints.load import Checkpoint, open_checkpoint
from gemma_mtp.config import DrafterConfig, HeadsConfig, ModelConfig
from gemma_mtp.decoding.sampling import SamplingParams
from gemma_mtp.engine.engine import Engine
from gemma_mtp.errors import SettingsError
from gemma_mtp.model import Model
from gemma_mtp.ops.torch import TorchWeights
from gemma_mtp.training.chart import chart_of_training
from gemma_mtp.training.data import Text, Windows, check_paths, python_library, read_texts, split, token_stream
from gemma_mtp.training.distill import distill
from gemma_mtp.training.drafter import (
    drafter_config,
    first_weights,
    fitting_centroids,
    inherited_layers,
    output_embedding,
    weights_of,
    with_embedding,
)
from gemma_mtp.training.evaluate import acceptance
from gemma_mtp.training.export import widened, write_compact, write_folder
from gemma_mtp.training.fitting import fit_first_matrix
from gemma_mtp.training.heads import first_heads, heads_config
from gemma_mtp.training.optimise import Budget, Log, load_progress, save_progress
from gemma_mtp.training.states import TEXTS_A_SHARD, Lessons, Recipe, bytes_a_token, make_shards

PYTHON = "python"  # as data: Python's own library, which is also the default
ITSELF = "itself"  # as data, beside other: what the target says when it is given nothing
RATE, GENTLE_RATE = 2e-3, 5e-4
_FITTED_SHARDS = 4
WIDENED_BY = 32  # of zeros: a block of the quantisations
Show = Callable[[str, float], None]
"""Told what is being done, and the share of it that is done."""


@dataclass(frozen=True)
class TrainSettings:
    """How to train. tokens: of text to learn from; gigabytes: the most that its states may take on disk; minutes: of
    training, the making of the states not counted; hidden, layers: the drafter's, a width of None being the target's,
    with which it starts as the target's last layers; centroids: of its head, 0 scoring every token and None what fits,
    of which `active` are looked into; length: tokens of a text; texts: of a lesson, of which an update takes
    `accumulate`; rate: of learning, None for RATE, or GENTLE_RATE where what is trained has been trained before.

    kind: "assistant", or "heads" of which there are `depth`, `hidden` wide.
    init: the folder of a drafter to go on from, whose sizes then count instead of these.
    """

    target: str
    kind: str = "assistant"
    data: tuple[str, ...] = ()
    tokens: int = 400_000
    gigabytes: float = 4.0
    minutes: float = 30.0
    hidden: int | None = None
    layers: int = 2
    centroids: int | None = None
    active: int = 32
    length: int = 384
    texts: int = 3
    accumulate: int = 1
    depth: int = 3
    rate: float | None = None
    seed: int = 0
    threads: int | None = None
    init: str | None = None


_DEFAULTS = json.loads(json.dumps(asdict(TrainSettings(target=""))))


class Training:
    """One run, in a folder that it can be taken up from again."""

    def __init__(self, settings: TrainSettings, out: Path):
        self.settings, self.out = settings, out
        self.checkpoint: Checkpoint = open_checkpoint(resolve(settings.target))
        if not isinstance(self.checkpoint.config, ModelConfig):
            raise SettingsError(f"{settings.target} is a drafter: train one for a target.")
        self.target = self.checkpoint.config
        self.init = Path(settings.init) if settings.init else None
        self.described = self._described()
        drafter = config_from_hf(self.described, self.init or "the drafter's configuration")
        if isinstance(drafter, ModelConfig):
            raise SettingsError(f"{self.init} is no drafter that can be trained further.")
        drafter.check_target(self.target)
        self.drafter = drafter
        self.inherited = inherited_layers(drafter, self.target) if isinstance(drafter, DrafterConfig) else None
        if settings.length > self.target.context:
            most = self.target.context
            raise SettingsError(f"Texts of {settings.length} tokens are longer than the target's context of {most}.")
        self.files = [Path(path) for path in settings.data if path not in (PYTHON, ITSELF)]
        check_paths(self.files)
        shard = TEXTS_A_SHARD * settings.length
        room = int(settings.gigabytes * 1e9) // (bytes_a_token(self.target) * shard)
        if not room:
            raise SettingsError(f"{settings.gigabytes} GB hold not even one shard of states: give more.")
        self.shards = max(1, min(room, settings.tokens // shard))
        self.tokens = self.shards * shard

    def plan(self) -> str:
        """What a run will do, for people."""
        settings, drafter = self.settings, self.drafter
        if isinstance(drafter, HeadsConfig):
            body = f"{drafter.count} parallel heads, {drafter.width} wide"
        else:
            body = f"{len(drafter.layers)} layers, hidden {drafter.hidden}"
        head = f"{drafter.centroids.count} centroids" if drafter.centroids else "a full head"
        disk = self.tokens * bytes_a_token(self.target) / 1e9
        target = f"{self.target.family}, hidden {self.target.hidden}, {self.target.vocab} tokens"
        lines = [
            f"Target   {settings.target}: {target}",
            f"Drafter  {body}, {head}",
            *([f"From     {self.init}"] if self.init else []),
            f"Data     {', '.join(settings.data or [PYTHON])}",
            f"Tokens   {self.tokens:,}, three quarters written by the target",
            f"Disk     {disk:.2f} GB in {self.out / 'states'} (at most {settings.gigabytes:g} GB)",
            f"Time     {settings.minutes:g} minutes of training after the states are made",
        ]
        return "\n".join(lines)

    def run(self, resume: bool, show: Show, tell: Callable[[str], None]) -> None:
        """Trains, exports, measures, draws the log. Ctrl-C keeps what there is for `resume`. Raises SettingsError."""
        self._claim(resume)
        try:
            with Log(self.out / "log.jsonl", tell) as log:
                self._run(resume, show, log)
        finally:
            self._draw()

    def _run(self, resume: bool, show: Show, log: Log) -> None:
        settings, out = self.settings, self.out
        if settings.threads:
            torch.set_num_threads(settings.threads)
        log.write("start", resumed=resume, torch=torch.__version__, **asdict(settings) | {"tokens": self.tokens})
        model = Model.load(settings.target, drafter="none", threads=settings.threads)
        engine = model.engine
        assert isinstance(engine, Engine), "a model is loaded natively unless a device is named"
        texts, held_out = self._streams(model)
        weights = TorchWeights(self.checkpoint.weights, torch.device("cpu"), torch.float32)
        recipe = Recipe(settings.length, settings.seed, ITSELF in settings.data)
        for made in make_shards(out / "states", self.shards, engine, texts, recipe):
            show("The target writes and computes", made / self.shards)
        embedding = output_embedding(weights, self.target)
        kept = load_progress(out / "progress.pt") if resume else None
        drawn = kept[1].steps * settings.accumulate if kept else 0
        lessons = Lessons(out / "states", self.target, embedding, settings.texts, settings.seed, drawn)
        drafter_weights, done = kept or (self._start(weights, lessons, log), None)
        distill(
            self.drafter,
            drafter_weights,
            self.target,
            weights,
            lessons.next,
            Budget(seconds=settings.minutes * 60),
            log,
            depth=settings.depth,
            rate=settings.rate or (GENTLE_RATE if self.init or self.inherited else RATE),
            accumulate=settings.accumulate,
            done=done,
            held_out=lessons.held_out,
            show=lambda share: show("The drafter learns", share),
            save=lambda progress: save_progress(out / "progress.pt", drafter_weights, progress),
        )
        described, whole = self.described, with_embedding(drafter_weights, embedding)
        if isinstance(self.drafter, DrafterConfig) and self.inherited and self.target.family == "gemma4":
            # For llama.cpp, which runs these.
            described, whole = widened(described, whole, self.drafter.hidden + WIDENED_BY)
        write_folder(out, described, whole)
        if isinstance(self.drafter, DrafterConfig) and "embed" not in drafter_weights:
            write_compact(out / "compact", self.described, drafter_weights)
        self._write_tokenizer()
        rates = self._measure(held_out, log)
        (out / "README.md").write_text(self._card(rates), "utf-8")

    def add_to_card(self, section: str) -> None:
        """Ends the card with another section."""
        with open(self.out / "README.md", "a", encoding="utf-8") as card:
            card.write(f"\n{section}\n")

    def gguf(self) -> list[Path]:
        """Writes the drafter as GGUF beside its folder's other files."""
        return convert(self.out, self.out / f"{self.out.resolve().name}.gguf", force=True)

    def _described(self) -> dict[str, Any]:
        """The drafter's config.json."""
        settings = self.settings
        if self.init:
            if not (self.init / "config.json").is_file():
                raise SettingsError(f"{self.init} is not the folder of a drafter: it has no config.json.")
            return {key: value for key, value in read_json(self.init / "config.json").items() if key != "dtype"}
        centroids = settings.centroids if settings.centroids is not None else fitting_centroids(self.target.vocab)
        if settings.kind == "heads":
            return heads_config(
                self.target,
                count=settings.depth,
                width=settings.hidden,
                centroids=centroids or None,
                active=settings.active,
            )
        return drafter_config(
            self.target,
            hidden=settings.hidden,
            layers=settings.layers,
            centroids=centroids or None,
            active=settings.active,
        )

    def _claim(self, resume: bool) -> None:
        """Makes the folder a run's, or makes sure that it is this run's."""
        described = json.dumps(asdict(self.settings), indent=2) + "\n"
        path = self.out / "training.json"
        if not resume:
            if path.exists():
                raise SettingsError(
                    f"{self.out} holds a training already: go on with --resume, or give another folder."
                )
            if self.out.exists() and (not self.out.is_dir() or any(self.out.iterdir())):
                raise SettingsError(f"{self.out} is there already and not an empty folder: give another one.")
        elif not path.exists():
            raise SettingsError(f"{self.out} holds no training to resume.")
        else:
            earlier = _DEFAULTS | json.loads(path.read_text())  # which may be from before there was a setting
            free = ("data", "tokens", "gigabytes", "minutes", "threads")
            asked = json.loads(described)
            if changed := [name for name in asked if earlier.get(name) != asked[name] and name not in free]:
                raise SettingsError(f"{self.out} was trained with another {', '.join(changed)}: keep it to resume.")
        self.out.mkdir(parents=True, exist_ok=True)
        path.write_text(described)

    def _streams(self, model: Model) -> tuple[Windows, Windows]:
        settings = self.settings
        texts: list[Text] = python_library() if PYTHON in settings.data or not self.files else []
        if self.files:
            texts += read_texts(self.files)
        train, held_out = split(texts)
        if not held_out:  # few and large texts: their ends are held out
            cut = [(text.name, text.content, int(0.95 * len(text.content))) for text in texts]
            train = [Text(name, content[:end]) for name, content, end in cut]
            held_out = [Text(name, content[end:]) for name, content, end in cut]
        end = self.target.eos[0]

        def encode(text: str) -> list[int]:
            return model.tokenize(text)[1:]

        return (
            Windows(token_stream(train, encode, end), settings.length, self.target.bos, settings.seed, end),
            Windows(token_stream(held_out, encode, end), 48, self.target.bos, settings.seed, end),
        )

    def _draw(self) -> None:
        """The picture of the log, once there is something to see."""
        if drawn := chart_of_training(self.out / "log.jsonl", f"A drafter for {self.settings.target}"):
            with written_whole(self.out / "training.svg") as out:
                out.write(drawn.encode())

    def _start(self, of_target: TorchWeights, lessons: Lessons, log: Log) -> dict[str, torch.Tensor]:
        """The weights that a training starts from."""
        if self.init:
            return weights_of(self.init, self.drafter)
        if isinstance(self.drafter, HeadsConfig):
            return first_heads(self.drafter, self.target, of_target, self.settings.seed)
        weights = first_weights(self.drafter, self.target, of_target, self.settings.seed)
        if self.inherited:
            weights["pre_projection"], explained = fit_first_matrix(
                self.inherited[0], self.target, of_target, lessons.texts(_FITTED_SHARDS)
            )
            log.write("the target's last layers, and a first matrix fitted to them", explained=explained)
        return weights

    def _write_tokenizer(self) -> None:
        """The target's tokenizer beside the drafter, where the target is a folder: llama.cpp wants it."""
        for name in ("tokenizer.json", "tokenizer_config.json"):
            file = self.checkpoint.path / name
            if self.checkpoint.path.is_dir() and file.is_file():
                (self.out / name).write_bytes(file.read_bytes())

    def _measure(self, held_out: Windows, log: Log) -> dict[str, list[float]]:
        model = Model.load(self.settings.target, drafter=self.out, threads=self.settings.threads)
        prompts = [*held_out.batch(8).tolist(), *self._beginnings(held_out.openings(8))]
        rates = {}
        for name, temperature, loops in (
            ("greedy", 0.0, True),
            ("greedy, without loops", 0.0, False),
            ("temperature 1", 1.0, True),
        ):
            params = SamplingParams(max_tokens=96, temperature=temperature)
            rates[name] = acceptance(model, prompts, params, loops=loops).rates
            log.write("acceptance on held-out text", decoding=name, rates=rates[name])
        return rates

    def _beginnings(self, windows: NDArray[np.int64]) -> list[list[int]]:
        """Each window up to where its text ends."""
        end = self.target.eos[0]
        return [row[: row.index(end)] if end in row else row for row in windows.tolist()]

    def _card(self, rates: dict[str, list[float]]) -> str:
        rows = "\n".join(f"| {name} | {' | '.join(f'{rate:.2f}' for rate in of)} |" for name, of in rates.items())
        return (
            f"# A drafter for {self.settings.target}\n\n"
            f"Made by `gemma-mtp train` on {time.strftime('%Y-%m-%d')}; settings in training.json, figures in "
            f"log.jsonl.\n\n```\n{self.plan()}\n```\n\n"
            "Acceptance on held-out text, of the tokens drafted at each depth after those before were kept:\n\n"
            f"| decoding | depth 1 | depth 2 | depth 3 |\n|---|---|---|---|\n{rows}\n\n"
            "It is trained on what its target says and derived from the target's embedding: the target's licence "
            "applies to it.\n"
        )
