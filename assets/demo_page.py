"""Make assets/demo.webp, the picture of `vistok demo` in README.md, in headless Chromium.

Run: python assets/demo_page.py        (needs vistok[demo], playwright from PyPI, and Chromium)
"""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image

from tests.demo.test_page import opened, picture, served, wait_for

HERE = Path(__file__).parent
TOKENS = "96"
WIDTH = 1280


def shot() -> Image.Image:
    """The first tab at `TOKENS` tokens."""
    with served() as address, opened(address) as tab:
        tab.set_viewport_size({"width": WIDTH, "height": 900})
        tab.wait_for_selector("#vt-view .vt-cards img")
        tab.wait_for_selector("#vt-drawn polyline")
        first = picture(tab, "#vt-view", "Original")
        tab.locator(".vt-photos .thumbnail-item").nth(2).click()
        tab.wait_for_function(
            "old => document.querySelector(\"#vt-view [data-card='Original'] img\")?.src !== old", arg=first
        )
        tab.wait_for_selector("#vt-drawn polyline")
        tab.locator("#vt-tokens input[type=number]").fill(TOKENS)
        tab.locator("#vt-tokens input[type=number]").press("Enter")
        wait_for(tab, "#vt-view [data-figure=tokens] .vt-value", TOKENS)
        tab.mouse.click(4, 4)  # nothing has the focus
        tab.wait_for_timeout(3000)
        return Image.open(io.BytesIO(tab.screenshot(full_page=True))).convert("RGB")


if __name__ == "__main__":
    shot().save(HERE / "demo.webp", quality=88, method=6)
