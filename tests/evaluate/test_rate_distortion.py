"""Rate and distortion: budgets are kept, headers are counted, and nobody wins where no file fits."""

import json

import numpy as np
import pytest

import vistok
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


def test_a_report_is_written_and_budgets_are_kept(tokenizer, tmp_path):
    files = Photos(split="heldout").files[:2]
    result = run(tokenizer, files, out=tmp_path, budgets=(60, 150), metrics=("psnr", "ssim"), codecs=("JPEG", "WebP"))
    rows = {(r["coder"], r["bytes"]): r for r in result.rows}
    ours = rows["spectral_planes", 150]
    assert ours["fit"] == 2 and ours["mean_bytes"] <= 150 and ours["psnr"] > rows["spectral_planes", 60]["psnr"]
    assert rows["JPEG", 60]["fit"] == 0 and rows["JPEG", 60]["psnr"] is None
    assert json.loads((tmp_path / "rate_distortion.json").read_text())["pictures"] == 2
    assert all(path.is_file() for path in result.files.values())


def test_one_length_has_no_rate(tmp_path):
    fixed = vistok.create("tokenizer", "spectral_titok_tiny").eval()
    with pytest.raises(ValueError, match="a rate needs a nested tokenizer"):
        run(fixed, Photos(split="heldout").files[:1], out=tmp_path)
