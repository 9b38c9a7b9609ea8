"""The page is self-contained and says what it must; grids and curves show what they were given."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser

import pytest
import torch
from PIL import Image

import vistok
from tests.fill import image
from vistok.evaluate import report
from vistok.evaluate.curves import is_noisy, smooth, thin_out, wants_log
from vistok.evaluate.intervals import bootstrap_interval


class Outline(HTMLParser):
    """Collects tags, addresses and whether every element is closed."""

    VOID = ("meta", "img", "br")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.sources: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [v for k, v in attrs if k in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, tag


def examples(count: int) -> list[report.Example]:
    x, y = image(count, 32), image(count, 32, seed=1)
    return [report.Example.of(f"{i:02}.png", x[i], y[i], psnr=float(i)) for i in range(count)]


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> str:
    gallery = report.Gallery("psnr", keep=2)
    for example in examples(9):
        gallery.add(example)
    metric = vistok.create("metric", "psnr")
    path = report.write_page(
        tmp_path_factory.mktemp("page") / "deep" / "report.html",
        title="A <b>bold</b> title",
        subtitle="9 pictures",
        command="vistok eval x --data 'a & b'",
        figures=[report.figure_of(metric, 21.234, (20.0, 22.5))],
        groups=gallery.groups(),
        gallery=gallery.sampled(),
        curves=report.curves_from_log([{"step": i, "loss/mse": 1.0 / (i + 1)} for i in range(5)]),
        tables=[report.Table(title="Baselines", columns=["method", "bytes"], rows=[["JPEG", 568], ["ours", None]])],
        protocol={"data": {"name": "photos", "sha256": "0123456789abcdef" * 4}, "git": None},
        notes=["Only 9 pictures."],
    )
    return path.read_text(encoding="utf-8")


def test_page_refers_to_nothing_outside_itself(page):
    outline = Outline()
    outline.feed(page)
    assert outline.sources and all(s.startswith("data:image/") for s in outline.sources)
    assert not re.search(r"url\(|@import|<script|<link", page)


def test_page_is_well_formed(page):
    outline = Outline()
    outline.feed(page)
    assert outline.open == []
    assert outline.tags.count("h1") == 1


def test_page_escapes_what_it_is_given(page):
    assert "A &lt;b&gt;bold&lt;/b&gt; title" in page
    assert "&#x27;a &amp; b&#x27;" in page


@pytest.mark.parametrize(
    "text", ["21.23", "20.00 to 22.50", "Only 9 pictures.", "Baselines", "0123456789ab<", "viewport", "worst", "median"]
)
def test_page_shows(page, text):
    assert text in page


def test_pictures_in_the_page_are_those_given(page):
    sources = re.findall(r'alt="00.png, original" src="data:image/jpeg;base64,([^"]+)"', page)
    shown = Image.open(io.BytesIO(base64.b64decode(sources[0]))).convert("RGB")
    want = torch.tensor(list(shown.tobytes())).view(32, 32, 3).permute(2, 0, 1)
    assert (
        want - examples(9)[0].original
    ).float().abs().mean() < 6  # colour noise is the worst case; another picture differs by 60


def test_worst_median_and_best_are_chosen_by_value():
    gallery = report.Gallery("psnr", keep=2)
    for example in examples(9):
        gallery.add(example)
    names = {group: [e.name[:2] for e in found] for group, found in gallery.groups().items()}
    assert names == {"worst": ["00", "01"], "median": ["03", "04"], "best": ["08", "07"]} or names["median"] == [
        "04",
        "05",
    ]


def test_lower_is_better_turns_the_groups_round():
    gallery = report.Gallery("psnr", higher_is_better=False, keep=1)
    for example in examples(5):
        gallery.add(example)
    assert gallery.groups()["worst"][0].name == "04.png"


def test_merged_galleries_equal_one_that_saw_everything():
    everything = examples(12)
    whole, left, right = (report.Gallery("psnr", keep=2, sample=6) for _ in range(3))
    for i, example in enumerate(everything):
        whole.add(example)
        (left if i % 2 else right).add(example)
    merged = left.merge([right])
    assert {k: [e.name for e in v] for k, v in merged.groups().items()} == {
        k: [e.name for e in v] for k, v in whole.groups().items()
    }
    assert [e.name for e in merged.sampled()] == [e.name for e in whole.sampled()]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_few_pictures_are_shown_once(count):
    gallery = report.Gallery("psnr", keep=4)
    for example in examples(count):
        gallery.add(example)
    names = [e.name for group in gallery.groups().values() for e in group]
    assert sorted(names) == sorted(set(names))
    assert names


def test_grid_holds_the_pictures_unscaled(tmp_path):
    x, y = image(3, 128), image(3, 128, seed=1)
    path = report.save_grid(tmp_path / "grid.png", x, y, captions=["a", "b", "c"], title="A title")
    grid = Image.open(path).convert("RGB")
    saved = torch.frombuffer(bytearray(grid.tobytes()), dtype=torch.uint8).view(grid.height, grid.width, 3)
    found = (x[0] * 255).round().to(torch.uint8).permute(1, 2, 0)
    left, top = 46, 58
    assert torch.equal(saved[top : top + 128, left : left + 128], found)


def test_grid_bands_are_balanced():
    grid = report.reconstruction_grid(image(10, 128), image(10, 128), columns=8)
    assert grid.width < 6 * 138 + 80


def test_grid_needs_one_caption_a_pair():
    with pytest.raises(ValueError, match="one caption for each"):
        report.reconstruction_grid(image(2, 32), image(2, 32), captions=["a"])


def test_curves_group_by_prefix_and_skip_what_is_no_number():
    log = [{"step": 1, "loss/a": 1.0, "loss/b": 2.0, "lr": 0.1, "note": "x", "flag": True}, {"epoch": 3, "lr": 5.0}]
    curves = report.curves_from_log(log)
    assert [(c.title, list(c.series)) for c in curves] == [("loss", ["a", "b"]), ("lr", ["lr"])]
    assert curves[1].series["lr"] == [(1.0, 0.1)]


def test_usage_and_perplexity_have_diagrams_of_their_own():
    log = [{"step": 1, "quantizer/usage": 0.2, "quantizer/perplexity": 300.0, "quantizer/dead_age": 20.0}]
    assert [c.title for c in report.curves_from_log(log)] == [
        "quantizer usage",
        "quantizer perplexity",
        "quantizer dead age",
    ]


def test_curves_can_be_chosen_by_key_or_prefix():
    log = [{"step": 1, "loss/a": 1.0, "loss/b": 2.0, "lr": 0.1, "usage": 0.5}]
    curves = report.curves_from_log(log, keys=["usage", "loss/"])
    assert [c.title for c in curves] == ["usage", "loss"]


def test_curve_png_is_written(tmp_path):
    curves = report.curves_from_log([{"step": i, "loss": 1 / (i + 1), "lr": float("nan")} for i in range(200)])
    with Image.open(report.save_curves(tmp_path / "a" / "loss.png", curves, title="run")) as picture:
        assert picture.format == "PNG" and picture.width > 600


def test_no_curves_is_a_clear_error(tmp_path):
    with pytest.raises(ValueError, match="nothing to draw"):
        report.save_curves(tmp_path / "x.png", [])


def test_thinned_line_keeps_its_mean_and_drops_non_finite_points():
    points = [(float(i), float(i % 7)) for i in range(5000)] + [(5000.0, float("nan"))]
    thin = thin_out(points, 500)
    assert len(thin) == 500
    assert sum(y for _, y in thin) / 500 == pytest.approx(sum(y for _, y in points[:-1]) / 5000)


def test_smoothing_leaves_a_straight_line_alone():
    line = [(float(i), 2.0 * i) for i in range(50)]
    assert [y for _, y in smooth(line, 5)] == pytest.approx([y for _, y in line])


def test_only_lines_that_go_up_and_down_count_as_noisy():
    noise = [(float(i), float(i % 2)) for i in range(100)]
    assert is_noisy(noise) and not is_noisy([(float(i), float(i)) for i in range(100)])


def test_log_axis_is_for_values_squeezed_to_the_floor():
    decay = [[0.9**i for i in range(100)]]
    rise = [[1 - 0.99 * 0.9**i for i in range(100)]]
    assert wants_log(decay) and not wants_log(rise) and not wants_log([[0.0, 1.0]])


def test_bootstrap_interval_has_the_width_of_the_standard_error():
    values = torch.randn(400, generator=torch.Generator().manual_seed(1))
    low, high = bootstrap_interval(values)
    assert high - low == pytest.approx(2 * 1.96 * float(values.std()) / 20, rel=0.1)
    assert low < float(values.mean()) < high


def test_bootstrap_interval_repeats_and_needs_values():
    assert bootstrap_interval([1.0, 2.0, 4.0]) == bootstrap_interval([1.0, 2.0, 4.0])
    with pytest.raises(ValueError, match="at least one"):
        bootstrap_interval([])
