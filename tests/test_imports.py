"""The base package needs none of the optional libraries, and the command starts without the heavy ones."""

import subprocess
import sys

IMPORT_ALL = """
import importlib, pkgutil, sys
blocked = ("torch", "transformers", "gguf", "fastapi", "uvicorn", "pydantic", "prometheus_client", "llguidance")
sys.modules.update(dict.fromkeys(blocked))  # None: importing raises ImportError
import gemma_mtp
optional = ("gemma_mtp.ops.torch", "gemma_mtp.engine.torch_engine", "gemma_mtp.training", "gemma_mtp.server")
for module in pkgutil.walk_packages(gemma_mtp.__path__, "gemma_mtp."):
    if not module.name.startswith(optional):
        importlib.import_module(module.name)
"""

COMMAND = """
import sys
import gemma_mtp.cli
heavy = {"numpy", "rich", "jinja2", "tokenizers", "huggingface_hub", "gemma_mtp._native"} & set(sys.modules)
assert not heavy, heavy
"""


def run(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_base_package_imports_without_optional_libraries():
    run(IMPORT_ALL)


def test_the_command_line_imports_nothing_heavy():
    run(COMMAND)
