"""Self-contained HTML page of tables and figures: no network, no script, no second file."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from finlora.report.tables import NOT_MEASURED, NOT_RUN, TextTable

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, slots=True)
class Image:
    """A figure of the page."""

    caption: str
    source: str
    """A data URL."""


@dataclass(frozen=True, slots=True)
class Section:
    """One part of the page."""

    title: str
    table: TextTable | None = None
    images: tuple[Image, ...] = ()


def embed(figure: Figure, caption: str) -> Image:
    """Turn a figure into an SVG inside the page, the same one for equal figures."""
    import matplotlib

    stream = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "finlora"}):  # otherwise ids of shapes are random
        figure.savefig(stream, format="svg", metadata={"Date": None})
    return Image(caption, f"data:image/svg+xml;base64,{base64.b64encode(stream.getvalue()).decode()}")


def render_page(title: str, subtitle: str, sections: Sequence[Section]) -> str:
    """Return the page. Names and texts of results are shown as they are, never read as markup."""
    return render_template(
        "finlora.report",
        "report.html",
        title=title,
        subtitle=subtitle,
        sections=sections,
        missing=(NOT_MEASURED, NOT_RUN),
    )


def render_template(package: str, name: str, **values: object) -> str:
    """Return a page from a template of a package. It may include the report's own templates, such as style.css.

    Args:
        package: with a folder `templates`.
        values: texts in them are escaped.
    """
    from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

    loader = ChoiceLoader([PackageLoader(package), PackageLoader("finlora.report")])
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, keep_trailing_newline=True)
    return environment.get_template(name).render(**values)
