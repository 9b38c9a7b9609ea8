"""Make assets/demo.webp, the picture of `vistok demo` in README.md, in headless Chromium.

Run: python assets/demo_page.py        (needs vistok[demo], playwright from PyPI, and Chromium)
"""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image

from tests.demo.test_page import opened, served, wait_for

HERE = Path(__file__).parent
TOKENS = "96"
WIDTH = 1240


def shot() -> Image.Image:
    """The first tab at `TOKENS` tokens."""
    with served() as address, opened(address) as tab:
        tab.set_viewport_size({"width": WIDTH, "height": 900})
        tab.wait_for_selector("#vt-view .vt-cards img")
        tab.locator(".vt-photos .thumbnail-item").nth(2).click()
        tab.locator("#vt-tokens input[type=number]").fill(TOKENS)
        tab.locator("#vt-tokens input[type=number]").press("Enter")
        wait_for(tab, "#vt-view [data-figure=tokens] .vt-value", TOKENS)
        tab.mouse.move(0, 0)
        tab.wait_for_timeout(3000)
        return Image.open(io.BytesIO(tab.screenshot(full_page=True))).convert("RGB")


if __name__ == "__main__":
    shot().save(HERE / "demo.webp", quality=88, method=6)
