"""The command `gemma-mtp`: one file a command. Only typer is imported here, so that starting stays quick; what a
command needs (numpy, the native extension, rich) is imported inside it."""

import io
import sys

import typer

from gemma_mtp.cli import batch, bench, convert, eval_drafter, inspect, pull, run, serve, train, verify
from gemma_mtp.errors import GemmaMtpError

app = typer.Typer(
    name="gemma-mtp",
    help="Gemma with multi-token prediction: more tokens per second, the very same tokens.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="MODEL is 'demo' (Gemma 3 270M), a path, or owner/name[:file] on the Hugging Face hub; where it may be left "
    "out, it is demo.",
)
COMMANDS = (
    run.run,
    serve.serve,
    batch.batch,
    pull.pull,
    inspect.inspect,
    convert.convert,
    verify.verify,
    bench.bench,
    train.train,
)
for command in COMMANDS:
    app.command()(command)
app.command("eval-drafter")(eval_drafter.eval_drafter)


def show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"gemma-mtp {version('gemma-mtp')}")
        raise typer.Exit


@app.callback()
def options(
    version: bool = typer.Option(False, "--version", callback=show_version, is_eager=True, help="Say the version."),
) -> None:
    pass


def main() -> None:
    """Entry point. Exit 0 is success, 2 a usage or input error, 130 Ctrl-C, 1 anything else."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # what a terminal that is not of UTF-8 cannot show
    try:
        app(prog_name="gemma-mtp")
    except GemmaMtpError as error:
        print(f"gemma-mtp: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:  # of a disk that is full, say
        print(f"gemma-mtp: {error}", file=sys.stderr)
        sys.exit(1)
