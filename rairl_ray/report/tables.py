"""Tables as Markdown, LaTeX and CSV; the page shows the same cells."""

from __future__ import annotations

import csv
import io
import math
import re

from rairl_ray.report.parts import Cell, Number, Table

_TEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "%": r"\%",
    "_": r"\_", "^": r"\textasciicircum{}", "~": r"\textasciitilde{}", "±": r"$\pm$", "–": "--",
    "<": r"$<$", ">": r"$>$", "→": r"$\to$",
}  # fmt: skip


def cell_text(cell: Cell) -> str:
    """A cell as people read it: `51.1 [48.5, 53.7]`, `27.9 ± 4.7`, `–` for no number; shares in percent."""
    if cell is None:
        return "–"
    if isinstance(cell, str):
        return cell
    if not math.isfinite(cell.value):
        return "–"
    if cell.kind == "p":
        return "< 0.001" if cell.value < 0.001 else f"{cell.value:.3f}"
    if cell.kind == "count":
        return f"{cell.value:,.0f}"
    scale = 100.0 if cell.kind == "percent" else 1.0
    digits = 1 if cell.kind == "percent" else _digits(cell.value)
    text = _fixed(scale * cell.value, digits)
    if math.isfinite(cell.std):
        return f"{text} ± {_fixed(scale * cell.std, digits)}"
    if math.isfinite(cell.low) and math.isfinite(cell.high):
        return f"{text} [{_fixed(scale * cell.low, digits)}, {_fixed(scale * cell.high, digits)}]"
    return text


def column_title(table: Table, index: int) -> str:
    """The column's name, with its unit if all its numbers are percentages."""
    numbers = [row[index] for row in table.rows if isinstance(row[index], Number)]
    percent = numbers and all(isinstance(cell, Number) and cell.kind == "percent" for cell in numbers)
    return f"{table.columns[index]} (%)" if percent else table.columns[index]


def markdown(table: Table) -> str:
    """A GitHub table under its title."""
    titles = [column_title(table, i) for i in range(len(table.columns))]
    lines = [[_markdown_text(text) for text in titles], ["---"] * len(titles)]
    lines += [[_markdown_text(cell_text(cell)) for cell in row] for row in table.rows]
    body = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    note = f"\n{_markdown_text(table.note)}\n" if table.note else ""
    return f"**{_markdown_text(table.title)}**\n\n{body}\n{note}"


def latex(table: Table) -> str:
    """A `tabular` in a `table`, for the booktabs package."""
    width = len(table.columns)
    numeric = [any(isinstance(row[i], Number) for row in table.rows) for i in range(width)]
    titles = [_tex_text(column_title(table, i)) for i in range(width)]
    rows = [" & ".join(_tex_text(cell_text(cell)) for cell in row) + r" \\" for row in table.rows]
    caption = _tex_text(f"{table.title}. {table.note}" if table.note else table.title)
    return "\n".join(
        [
            r"% needs \usepackage{booktabs}",
            r"\begin{table}",
            rf"\caption{{{caption}}}",
            rf"\label{{tab:{table.name}}}",
            rf"\begin{{tabular}}{{{''.join('r' if is_numeric else 'l' for is_numeric in numeric)}}}",
            r"\toprule",
            " & ".join(titles) + r" \\",
            r"\midrule",
            *rows,
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
            "",
        ]
    )


def comma_separated(table: Table) -> str:
    """CSV with raw numbers: an interval has columns `X low` and `X high` of its own, a spread `X std`."""
    extras = [
        [part for part in ("low", "high", "std") if any(_has(row[i], part) for row in table.rows)]
        for i in range(len(table.columns))
    ]
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    header: list[str] = []
    for name, parts in zip(table.columns, extras, strict=True):
        header += [name, *(f"{name} {part}" for part in parts)]
    writer.writerow(header)
    for row in table.rows:
        values: list[str] = []
        for cell, parts in zip(row, extras, strict=True):
            values.append(_raw(cell.value) if isinstance(cell, Number) else cell or "")
            values += [_raw(getattr(cell, part)) if isinstance(cell, Number) else "" for part in parts]
        writer.writerow(values)
    return buffer.getvalue()


def _has(cell: Cell, part: str) -> bool:
    return isinstance(cell, Number) and math.isfinite(getattr(cell, part))


def _raw(value: float) -> str:
    if not math.isfinite(value):
        return ""
    return str(int(value)) if float(value).is_integer() and abs(value) < 1e15 else repr(float(value))


def _digits(value: float) -> int:
    size = abs(value)
    return 3 if size < 10 else 2 if size < 100 else 1 if size < 1000 else 0


def _fixed(value: float, digits: int) -> str:
    text = f"{value:,.{digits}f}"
    return text[1:] if text.startswith("-") and not text.strip("-0.,") else text


def _markdown_text(text: str) -> str:
    text = re.sub(r"([\\|*_`<>\[\]])", r"\\\1", text)
    return " ".join(text.split())


def _tex_text(text: str) -> str:
    return "".join(_TEX.get(character, character) for character in " ".join(text.split()))
