"""The page: one HTML file that needs nothing else, and the files beside it."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, StrictUndefined

from rairl_ray.files import write_atomic
from rairl_ray.report.parts import Figure, Number, Section, Table
from rairl_ray.report.safety import clean, visible
from rairl_ray.report.style import LEVELS, image, level_colour
from rairl_ray.report.tables import cell_text, column_title, comma_separated, latex, markdown

TABLE_FORMATS = {"md": markdown, "tex": latex, "csv": comma_separated}


def write_page(output: Path, title: str, sections: Sequence[Section], notes: Sequence[str]) -> list[Path]:
    """Write index.html, figures/ and tables/; the paths, the page first."""
    for folder in ("figures", "tables"):
        (output / folder).mkdir(parents=True, exist_ok=True)
    paths: list[Path] = []
    images: dict[str, str] = {}
    for part in (part for section in sections for part in section.parts):
        if isinstance(part, Figure):
            for kind in ("png", "pdf"):
                path = output / "figures" / f"{part.name}.{kind}"
                path.write_bytes(image(part.drawing, kind))
                paths.append(path)
            if part.place == "page":
                encoded = base64.b64encode(image(part.drawing, "svg")).decode()
                images[part.name] = f"data:image/svg+xml;base64,{encoded}"
        elif isinstance(part, Table):
            for kind, render in TABLE_FORMATS.items():
                path = output / "tables" / f"{part.name}.{kind}"
                write_atomic(path, clean(render(part)))
                paths.append(path)
    page = output / "index.html"
    write_atomic(page, clean(_template().render(title=title, sections=sections, notes=notes, images=images)))
    return [page, *paths]


def slug(text: str) -> str:
    """A text as a file name or an anchor."""
    return re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_") or "part"


@cache
def _template():  # type: ignore[no-untyped-def]
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.globals |= {"cell_text": cell_text, "column_title": column_title, "kind_of": _kind}
    environment.globals |= {"levels": range(-LEVELS, LEVELS + 1), "level_colour": level_colour, "slug": slug}
    environment.filters["visible"] = visible
    environment.tests["number"] = lambda value: isinstance(value, Number)
    return environment.from_string((files("rairl_ray.report") / "page.html.j2").read_text(encoding="utf-8"))


def _kind(part: object) -> str:
    return type(part).__name__.lower()
