"""The page itself: Gradio's parts put together. What is shown is made in `look`, `kept` and `html`."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any

from vistok.data.bundled import Photos
from vistok.demo.html import curve_svg, error_html, kept_html, note_html, view_html
from vistok.demo.kept import QUESTION, Keeper
from vistok.demo.look import Look, Viewer
from vistok.demo.style import CSS, FONT, MONO

HOST, FIRST_SHARE = "127.0.0.1", 0.25
USERS = (ValueError, OSError)
"""What a picture or a setting can raise; said on the page in one line."""


class GradioMissing(ImportError):
    """Gradio is not installed."""


def gradio() -> Any:
    """Gradio, told not to call home.

    Raises:
        GradioMissing: It is not installed.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        import gradio
    except ImportError as err:
        raise GradioMissing("The page needs Gradio: pip install 'vistok[demo]' (or pip install gradio).") from err
    return gradio


def refuse_taken(port: int) -> None:
    """Stop before anything is loaded if something listens on the port.

    Raises:
        OSError: The port is taken, or may not be used.
    """
    with socket.socket() as tried:
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            tried.bind((HOST, port))
        except OSError as err:
            raise OSError(f"Port {port} of this machine cannot be used ({err.strerror}): give another --port.") from err


def serve(viewer: Viewer, keeper: Keeper, *, port: int, share: bool = False) -> None:
    """Show the page on this machine until Ctrl-C.

    Args:
        viewer: The tokenizer of the first tab.
        keeper: What the second tab paints with.
        port: Of 127.0.0.1.
        share: Also through Gradio's public tunnel.

    Raises:
        GradioMissing: Gradio is not installed.
        OSError: The port is taken.
    """
    gr = gradio()
    refuse_taken(port)
    page = build(gr, viewer, keeper)
    theme = gr.themes.Default(font=list(FONT), font_mono=list(MONO), radius_size="lg", primary_hue="blue")
    _, address, shared = page.launch(
        server_name=HOST,
        server_port=port,
        share=share,
        theme=theme,
        css=CSS,
        quiet=True,
        ssr_mode=False,
        footer_links=[],
        show_error=True,
        prevent_thread_lock=True,
        max_file_size="64mb",
        _frontend=False,  # else Gradio gives up where the page does not answer within three seconds
    )
    print(f"vistok demo: {shared or address}  (Ctrl-C ends it)", flush=True)
    page.block_thread()


def build(gr: Any, viewer: Viewer, keeper: Keeper) -> Any:
    """Both tabs, wired up.

    Args:
        gr: The gradio module.
        viewer: The tokenizer of the first tab.
        keeper: What the second tab paints with.

    Returns:
        Gradio's `Blocks`.
    """
    with gr.Blocks(title="vistok demo", analytics_enabled=False, fill_width=True) as page:
        gr.HTML(
            f'<div id="vt-head"><h1><span>vistok</span> &nbsp;How few tokens does a picture need?</h1>'
            f"<p><code>{escape(viewer.name)}</code> &middot; {escape(viewer.facts)}</p></div>"
        )
        with gr.Tab("Tokens and bytes"):
            _tokens_tab(gr, page, viewer)
        with gr.Tab("Tokens a VLM keeps"):
            _kept_tab(gr, page, keeper)
    return page


def _picture_input(gr: Any, where: str) -> tuple[Any, Any]:
    """A drop zone that hands over the file as it came, and the bundled photographs below it."""
    photos = [str(path) for path in Photos(split="heldout").files]  # the shipped weights have not seen these
    dropped = gr.Image(
        photos[0],
        type="filepath",
        image_mode=None,
        label="Drop a picture here",
        sources=["upload", "clipboard"],
        height=250,
        buttons=[],
        elem_id=f"vt-picture-{where}",
    )
    # vistok reads the file itself: what is no picture is said in our words, and nothing is decoded before the check
    dropped.preprocess = lambda payload: None if payload is None else payload.path
    gallery = gr.Gallery(
        photos,
        columns=4,
        rows=2,
        height="auto",
        object_fit="cover",
        allow_preview=False,
        show_label=False,
        buttons=[],
        elem_classes="vt-photos",
    )

    def chosen(event: gr.SelectData) -> str:
        return photos[int(event.index)]

    chosen.__annotations__["event"] = gr.SelectData  # a string under postponed annotations
    gallery.select(chosen, None, dropped, show_progress="hidden")
    return dropped, gallery


