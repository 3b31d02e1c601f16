"""gemma-mtp run: continues a prompt, or holds a small session when there is none."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gemma_mtp.cli import options
from gemma_mtp.errors import PromptError, SettingsError

if TYPE_CHECKING:
    from gemma_mtp import Generation, Model, SamplingParams

DRAFTED = "\x1b[32m{}\x1b[0m"  # green
INTERRUPTED = 130  # the shell's exit status of Ctrl-C


def run(
    first: options.ModelArgument = None,
    second: Annotated[
        str | None, typer.Argument(metavar="PROMPT", help="The text to continue; '-' reads it from standard input.")
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
        int, typer.Option("--max-tokens", "-n", metavar="N", help="Tokens to generate at most; -1: until it ends.")
    ] = 128,
    temperature: Annotated[float, typer.Option("--temperature", "--temp", metavar="X", help="0 is greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option(metavar="N", help="Sample from the N likeliest tokens; 0: all.")] = 0,
    top_p: Annotated[float, typer.Option(metavar="X", help="Sample from the likeliest tokens of this share.")] = 1.0,
    min_p: Annotated[float, typer.Option(metavar="X", help="Drop tokens below this share of the likeliest.")] = 0.0,
    repeat_penalty: Annotated[float, typer.Option(metavar="X", help="Above 1 discourages repetition.")] = 1.0,
    seed: Annotated[int, typer.Option("--seed", "-s", metavar="N", help="The same seed gives the same text.")] = 0,
    stop: Annotated[list[str] | None, typer.Option(metavar="TEXT", help="End before this text; repeatable.")] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on past the model's end tokens.")] = False,
    threads: options.Threads = None,
    ctx: options.Context = None,
    backend: options.Backend = "native",
    dtype: options.Dtype = None,
    show_drafts: Annotated[bool, typer.Option("--show-drafts", help="Colour the tokens that were drafted.")] = False,
    as_json: options.Json = False,
) -> None:
    """Continue a prompt, or hold a session when there is none.

    A single argument is the MODEL if it is 'demo', something that exists, a
    .gguf or .safetensors file, or owner/name[:file]; anything else is the PROMPT (-m and -p leave no doubt). Without a
    prompt, standard input is read if it is piped; on a terminal a session begins.
    """
    name, text = options.model_and_prompt(first, second, model, read_file(file, prompt))
    depth = options.parse_draft(draft)
    if text == "-" or (text is None and not sys.stdin.isatty()):
        text = without_last_newline(sys.stdin.read())
    if text is None and as_json:
        raise PromptError("With --json a prompt is needed; give it as an argument, with -p, -f or on standard input.")
    if text == "":
        raise PromptError("The prompt is empty; give some text to continue.")

    from gemma_mtp import Model, SamplingParams

    loaded = Model.load(name, drafter=drafter, backend=backend, threads=threads, context=ctx, dtype=dtype)
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
    if text is None:
        from gemma_mtp.cli.session import Session

        Session(loaded, params, depth, show_drafts).run()
        return
    if as_json:
        generation = loaded.generate(text, params, draft=depth)
        print(json.dumps(as_object(generation, loaded), ensure_ascii=False))
    else:
        generation = write_stream(loaded, text, params, depth, show_drafts)
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


def without_last_newline(text: str) -> str:
    """`text` without the newline that `echo` and editors put at its end: it would steer the model to a new line."""
    return text.removesuffix("\n").removesuffix("\r")


def write_stream(
    model: "Model", prompt: str, params: "SamplingParams", draft: str | int, show_drafts: bool
) -> "Generation":
    """Writes a generation to standard output piece by piece, drafted pieces in colour if asked for."""
    stream = model.stream(prompt, params, draft=draft)
    try:
        for piece in stream:
            coloured = show_drafts and piece.origin == "draft"
            sys.stdout.write(DRAFTED.format(piece.text) if coloured else piece.text)
            sys.stdout.flush()
    except KeyboardInterrupt:  # between two pieces; one within a pass ends the stream by itself
        pass
    finally:
        stream.close()
    return stream.generation


def end_line(generation: "Generation") -> str:
    """How it went: `[64 tokens, 101.3 tokens/s; 20 rounds, 2.20 accepted a round, 44 of 60 drafted]`."""
    stats = generation.stats
    line = f"{stats.tokens} tokens, {stats.tokens_per_second:.1f} tokens/s"
    if stats.drafted:
        mean = stats.accepted / stats.rounds
        line += f"; {stats.rounds} rounds, {mean:.2f} accepted a round, {stats.accepted} of {stats.drafted} drafted"
    else:
        line += "; nothing drafted"
    if generation.finish_reason == "cancelled":
        line += "; cancelled"
    return f"[{line}]"


def as_object(generation: "Generation", model: "Model") -> dict[str, object]:
    """What --json prints."""
    return {
        "text": generation.text,
        "tokens": generation.tokens,
        "finish_reason": generation.finish_reason,
        "stats": dataclasses.asdict(generation.stats) | {"tokens_per_second": generation.stats.tokens_per_second},
        "model": model.name,
        "drafter": model.drafter_name,
    }
