"""What the tests of training share."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "small_gemma4.py"


@pytest.fixture(scope="session")
def example() -> ModuleType:
    """examples/small_gemma4.py as a module."""
    spec = importlib.util.spec_from_file_location("small_gemma4", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