def _tokens_tab(gr: Any, page: Any, viewer: Viewer) -> None:
    start = min(viewer.most, max(viewer.least, min(viewer.most // 4, 64)))
    state, curves = gr.State(), gr.State({})
    with gr.Row():
        with gr.Column(scale=1, min_width=260):
            dropped, _ = _picture_input(gr, "tokens")
            reads = "text" in viewer.tokenizer.options
            caption = gr.Textbox("", label="Caption", placeholder="this tokenizer reads text", visible=reads)
            skipped = " ".join(f"{name} is left out: {why}" for name, why in viewer.skipped.items())
            gr.HTML(note_html(skipped), visible=bool(skipped), padding=False, elem_classes="vt-plain")
        with gr.Column(scale=3):
            slider = gr.Slider(
                viewer.least if viewer.least < viewer.most else 0,
                viewer.most,
                start,
                step=1,
                label="Tokens",
                interactive=viewer.least < viewer.most,
                elem_id="vt-tokens",
            )
            gr.HTML(note_html(viewer.why_fixed), visible=bool(viewer.why_fixed), padding=False, elem_classes="vt-plain")
            shown = gr.HTML(elem_id="vt-view", padding=False, elem_classes="vt-plain")
            drawn = gr.HTML(elem_id="vt-drawn", padding=False, elem_classes="vt-plain")

    def encode(file: str | None, text: str) -> tuple[Look | None, Any, dict[str, Any], str]:
        if not file:
            return None, note_html("Drop a picture, or choose one below."), {}, ""
        look, said = _told(file, lambda: viewer.look(file, text))
        return (None, said, {}, "") if look is None else (look, gr.skip(), {}, "")

    def move(look: Look | None, lines: dict[str, Any], count: int) -> tuple[Any, Any]:
        if look is None:
            return gr.skip(), gr.skip()
        view = look.at(count)
        return view_html(view, viewer.name), curve_svg(lines, view.size)

    def measure(look: Look | None) -> dict[str, Any]:
        return {} if look is None else look.curve()

    def draw(look: Look | None, lines: dict[str, Any], count: int) -> str:
        return curve_svg(lines, None if look is None else look.size(count))

    # each step reads where the slider is by then: a slow picture does not bring back an old position
    for event in (page.load, dropped.change, caption.submit):
        done = event(encode, [dropped, caption], [state, shown, curves, drawn], show_progress="minimal")
        done = done.then(move, [state, curves, slider], [shown, drawn], show_progress="hidden")
        done = done.then(measure, state, curves, show_progress="hidden")
        done.then(draw, [state, curves, slider], drawn, show_progress="hidden")
    slider.change(move, [state, curves, slider], [shown, drawn], show_progress="hidden", trigger_mode="always_last")


def _kept_tab(gr: Any, page: Any, keeper: Keeper) -> None:
    with gr.Row():
        with gr.Column(scale=1, min_width=260):
            dropped, _ = _picture_input(gr, "kept")
        with gr.Column(scale=3):
            gr.HTML(note_html(keeper.about), padding=False, elem_classes="vt-plain")
            with gr.Row():
                method = gr.Dropdown(keeper.methods, value=keeper.methods[0], label="Method", elem_id="vt-method")
                keep = gr.Slider(
                    0.02, 1.0, FIRST_SHARE, step=0.01, label="Share of tokens that stay", elem_id="vt-keep"
                )
            question = gr.Textbox(QUESTION, label="Question", visible=keeper.asks)
            painted = gr.HTML(elem_id="vt-kept", padding=False, elem_classes="vt-plain")

    def paint(file: str | None, name: str, share: float, text: str) -> str:
        if not file:
            return note_html("Drop a picture, or choose one below.")
        kept, said = _told(file, lambda: keeper.paint(file, name, share, text))
        return said if kept is None else kept_html(kept, name, text)

    inputs = [dropped, method, keep, question]
    for event in (page.load, dropped.change, method.change, question.submit):
        event(paint, inputs, painted, show_progress="minimal")
    keep.change(paint, inputs, painted, show_progress="minimal", trigger_mode="always_last")


def _told(file: str, call: Callable[[], Any]) -> tuple[Any, str]:
    """What a call about a picture gives, or None and one line for the page; bugs are raised."""
    try:
        return call(), ""
    except USERS as err:
        return None, error_html(str(err).replace(file, Path(file).name))
