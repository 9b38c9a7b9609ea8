"""LPIPS against the reference values of the official implementation; the networks stay out of everybody's state."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import vistok
from tests.fill import image
from vistok import assets
from vistok.losses.perceptual import Lpips, read_lpips

# official lpips 0.1.4 on the top-left 256 x 256 of the decoded photographs
REFERENCE = {
    "16 levels": {"alex": 0.0279, "vgg": 0.1116},
    "shifted": {"alex": 0.0225, "vgg": 0.0490},
    "tulips": {"alex": 0.8330, "vgg": 0.8929},
    "negative": {"alex": 0.5284, "vgg": 0.6321},
}


@pytest.fixture(scope="module")
def pairs() -> tuple[torch.Tensor, torch.Tensor]:
    """The cat, and what it is compared with in `REFERENCE`'s order."""
    photos = Path(vistok.__file__).parent / "data" / "photos"
    wide = np.asarray(Image.open(photos / "01-cat.jpg").convert("RGB"))
    tulips = np.asarray(Image.open(photos / "12-tulips.jpg").convert("RGB"))[:256, :256]
    cat = wide[:256, :256]
    others = [cat // 16 * 16 + 8, wide[:256, 1:257], tulips, 255 - cat]
    to_tensor = [torch.from_numpy(o.copy()).permute(2, 0, 1) / 255.0 for o in others]
    return torch.stack(to_tensor), (torch.from_numpy(cat.copy()).permute(2, 0, 1) / 255.0).expand(4, -1, -1, -1)


def lpips(net: str) -> Lpips:
    try:
        return vistok.create("loss", "lpips", net=net)
    except assets.AssetError as err:
        pytest.skip(str(err))


@pytest.mark.parity
@pytest.mark.parametrize("net", ["alex", "vgg"])
def test_lpips_matches_the_official_values_on_photographs(net, pairs):
    with torch.no_grad():
        found = lpips(net)(*pairs)
    expected = torch.tensor([row[net] for row in REFERENCE.values()])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_half_precision_weights_shift_lpips_by_less_than_5e_5(pairs):
    source = next(s for s in assets.ASSETS["lpips_alex"].sources if s.carrier)
    path = assets.carried(source)
    if path is None:
        pytest.skip(f"{source.carrier} is not installed")
    with torch.no_grad():
        exact, shipped = Lpips(weights=path)(*pairs), Lpips()(*pairs)
    assert (exact - shipped).abs().max() < 5e-5
    assert (exact - shipped).abs().max() > 0


def test_lpips_keeps_out_of_state_and_optimiser():
    holder = torch.nn.Module()
    holder.loss = lpips("alex")
    assert holder.state_dict() == {}
    assert list(holder.parameters()) == []


def test_lpips_stays_in_eval_mode():
    loss = lpips("alex").train()
    assert not any(m.training for m in loss.modules())


def test_lpips_follows_its_owner_to_another_type():
    loss = lpips("alex").double()
    assert loss(image(1, 64).double(), image(1, 64, seed=1).double()).dtype == torch.float64


def test_gradient_reaches_only_the_reconstruction():
    x, y = image(1, 64).requires_grad_(), image(1, 64, seed=1)
    lpips("alex")(x, y).mean().backward()
    assert x.grad.abs().sum() > 0


def test_gradient_is_finite_where_features_are_zero():
    x = torch.zeros(1, 3, 64, 64, requires_grad=True)
    lpips("alex")(x, image(1, 64)).mean().backward()
    assert torch.isfinite(x.grad).all()


def test_batch_gives_the_values_of_single_pictures():
    x, y = image(3, 64), image(3, 64, seed=1)
    loss = lpips("alex")
    single = torch.cat([loss(x[i : i + 1], y[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(loss(x, y), single, rtol=1e-5, atol=1e-6)


def test_official_state_dict_and_torchvision_names_are_read(tmp_path):
    ours = assets.read_tensors(assets.find("lpips_alex"))
    features = {0: 0, 1: 3, 2: 6, 3: 8, 4: 10}
    official = {
        f"net.slice{i + 1}.{k}.{p}": ours[f"convs.{i}.{p}"] for i, k in features.items() for p in ("weight", "bias")
    }
    official |= {f"lin{i}.model.1.weight": ours[f"heads.{i}"].view(1, -1, 1, 1) for i in range(5)}
    torch.save(official, tmp_path / "lpips.pth")
    plain = {f"features.{k}.{p}": ours[f"convs.{i}.{p}"] for i, k in features.items() for p in ("weight", "bias")}
    save_file(plain, tmp_path / "alexnet.safetensors")
    for name in ("lpips.pth", "alexnet.safetensors"):
        table = read_lpips(tmp_path / name, "alex")
        assert all(torch.equal(table[k], v.float()) for k, v in ours.items()), name


def test_file_of_another_network_is_refused(tmp_path):
    save_file({"features.0.weight": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(assets.UnreadableError, match="found 1 of 5 convolutions"):
        vistok.create("loss", "lpips", weights=str(tmp_path / "x.safetensors"))


def test_small_pictures_are_refused():
    with pytest.raises(ValueError, match="at least 32 x 32"):
        lpips("alex")(image(1, 16), image(1, 16))


def test_uint8_pictures_are_refused():
    picture = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    with pytest.raises(ValueError, match="Divide uint8"):
        lpips("alex")(picture, picture)


def test_missing_convnext_weights_say_where_to_get_them(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.delenv("VISTOK_CONVNEXT_SMALL", raising=False)
    with pytest.raises(assets.AssetError, match=r"VISTOK_CONVNEXT_SMALL=.*convnext_small-0c510722\.pth"):
        vistok.create("loss", "convnext_logits")
