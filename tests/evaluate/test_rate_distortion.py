"""Rate and distortion: budgets are kept, headers are counted, and nobody wins where no file fits."""

import json

import numpy as np
import pytest

import vistok
from vistok.cli import run as cli
from vistok.data.bundled import Photos
from vistok.evaluate.rate_distortion import best_that_fits, codec_candidates, run
from vistok.image import to_pil


@pytest.fixture(scope="module")
def tokenizer():
    return vistok.create("tokenizer", "spectral_planes_tiny").eval()


def test_whole_files_are_counted_and_the_best_is_taken():
    picture = np.asarray(to_pil(Photos(split="heldout").files[0]).resize((64, 64)))
    files = codec_candidates(picture, "WebP", 300)
    assert files and all(size <= 300 and decoded.shape == picture.shape for size, decoded in files)
    assert best_that_fits(picture, files, 10) is None
    small, large = (best_that_fits(picture, files, b) for b in (90, 300))
    errors = [((f[1].astype(float) - picture) ** 2).mean() for f in (small, large)]
    assert small[0] <= 90 and errors[1] < errors[0]


def test_the_container_of_avif_can_be_left_out_of_the_count():
    picture = np.asarray(to_pil(Photos(split="heldout").files[0]).resize((64, 64)))
    whole, body = (codec_candidates(picture, codec, 2000) for codec in ("AVIF", "AVIF body+10"))
    assert len(whole) == len(body)
    for (size, decoded), (less, same) in zip(whole, body):
        assert 200 < size - less < 400 and np.array_equal(decoded, same)


def test_a_report_is_written_and_budgets_are_kept(tokenizer, tmp_path):
    files = Photos(split="heldout").files[:2]
    result = run(tokenizer, files, out=tmp_path, budgets=(60, 150), metrics=("psnr", "ssim"), codecs=("JPEG", "WebP"))
    rows = {(r["coder"], r["bytes"]): r for r in result.rows}
    ours = rows["spectral_planes", 150]
    assert ours["fit"] == 2 and ours["mean_bytes"] <= 150 and ours["psnr"] > rows["spectral_planes", 60]["psnr"]
    assert rows["JPEG", 60]["fit"] == 0 and rows["JPEG", 60]["psnr"] is None
    assert json.loads((tmp_path / "rate_distortion.json").read_text())["pictures"] == 2
    assert all(path.is_file() for path in result.files.values())
    page = (tmp_path / "rate_distortion.html").read_text()
    assert '<td class="number">60</td><td class="number">0</td><td class="number">-</td>' in page  # JPEG
    assert "Pictures at equal bytes" in page and f"{ours['mean_bytes']:.0f} bytes" in page
    shown = 2 * (1 + 2) + sum(r["fit"] for r in result.rows if r["coder"] != "spectral_planes")
    assert page.count("data:image/webp;base64,") == shown  # every picture once, the originals too


def test_one_length_has_no_rate(tmp_path):
    fixed = vistok.create("tokenizer", "spectral_titok_tiny").eval()
    with pytest.raises(ValueError, match="a rate needs a nested tokenizer"):
        run(fixed, Photos(split="heldout").files[:1], out=tmp_path)


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    return str(tokenizer.save_pretrained(tmp_path_factory.mktemp("planes")))


def test_the_command_writes_the_comparison_and_prints_it(folder, tmp_path, capsys):
    photos = ",".join(str(p) for p in Photos(split="heldout").files[:2])
    words = ["eval", folder, "--rate-distortion", "--data", photos, "--budgets", "60,150", "--metrics", "psnr,ssim"]
    words += ["--out", str(tmp_path)]
    assert cli(words) == 0
    said = capsys.readouterr().out
    assert "mean_bytes" in said and "WebP" in said
    for name in ("rate_distortion.json", "rate_distortion.html", "curves.png"):
        assert (tmp_path / name).is_file() and f"Wrote {tmp_path / name}" in said
    assert cli(words) == 2  # nothing is replaced unasked
    assert "exists already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("model", "data", "options", "message"),
    [
        ("planes", "nowhere/*.jpg", (), "There is no file or folder 'nowhere/*.jpg'"),
        ("nowhere", "photo", (), "'nowhere' is no preset with weights, no folder and no file"),
        ("planes", "photo", ("--budgets", "64,many"), "--budgets takes integers separated by commas"),
        ("planes", "photo", ("--budgets", ","), "Budgets are numbers of bytes, at least 1 each"),
        ("planes", "photo", ("--budgets", "64,-1"), "Budgets are numbers of bytes, at least 1 each"),
        ("planes", "photo", ("--budgets", "3,5", "--metrics", "psnr"), "Nothing has files of at most 5 bytes"),
        ("fixed", "photo", (), "has one length only: a rate needs a nested tokenizer"),
        ("planes", "text", (), "There is no picture to evaluate on"),
    ],
)
def test_the_command_says_in_one_line_what_is_wrong(model, data, options, message, folder, tmp_path, capsys):
    if model == "fixed":
        folder = str(vistok.create("tokenizer", "spectral_titok_tiny").eval().save_pretrained(tmp_path / "fixed"))
    (tmp_path / "text.jpg").write_text("no picture")
    data = {"photo": str(Photos(split="heldout").files[0]), "text": str(tmp_path / "text.jpg")}.get(data, data)
    source = "nowhere" if model == "nowhere" else folder
    assert cli(["eval", source, "--rate-distortion", "--data", data, *options, "--out", str(tmp_path / "out")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and message in lines[0]
    assert not (tmp_path / "out").exists()


def test_a_broken_picture_is_named_and_the_others_are_compared(folder, tmp_path, capsys):
    (tmp_path / "broken.jpg").write_text("no picture")
    data = f"{Photos(split='heldout').files[0]},{tmp_path / 'broken.jpg'}"
    words = ["eval", folder, "--rate-distortion", "--data", data, "--budgets", "80", "--metrics", "psnr"]
    words += ["--out", str(tmp_path / "out")]
    assert cli(words) == 2
    assert "broken.jpg is not a picture" in capsys.readouterr().err
    assert json.loads((tmp_path / "out" / "rate_distortion.json").read_text())["pictures"] == 1
