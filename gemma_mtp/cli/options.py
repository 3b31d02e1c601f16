"""Arguments and options that several commands share, and how a model and a prompt are told apart."""

import os
import re
from typing import Annotated

import typer

from gemma_mtp.errors import SettingsError

DEMO = "demo"

ModelArgument = Annotated[
    str | None, typer.Argument(metavar="MODEL", help="'demo' (the default), a path, or owner/name[:file] on the hub.")
]
ModelOption = Annotated[str | None, typer.Option("--model", "-m", help="MODEL, as an option.", show_default=False)]
Drafter = Annotated[
    str,
    typer.Option(
        "--drafter",
        "-md",
        metavar="auto|none|PATH",
        help="The drafter; auto: the one beside the model; demo: the demo's.",
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(
        "--threads",
        "-t",
        metavar="N",
        min=1,
        help="Threads; by default one a core, fewer for a small model.",
        show_default=False,
    ),
]
Context = Annotated[
    int | None,
    typer.Option(
        "--ctx", "-c", metavar="N", min=1, help="Context in tokens; by default at most 8192.", show_default=False
    ),
]
Backend = Annotated[str, typer.Option("--backend", metavar="native|torch", help="What runs the model.")]
Device = Annotated[str, typer.Option("--device", metavar="auto|cpu|cuda|mps", help="What the torch backend runs on.")]
Dtype = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        metavar="TYPE",
        help="Quantise matrices as they are loaded: bf16, q8_0, q4_k, ...; as-is (the default) keeps the file's types.",
        show_default=False,
    ),
]
DrafterDtype = Annotated[
    str | None,
    typer.Option("--drafter-dtype", metavar="TYPE", help="--dtype of the drafter.", show_default=False),
]
Kv = Annotated[
    str | None,
    typer.Option(
        "--kv",
        metavar="f16|q8_0|f32",
        help="How keys and values are kept; q8_0 takes half of f16 (the default).",
        show_default=False,
    ),
]
Cache = Annotated[
    bool | None,
    typer.Option(
        "--cache/--no-cache",
        help="Keep the weights as the kernels read them in the user's cache folder, for a quicker start next time; by "
        "default those below 2 GiB, or as GEMMA_MTP_CACHE says (on, auto or off).",
        show_default=False,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(:[\w./-]+)?")


def names_model(text: str) -> bool:
    """Whether a lone argument names a model: 'demo', whatever exists, a checkpoint's file name, owner/name[:file]."""
    return (
        text == DEMO
        or os.path.exists(text)
        or text.endswith((".gguf", ".safetensors"))
        or _HUB_ID.fullmatch(text) is not None
    )


def model_and_prompt(
    first: str | None, second: str | None, model: str | None, prompt: str | None
) -> tuple[str, str | None]:
    """The model and the prompt from two positional arguments, -m and -p. A lone argument is the prompt once a model is
    given, the model once a prompt is given, and otherwise whatever `names_model` says it is."""
    arguments = [argument for argument in (first, second) if argument is not None]
    if len(arguments) + (model is not None) + (prompt is not None) > 2:
        raise SettingsError("The model or the prompt is given twice; give each once, as an argument or with -m and -p.")
    if len(arguments) == 2:
        return arguments[0], arguments[1]
    if len(arguments) == 1:
        if model is not None:
            return model, arguments[0]
        if prompt is not None or names_model(arguments[0]):
            return arguments[0], prompt
        return DEMO, arguments[0]
    return model or DEMO, prompt


def only_model(argument: str | None, option: str | None) -> str:
    """The model of a command that takes no prompt."""
    if argument is not None and option is not None:
        raise SettingsError("The model is given twice; give it once, as an argument or with -m.")
    return argument or option or DEMO


def parse_draft(text: str) -> str | int:
    """The value of --draft: 'auto', 'off' or a depth of at least 1."""
    if text in ("auto", "off"):
        return text
    if text.isdecimal():
        return int(text) or "off"
    raise SettingsError(f"--draft {text!r} is neither auto, off nor a number of tokens; use one of these.")
