"""The DINO discriminator against the official code, and what it does in training."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import save_file

import vistok
from tests.fill import fill, image
from vistok.assets import AssetError
from vistok.losses.adversarial import r1_penalty
from vistok.losses.diff_augment import DiffAugment, cut_out, recolour, translate
from vistok.losses.dino import SpectralConv1d

CASES = ["s224", "s256"]


def filled(entries):
    return {key: torch.from_numpy(fill(key, tuple(shape))) for key, shape in entries}


@pytest.fixture(scope="module")
def tiny_weights(tmp_path_factory):
    """DINO's embedding and its first block."""
    path = tmp_path_factory.mktemp("dino") / "dino.safetensors"
    shapes = {"cls_token": (1, 1, 384), "pos_embed": (1, 197, 384)}
    shapes |= {"patch_embed.proj.weight": (384, 3, 16, 16), "patch_embed.proj.bias": (384,)}
    for name, shape in {
        "attn.qkv": (1152, 384),
        "attn.proj": (384, 384),
        "mlp.fc1": (1536, 384),
        "mlp.fc2": (384, 1536),
    }.items():
        shapes |= {f"blocks.0.{name}.weight": shape, f"blocks.0.{name}.bias": shape[:1]}
    shapes |= {f"blocks.0.{n}.{w}": (384,) for n in ("norm1", "norm2") for w in ("weight", "bias")}
    save_file(filled(shapes.items()), path)
    return path


@pytest.fixture
def tiny(tiny_weights):
    return vistok.create("loss", "dino_discriminator", read_outs=[0], weights=str(tiny_weights))


@pytest.fixture
def official(golden, tmp_path):
    """The golden weights in the official layout: DINO's file, and heads with singular vectors of length 1."""
    file = golden("dinodisc")
    trunk = filled(e for e in file.meta["dino_state_dict"] if not e[0].startswith("x_"))
    save_file(trunk, tmp_path / "dino.safetensors")
    model = vistok.create("loss", "dino_discriminator", read_outs=[1, 3], weights=str(tmp_path / "dino.safetensors"))
    heads = filled(file.meta["heads_state_dict"])
    heads |= {k: v / v.norm() for k, v in heads.items() if k.endswith(("weight_u", "weight_v"))}
    model.heads.load_state_dict(heads)
    return file, model.eval()


@pytest.mark.parity
@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradient_equal_the_official_ones(official, case):
    file, model = official
    images = image(2, int(case[1:]), 61).requires_grad_()
    logits = model(images)
    expected = file[f"{case}/logits"]
    assert (logits - expected).abs().max() < 2e-4 * expected.std()
    (gradient,) = torch.autograd.grad(-logits.mean(), images)
    expected = file[f"{case}/grad_gen_hinge_stride"]
    found = gradient[..., 3::16, 5::16] / 2  # theirs is with respect to pictures in [-1, 1]
    # leaky ReLUs near 0 take either slope, so the gradient is less exact than the logits
    assert (found - expected).norm() < 1e-2 * expected.norm()


def test_state_dict_holds_the_heads_alone(tiny):
    assert {k.split(".")[0] for k in tiny.state_dict()} == {"heads"}
    assert {k.split(".")[0] for k, _ in tiny.named_parameters()} == {"heads"}


def test_trunk_is_carried_by_nothing_but_moves_along(tiny):
    assert {k.rsplit(".", 1)[1] for k, _ in tiny.named_buffers()} == {"weight_u", "weight_v"}
    tiny.double()
    assert tiny.trunk.pos_embed.dtype == tiny.trunk.blocks[0].attn.qkv.weight.dtype == torch.float64


def test_a_file_of_another_network_is_refused(tmp_path):
    save_file({"cls_token": torch.zeros(1, 1, 768)}, tmp_path / "base.safetensors")
    with pytest.raises(AssetError, match="is no DINO ViT-S/16: 4 of 4 tensors"):
        vistok.create("loss", "dino_discriminator", read_outs=[], weights=str(tmp_path / "base.safetensors"))


@pytest.mark.parametrize("size", [64, 224, 240])
def test_pictures_of_any_size_give_as_many_logits(tiny, size):
    assert tiny(image(2, size)).shape == (2, 2 * 196)


def test_evaluation_is_repeatable_and_training_is_not(tiny):
    x = image(2, 64)
    assert not torch.equal(tiny(x), tiny(x))
    tiny.eval()
    assert torch.equal(tiny(x), tiny(x))


def test_training_updates_the_singular_vectors_and_leaves_the_trunk(tiny):
    before = {k: v.clone() for k, v in tiny.state_dict().items()}
    trunk = tiny.trunk.pos_embed.clone()
    tiny(image(2, 64))
    changed = {k.rsplit(".", 1)[1] for k, v in tiny.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {"weight_u", "weight_v"}
    assert torch.equal(trunk, tiny.trunk.pos_embed) and not tiny.trunk.training


def test_it_can_be_copied_after_a_backward_pass(tiny):
    tiny(image(2, 64)).mean().backward()
    copied = copy.deepcopy(tiny).eval()
    assert torch.equal(copied(image(1, 64)), tiny.eval()(image(1, 64)))


def test_r1_reaches_every_head(tiny):
    r1_penalty(tiny.eval(), image(1, 64)).sum().backward()
    assert all(p.grad.abs().sum() > 0 for n, p in tiny.named_parameters() if n.endswith("weight_orig"))


@pytest.mark.parametrize("kernel", [1, 3])
def test_spectral_convolution_is_torchs(kernel):
    ours = SpectralConv1d(4, 5, kernel)
    plain = torch.nn.Conv1d(4, 5, kernel, padding=kernel // 2, padding_mode="circular")
    theirs = torch.nn.utils.spectral_norm(plain, eps=1e-12)
    assert list(theirs.state_dict()) == list(ours.state_dict())
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 4, 7)
    for _ in range(3):
        torch.testing.assert_close(ours(x), theirs(x))


def test_translation_moves_by_whole_pixels_with_zeros_behind():
    x = image(3, 16)
    moved = translate(x, torch.tensor([0.0, 0.5, 0.99]), torch.full((3,), 0.5))
    assert torch.equal(moved[0, :, :-2], x[0, :, 2:]) and not moved[0, :, -2:].any()
    assert torch.equal(moved[1], x[1])
    assert torch.equal(moved[2, :, 2:], x[2, :, :-2]) and not moved[2, :, :2].any()


def test_colours_in_the_middle_of_their_range_leave_a_picture_alone():
    half = torch.full((2,), 0.5)
    torch.testing.assert_close(recolour(image(2, 16), half, half, half), image(2, 16))


def test_no_saturation_is_grey():
    half = torch.full((2,), 0.5)
    grey = recolour(image(2, 16), half, torch.zeros(2), half)
    torch.testing.assert_close(grey[:, 0], grey[:, 1])


def test_cutout_takes_a_rectangle_of_its_share():
    holed = cut_out(torch.ones(3, 3, 20, 10), torch.tensor([0.5, 0.5, 0.0]), torch.full((3,), 0.5), 0.2)
    assert [int((h == 0).sum()) for h in holed] == [3 * 4 * 2, 3 * 4 * 2, 3 * 2 * 2]


def test_augmentation_is_off_outside_training():
    x = image(2, 16)
    assert DiffAugment().eval()(x) is x
    assert not torch.equal(DiffAugment()(x), x)
