"""A few seconds of benchmarks/soak.py."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SOAK = Path(__file__).parents[2] / "benchmarks" / "soak.py"


@pytest.mark.slow
def test_clients_of_every_kind_are_answered_or_refused(tmp_path: Path) -> None:
    command = [sys.executable, SOAK, "--minutes", "0.15", "--json", tmp_path / "found"]
    subprocess.run(command, check=False, capture_output=True)
    found = json.loads((tmp_path / "found").read_text())
    assert found["failures"] == []
    assert found["outcomes"]["at SIGTERM: answered"] == 6
    assert found["visits"] > 20
