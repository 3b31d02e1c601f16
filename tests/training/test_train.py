"""gemma-mtp train makes a drafter that is right far more often than an untrained one, for Gemma 3 and Gemma 4."""

import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from typer.testing import CliRunner

from gemma_mtp import Model, SamplingParams
from gemma_mtp.checkpoints.convert import convert
from gemma_mtp.checkpoints.hf_config import config_from_hf
from gemma_mtp.checkpoints.load import open_checkpoint
from gemma_mtp.cli import app
from gemma_mtp.config import ModelConfig
from gemma_mtp.errors import SettingsError
from gemma_mtp.measuring.cost import Costs
from gemma_mtp.measuring.projection import project
from gemma_mtp.models.assistant import draft_step
from gemma_mtp.ops.torch import Pass, TorchOps, TorchWeights
from gemma_mtp.training import distill
from gemma_mtp.training.data import Windows, python_library, token_stream
from gemma_mtp.training.drafter import first_weights, output_embedding, with_embedding
from gemma_mtp.training.evaluate import acceptance, generate
from gemma_mtp.training.export import write_folder
from gemma_mtp.training.heads import first_heads
from gemma_mtp.training.optimise import Budget, Log, initial_weights, on_device
from gemma_mtp.training.pretrain import pretrain, run_target
from gemma_mtp.training.train import WIDENED_BY, Training, TrainSettings

from ..checkpoints.tiny import TARGETS
from ..parity import oracle

VOCAB, LENGTH = 512, 96
PROMPT = 'def read(self, size=-1):\n    """Read'
SETTINGS = TrainSettings(target="", tokens=20_000, minutes=0.2, hidden=48, layers=2, length=LENGTH, texts=8, threads=1)

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_torch_thread")]


