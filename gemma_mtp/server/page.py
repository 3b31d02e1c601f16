"""The page at /: static files, which ask nothing of any other server."""

from pathlib import Path

from fastapi import FastAPI
from starlette.responses import FileResponse

_FOLDER = Path(__file__).parent / "web"
_FILES = {
    "/": "index.html",
    **{f"/{name}": name for name in ("page.css", "page.js", "api.js", "plot.js", "race.js")},
}
PATHS = tuple(_FILES)

_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}


def add_page(app: FastAPI) -> None:
    def add(path: str, name: str) -> None:
        @app.get(path, include_in_schema=False)
        async def file() -> FileResponse:
            return FileResponse(_FOLDER / name, headers=_HEADERS)

    for path, name in _FILES.items():
        add(path, name)
