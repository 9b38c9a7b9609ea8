"""An evaluation at several token counts: its figures are those of plain decoding, and the page shows the ladder."""

from __future__ import annotations

import json

import pytest
from PIL import Image

import vistok
from vistok.evaluate.grid import count_tokens
from vistok.evaluate.pixel import Psnr
from vistok.evaluate.run import evaluate
from vistok.image import read_batches


def test_evaluation_climbs_the_token_counts(photos, tmp_path):
    tok = vistok.create("tokenizer", "flextok_tiny").eval()
    pictures = photos[:3]
    result = evaluate(tok, pictures, metrics=["psnr"], out=tmp_path, lengths=(1, 4, 16))
    found = json.loads(result.files["metrics"].read_text())["by_tokens"]
    _, images = next(iter(read_batches(pictures, tok.preprocess, 3, broken={})))
    for k in (1, 4, 16):
        expected = float(Psnr().update(tok.decode(tok.encode(images, k)), images).mean())
        assert found[str(k)]["psnr"] == pytest.approx(expected, abs=1e-3)
    assert found["16"]["psnr"] == pytest.approx(result.figures["psnr"], abs=1e-3)
    with Image.open(result.files["ladder"]) as ladder:
        assert ladder.width > 4 * 64
    page = result.files["report"].read_text()
    assert "Ladder of token counts" in page and "Quality by number of tokens" in page


def test_a_tokenizer_of_one_length_has_no_ladder(photos, tmp_path):
    tok = vistok.create("tokenizer", "titok_tiny").eval()
    with pytest.raises(ValueError, match="always makes 16 tokens"):
        evaluate(tok, photos[:1], metrics=["psnr"], out=tmp_path, lengths=(4,))


def test_one_token_is_not_several():
    assert [count_tokens(k) for k in (1, 2, 64)] == ["1 token", "2 tokens", "64 tokens"]
