"""`vistok prior` and `encode --bytes`: a prior for any tokenizer with ids, and files that keep their size exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import vistok
from vistok.cli import run
from vistok.data.bundled import FOLDER
from vistok.evaluate.lengths import fitting
from vistok.evaluate.prior import fit
from vistok.image import to_pictures
from vistok.tokens import FLAG_CODED, to_bytes

pytest.importorskip("constriction", reason="the range coder is not installed: pip install 'vistok[codec]'")


@pytest.fixture(scope="module")
def smooth(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """25 pictures of soft colours, which are cheap to write."""
    folder, draw = tmp_path_factory.mktemp("smooth"), torch.Generator().manual_seed(0)
    x = torch.nn.functional.interpolate(torch.rand(25, 3, 4, 4, generator=draw), (64, 64), mode="bilinear")
    for i, picture in enumerate(to_pictures(x)):
        picture.save(folder / f"{i:02d}.png")
    return sorted(folder.iterdir())


@pytest.fixture(scope="module")
def coded(tmp_path_factory: pytest.TempPathFactory, smooth: list[Path]) -> Path:
    """A folder with a small nested tokenizer and a prior that `vistok prior` fitted."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("coded")
    vistok.create("tokenizer", "spectral_planes_tiny", num_tokens=12).eval().save_pretrained(folder)
    assert run(["prior", str(folder), "--data", str(smooth[0].parent), "--out", str(folder)]) == 0
    return folder


