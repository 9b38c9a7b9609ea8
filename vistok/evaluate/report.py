"""One self-contained HTML page about a training run or an evaluation.

`write_page` takes plain data and knows neither trainer nor evaluator. Everything is inside the file: no script, no
font, no address outside. PNG grids and curves come from `vistok.evaluate.grid` and `vistok.evaluate.curves`, which are
importable from here as well.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from torch import Tensor

from vistok.evaluate.curves import Curve, curve_svg, curves_from_log, save_curves
from vistok.evaluate.gallery import Example, Gallery
from vistok.evaluate.grid import reconstruction_grid, save_grid
from vistok.evaluate.protocol import flatten
from vistok.evaluate.style import STYLE
from vistok.hub import write_atomic

__all__ = [
    "Curve",
    "Example",
    "Figure",
    "Gallery",
    "Sheet",
    "Table",
    "curves_from_log",
    "reconstruction_grid",
    "save_curves",
    "save_grid",
    "write_page",
]

LARGEST_SIDE = 512  # of a picture in the page
SHEET_QUALITY = 90  # of the WebP pictures of a sheet


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One headline figure.

    Attributes:
        title: Name of the metric.
        value: Its value.
        unit: Unit, empty for a bare number.
        decimals: Digits to show.
        interval: Ends of a 95 % interval, None if there is none.
        higher_is_better: Direction, None where neither is.
        definition: What exactly was measured; shown small.
    """

    title: str
    value: float
    unit: str = ""
    decimals: int = 4
    interval: tuple[float, float] | None = None
    higher_is_better: bool | None = None
    definition: str = ""


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table.

    Attributes:
        title: Heading.
        columns: Column names.
        rows: Cells; numbers are set flush right, floats with four significant digits or more, None beside them as -.
        note: A line below.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Sheet:
    """Pictures in rows and columns, each once; small in the page (WebP).

    Attributes:
        title: Heading.
        columns: What stands above each column.
        rows: A label, and for every column a picture (uint8, (3, H, W); None leaves the cell empty) with its caption.
        note: A line below the heading.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[tuple[str, Sequence[tuple[Tensor | None, str]]]]
    note: str = ""


def write_page(
    path: str | Path,
    *,
    title: str,
    command: str,
    subtitle: str = "",
    figures: Sequence[Figure] = (),
    groups: Mapping[str, Sequence[Example]] | None = None,
    gallery: Sequence[Example] = (),
    curves: Sequence[Curve] = (),
    tables: Sequence[Table] = (),
    sheets: Sequence[Sheet] = (),
    panels: Mapping[str, bytes] | None = None,
    protocol: Mapping[str, Any] | None = None,
    notes: Sequence[str] = (),
    ranked_by: str = "PSNR",
) -> Path:
    """Write the page, atomically.

    Args:
        path: Where to; folders are made.
        title: Heading, for instance the recipe's or the model's name.
        command: The exact command that gives this page again.
        subtitle: One line below the heading: data, number of pictures, date.
        figures: Headline figures.
        groups: Pictures to look at closely, `Gallery.groups()`: worst, median, best.
        gallery: Further pictures, folded away.
        curves: Diagrams.
        tables: Tables.
        sheets: Pictures in rows and columns.
        panels: Further pictures (PNG) under their headings.
        protocol: What the figures depend on, from `vistok.evaluate.protocol.collect`.
        notes: Plain sentences a reader must know, shown above the figures.
        ranked_by: Metric that chose the groups, for their heading.

    Returns:
        The path.
    """
    sections = [
        _notes(notes),
        _figures(figures),
        _groups(groups or {}, ranked_by),
        _curves(curves),
        f'<div class="tables">{"".join(_table(t) for t in tables)}</div>' if tables else "",
        "".join(_sheet(s) for s in sheets),
        "".join(_panel(heading, png) for heading, png in (panels or {}).items()),
        _gallery(gallery),
        _protocol(protocol),
    ]
    page = "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)}</title><style>{STYLE}</style></head><body><main>",
            f"<header><h1>{escape(title)}</h1>" + (f"<p>{escape(subtitle)}</p>" if subtitle else ""),
            f'<pre class="command"><code>{escape(command)}</code></pre></header>',
            *(s for s in sections if s),
            "<footer>Made by vistok. Pictures in this page are compressed (JPEG, quality 93, full colour resolution; "
            f"in sheets WebP, quality {SHEET_QUALITY}), at most {LARGEST_SIDE} pixels wide; figures were measured on "
            "the uncompressed ones.</footer>",
            "</main></body></html>",
        ]
    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, page.encode())
    return path


def _section(heading: str, body: str, note: str = "") -> str:
    lead = f'<p class="lead">{escape(note)}</p>' if note else ""
    return f"<section><h2>{escape(heading)}</h2>{lead}{body}</section>"


def _notes(notes: Sequence[str]) -> str:
    return f'<div class="notes">{"".join(f"<p>{escape(n)}</p>" for n in notes)}</div>' if notes else ""


def _figures(figures: Sequence[Figure]) -> str:
    if not figures:
        return ""
    return f'<section class="tiles">{"".join(_tile(f) for f in figures)}</section>'


def _tile(figure: Figure) -> str:
    arrow = {True: "higher is better", False: "lower is better", None: ""}[figure.higher_is_better]
    mark = {True: "&uarr;", False: "&darr;", None: ""}[figure.higher_is_better]
    digits = figure.decimals
    unit = f"<small>{escape(figure.unit)}</small>" if figure.unit else ""
    lines = f'<div class="value">{figure.value:.{digits}f}{unit}</div>'
    if figure.interval is not None:
        low, high = figure.interval
        lines += f'<div class="interval">95 % interval {low:.{digits}f} to {high:.{digits}f}</div>'
    if figure.definition:
        lines += f'<div class="definition">{escape(figure.definition)}</div>'
    heading = f'{escape(figure.title)} <span title="{arrow}">{mark}</span>'
    return f'<div class="tile"><div class="name">{heading}</div>{lines}</div>'


def _groups(groups: Mapping[str, Sequence[Example]], ranked_by: str) -> str:
    columns = []
    for name, examples in groups.items():
        if examples:
            cards = "".join(_pair(e) for e in examples)
            columns.append(f'<div class="group"><h3>{escape(name)}</h3>{cards}</div>')
    if not columns:
        return ""
    body = f'<div class="groups">{"".join(columns)}</div>'
    return _section("Pictures", body, f"Chosen by {ranked_by}. Original left, reconstruction right.")


def _pair(example: Example) -> str:
    values = " &middot; ".join(f"{escape(_label(k))} {_number(v)}" for k, v in example.values.items())
    note = f"<div>{escape(example.note)}</div>" if example.note else ""
    caption = f'<div class="file">{escape(example.name)}</div><div class="values">{values}</div>{note}'
    return (
        '<figure class="pair"><div class="sides">'
        f"{_image(example.original, f'{example.name}, original')}"
        f"{_image(example.reconstruction, f'{example.name}, reconstruction')}</div>"
        f"<figcaption>{caption}</figcaption></figure>"
    )


def _panel(heading: str, png: bytes) -> str:
    source = f"data:image/png;base64,{_base64(png)}"
    return _section(heading, f'<div class="scroll"><img alt="{escape(heading)}" src="{source}"></div>')


def _sheet(sheet: Sheet) -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in sheet.columns)
    rows = []
    for label, cells in sheet.rows:
        shown = "".join(
            "<td></td>" if picture is None else f"<td>{_image(picture, note, 'WEBP')}<div>{escape(note)}</div></td>"
            for picture, note in cells
        )
        rows.append(f"<tr><th>{escape(label)}</th>{shown}</tr>")
    table = f'<table class="sheet"><thead><tr><th></th>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table>'
    return _section(sheet.title, f'<div class="scroll">{table}</div>', sheet.note)


def _gallery(examples: Sequence[Example]) -> str:
    if not examples:
        return ""
    cards = "".join(_pair(e) for e in examples)
    folded = f'<details><summary>More pictures ({len(examples)})</summary><div class="gallery">{cards}</div></details>'
    return f"<section>{folded}</section>"


def _curves(curves: Sequence[Curve]) -> str:
    if not curves:
        return ""
    pictures = (
        f'<img class="chart" alt="{escape(c.title)}" src="data:image/svg+xml;base64,{_base64(curve_svg(c).encode())}">'
        for c in curves
    )
    return _section("Curves", f'<div class="charts">{"".join(pictures)}</div>')


def _table(table: Table) -> str:
    columns = [[row[i] for row in table.rows if row[i] is not None] for i in range(len(table.columns))]
    numeric = [bool(column) and all(map(_is_number, column)) for column in columns]
    head = "".join(f"<th{' class=number' * n}>{escape(str(c))}</th>" for c, n in zip(table.columns, numeric))
    rows = "".join(f"<tr>{''.join(map(_cell, row, numeric))}</tr>" for row in table.rows)
    note = f'<p class="lead below">{escape(table.note)}</p>' if table.note else ""
    body = f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
    return _section(table.title, body + note)


def _protocol(protocol: Mapping[str, Any] | None) -> str:
    if not protocol:
        return ""
    rows = "".join(f"<tr><th>{escape(k)}</th><td>{escape(v)}</td></tr>" for k, v in flatten(protocol))
    table = f'<div class="scroll"><table class="facts">{rows}</table></div>'
    body = f"<details><summary>All settings</summary>{table}</details>"
    return _section("Protocol", f"{_brief(protocol)}{body}", "What these figures depend on.")


def _brief(protocol: Mapping[str, Any]) -> str:
    """The handful of facts a reader looks for first."""
    known = dict(flatten(protocol))
    wanted = (
        ("data.name", "Data"),
        ("data.pictures", "Pictures"),
        ("data.sha256", "Data hash"),
        ("model.name", "Model"),
        ("model.sha256", "Model hash"),
        ("preprocess.size", "Size"),
        ("preprocess.crop", "Crop"),
        ("preprocess.resample", "Resize filter"),
        ("device", "Device"),
        ("git", "Commit"),
        ("versions.vistok", "vistok"),
        ("versions.torch", "torch"),
    )
    rows = [(label, known[key]) for key, label in wanted if key in known]
    cells = "".join(f"<tr><th>{label}</th><td>{escape(_shortened(value))}</td></tr>" for label, value in rows)
    return f'<table class="facts brief">{cells}</table>' if rows else ""


def _shortened(value: str) -> str:
    is_hash = len(value) >= 40 and all(c in "0123456789abcdef" for c in value.split("-")[0])
    return value[:12] + (value[40:] if "-" in value else "") if is_hash else value


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _cell(value: Any, numeric: bool) -> str:
    if numeric or _is_number(value):
        return f'<td class="number">{"-" if value is None else _number(value)}</td>'
    return f"<td>{escape('' if value is None else str(value))}</td>"


def _number(value: float) -> str:
    if float(value).is_integer() and abs(value) < 1e12:
        return f"{int(value):,}".replace(",", "&#8239;") if abs(value) >= 10_000 else str(int(value))
    if value == 0 or 0.01 <= abs(value) < 10_000:
        decimals = 4 if abs(value) < 1 else 3 if abs(value) < 10 else 2
        return f"{value:.{decimals}f}"
    return f"{value:.3g}"


def _label(key: str) -> str:
    return key.replace("_", " ").upper() if len(key) <= 5 else key.replace("_", " ").replace("lpips", "LPIPS")


def _image(picture: Tensor, alt: str, kind: str = "JPEG") -> str:
    from PIL import Image

    image = Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy())
    image.thumbnail((LARGEST_SIDE, LARGEST_SIDE))
    buffer = io.BytesIO()
    if kind == "JPEG":
        image.save(buffer, format=kind, quality=93, subsampling=0)  # full colour resolution: colour is what suffers
    else:
        image.save(buffer, format=kind, quality=SHEET_QUALITY, method=6)
    size = f'width="{image.width}" height="{image.height}"'
    return f'<img {size} alt="{escape(alt)}" src="data:image/{kind.lower()};base64,{_base64(buffer.getvalue())}">'


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def figure_of(metric: Any, value: float, interval: tuple[float, float] | None = None) -> Figure:
    """The headline figure of a registered metric.

    Args:
        metric: The metric object, for its title, unit, digits, direction and definition.
        value: What it computed.
        interval: Ends of a 95 % interval.
    """
    return Figure(
        title=metric.label,
        value=value,
        unit=metric.unit,
        decimals=metric.decimals,
        interval=interval,
        higher_is_better=metric.higher_is_better,
        definition=metric.definition,
    )
