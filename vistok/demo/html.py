"""The results as HTML: cards with pictures inside, figures, a curve. Nothing in it is fetched from outside."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING

from vistok.demo.kept import Kept
from vistok.demo.look import GAIN, Rival, View

if TYPE_CHECKING:
    from PIL.Image import Image

COLOURS = ("var(--vt-ours)", "var(--vt-1)", "var(--vt-2)", "var(--vt-3)")
WIDTH, HEIGHT, LEFT, BOTTOM = 860, 260, 48, 34
LOWER_IS_BETTER = ("LPIPS", "DISTS")


def view_html(view: View, name: str) -> str:
    """A picture at one number of tokens: figures in a row, then the pictures beside each other."""
    caption = f"{view.count} token{'s' * (view.count != 1)}"
    size = "" if view.size is None else f"{view.size} bytes"
    cards = [
        _card("Original", f"{view.raw:,} bytes of pixels", view.original),
        _card(name, f"{caption}, {size}" if size else caption, view.reconstruction, view.values, ours=True),
        _card("What is missing", f"original minus reconstruction, {GAIN:g} times as strong", view.residual),
    ]
    rivals = [_rival(rival, view) for rival in view.rivals]
    if not rivals:
        rivals = [
            '<p class="vt-note">Continuous latents have no bytes, so no file of another codec is beside them.</p>'
        ]
    heading = f"The same {size}, spent by other codecs" if size else "Other codecs"
    return (
        f'{_figures(view)}<div class="vt-cards">{"".join(cards)}</div>'
        f'<h3 class="vt-heading">{escape(heading)}</h3><div class="vt-cards">{"".join(rivals)}</div>'
    )


def _figures(view: View) -> str:
    tiles = [("tokens", f"{view.count}", f"of {view.of}")]
    if view.size is not None:
        pixels = view.raw / 3
        how = "whole file, ids entropy-coded" if view.coded else "whole file, ids packed"
        tiles += [("bytes", f"{view.size}", how)]
        tiles += [("smaller", f"{view.raw / view.size:,.0f} times", f"{8 * view.size / pixels:.3f} bits per pixel")]
    for title, value in view.values.items():
        lower = title.startswith(LOWER_IS_BETTER)
        text = f"{value:.2f} dB" if title == "PSNR" else f"{value:.3f}"
        tiles.append((title, text, "lower is better" if lower else "higher is better"))
    return '<div class="vt-figures">' + "".join(_figure(*tile) for tile in tiles) + "</div>"


def _figure(name: str, value: str, note: str) -> str:
    key = name.split(" ")[0].lower()
    number, _, unit = value.partition(" ")
    shown = escape(number) + (f"<small>{escape(unit)}</small>" if unit else "")
    return (
        f'<div class="vt-figure" data-figure="{escape(key)}"><div class="vt-name">{escape(name)}</div>'
        f'<div class="vt-value">{shown}</div><div class="vt-small">{escape(note)}</div></div>'
    )


def _card(
    title: str, note: str, picture: Image, values: Mapping[str, float] | None = None, *, ours: bool = False
) -> str:
    kind = " vt-ours" if ours else ""
    return (
        f'<figure class="vt-card{kind}" data-card="{escape(title)}">{_image(picture, title)}<figcaption>'
        f'<div class="vt-title">{_breakable(title)}</div><div class="vt-small">{escape(note)}</div>'
        f"{_values(values or {})}</figcaption></figure>"
    )


def _breakable(name: str) -> str:
    """A name that may be broken behind its dots and underscores."""
    return escape(name).replace("_", "_<wbr>").replace(".", ".<wbr>")


def _rival(rival: Rival, view: View) -> str:
    if rival.picture is not None:
        return _card(rival.codec, f"{rival.size} bytes, best quality and scale", rival.picture, rival.values)
    ratio = view.original.width / view.original.height
    return (
        f'<figure class="vt-card vt-none" data-card="{escape(rival.codec)}">'
        f'<div class="vt-empty" style="aspect-ratio:{ratio:.3f}"><b>{escape(rival.codec)}</b>'
        f"<span>{escape(rival.note)}</span></div><figcaption>"
        f'<div class="vt-title">{escape(rival.codec)}</div><div class="vt-small">nothing to compare</div>'
        "</figcaption></figure>"
    )


def _values(values: Mapping[str, float]) -> str:
    parts = (
        f"<span><i>{escape(title.replace(' (alex)', ''))}</i> {value:.{2 if title == 'PSNR' else 3}f}</span>"
        for title, value in values.items()
    )
    return f'<div class="vt-values">{"".join(parts)}</div>' if values else ""


def kept_html(kept: Kept, method: str, question: str = "") -> str:
    """A painted picture with what the method left and, in a model, what it answers."""
    tiles = [("tokens", f"{kept.left}", f"of {kept.of} after the last cut")]
    tiles += [("kept", f"{kept.left / kept.of:.1%}", method)]
    if kept.share is not None:
        tiles.append(("FLOPs", f"{kept.share:.1%}", "of the image tokens' prefill is left"))
    said = ""
    if kept.answer or kept.plain:
        said = (
            f'<div class="vt-said"><p class="vt-question">{escape(question)}</p>'
            f"<p><i>{escape(method)}</i>{escape(kept.answer or '(nothing)')}</p>"
            f"<p><i>all tokens</i>{escape(kept.plain or '(nothing)')}</p></div>"
        )
    figures = '<div class="vt-figures">' + "".join(_figure(*tile) for tile in tiles) + "</div>"
    painted = _card(
        f"What {method} keeps", "dark: dropped; as it is: kept; tinted alike: merged into one", kept.picture
    )
    original = _card("Original", "as the encoder sees it", kept.original)
    return f'{figures}<div class="vt-painted">{painted}<div>{original}{said}</div></div>'


def error_html(text: str) -> str:
    """What is wrong, in one line."""
    return f'<p class="vt-error" role="alert">{escape(" ".join(text.split()))}</p>'


def note_html(text: str) -> str:
    """A plain remark."""
    return f'<p class="vt-note">{escape(text)}</p>' if text else ""


def curve_svg(curves: Mapping[str, Sequence[tuple[int, float]]], at: int | None = None) -> str:
    """PSNR against bytes, a line per coder, with a mark at a number of bytes; empty without curves."""
    if not curves:
        return ""
    points = [point for line in curves.values() for point in line]
    low_x, high_x = math.log2(min(x for x, _ in points)), math.log2(max(x for x, _ in points) + 1)
    low_y, high_y = math.floor(min(y for _, y in points)), math.ceil(max(y for _, y in points))

    def place(x: float, y: float) -> tuple[float, float]:
        across = (math.log2(max(x, 1)) - low_x) / max(high_x - low_x, 1e-9)
        up = (y - low_y) / max(high_y - low_y, 1e-9)
        return LEFT + across * (WIDTH - LEFT - 120), (HEIGHT - BOTTOM) - up * (HEIGHT - BOTTOM - 22)

    parts, step = [], max(1, round((high_y - low_y) / 5))
    for y in range(low_y, high_y + 1, step):
        x0, y0 = place(2**low_x, y)
        parts.append(f'<line class="vt-grid" x1="{x0}" x2="{WIDTH - 120}" y1="{y0:.1f}" y2="{y0:.1f}"/>')
        parts.append(f'<text x="{x0 - 8}" y="{y0 + 4:.1f}" text-anchor="end">{y}</text>')
    for power in range(math.ceil(low_x), math.floor(high_x) + 1):
        x0, y0 = place(2**power, low_y)
        parts.append(f'<text x="{x0:.1f}" y="{y0 + 18:.1f}" text-anchor="middle">{2**power}</text>')
    parts.append(
        f'<text x="{WIDTH - 112}" y="{HEIGHT - BOTTOM + 18}">bytes</text><text x="{LEFT + 6}" y="11">PSNR, dB</text>'
    )
    if at is not None:
        x0, _ = place(at, low_y)
        parts.append(
            f'<line class="vt-at" data-bytes="{at}" x1="{x0:.1f}" x2="{x0:.1f}" y1="18" y2="{HEIGHT - BOTTOM}"/>'
        )
    parts += _lines(curves, place)
    return (
        f'<div class="vt-curve"><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="PSNR against bytes">'
        f"{''.join(parts)}</svg></div>"
    )


def _lines(curves: Mapping[str, Sequence[tuple[int, float]]], place: object) -> list[str]:
    parts: list[str] = []
    taken: list[float] = []
    assert callable(place)
    for (name, line), colour in zip(curves.items(), COLOURS):
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in line))
        parts.append(f'<polyline style="stroke:{colour}" points="{path}"/>')
        x, y = place(*line[-1])
        while any(abs(y - other) < 15 for other in taken):  # labels do not cover each other
            y += 3
        taken.append(y)
        label = name if len(name) <= 15 else "this tokenizer"
        parts.append(f'<text x="{x + 8:.1f}" y="{y + 4:.1f}" style="fill:{colour}">{escape(label)}</text>')
    return parts


def _image(picture: Image, alt: str) -> str:
    file = io.BytesIO()
    picture.save(file, format="PNG", compress_level=1)
    data = base64.b64encode(file.getvalue()).decode()
    size = f'width="{picture.width}" height="{picture.height}"'
    return f'<img alt="{escape(alt)}" {size} src="data:image/png;base64,{data}">'
