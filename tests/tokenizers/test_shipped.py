"""The weights that come with the package: there, small, strict, better than no training, offline by default."""

import torch

import vistok
from vistok.assets import SHIPPED
from vistok.cli import run
from vistok.data.bundled import Photos
from vistok.image import to_tensor

NAME = "spectral_planes_128.free"


def test_they_load_and_beat_the_plain_transform_on_held_out_photographs():
    tokenizer = vistok.load(NAME)
    x = to_tensor(Photos(split="heldout").files, tokenizer.preprocess)
    tokens = tokenizer.encode(x)
    assert tokenizer.prior is not None and tokenizer.nested
    lpips = vistok.create("loss", "lpips", net="alex")
    for k in (16, 64):
        plain, learned = tokenizer.code.synthesise(tokens.codes[:, :k]).clamp(0, 1), tokenizer.decode(tokens[:, :k])
        assert float(lpips(learned, x).mean()) < 0.9 * float(lpips(plain, x).mean())
        assert float((learned - x).square().mean()) < 1.05 * float((plain - x).square().mean())


def test_they_are_small_and_named_by_their_encoder():
    files = list((SHIPPED / "spectral_planes_128").iterdir())
    assert sum(f.stat().st_size for f in files) <= 12e6
    tokenizer = vistok.load(NAME)
    assert tokenizer.model_id == vistok.info(NAME).weights.model_id
    tokenizer._model_id = None
    assert tokenizer.model_id == vistok.info(NAME).weights.model_id  # computed, not only read


def test_reconstruct_takes_them_without_being_asked(tmp_path, capsys):
    photo = str(Photos(split="heldout").files[0])
    assert run(["reconstruct", photo, "--tokens", "16,64", "--out", str(tmp_path)]) == 0
    assert {p.name for p in tmp_path.iterdir()} == {"01-cat.16.png", "01-cat.64.png", "ladder.png"}


def test_reconstruct_takes_a_folder_of_pictures_alone(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "photo.jpg").write_bytes(Photos(split="heldout").files[0].read_bytes())
    assert run(["reconstruct", str(tmp_path / "in"), "--tokens", "16", "--out", str(tmp_path / "out")]) == 0
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"photo.16.png", "comparison.16.png"}
    assert run(["reconstruct", "nothing", "--out", str(tmp_path / "none")]) == 2
    assert "There are no pictures" in capsys.readouterr().err


def test_saving_keeps_the_prior(tmp_path):
    tokenizer = vistok.load(NAME)
    tokenizer.save_pretrained(tmp_path)
    again = vistok.load(tmp_path)
    assert again.prior.check == tokenizer.prior.check
    x = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    assert torch.equal(again.encode(x).ids, tokenizer.encode(x).ids)
