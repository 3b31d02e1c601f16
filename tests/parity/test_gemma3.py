"""Gemma 3 270M against transformers loading the same GGUF in float32."""

import numpy as np
import pytest

from gemma_mtp import Model
from gemma_mtp.checkpoints.hub import resolve
from gemma_mtp.prompts import NINE_KINDS

TOKENS = 640  # past the window of 512


@pytest.fixture(scope="module")
def tokens(demo: Model) -> list[int]:
    return demo.tokenize("\n\n".join(NINE_KINDS.values()) * 3)[:TOKENS]


@pytest.fixture(scope="module")
def reference(tokens: list[int]) -> np.ndarray:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    path = resolve("demo")
    model = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    with torch.no_grad():
        return model.eval()(torch.tensor([tokens])).logits[0].numpy()


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64) - x.max(axis=1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=1, keepdims=True))


@pytest.mark.filterwarnings("ignore")
def test_float32_logits_are_those_of_transformers(reference: np.ndarray, tokens: list[int]) -> None:
    logits = Model.load("demo", dtype="f32").logits(tokens)
    assert np.abs(logits - reference).max() < 2e-3
    assert (logits.argmax(axis=1) == reference.argmax(axis=1)).all()


@pytest.mark.filterwarnings("ignore")
def test_int8_activations_stay_near(demo: Model, reference: np.ndarray, tokens: list[int]) -> None:
    p, q = log_softmax(reference), log_softmax(demo.logits(tokens))
    kl = (np.exp(p) * (p - q)).sum(axis=1).mean()
    agreement = (p.argmax(axis=1) == q.argmax(axis=1)).mean()
    print(f"mean KL {kl:.2e}, top-1 agreement {agreement:.3f}")
    assert kl < 2e-3
    assert agreement >= 0.97
