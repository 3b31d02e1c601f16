"""What every test shares: the real demo model, and child processes that import the package under test."""

import os
from collections.abc import Iterator

import pytest

from gemma_mtp import Model

# A child `python -c` would otherwise put the checkout first, whose package has no extension when a wheel is tested.
os.environ["PYTHONSAFEPATH"] = "1"


@pytest.fixture
def one_torch_thread() -> Iterator[None]:
    """For tiny models: PyTorch's threads wait for each other far longer than the work takes where cores are shared."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def demo() -> Iterator[Model]:
    return Model.load("demo", threads=2)
