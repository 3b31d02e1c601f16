"""gemma-mtp serve: an OpenAI-compatible server for many users at once."""

import socket
import sys
from pathlib import Path
from typing import Annotated

import typer

from gemma_mtp.cli import options
from gemma_mtp.errors import SettingsError

# Seconds that an idle connection is kept: longer than clients keep theirs (httpx: 5), or they would send a request on
# one that is just being closed.
KEEP_ALIVE = 75


def serve(
    first: options.ModelArgument = None,
    model: options.ModelOption = None,
    drafter: options.Drafter = "auto",
    host: Annotated[str, typer.Option("--host", metavar="ADDRESS", help="Where to listen; 0.0.0.0: everywhere.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option("--port", metavar="N", min=0, max=65535, help="0: a free one.")] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(
            "--api-key",
            metavar="KEY",
            envvar="GEMMA_MTP_API_KEY",
            help="What clients have to send as 'Authorization: Bearer KEY'.",
            show_default=False,
            show_envvar=True,
        ),
    ] = None,
    api_key_file: Annotated[
        Path | None,
        typer.Option(
            "--api-key-file",
            metavar="FILE",
            help="Further keys, one a line; lines that start with # are comments.",
            show_default=False,
        ),
    ] = None,
    alias: Annotated[
        str | None,
        typer.Option("--alias", metavar="NAME", help="The model's name for clients.", show_default=False),
    ] = None,
    parallel: Annotated[
        int, typer.Option("--parallel", metavar="N", help="Sequences that run at once, each with a context of its own.")
    ] = 8,
    max_queue: Annotated[
        int, typer.Option("--max-queue", metavar="N", min=0, help="Sequences that wait for a place; more are refused.")
    ] = 64,
    max_body: Annotated[
        int, typer.Option("--max-body", metavar="BYTES", min=1, help="The largest request.")
    ] = 4 << 20,
    max_prompt: Annotated[
        int | None,
        typer.Option("--max-prompt", metavar="TOKENS", min=1, help="The longest prompt.", show_default="the context"),
    ] = None,
    timeout: Annotated[
        float | None,
        typer.Option("--timeout", metavar="SECONDS", help="How long a request may take, waiting included.", min=0),
    ] = None,
    kv_memory: Annotated[
        str | None,
        typer.Option(
            "--kv-memory",
            metavar="SIZE",
            help="Memory for keys and values, as 512MB or 2GiB: running requests, and beginnings kept for others.",
            show_default="twice --parallel contexts, at most half of what is free",
        ),
    ] = None,
    drain: Annotated[
        int, typer.Option("--drain", metavar="SECONDS", min=0, help="After SIGTERM, how long requests may go on.")
    ] = 60,
    threads: options.Threads = None,
    ctx: options.Context = None,
    dtype: options.Dtype = None,
    kv: options.Kv = None,
    cache: options.Cache = None,
) -> None:
    """Serve a model to OpenAI clients: chat and text completions, with multi-token prediction.

    Requests share passes and join and leave at every pass; a request's text depends neither on the others nor on
    drafting. Ctrl-C or SIGTERM refuses new requests and ends when those that run are done.
    """
    name = options.only_model(first, model)
    try:
        import uvicorn

        from gemma_mtp.server.app import create_app
    except ImportError as error:
        raise SettingsError("Serving needs more packages: run `pip install 'gemma-mtp[server]'`.") from error
    if api_key is not None and not api_key.strip():
        raise SettingsError("--api-key is empty: give a key, or leave it out to let everyone in.")
    check_address(host, port)
    keys = [*([api_key.strip()] if api_key else ()), *(read_keys(api_key_file) if api_key_file else ())]
    if not keys and host not in ("127.0.0.1", "::1", "localhost"):
        print(f"gemma-mtp: everyone who reaches {host} is let in; --api-key asks for a key.", file=sys.stderr)

    from gemma_mtp import AsyncEngine, Model
    from gemma_mtp.engine.memory import parse_size

    loaded = Model.load(name, drafter=drafter, threads=threads, context=ctx, dtype=dtype, kv=kv, cache=cache)
    engine = AsyncEngine(
        loaded,
        parallel=parallel,
        max_queue=max_queue,
        kv_memory=None if kv_memory is None else parse_size(kv_memory),
        timeout=timeout,
    )
    app = create_app(engine, alias or served_name(name), keys=keys, max_body=max_body, max_prompt=max_prompt)
    settings = uvicorn.Config(
        app,
        host=host,
        port=port,
        timeout_graceful_shutdown=drain,
        timeout_keep_alive=KEEP_ALIVE,
        access_log=False,
        server_header=False,
    )
    uvicorn.Server(settings).run()


def check_address(host: str, port: int) -> None:
    """Raises SettingsError if nothing can listen there: before a model is loaded."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise SettingsError(f"Nothing can listen at {host}, port {port}: {error.strerror}.") from None


def read_keys(path: Path) -> list[str]:
    """The API keys of a file. Raises SettingsError."""
    try:
        lines = [line.strip() for line in path.read_text().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"The API keys of {path} cannot be read: {error}.") from None
    keys = [line for line in lines if line and not line.startswith("#")]
    if not keys:
        raise SettingsError(f"{path} has no API key: give one a line, or leave --api-key-file out.")
    return keys


def served_name(model: str) -> str:
    """demo as it is, owner/name as it is, and of a path its last part without .gguf."""
    path = Path(model).expanduser()
    return path.resolve().name.removesuffix(".gguf") if model != options.DEMO and path.exists() else model
