"""The page in a real browser: headless Chromium uploads, moves sliders and reads what changed."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import vistok
from tests.plugins import local
from vistok.demo import page
from vistok.demo.kept import FeatureKeeper
from vistok.demo.look import Look, Viewer

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
MISSING = [name for name in ("gradio", "playwright") if importlib.util.find_spec(name) is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: pip install {' '.join(MISSING)}"),
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium: apt-get install chromium"),
]
WAIT = 90_000


@contextlib.contextmanager
def served(*words: str) -> Iterator[str]:
    """The address of `vistok demo` at work."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vistok", "demo", *words, "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert f"vistok demo: http://127.0.0.1:{port}" in line, line
        yield f"http://127.0.0.1:{port}"
    finally:
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)
        process.kill()


@contextlib.contextmanager
def opened(address: str) -> Iterator[Any]:
    """A browser's tab on it; no request leaves this machine, and the console shows no error."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        tab, outside, errors = browser.new_page(viewport={"width": 1280, "height": 1100}), [], []
        tab.set_default_timeout(WAIT)
        tab.on("request", lambda r: None if r.url.startswith((address, "data:", "blob:")) else outside.append(r.url))
        tab.on("pageerror", lambda error: errors.append(str(error)))
        tab.goto(address)
        yield tab
        browser.close()
    assert (outside, errors) == ([], [])


def picture(tab: Any, where: str, card: str) -> str:
    return str(tab.get_attribute(f"{where} [data-card='{card}'] img", "src"))


def figure(tab: Any, name: str) -> str:
    return str(tab.text_content(f"#vt-view [data-figure={name}] .vt-value"))


def wait_for(tab: Any, selector: str, text: str) -> None:
    tab.wait_for_function(
        "([selector, text]) => document.querySelector(selector)?.textContent.includes(text)", arg=[selector, text]
    )


def test_a_picture_is_dropped_in_and_the_sliders_change_what_is_seen(photos: list[Path], tmp_path: Path) -> None:
    with served() as address, opened(address) as tab:
        tab.wait_for_selector("#vt-view .vt-cards img")  # the first picture is there at once
        first = picture(tab, "#vt-view", "Original")
        tab.set_input_files("#vt-picture-tokens input[type=file]", str(photos[9]))
        tab.wait_for_function(
            "old => document.querySelector(\"#vt-view [data-card='Original'] img\")?.src !== old", arg=first
        )
        assert figure(tab, "tokens") == "64"
        name = "spectral_planes_128.free"
        before = [figure(tab, n) for n in ("bytes", "psnr")] + [
            picture(tab, "#vt-view", c) for c in (name, "What is missing", "WebP")
        ]
        original = picture(tab, "#vt-view", "Original")
        tab.locator("#vt-tokens input[type=range]").focus()
        for _ in range(8):
            tab.keyboard.press("ArrowRight")
        tab.keyboard.press("ArrowRight")
        wait_for(tab, "#vt-view [data-figure=tokens] .vt-value", "73")
        after = [figure(tab, n) for n in ("bytes", "psnr")] + [
            picture(tab, "#vt-view", c) for c in (name, "What is missing", "WebP")
        ]
        assert all(a != b for a, b in zip(before, after)), before[:2] + after[:2]
        assert picture(tab, "#vt-view", "Original") == original
        assert float(before[1].split("dB")[0]) < float(after[1].split("dB")[0]) and int(before[0]) < int(after[0])
        assert "has no file of" in str(tab.text_content("#vt-view [data-card=JPEG]"))
        assert tab.locator("#vt-drawn polyline").count() >= 2

        bad = tmp_path / "broken.jpg"
        bad.write_bytes(photos[0].read_bytes()[:3000])
        tab.set_input_files("#vt-picture-tokens input[type=file]", str(bad))
        tab.wait_for_selector("#vt-view .vt-error")
        said = str(tab.text_content("#vt-view .vt-error"))
        assert said.startswith("broken.jpg is damaged or not fully written") and "Traceback" not in said
        tab.locator("#vt-picture-tokens button[aria-label='Remove Image'], #vt-picture-tokens button").first.click()
        tab.locator(".vt-photos .thumbnail-item").nth(1).click()
        tab.wait_for_selector("#vt-view .vt-cards img")


@pytest.mark.filterwarnings("ignore:The copy keyword")  # of pandas, from Gradio
def test_curves_that_take_their_time_are_marked_where_the_slider_is_by_then(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Look.curve

    def slow(look: Look) -> dict[str, list[tuple[int, float]]]:
        time.sleep(6)
        return plain(look)

    monkeypatch.setattr(Look, "curve", slow)
    name = "spectral_planes_128.free"
    blocks = page.build(page.gradio(), Viewer(vistok.load(name), name), FeatureKeeper())
    _, address, _ = blocks.launch(prevent_thread_lock=True, quiet=True, ssr_mode=False, _frontend=False)
    try:
        with opened(address.rstrip("/")) as tab:
            tab.wait_for_selector("#vt-view .vt-cards img")
            tab.locator("#vt-tokens input[type=number]").fill("9")
            tab.locator("#vt-tokens input[type=number]").press("Enter")
            wait_for(tab, "#vt-view [data-figure=smaller] .vt-value", "times")
            tab.wait_for_selector("#vt-drawn polyline")
            tab.wait_for_timeout(1000)
            assert figure(tab, "tokens") == "9"
            assert tab.get_attribute("#vt-drawn .vt-at", "data-bytes") == figure(tab, "bytes")
    finally:
        blocks.close()


def test_the_second_tab_paints_without_a_model() -> None:
    with served() as address, opened(address) as tab:
        tab.get_by_role("tab", name="Tokens a VLM keeps").click()
        tab.wait_for_selector("#vt-kept [data-card='What divprune keeps'] img")
        before = picture(tab, "#vt-kept", "What divprune keeps")
        assert before != picture(tab, "#vt-kept", "Original")
        tab.locator("#vt-keep input[type=number]").fill("0.5")
        tab.locator("#vt-keep input[type=number]").press("Enter")
        wait_for(tab, "#vt-kept [data-figure=tokens] .vt-value", "288")
        assert picture(tab, "#vt-kept", "What divprune keeps") != before
        tab.locator("#vt-method input").click()
        tab.get_by_role("option", name="pool", exact=True).click()
        tab.wait_for_selector("#vt-kept [data-card='What pool keeps'] img")


def test_a_tokenizer_of_one_length_and_a_model_of_ones_own(tmp_path: Path) -> None:
    vistok.create("tokenizer", "titok_tiny").eval().save_pretrained(tmp_path / "titok")
    host = local.save(tmp_path / "llava")
    with served(str(tmp_path / "titok"), "--vlm", str(host)) as address, opened(address) as tab:
        tab.wait_for_selector("#vt-view .vt-cards img")
        assert "always makes 16 tokens" in str(tab.text_content("body"))
        assert tab.locator("#vt-tokens input[type=range]").is_disabled()
        assert (figure(tab, "tokens"), figure(tab, "bytes")) == ("16", "26")
        tab.get_by_role("tab", name="Tokens a VLM keeps").click()
        tab.wait_for_selector("#vt-kept .vt-said")
        assert "all tokens" in str(tab.text_content("#vt-kept .vt-said"))
        assert str(tab.text_content("#vt-kept [data-figure=tokens] .vt-value")) == "4"
