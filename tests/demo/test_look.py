"""What the page shows, without Gradio: encoded once, equal bytes, painted tokens, one line where it goes wrong."""

from __future__ import annotations

import itertools
import socket
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import vistok
from tests.plugins import local
from vistok.cli import run
from vistok.demo import html
from vistok.demo.kept import FeatureKeeper, HostKeeper, Kept
from vistok.demo.look import Look, Viewer, rising, spread
from vistok.evaluate.rate_distortion import codec_candidates, smallest_file
from vistok.image import PictureError, to_tensor


@pytest.fixture(scope="module")
def viewer() -> Viewer:
    torch.manual_seed(0)
    return Viewer(vistok.create("tokenizer", "spectral_planes_tiny").eval(), "planes")


@pytest.fixture(scope="module")
def look(viewer: Viewer, photos: list[Path]) -> Look:
    return viewer.look(photos[1])


def test_a_picture_is_encoded_once_and_decoded_at_every_length(viewer: Viewer, photos: list[Path], monkeypatch: Any):
    calls, encode = [], viewer.tokenizer.encode
    monkeypatch.setattr(viewer.tokenizer, "encode", lambda *a, **k: calls.append(1) or encode(*a, **k))
    look = viewer.look(photos[1])
    views = [look.at(count) for count in (1, 8, 32)]
    look.curve()
    assert calls == [1]
    assert [v.count for v in views] == [1, 8, 32]
    assert views[0].values["PSNR"] < views[1].values["PSNR"] < views[2].values["PSNR"]
    assert np.asarray(views[0].reconstruction).tobytes() != np.asarray(views[2].reconstruction).tobytes()


def test_bytes_are_those_of_the_whole_file(viewer: Viewer, look: Look):
    tokens = viewer.tokenizer.encode(look.pixels)
    view = look.at(8)
    assert view.size == len(viewer.tokenizer.to_bytes(tokens[:, :8]))
    assert view.raw == 64 * 64 * 3 and not view.coded


def test_entropy_coded_files_are_called_so(photos: list[Path]):
    shipped = Viewer(vistok.load("spectral_planes_128.free").eval(), "shipped")
    view = shipped.look(photos[1]).at(16)
    assert view.coded and view.size < 60


def test_what_is_shown_is_what_decoding_gives(viewer: Viewer, look: Look):
    tokens = viewer.tokenizer.encode(look.pixels)
    rebuilt = viewer.tokenizer.decode(tokens[:, :8])
    view = look.at(8)
    shown = to_tensor(view.reconstruction, viewer.tokenizer.preprocess)
    assert float((shown - rebuilt).abs().max()) < 0.6 / 255
    missing = 0.5 + 1.5 * (look.pixels - rebuilt)
    found = to_tensor(view.residual, viewer.tokenizer.preprocess)
    assert float((found - missing.clamp(0, 1)).abs().max()) < 0.6 / 255


def test_other_codecs_get_the_same_bytes_or_are_said_to_have_no_file(look: Look):
    view = look.at(20)
    assert view.size is not None
    webp, jpeg = (next(r for r in view.rivals if r.codec == c) for c in ("WebP", "JPEG"))
    assert webp.picture is not None and 0 < webp.size <= view.size and set(webp.values) == set(view.values)
    picture = np.asarray(view.original)
    least = smallest_file(picture, "JPEG")
    assert jpeg.picture is None and least > view.size
    assert jpeg.note == f"has no file of {view.size} bytes; its smallest is {least}"
    best = max(
        codec_candidates(picture, "WebP", view.size), key=lambda f: -((f[1].astype(float) - picture) ** 2).mean()
    )
    assert np.array_equal(best[1], np.asarray(webp.picture))


def test_counts_that_are_not_possible_become_the_nearest(look: Look):
    assert (look.at(0).count, look.at(99).count) == (1, 32)


@pytest.mark.parametrize("name", ["titok_tiny", "wetok_tiny"])
def test_a_tokenizer_of_one_length_says_why_the_slider_is_fixed(name: str, photos: list[Path]):
    viewer = Viewer(vistok.create("tokenizer", name).eval(), name)
    assert viewer.least == viewer.most == viewer.tokenizer.num_tokens
    assert f"always makes {viewer.most} tokens" in viewer.why_fixed
    look = viewer.look(photos[1])
    view = look.at(3)
    assert view.count == viewer.most and view.size and look.curve() == {}
    assert f"{view.size} bytes" in html.view_html(view, name)


def test_continuous_latents_have_no_bytes(photos: list[Path]):
    viewer = Viewer(vistok.create("tokenizer", "mingtok_tiny").eval(), "mingtok")
    view = viewer.look(photos[1]).at(1)
    assert view.size is None and view.rivals == []
    assert "Continuous latents have no bytes" in html.view_html(view, "mingtok")


def test_a_generative_decoder_gets_the_same_noise_every_time(photos: list[Path]):
    torch.manual_seed(0)
    look = Viewer(vistok.create("tokenizer", "flextok_tiny").eval(), "flextok").look(photos[1])
    assert look.at(4).reconstruction.tobytes() == look.at(4).reconstruction.tobytes()


def test_captions_reach_a_tokenizer_that_reads_them(photos: list[Path]):
    torch.manual_seed(0)
    viewer = Viewer(vistok.create("tokenizer", "ta_titok_tiny").eval(), "ta_titok")
    one, other = viewer.look(photos[1], "a cat"), viewer.look(photos[1])
    assert one.tokens.text == ("a cat",) and other.tokens.text != one.tokens.text


