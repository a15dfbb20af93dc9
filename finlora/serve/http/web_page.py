"""Web page of the server: the static files of the folder `page`, served without a key under a strict content policy.

The page holds no data. All that it shows comes from the `/v1` endpoints, with the key that the user types.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from html import escape
from pathlib import Path
from typing import Any

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


def describe_api(described: Mapping[str, Any]) -> str:
    """Return an OpenAPI description as an HTML page without scripts, which loads nothing from other hosts."""
    parts = []
    for path, calls in described["paths"].items():
        for method, call in calls.items():
            needs_key = "" if call.get("security") == [] else " Needs a key."
            parts.append(
                f"<h2>{escape(method.upper())} {escape(path)}</h2><p>{escape(call['summary'])}.{needs_key}</p>"
            )
            parts.append(f"<p>{escape(call.get('description', ''))}</p>")
            schema = call.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema", {})
            parts.append(_show_fields("Request", schema, described))
            reply = call["responses"].get("200", {}).get("content", {}).get("application/json", {}).get("schema", {})
            parts.append(_show_fields("Reply", reply, described))
    return _API_PAGE.format(
        title=escape(described["info"]["title"]),
        version=escape(described["info"]["version"]),
        about=escape(described["info"]["description"]),
        body="".join(parts),
    )


_API_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title} HTTP API</title><link rel="stylesheet" href="/page/style.css"></head>
<body><main><h1>{title} {version}: HTTP API</h1><p>{about}</p>
<p>Programs read the same as <a href="/openapi.json">/openapi.json</a>, with a key.</p>{body}</main></body></html>
"""


def _show_fields(title: str, schema: Mapping[str, Any], described: Mapping[str, Any]) -> str:
    name = schema.get("$ref", "").rpartition("/")[2]
    fields = described["components"]["schemas"].get(name, {}).get("properties", {})
    rows = (
        f"<dt><code>{escape(field)}</code></dt><dd>{escape(facts.get('description', ''))}</dd>"
        for field, facts in fields.items()
    )
    return f"<h3>{title}: {escape(name)}</h3><dl>{''.join(rows)}</dl>" if fields else ""


def _sender_of(file: Path) -> Callable[[], Awaitable[FileResponse]]:
    async def send_file() -> FileResponse:
        return FileResponse(file, media_type=_MEDIA_TYPES[file.suffix], headers=PAGE_HEADERS)

    return send_file
