"""gemma-mtp pull: fetches a model from the Hugging Face hub."""

import shlex
import sys
from typing import Annotated

import typer


def pull(
    model: Annotated[
        str, typer.Argument(metavar="OWNER/NAME[:FILE]", help="A repository of the hub, and a GGUF file in it.")
    ],
) -> None:
    """Fetch a model from the Hugging Face hub.

    It is put into the Hugging Face cache (HF_HOME moves it) and checked; its path goes to standard output. Run again,
    this goes on with a download that broke off. For gated and private models set HF_TOKEN, or log in with
    `hf auth login`.
    """
    from gemma_mtp.checkpoints import hub
    from gemma_mtp.checkpoints.load import open_checkpoint
    from gemma_mtp.config import ModelConfig

    path = hub.pull(model)
    print(path)
    if isinstance(open_checkpoint(path).config, ModelConfig):
        command = f"gemma-mtp run {shlex.quote(model)}"
    else:
        command = f"gemma-mtp run TARGET --drafter {shlex.quote(str(path))}"
    print(f"Run it: {command}", file=sys.stderr)
