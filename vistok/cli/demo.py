"""`vistok demo`: the page to look at."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vistok.cli.pictures import DEFAULT, Device, load


def demo(
    model: Annotated[
        str, typer.Argument(metavar="[MODEL]", help="Preset with weights, folder, or hf-hub:org/name.")
    ] = DEFAULT,
    vlm: Annotated[
        Path | None, typer.Option(help="Directory of a vision-language model, for the tab about its tokens.")
    ] = None,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port on this machine.")] = 7860,
    share: Annotated[
        bool, typer.Option("--share", help="Also through Gradio's public tunnel; off by default.")
    ] = False,
    device: Device = "",
) -> None:
    """Serve a page: a picture at any number of tokens beside JPEG, WebP and AVIF, and which tokens a VLM keeps."""
    from vistok.demo import page
    from vistok.demo.kept import FeatureKeeper, HostKeeper
    from vistok.demo.look import Viewer

    page.gradio()
    page.refuse_taken(port)
    viewer = Viewer(load(model, device), model)
    page.serve(viewer, FeatureKeeper() if vlm is None else HostKeeper(vlm), port=port, share=share)
