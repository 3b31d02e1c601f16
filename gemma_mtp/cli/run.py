"""gemma-mtp run: answers or continues a prompt, or holds a small session when there is none."""

import io
import json
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gemma_mtp.cli import options
from gemma_mtp.cli.writing import as_object, end_line, write_stream
from gemma_mtp.errors import PromptError, SettingsError

if TYPE_CHECKING:
    from gemma_mtp import Stream
    from gemma_mtp.model import Prompt

CONTINUED = 128  # tokens of a continuation, which need not come to an end by itself as an answer does
INTERRUPTED = 130  # the shell's exit status of Ctrl-C


def run(
    first: options.ModelArgument = None,
    second: Annotated[
        str | None, typer.Argument(metavar="PROMPT", help="The text to answer or continue; '-' reads standard input.")
    ] = None,
    model: options.ModelOption = None,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="PROMPT, as an option.")] = None,
    file: Annotated[Path | None, typer.Option("--file", "-f", help="Read the prompt from a file.")] = None,
    drafter: options.Drafter = "auto",
    draft: Annotated[
        str,
        typer.Option("--draft", "--spec-draft-n-max", metavar="auto|off|N", help="How many tokens a round drafts."),
    ] = "auto",
    max_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-tokens",
            "-n",
            metavar="N",
            help=f"Tokens to generate at most; -1: until it ends. By default -1 in a chat, otherwise {CONTINUED}.",
            show_default=False,
        ),
    ] = None,
    temperature: Annotated[float, typer.Option("--temperature", "--temp", metavar="X", help="0 is greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option(metavar="N", help="Sample from the N likeliest tokens; 0: all.")] = 0,
    top_p: Annotated[float, typer.Option(metavar="X", help="Sample from the likeliest tokens of this share.")] = 1.0,
    min_p: Annotated[float, typer.Option(metavar="X", help="Drop tokens below this share of the likeliest.")] = 0.0,
    repeat_penalty: Annotated[float, typer.Option(metavar="X", help="Above 1 discourages repetition.")] = 1.0,
    seed: Annotated[int, typer.Option("--seed", "-s", metavar="N", help="The same seed gives the same text.")] = 0,
    stop: Annotated[list[str] | None, typer.Option(metavar="TEXT", help="End before this text; repeatable.")] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on past the model's end tokens.")] = False,
    system: Annotated[
        str | None, typer.Option("--system", metavar="TEXT", help="What the chat's system turn says.")
    ] = None,
    thinking: Annotated[bool, typer.Option("--thinking", help="Let the model reason before it answers.")] = False,
    tools: Annotated[
        Path | None, typer.Option("--tools", metavar="FILE", help="Tools the model may call: a JSON list, as OpenAI's.")
    ] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the prompt, whatever chat template there is.")] = False,
    threads: options.Threads = None,
    ctx: options.Context = None,
    backend: options.Backend = "native",
    device: options.Device = "auto",
    dtype: options.Dtype = None,
    kv: options.Kv = None,
    drafter_dtype: options.DrafterDtype = None,
    cache: options.Cache = None,
    show_drafts: Annotated[bool, typer.Option("--show-drafts", help="Colour the tokens that were drafted.")] = False,
    as_json: options.Json = False,
) -> None:
    """Answer or continue a prompt, or hold a session when there is none.

    A model with a chat template answers the prompt as a user's turn; one without continues it, as any does with --raw.
    Reasoning is shown dimmed on a terminal and left out elsewhere; tool calls are printed as JSON.

    A single argument is the MODEL if it is 'demo', something that exists, a .gguf or .safetensors file, or
    owner/name[:file]; anything else is the PROMPT (-m and -p leave no doubt). Without a prompt, standard input is read
    if it is piped; on a terminal a session begins.
    """
    name, text = options.model_and_prompt(first, second, model, read_file(file, prompt))
    depth = options.parse_draft(draft)
    if text == "-" or (text is None and not (sys.stdin and sys.stdin.isatty())):
        text = read_standard_input()
    if text is None and as_json:
        raise PromptError("With --json a prompt is needed; give it as an argument, with -p, -f or on standard input.")
    if text == "":
        raise PromptError("The prompt is empty; give some text to continue.")
    if text is not None and any("\ud800" <= character <= "\udfff" for character in text):
        raise PromptError("The prompt is not UTF-8 text.")  # how Python passes on an argument's other bytes

    from gemma_mtp import Model, SamplingParams

    declared = read_tools(tools)
    loaded = Model.load(
        name,
        drafter="none" if drafter == "auto" and depth == "off" else drafter,
        backend=backend,
        threads=threads,
        context=ctx,
        dtype=dtype,
        kv=kv,
        drafter_dtype=drafter_dtype,
        device=device,
        cache=cache,
    )
    chat = loaded.has_chat_template and not raw
    if not chat and (system is not None or thinking or tools):
        raise SettingsError("--system, --thinking and --tools are for a model with a chat template, without --raw.")
    if max_tokens is None:
        max_tokens = -1 if chat else CONTINUED
    params = SamplingParams(
        max_tokens=loaded.context if max_tokens == -1 else max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repeat_penalty,
        seed=seed,
        stop=stop or [],
        ignore_eos=ignore_eos,
    )

    def ask(prompt: "Prompt") -> "Stream":
        return loaded.stream(prompt, params, depth, tools=declared, thinking=thinking)

    from gemma_mtp.cli.session import Continuation, Conversation, Session

    talk = Conversation(system) if chat else Continuation()
    if text is None:
        Session(loaded.name, talk, ask, show_drafts).run()
        return
    stream = ask(talk.prompt(text))
    generation = stream.generation
    if as_json:
        with suppress(KeyboardInterrupt):  # what has come is told, as cancelled
            for _ in stream:
                pass
        print(json.dumps(as_object(generation, loaded, chat), ensure_ascii=False))
    else:
        write_stream(stream, show_drafts)
        print()
        print(end_line(generation), file=sys.stderr)
    if generation.finish_reason == "cancelled":
        raise typer.Exit(INTERRUPTED)


def read_file(path: Path | None, prompt: str | None) -> str | None:
    """The prompt: `prompt` itself, or the text of the file at `path`."""
    if path is None:
        return prompt
    if prompt is not None:
        raise SettingsError("The prompt is given twice; use either -p or -f.")
    try:
        return without_last_newline(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise PromptError(f"The prompt file {path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise PromptError(f"The prompt file {path} is not UTF-8 text.") from error


def read_standard_input() -> str:
    if sys.stdin is None:
        raise PromptError("Standard input is closed; give a prompt as an argument, with -p or -f.")
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8", errors="strict")  # whatever the locale says
    try:
        return without_last_newline(sys.stdin.read())
    except UnicodeDecodeError as error:
        raise PromptError("Standard input is not UTF-8 text.") from error


def without_last_newline(text: str) -> str:
    """`text` without the newline that `echo` and editors put at its end: it would steer the model to a new line."""
    return text.removesuffix("\n").removesuffix("\r")


def read_tools(path: Path | None) -> list[Any] | None:
    """The tools declared in a file."""
    if path is None:
        return None
    try:
        tools = json.loads(path.read_bytes())
    except OSError as error:
        raise PromptError(f"The tools file {path} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise PromptError(f"The tools file {path} is not JSON: {error}.") from error
    if not isinstance(tools, list):
        raise PromptError(f"The tools file {path} has to hold a list of tools.")
    return tools
