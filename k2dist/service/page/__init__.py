"""The page at `/`: static files, sent as they are, with a policy that lets the browser load nothing else."""

from __future__ import annotations

from importlib.resources import files

from fastapi import FastAPI
from fastapi.responses import Response

# Scripts, styles and requests from this origin and nowhere else; no inline code, no frames.
_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "connect-src 'self'",
        "img-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
    )
)
_HEADERS = {
    "content-security-policy": _POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}
_FILES = {
    "index.html": "text/html",
    "page.css": "text/css",
    "chat.js": "text/javascript",
    "cluster.js": "text/javascript",
    "drawing.js": "text/javascript",
    "server.js": "text/javascript",
    "icon.svg": "image/svg+xml",
}


PAGE_PATHS = {"/" if name == "index.html" else f"/page/{name}": name for name in _FILES}


def add_page(app: FastAPI) -> None:
    for path, name in PAGE_PATHS.items():
        _add_file(app, path, name, _FILES[name])


def _add_file(app: FastAPI, path: str, name: str, media_type: str) -> None:
    data = files(__name__).joinpath(name).read_bytes()

    @app.get(path, include_in_schema=False)
    async def send() -> Response:
        return Response(data, media_type=media_type, headers=_HEADERS)