@pytest.mark.parametrize("content", [b"", b"no picture", b"\x89PNG\r\n\x1a\n" + bytes(20)])
def test_what_is_no_picture_is_one_line(viewer: Viewer, tmp_path: Path, content: bytes):
    (tmp_path / "bad.png").write_bytes(content)
    with pytest.raises(PictureError, match=r"bad.png is (not a picture that Pillow reads|damaged)") as caught:
        viewer.look(tmp_path / "bad.png")
    said = html.error_html(f"{caught.value}\n<b>")
    assert "\n" not in said and "&lt;b&gt;" in said


def test_the_curve_rises_and_is_drawn_with_a_mark(look: Look):
    curves = look.curve()
    assert {"planes", "WebP"} <= set(curves)
    for line in curves.values():
        assert [b for b, _ in line] == sorted({b for b, _ in line})
        assert all(later[1] > earlier[1] for earlier, later in itertools.pairwise(line))
    drawn = html.curve_svg(curves, 80)
    assert drawn.count("<polyline") == len(curves) and "vt-at" in drawn and "http" not in drawn
    assert html.curve_svg({}) == ""


def test_counts_are_spread_the_ends_first():
    assert spread(256, 14)[:2] == [1, 256] and sorted(spread(256, 14)) == sorted(set(spread(256, 14)))
    assert spread(1, 14) == [1] and sorted(spread(3, 14)) == [1, 2, 3]
    assert rising([(5, 1.0), (5, 2.0), (6, 1.5), (9, 3.0)]) == [(5, 2.0), (9, 3.0)]


def test_the_page_is_self_contained(look: Look):
    shown = html.view_html(look.at(8), "<planes>")
    assert shown.count("data:image/png;base64,") == 3 + sum(r.picture is not None for r in look.at(8).rivals)
    assert "http" not in shown and "&lt;planes&gt;" in shown and "<planes>" not in shown


@pytest.fixture(scope="module")
def features() -> FeatureKeeper:
    return FeatureKeeper()


def test_methods_that_need_features_alone_paint_without_a_model(features: FeatureKeeper, photos: list[Path]):
    assert {"divprune", "random_features", "pool"} <= set(features.methods)
    assert not {"fastv", "visionzip", "frame_merge", "h2o"} & set(features.methods)
    assert "vistok demo --vlm" in features.about
    for method in features.methods:
        kept = features.paint(photos[1], method, 0.25)
        assert (kept.left, kept.of) == (144, 576), method
        assert kept.picture.size == kept.original.size == (448, 448)
        assert kept.picture.tobytes() != kept.original.tobytes()
    whole = features.paint(photos[1], "divprune", 1.0)
    assert whole.left == 576 and whole.picture.tobytes() == whole.original.tobytes()


def test_a_selection_darkens_what_it_drops(features: FeatureKeeper, photos: list[Path]):
    kept = features.paint(photos[1], "divprune", 0.25)
    same = (np.asarray(kept.picture) == np.asarray(kept.original)).all(-1)
    assert 0.2 < same.mean() < 0.35


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> HostKeeper:
    return HostKeeper(local.save(tmp_path_factory.mktemp("host") / "llava"))


def test_a_model_from_a_directory_paints_and_answers(host: HostKeeper, photos: list[Path]):
    assert {"fastv", "divprune", "tome"} <= set(host.methods)
    assert not {"h2o", "snapkv", "frame_merge"} & set(host.methods)
    for method in ("fastv", "pool", "tome"):
        kept = host.paint(photos[1], method, 0.5, "what ?")
        assert (kept.left, kept.of) == (8, 16), method
        assert kept.share is not None and 0 < kept.share < 1
        assert kept.picture.size == (448, 448) and kept.picture.tobytes() != kept.original.tobytes()
    assert not hasattr(host.model, "_vistok_plugin")
    shown = html.kept_html(kept, "tome", "what <is> it ?")
    assert "8</div>" in shown and "what &lt;is&gt; it ?" in shown


def test_the_picture_is_shown_as_the_processor_cropped_it(host: HostKeeper, photos: list[Path]):
    kept = host.paint(photos[1], "random", 1.0, "what ?")
    assert kept.left == kept.of == 16
    assert kept.picture.tobytes() == kept.original.tobytes()
    squashed = np.asarray(vistok.image.to_pil(photos[1]).resize((448, 448)), dtype=float)
    assert np.abs(np.asarray(kept.original) - squashed).mean() < 12  # 56 pixels enlarged: blurred, not moved


def test_answers_are_shown_only_where_there_is_a_model(features: FeatureKeeper, photos: list[Path]):
    kept = features.paint(photos[1], "divprune", 0.5)
    assert isinstance(kept, Kept) and "vt-said" not in html.kept_html(kept, "divprune")


def failed(capsys: Any, *words: str) -> str:
    assert run(["demo", *words]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    return lines[0]


def test_without_gradio_one_line_says_how_to_get_it(capsys: Any, monkeypatch: Any):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert failed(capsys) == "Error: The page needs Gradio: pip install 'vistok[demo]' (or pip install gradio)."


def test_what_is_not_there_is_one_line(capsys: Any, monkeypatch: Any, tmp_path: Path):
    monkeypatch.setitem(sys.modules, "gradio", object())
    assert "'nowhere' is no preset with weights" in failed(capsys, "nowhere")
    assert "holds no model (no config.json)" in failed(capsys, "--vlm", str(tmp_path))
    assert "--port" in failed(capsys, "--port", "0")


def test_a_port_that_is_taken_is_one_line(capsys: Any, monkeypatch: Any):
    monkeypatch.setitem(sys.modules, "gradio", object())
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"Port {port} of this machine cannot be used" in failed(capsys, "--port", str(port))
