"""The evaluation runner: figures that can be checked by hand, files that can be read, broken pictures named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

import vistok
from vistok.evaluate.run import EvalResult, evaluate, flat_cells
from vistok.image import Preprocess, to_tensor
from vistok.quantizers.base import Quantized, Quantizer
from vistok.tokenizers.base import Tokenizer


class Levels(Quantizer):
    """Grey levels: id k is the value k / 255."""

    def __init__(self) -> None:
        super().__init__(1, (256,))

    def quantize(self, z: Tensor, mask: Any, grid: Any, generator: Any) -> Quantized:
        ids = (z[..., 0] * 255).round().long()
        return Quantized(self.ids_to_codes(ids), ids, {}, {}, z.new_zeros(()))

    def ids_to_codes(self, ids: Tensor, grid: Any = None) -> Tensor:
        return ids.unsqueeze(-1) / 255


class Cells(Tokenizer):
    """A tokenizer whose every figure is known: 8x8 cells of the mean grey value."""

    registry_name = "cells"

    def __init__(self, size: int = 64) -> None:
        super().__init__()
        self.quantizer = Levels()
        self.preprocess = Preprocess(size=(size, size))
        self.num_tokens = 64
        self.anchor = torch.nn.Parameter(torch.zeros(1))

    def encode_features(self, images: Tensor) -> Tensor:
        return flat_cells(images)[..., 4::8, 4::8].mean(1).flatten(1).unsqueeze(-1)

    def decode_codes(self, codes: Tensor, **options: Any) -> Tensor:
        grid = codes.view(-1, 1, 8, 8).expand(-1, 3, -1, -1)
        return torch.nn.functional.interpolate(grid, size=self.preprocess.size)


@pytest.fixture
def flat(tmp_path: Path) -> list[Path]:
    """Three flat grey pictures and one that is no picture."""
    folder = tmp_path / "pictures"
    (folder / "inner").mkdir(parents=True)
    for name, grey in (("a.png", 10), ("b.png", 100), ("inner/a.png", 200)):
        Image.new("RGB", (80, 70), (grey, grey, grey)).save(folder / name)
    (folder / "broken.png").write_text("no picture")
    return [folder / n for n in ("a.png", "b.png", "broken.png", "inner/a.png")]


@pytest.fixture
def result(flat: list[Path], tmp_path: Path) -> EvalResult:
    history = {"step": [1.0, 2.0, 3.0], "loss": [3.0, float("nan"), 1.0], "seconds": [1.0, 2.0, 3.0]}
    return evaluate(
        Cells(), flat, metrics=("psnr", "ssim"), out=tmp_path / "out", batch=2, command="this command", history=history
    )


def test_a_perfect_reconstruction_has_the_largest_figures(result: EvalResult) -> None:
    assert result.figures == {"psnr": 100.0, "ssim": pytest.approx(1.0)}


def test_the_rate_is_that_of_the_ids(result: EvalResult) -> None:
    assert result.rate == {
        "tokens_per_picture": 64,
        "bits_per_token": 8,
        "bits_per_pixel": 64 * 8 / 64**2,
        "bytes_per_picture": 64,
        "file_bytes_per_picture": 74,
    }


def test_usage_counts_the_ids_that_occurred(result: EvalResult) -> None:
    assert result.usage["usage"] == 3 / 256
    assert result.usage["perplexity"] == pytest.approx(3.0)


def test_a_broken_picture_is_skipped_counted_and_named(result: EvalResult) -> None:
    assert result.pictures == 3
    assert [Path(p).name for p in result.skipped] == ["broken.png"]
    assert "is not a picture that Pillow reads" in next(iter(result.skipped.values()))


def test_metrics_json_names_what_the_figures_depend_on(result: EvalResult) -> None:
    found = json.loads(result.files["metrics"].read_text())
    assert found["figures"] == result.figures
    assert found["protocol"]["command"] == "this command"
    assert found["protocol"]["data"]["pictures"] == 3
    assert found["protocol"]["preprocess"]["crop"] == "center"
    assert set(found["protocol"]) == {
        *("data", "model", "preprocess", "metrics", "settings", "versions", "device", "command", "git")
    }


def test_every_picture_has_its_line(result: EvalResult) -> None:
    lines = [json.loads(line) for line in result.files["pictures"].read_text().splitlines()]
    assert [line["file"] for line in lines] == ["a.png", "b.png", "inner/a.png"]
    assert all(line["psnr"] == 100.0 for line in lines)


def test_the_grid_and_the_curves_are_pictures(result: EvalResult) -> None:
    for key in ("grid", "curves"):
        with Image.open(result.files[key]) as found:
            assert min(found.size) > 100


def test_the_page_stands_alone_and_names_the_broken_picture(result: EvalResult) -> None:
    page = result.files["report"].read_text()
    assert "this command" in page
    assert "broken.png" in page
    assert "http" not in page.replace("http://www.w3.org", "")


def test_without_a_history_there_are_no_curves(flat: list[Path], tmp_path: Path) -> None:
    found = evaluate(Cells(), flat, metrics=("psnr",), out=tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(p.name for p in found.files.values())
    assert "curves" not in found.files


def test_figures_do_not_depend_on_the_batch_size(photos: list[Path], tmp_path: Path) -> None:
    tokenizer = vistok.create("tokenizer", "titok_tiny")
    runs = [evaluate(tokenizer, photos[:5], metrics=("psnr", "ssim"), out=tmp_path, batch=b) for b in (1, 5)]
    assert runs[0].figures == pytest.approx(runs[1].figures, rel=1e-5)


def test_the_flat_baseline_is_the_psnr_of_mean_coloured_cells(photos: list[Path], tmp_path: Path) -> None:
    found = evaluate(Cells(), photos[:3], metrics=("psnr",), out=tmp_path)
    images = to_tensor(photos[:3], Cells().preprocess)
    cells = images.unfold(2, 8, 8).unfold(3, 8, 8).mean((-1, -2))
    drawn = (cells.repeat_interleave(8, 2).repeat_interleave(8, 3) * 255).round() / 255
    expected = (-10 * (drawn - images).square().mean((1, 2, 3)).log10()).mean()
    assert found.baselines["flat_8x8_psnr"] == pytest.approx(float(expected), abs=1e-3)


def test_the_mode_of_the_model_is_put_back(flat: list[Path], tmp_path: Path) -> None:
    tokenizer = Cells().train()
    evaluate(tokenizer, flat, metrics=("psnr",), out=tmp_path)
    assert tokenizer.training


def test_progress_counts_pictures(flat: list[Path], tmp_path: Path) -> None:
    seen: list[int] = []
    evaluate(Cells(), flat, metrics=("psnr",), out=tmp_path, batch=2, progress=seen.append)
    assert seen == [2, 3]


def test_continuous_latents_have_neither_usage_nor_bits(tmp_path: Path, photos: list[Path]) -> None:
    class Greys(Levels):
        def mode(self, z: Tensor) -> Tensor:
            return z

    model = Cells()
    model.quantizer = Greys()
    model.quantizer.vocab_sizes = ()
    found = evaluate(model, photos[:2], metrics=("psnr",), out=tmp_path)
    assert (found.usage, found.rate) == ({}, {"tokens_per_picture": 64})


@pytest.mark.parametrize(
    ("metrics", "keep", "message"),
    [(("psnr",), slice(2, 3), "no picture to evaluate on .broken.png"), ((), slice(0, 1), "a value for every picture")],
)
def test_nothing_to_measure_is_said(
    flat: list[Path], tmp_path: Path, metrics: tuple[str, ...], keep: slice, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate(Cells(), flat[keep], metrics=metrics, out=tmp_path)


def test_a_metric_that_needs_larger_pictures_is_left_out_and_named(flat, tmp_path):
    result = evaluate(Cells(), flat, metrics=("psnr", "ms_ssim"), out=tmp_path / "out")
    assert list(result.figures) == ["psnr"]
    assert "at least 161 pixels, these have 64" in result.unmeasured["ms_ssim"]
