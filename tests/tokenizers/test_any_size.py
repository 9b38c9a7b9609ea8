"""Tokenizers on a grid take pictures of any size: padded to whole tokens, cropped back."""

from __future__ import annotations

import pytest
import torch

import vistok
from vistok.image import Preprocess, to_pil
from vistok.registry import list_names, registry
from vistok.tokens import Tokens, from_bytes, to_bytes


def any_size() -> list[str]:
    """Tiny presets of every tokenizer that takes pictures of any size."""
    tokenizers = registry("tokenizer")
    return [n for n in list_names("tokenizer", "*_tiny") if getattr(tokenizers.resolve(n)[1], "multiple", None)]


@pytest.fixture(params=any_size())
def tok(request):
    return vistok.create("tokenizer", request.param).eval()


def same(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("height", "width"), [(49, 95), (64, 17), (96, 64)])
def test_a_picture_comes_back_in_its_own_size(tok, height, width):
    tokens = tok.encode(torch.rand(2, 3, height, width))
    assert tokens.size == (height, width)
    pictures = tok.decode(tokens)
    assert pictures.shape == (2, 3, height, width)
    if tokens.ids is not None:
        torch.manual_seed(0)
        first = tok.decode(tokens)
        torch.manual_seed(0)
        same(tok.decode(tokens.ids, size=(height, width)), first)


def test_training_compares_pictures_of_the_same_size(tok):
    assert tok.train()(torch.rand(2, 3, 49, 70)).images.shape == (2, 3, 49, 70)


def test_sides_are_padded_with_their_last_row_and_column(tok):
    step = tok.multiple
    picture = torch.rand(1, 3, 2 * step - 1, 2 * step)
    whole = torch.cat([picture, picture[:, :, -1:]], dim=2)
    assert torch.equal(tok.encode(picture).ids, tok.encode(whole).ids)


def test_the_file_knows_the_size(tok):
    tokens = tok.encode(torch.rand(1, 3, 40, 72))
    data = to_bytes(tokens, "0123abcd")
    read = from_bytes(data, vocab=tokens.vocab, model_id="0123abcd", grid=tok.token_grid((40, 72)))
    assert read.size == (40, 72)
    assert tok.decode(read).shape == (1, 3, 40, 72)


def test_picture_files_can_keep_their_size(tok, photos):
    assert tok.encode(photos[0]).size == tok.preprocess.size
    tok.preprocess = Preprocess(size=tok.preprocess.size, crop="none")
    picture = to_pil(photos[0])
    assert tok.encode(photos[0]).size == (picture.height, picture.width)


@pytest.mark.parametrize("name", [n for n in any_size() if vistok.create("tokenizer", n).grid is not None])
def test_sizes_that_do_not_fit_are_said(name):
    tok = vistok.create("tokenizer", name).eval()
    tokens = tok.encode(torch.rand(1, 3, 96, 64))
    with pytest.raises(ValueError, match=r"grid do not make a picture of 500x500"):
        tok.decode(tokens, size=(500, 500))
    with pytest.raises(ValueError, match=r"Give size=\(H, W\) of the picture"):
        tok.decode(torch.cat([tokens.ids, tokens.ids], 1))
    with pytest.raises(ValueError, match=r"size is \(H, W\) in pixels"):
        tok.decode(tokens.ids, size=(0, 64))
    bare = Tokens(ids=tokens.ids, vocab=tokens.vocab, grid=tokens.grid)
    assert tok.decode(bare).shape[-2:] == (tokens.grid[0] * tok.multiple, tokens.grid[1] * tok.multiple)


def test_multi_scale_ids_do_not_lie_on_the_grid():
    scales = {"name": "multiscale", "codebook_size": 32, "dim": 8, "scales": [1, 2, 4]}
    tok = vistok.create("tokenizer", "maskgit_vqgan_tiny", quantizer=scales).eval()
    tokens = tok.encode(torch.rand(2, 3, 60, 64))
    assert tokens.grid is None and tokens.ids.shape == (2, 21) and tok.num_tokens == 21
    assert tok.decode(tokens).shape == (2, 3, 60, 64)
    same(tok.decode(tokens.ids, size=(60, 64)), tok.decode(tokens))
    with pytest.raises(ValueError, match="quantises a 4x4 grid"):
        tok.encode(torch.rand(1, 3, 96, 64))


def test_the_command_line_keeps_whole_pictures(tmp_path, photos, capsys):
    from PIL import Image

    from vistok.cli import run

    vistok.create("tokenizer", "wetok_tiny").eval().save_pretrained(tmp_path / "model")
    Image.open(photos[0]).resize((45, 30)).save(tmp_path / "a.png")
    model, out = str(tmp_path / "model"), str(tmp_path / "out")
    assert run(["encode", model, str(tmp_path / "a.png"), "--out", out, "--whole"]) == 0
    assert run(["decode", model, f"{out}/a.vtok", "--out", out]) == 0
    assert Image.open(f"{out}/a.png").size == (45, 30)
    vistok.create("tokenizer", "titok_tiny").eval().save_pretrained(tmp_path / "fixed")
    assert run(["encode", str(tmp_path / "fixed"), str(tmp_path / "a.png"), "--out", f"{out}2", "--whole"]) == 2
    assert "one size only" in capsys.readouterr().err