@pytest.mark.parametrize("name", ["titok_tiny", "one_d_piece_tiny", "wetok_tiny", "spectral_planes_tiny"])
def test_any_tokenizer_with_ids_gets_one_and_files_come_back(
    name: str, capsys: Any, photos: list[Path], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    tokenizer = vistok.create("tokenizer", name).eval()
    tokenizer.save_pretrained(tmp_path / "plain")
    data = f"{photos[0].parent}/0*.jpg"
    assert run(["prior", str(tmp_path / "plain"), "--data", data, "--out", str(tmp_path / "own")]) == 0
    said = capsys.readouterr().out
    assert "Fitted to 10 pictures; wrote" in said and "Whole files of 2 pictures it was not fitted to" in said
    assert "% saved" in said
    assert run(["encode", str(tmp_path / "own"), str(photos[1]), "--out", str(tmp_path / "ids")]) == 0
    assert run(["decode", str(tmp_path / "own"), str(tmp_path / "ids"), "--out", str(tmp_path / "back")]) == 0
    mine = vistok.load(tmp_path / "own")
    wanted = tokenizer.encode(photos[1])
    data = (tmp_path / "ids" / f"{photos[1].stem}.vtok").read_bytes()
    assert len(data) <= len(to_bytes(wanted, tokenizer.model_id))
    found = vistok.tokens.from_bytes(data, vocab=wanted.vocab, model_id=mine.model_id, prior=mine.prior)
    assert torch.equal(found.ids, wanted.ids)


def test_the_saving_is_that_of_pictures_it_was_not_fitted_to(smooth: list[Path]) -> None:
    tokenizer = vistok.create("tokenizer", "spectral_planes_tiny", num_tokens=12).eval()
    found = fit(tokenizer, smooth)
    others = fit(tokenizer, [p for i, p in enumerate(smooth) if i % 5 != 4]).prior
    tokens = [tokenizer.encode(p) for p in smooth[4::5]]
    sizes = [len(to_bytes(tokenizer.portable(t), "00000000", others)) for t in tokens]
    assert (found.pictures, found.measured, found.coded_bytes) == (25, 5, sum(sizes) / 5)
    assert found.packed_bytes == len(tokenizer.to_bytes(tokens[0])) and 0 < found.saving < 1
    assert fit(tokenizer, smooth[:1]).measured == 0


def test_crops_of_a_picture_are_kept_together_and_the_same_every_time(smooth: list[Path], tmp_path: Path) -> None:
    tokenizer = vistok.create("tokenizer", "spectral_planes_tiny", num_tokens=12).eval()
    (tmp_path / "broken.png").write_bytes(b"no picture")
    found = fit(tokenizer, [*smooth[:7], tmp_path / "broken.png"], crops=3)
    assert (found.pictures, found.measured) == (7, 1) and 0 < found.saving < 1
    assert list(found.skipped) == [tmp_path / "broken.png"]
    again, whole = fit(tokenizer, smooth[:7], crops=3).prior, fit(tokenizer, smooth[:7]).prior
    assert again.check == found.prior.check != whole.check


def test_crops_keep_the_filter_and_channels_of_the_model_and_come_in_batches(smooth: list[Path]) -> None:
    tokenizer = vistok.create("tokenizer", "depth_vqvae_tiny").eval()
    seen: list[torch.Tensor] = []
    encode = tokenizer.encode
    tokenizer.encode = lambda images: seen.append(images) or encode(images)
    fit(tokenizer, smooth[:2], crops=5, batch=3)
    assert [len(images) for images in seen] == [3, 2, 3, 2]
    assert all(torch.equal(images[:, 0], images[:, channel]) for images in seen for channel in (1, 2))


@pytest.mark.parametrize(
    ("name", "message"),
    [("mingtok_tiny", "has continuous latents, and a prior is a table of at most 16384 ids"), ("nowhere", "no preset")],
)
def test_what_has_no_prior_is_refused_in_one_line(name: str, message: str, capsys: Any, tmp_path: Path) -> None:
    if name != "nowhere":
        vistok.create("tokenizer", name).eval().save_pretrained(tmp_path / name)
    words = ["prior", str(tmp_path / name), "--data", str(FOLDER / "01-cat.jpg"), "--out", str(tmp_path / "out")]
    assert run(words) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and message in lines[0]
    assert not (tmp_path / "out").exists()


def test_a_prior_is_not_replaced_unless_asked(coded: Path, capsys: Any, photos: list[Path]) -> None:
    words = ["prior", str(coded), "--data", str(photos[0]), "--out", str(coded)]
    before = (coded / "prior.npz").read_bytes()
    assert run(words) == 2
    assert "exists already" in capsys.readouterr().err
    assert (coded / "prior.npz").read_bytes() == before


@pytest.mark.parametrize("size", [25, 40, 77, 120])
def test_bytes_are_those_of_the_whole_coded_file_and_no_longer_prefix_fits(
    size: int, coded: Path, smooth: list[Path], tmp_path: Path
) -> None:
    sources = [str(p) for p in smooth[:3]]
    assert run(["encode", str(coded), *sources, "--out", str(tmp_path), "--bytes", str(size)]) == 0
    tokenizer = vistok.load(coded)
    for picture in smooth[:3]:
        data = (tmp_path / f"{picture.stem}.vtok").read_bytes()
        whole = tokenizer.encode(picture)
        every = [len(tokenizer.to_bytes(whole[:, :k])) for k in range(1, 13)]
        k = data[9]
        assert len(data) == every[k - 1] <= size
        assert all(length > size for length in every[k:])
        assert data[2] & FLAG_CODED or k == 12 or size < 40


def test_a_caption_counts() -> None:
    tokenizer = vistok.create("tokenizer", "spectral_planes_tiny").eval()
    tokens = tokenizer.encode(FOLDER / "01-cat.jpg")
    tokenizer.prior = vistok.codec.prior.fit(tokenizer, tokens.ids)
    named = vistok.Tokens(ids=tokens.ids, vocab=tokens.vocab, size=tokens.size, text=("a cat, 猫",))
    found = fitting(tokenizer, named, 30)
    assert len(tokenizer.to_bytes(found)) <= 30
    assert found.num_tokens < fitting(tokenizer, tokens, 30).num_tokens


def test_a_picture_that_does_not_fit_is_named_and_not_written(
    coded: Path, capsys: Any, smooth: list[Path], tmp_path: Path
) -> None:
    assert run(["encode", str(coded), str(smooth[0]), "--out", str(tmp_path), "--bytes", "10"]) == 2
    said = capsys.readouterr().err
    assert f"{smooth[0]}: A file of 10 bytes is too small: even one token takes more." in said
    assert not list(tmp_path.glob("*.vtok"))


def test_tokens_and_quality_are_what_they_were(coded: Path, smooth: list[Path], tmp_path: Path) -> None:
    for option, value in (("--tokens", "5"), ("--psnr", "12")):
        assert run(["encode", str(coded), str(smooth[1]), "--out", str(tmp_path / option), option, value]) == 0
    data = (tmp_path / "--tokens" / f"{smooth[1].stem}.vtok").read_bytes()
    assert data[9] == 5
    assert list((tmp_path / "--psnr").glob("*.vtok"))


def test_the_report_of_an_evaluation_holds_the_saving(coded: Path, smooth: list[Path], tmp_path: Path) -> None:
    import json

    words = ["eval", str(coded), "--data", str(smooth[1]), "--metrics", "psnr", "--out", str(tmp_path)]
    assert run(words) == 0
    rate = json.loads((tmp_path / "metrics.json").read_text())["rate"]
    tokenizer = vistok.load(coded)
    size = len(tokenizer.to_bytes(tokenizer.encode(smooth[1])))
    assert rate["coded_file_bytes_per_picture"] == size < rate["file_bytes_per_picture"]
    assert rate["saved_by_coding"] == pytest.approx(1 - size / rate["file_bytes_per_picture"])
    assert "saved by coding" in (tmp_path / "report.html").read_text()
