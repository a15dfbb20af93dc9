"""Web page of the server: the static files of the folder `page`, served without a key under a strict content policy.

The page holds no data. All that it shows comes from the `/v1` endpoints, with the key that the user types.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import FileResponse

PAGE_FOLDER = Path(__file__).parents[1] / "page"

# Fixed here, because the machine's own table of media types must not decide what a browser runs.
_MEDIA_TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}

PAGE_HEADERS = {
    # No inline script or style, nothing from other hosts, no form that submits, no frame around the page.
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    # Revalidate each time, so that the page always matches the server's version.
    "Cache-Control": "no-cache",
}


def page_router() -> APIRouter:
    """Return the page's routes for `FastAPI.include_router`: `/` and `/page/FILE`, left out of the OpenAPI description."""
    router = APIRouter(include_in_schema=False)
    for file in sorted(file for file in PAGE_FOLDER.iterdir() if file.suffix in _MEDIA_TYPES):
        path = "/" if file.name == "index.html" else f"/page/{file.name}"
        router.add_api_route(path, _sender_of(file), methods=["GET", "HEAD"], name=file.name)
    return router


def _sender_of(file: Path) -> Callable[[], Awaitable[FileResponse]]:
    async def send_file() -> FileResponse:
        return FileResponse(file, media_type=_MEDIA_TYPES[file.suffix], headers=PAGE_HEADERS)

    return send_file
