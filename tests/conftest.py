"""The real demo model, loaded once a session."""

from collections.abc import Iterator

import pytest

from gemma_mtp import Model


@pytest.fixture(scope="session")
def demo() -> Iterator[Model]:
    return Model.load("demo", threads=2)