@pytest.fixture(scope="module", params=["gemma3", "E2B"])
def target(
    request: pytest.FixtureRequest, example: ModuleType, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """A tiny target that has learned a little Python, and the drafter trained for it: their folders, and the data."""
    folder = tmp_path_factory.mktemp("made")
    texts = [text for text in python_library() if text.name in ("argparse.py", "ast.py", "doctest.py", "inspect.py")]
    (folder / "data").mkdir()
    for text in texts:
        (folder / "data" / text.name).write_text(text.content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(example, "VOCAB", VOCAB)
        tokenizer = example.train_tokenizer(texts)
    described = {**TARGETS[request.param], "vocab_size": VOCAB, "max_position_embeddings": 1024}
    if request.param == "E2B":
        described["vocab_size_per_layer_input"] = VOCAB
    config = config_from_hf(described)
    assert isinstance(config, ModelConfig)
    weights = initial_weights(config)
    stream = token_stream(texts, lambda text: tokenizer.encode(text, add_special_tokens=False).ids, end=1)
    windows = Windows(stream, LENGTH, first=2)
    torch.set_num_threads(1)
    with Log(folder / "log.jsonl") as log:
        pretrain(config, weights, windows, windows, Budget(steps=120), log, sequences=8, rate=5e-3)
    write_folder(folder / "target", described, weights, torch.float32)
    example.write_tokenizer(tokenizer, folder / "target")
    settings = replace(SETTINGS, target=str(folder / "target"), data=(str(folder / "data"),))
    Training(settings, folder / "drafter").run(resume=False, show=lambda what, share: None, tell=lambda line: None)
    return {"target": folder / "target", "drafter": folder / "drafter", "settings": settings}


def test_acceptance_rises_well_above_that_of_an_untrained_drafter(target: dict[str, Any], tmp_path: Path) -> None:
    described = json.loads((target["drafter"] / "config.json").read_text())
    config, of_target = open_checkpoint(target["drafter"]).config, open_checkpoint(target["target"]).config
    random = on_device(initial_weights(of_target))
    untrained = with_embedding(first_weights(config, of_target, random), output_embedding(random, of_target))
    write_folder(tmp_path / "untrained", described, untrained)
    rates = {}
    for drafter in (target["drafter"], tmp_path / "untrained"):
        model = Model.load(target["target"], drafter=drafter, threads=1)
        prompts = [model.tokenize(PROMPT[:end]) for end in (10, 20, 30)]
        rates[drafter.name] = acceptance(model, prompts, SamplingParams(max_tokens=64, temperature=1.0)).rates[0]
    assert rates["drafter"] > rates["untrained"] + 0.15


def test_transformers_loads_it_with_equal_logits(target: dict[str, Any]) -> None:
    reference = oracle.load(target["drafter"])
    assert type(reference).__name__ == "Gemma4AssistantForCausalLM"
    of_target, of_drafter = open_checkpoint(target["target"]), open_checkpoint(target["drafter"])
    weights, own = (
        TorchWeights(checkpoint.weights, torch.device("cpu"), torch.float32) for checkpoint in (of_target, of_drafter)
    )
    own = on_device({name: own[name] for name in of_drafter.weights}, {"target_embed": weights["embed"]})
    config = of_target.config
    tokens = Model.load(target["target"], threads=1).tokenize(PROMPT * 3)
    newest = len(tokens) - 1
    with torch.no_grad():
        decoded, cache = run_target(weights, config, torch.tensor([tokens[:-1]]))
        state, token, shared = decoded.hidden[-1:], tokens[-1:], {}
        for kind in ("sliding", "full"):
            layer = config.kv_source(kind)
            size, window = config.layers[layer].head_dim, config.layers[layer].window
            shared[f"{kind}_attention"] = tuple(
                part.unflatten(1, (-1, size)).transpose(0, 1)[None, :, -(window - 1 if window else newest) :]
                for part in cache.read(layer, 0, newest)
            )
        for _ in range(3):
            rows = Pass(token, newest, cache, outputs=1, hidden=state)
            found = draft_step(TorchOps(own, of_drafter.config.eps, rows), of_drafter.config, config)
            fed = torch.cat([weights["embed"][token] * config.embedding_scale, state], -1)[None]
            expected = reference(
                inputs_embeds=fed, position_ids=torch.tensor([[newest]]), shared_kv_states=shared, use_cache=False
            )
            chosen = found.logits[0].isfinite()
            assert oracle.error(found.logits[0][chosen].numpy(), expected.logits[0, 0][chosen].numpy()) < 1e-4
            assert oracle.error(found.hidden.numpy(), expected.last_hidden_state[0].numpy()) < 1e-4
            state, token = found.hidden, [int(found.logits.argmax())]


def test_it_converts_to_gguf_and_drafts_the_same_from_there(target: dict[str, Any], tmp_path: Path) -> None:
    convert(target["drafter"], tmp_path / "drafter.gguf")
    params = SamplingParams(max_tokens=48, temperature=1.0, seed=2)
    folder, gguf = (
        Model.load(target["target"], drafter=drafter, threads=1).generate(PROMPT, params, draft=3)
        for drafter in (target["drafter"], tmp_path / "drafter.gguf")
    )
    assert folder.tokens == gguf.tokens
    assert folder.stats.accepted == gguf.stats.accepted > 0


def test_a_finished_training_is_not_overwritten_and_resumes(target: dict[str, Any]) -> None:
    training = Training(target["settings"], target["drafter"])
    quiet = {"show": lambda what, share: None, "tell": lambda line: None}
    with pytest.raises(SettingsError, match="go on with --resume"):
        training.run(resume=False, **quiet)
    with pytest.raises(SettingsError, match="another seed"):
        Training(replace(target["settings"], seed=9), target["drafter"]).run(resume=True, **quiet)
    shards = {path: path.stat().st_mtime_ns for path in (target["drafter"] / "states").iterdir()}
    before = torch.load(target["drafter"] / "progress.pt")["steps"]
    Training(replace(target["settings"], minutes=0.22), target["drafter"]).run(resume=True, **quiet)
    assert torch.load(target["drafter"] / "progress.pt")["steps"] > before
    assert {path: path.stat().st_mtime_ns for path in (target["drafter"] / "states").iterdir()} == shards


@pytest.mark.parametrize("folder", ["", "compact"])
def test_a_drafter_is_adapted_to_another_target(target: dict[str, Any], tmp_path: Path, folder: str) -> None:
    """From a trained drafter on, a few steps leave it as good, which the same steps from the start do not make it."""
    rates = {}
    for name, init in (("adapted", str(target["drafter"] / folder)), ("new", None)):
        settings = replace(target["settings"], minutes=0.02, rate=3e-4, init=init)
        Training(settings, tmp_path / name).run(resume=False, show=lambda what, share: None, tell=lambda line: None)
        model = Model.load(target["target"], drafter=tmp_path / name, threads=1)
        prompts = [model.tokenize(PROMPT[:end]) for end in (10, 20, 30)]
        rates[name] = acceptance(model, prompts, SamplingParams(max_tokens=64, temperature=1.0)).rates[0]
    assert rates["adapted"] > rates["new"] + 0.15
    assert (tmp_path / "adapted" / "compact").is_dir() == (folder == "compact")


def test_one_that_starts_as_the_last_layers_is_right_from_the_start(target: dict[str, Any], tmp_path: Path) -> None:
    rates = {}
    for name, hidden in (("inherited", None), ("random", 48)):
        settings = replace(target["settings"], minutes=0.005, rate=1e-4, hidden=hidden)
        Training(settings, tmp_path / name).run(resume=False, show=lambda what, share: None, tell=lambda line: None)
        model = Model.load(target["target"], drafter=tmp_path / name, threads=1)
        prompts = [model.tokenize(PROMPT[:end]) for end in (10, 20, 30)]
        rates[name] = acceptance(model, prompts, SamplingParams(max_tokens=64, temperature=1.0)).rates[0]
    assert rates["inherited"] > rates["random"] + 0.1
    of_target, drafter = (open_checkpoint(path).config for path in (target["target"], tmp_path / "inherited"))
    assert drafter.hidden == of_target.hidden + (WIDENED_BY if of_target.family == "gemma4" else 0)


def test_parallel_heads_are_trained_for_a_target_too(target: dict[str, Any], tmp_path: Path) -> None:
    settings = replace(target["settings"], kind="heads", minutes=0.3, accumulate=2, texts=4, rate=2e-3)
    quiet = {"show": lambda what, share: None, "tell": lambda line: None}
    Training(settings, tmp_path / "heads").run(resume=False, **quiet)
    assert not (tmp_path / "heads" / "compact").exists()
    described = json.loads((tmp_path / "heads" / "config.json").read_text())
    of_target = open_checkpoint(target["target"]).config
    config = config_from_hf(described)
    untrained = first_heads(config, of_target, on_device(initial_weights(of_target)))
    write_folder(tmp_path / "untrained", described, untrained)
    rates, params = {}, SamplingParams(max_tokens=64, temperature=1.0)
    for drafter in ("heads", "untrained"):
        model = Model.load(target["target"], drafter=tmp_path / drafter, threads=1)
        prompts = [model.tokenize(PROMPT[:end]) for end in (10, 20, 30)]
        rates[drafter] = acceptance(model, prompts, params).rates[0]
        plain = model.generate(PROMPT, params, draft="off")
        assert model.generate(PROMPT, params, draft=3).tokens == plain.tokens
    assert rates["heads"] > rates["untrained"] + 0.02


def test_a_drafter_to_go_on_from_must_be_one_of_the_target(target: dict[str, Any], tmp_path: Path) -> None:
    for init, said in ((target["target"], "no drafter"), (tmp_path, "no config.json")):
        with pytest.raises(SettingsError, match=said):
            Training(replace(target["settings"], init=str(init)), tmp_path / "d")


def test_the_command_states_its_plan_and_keeps_what_there_is_on_ctrl_c(
    target: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = target["settings"]
    for data, folder in (("no/such/data", tmp_path / "d"), (settings.data[0], target["drafter"].parent)):
        refused = CliRunner().invoke(
            app, ["train", "--target", settings.target, "--data", data, "--out", str(folder), "--tokens", "6144"]
        )
        assert isinstance(refused.exception, SettingsError)
        assert not (folder / "training.json").exists()
    options = ["train", "--target", settings.target, "--data", settings.data[0], "--out", str(tmp_path / "d")]
    options += ["--tokens", "2000", "--hidden", "48", "--layers", "2", "--length", str(LENGTH), "--threads", "1"]
    planned = CliRunner().invoke(app, [*options, "--plan"])
    assert planned.exit_code == 0
    assert "Disk" in planned.output
    several = CliRunner().invoke(app, [*options[:5], __file__, *options[5:], "--plan"])  # as a shell's *.py gives them
    assert f"{settings.data[0]}, {__file__}" in several.output
    stray = CliRunner().invoke(app, ["train", "--target", settings.target, __file__, "--out", str(tmp_path / "d")])
    assert "Give data after --data" in str(stray.exception)
    assert not (tmp_path / "d").exists()
    compute = distill.total_loss
    calls: list[int] = []

    def interrupted(drafted: list[distill.DraftedRows]) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return compute(drafted)

    monkeypatch.setattr(distill, "total_loss", interrupted)
    monkeypatch.setattr(distill, "_LOG_EVERY", 1)
    stopped = CliRunner().invoke(app, options)
    assert stopped.exit_code == 130
    assert "--resume" in stopped.output
    assert torch.load(tmp_path / "d" / "progress.pt")["steps"] == 3
    shown = [title.text for title in ElementTree.parse(tmp_path / "d" / "training.svg").iter() if title.text]
    steps = {text.split(",")[1].split(":")[0].strip() for text in shown if text.startswith("loss, ")}
    assert steps == {"1", "2", "3"}


def test_eval_drafter_gives_acceptance_and_speed_of_nine_kinds(target: dict[str, Any]) -> None:
    arguments = ["eval-drafter", str(target["target"]), str(target["drafter"]), "--max-tokens", "12", "-t", "1"]
    done = CliRunner().invoke(app, [*arguments, "--json"])
    assert done.exit_code == 0, done.output
    rows = json.loads(done.output)["rows"]
    assert len(rows) == 18
    assert all(0 <= rate <= 1 for row in rows for rate in row["acceptance"])
    assert all(row["speed-up"] > 0 for row in rows)


def test_bench_projects_from_what_it_measured_of_this_pair(target: dict[str, Any]) -> None:
    arguments = ["bench", str(target["target"]), "--drafter", str(target["drafter"]), "-t", "1", "-r", "1", "-n", "4"]
    done = CliRunner().invoke(app, [*arguments, "--mtp", "--project", "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.output)
    assert len(found["rows"]) == 18
    costs = Costs({int(rows): of for rows, of in found["pass_seconds"].items()}, found["draft_step_seconds"])
    assert found["projection"]["rows"] == [row.as_json() for row in project(costs)]
    assert "PROJECTION, not a measurement" in found["projection"]["what"]
    assert found["target"] in found["projection"]["what"]
    assert found["drafter"] in found["projection"]["what"]


def test_ctrl_c_while_the_target_writes_is_not_lost(
    target: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: Any) -> None:
        raise KeyboardInterrupt

    model = Model.load(target["target"], drafter="none", threads=1)
    monkeypatch.setattr(model.engine, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        generate(model, [2, 5], SamplingParams())
