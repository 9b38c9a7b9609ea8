"""MingTok's training step: its objectives, what is hidden, and that it learns."""

from __future__ import annotations

import pytest
import torch

import vistok
from tests.train.tiny import recipe
from vistok.config import create
from vistok.data.base import Batch
from vistok.losses.frozen_features import AlexFeatures, ClipPatches
from vistok.train.loop import train
from vistok.train.recipe import from_dict
from vistok.train.steps.base import Losses, LossSpec, Weighting
from vistok.train.steps.mingtok import at_places, hide, kept_l1

SIZE = {"width": 32, "depth": 1, "heads": 2}
MODEL = {
    "name": "mingtok",
    "image_size": 32,
    "patch_size": 8,
    "latent_dim": 8,
    "encoder": SIZE,
    "semantic": SIZE,
    "pixels": SIZE,
    "pixel_patch": 8,
    "targets": {"low": 192, "semantic": 256},
}
STEP = {
    "name": "mingtok",
    "low": {"name": "alex_features", "stage": 2},
    "semantic": {"name": "alex_features", "stage": 5},
}


def built(model=None, **over):
    model = vistok.create("tokenizer", **(MODEL | (model or {})))
    step = create("step", **(STEP | over))
    weights = {"low": 0.5, "semantic": 0.25}
    step.setup(model, Losses({name: LossSpec(Weighting(weight=w), None) for name, w in weights.items()}))
    return model, step


def batch():
    return Batch(images=torch.rand(4, 3, 32, 32), positions=torch.arange(4), seed=3)


def test_every_objective_counts_and_reaches_every_parameter():
    model, step = built()
    part = next(step.run(batch(), 0, torch.Generator()))
    assert set(part.terms) == {"pixels", "pixels_full", "low", "semantic"}
    assert part.weights == {"pixels": 1.0, "pixels_full": 1.0, "low": 0.5, "semantic": 0.25}
    expected = sum(part.weights[name] * term for name, term in part.terms.items())
    torch.testing.assert_close(part.loss, expected)
    part.loss.backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


def test_hidden_patches_are_hidden_and_keyed_by_sample():
    model, step = built(hidden=0.5)
    given, seen = batch(), []
    model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs["mask"]), with_kwargs=True)
    next(step.run(given, 0, torch.Generator()))
    next(step.run(Batch(images=given.images[2:], positions=given.positions[2:], seed=3), 0, torch.Generator()))
    assert seen[0].sum(1).tolist() == [8, 8, 8, 8, 0, 0, 0, 0]
    assert torch.equal(seen[1][:2], seen[0][2:4])
    mask, changed = seen[0][:4], given.images.clone()
    where = torch.nn.functional.interpolate(mask.view(4, 1, 4, 4).float(), scale_factor=8).bool().expand_as(changed)
    changed[where] = 0.3
    with torch.no_grad():
        assert torch.equal(model(changed, mask=mask).images, model(given.images, mask=mask).images)


def test_losses_look_where_they_should():
    mask = hide(torch.rand(2, 16), 0.25)
    assert mask.sum(1).tolist() == [4, 4]
    target = torch.rand(2, 3, 32, 32)
    where = torch.nn.functional.interpolate(mask.view(2, 1, 4, 4).float(), scale_factor=8).bool()
    wrong = torch.where(where, target + 1, target)
    assert float(kept_l1(wrong, target, mask, (4, 4))) == 0
    torch.testing.assert_close(kept_l1(wrong, target, None, (4, 4)), torch.tensor(0.25))
    found = torch.randn(2, 4, 4, 6)
    wanted = torch.where(mask.view(2, 4, 4, 1), found, -found)
    torch.testing.assert_close(at_places(found, 2 * wanted, mask), torch.tensor(-1.0))


def test_a_run_learns_and_leaves_a_model_that_decodes(tmp_path):
    found = recipe(tmp_path, {"train": {"steps": 40, "global_batch": 8}}).resolved()
    found |= {"model": MODEL, "losses": {"pixels": {"weight": 1.0}}}
    found["train"] |= {"step": STEP}
    found["optim"] |= {"lr": 3e-3}
    result = train(from_dict(found))
    tok, images = vistok.load(result.out / "tokenizer"), batch().images
    fresh = vistok.create("tokenizer", **MODEL).eval()
    picture = images[:1] * 0 + torch.tensor([0.2, 0.4, 0.5]).view(1, 3, 1, 1)
    error = [(t.decode(t.encode(picture)) - picture).abs().mean() for t in (tok, fresh)]
    assert float(error[0]) < 0.5 * float(error[1])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: built(hidden=1.0), "share between 0 and 1"),
        (lambda: built({"targets": None}), "a mingtok with targets"),
        (lambda: built({"targets": {"low": 3, "semantic": 256}}), "'low' has 192 channels and model.targets.low is 3"),
    ],
)
def test_misuse_is_one_clear_line(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_alexnet_gives_maps_of_its_stages():
    for stage, width in ((1, 64), (2, 192), (5, 256)):
        network = AlexFeatures(stage=stage)
        assert network.features(torch.rand(1, 3, 64, 64)).shape[-1] == network.width == width
        assert not list(network.parameters())


@pytest.mark.slow
def test_clip_patches_are_timms(tmp_path):
    import timm
    from safetensors.torch import save_file

    from vistok.assets import AssetError

    vit = timm.create_model("vit_base_patch16_clip_224", pretrained=False, num_classes=512).eval()
    save_file(vit.state_dict(), tmp_path / "model.safetensors")
    network = ClipPatches(size="base", weights=tmp_path / "model.safetensors")
    images = torch.rand(1, 3, 224, 224)
    with torch.no_grad():
        expected = vit.forward_features((images - network.mean) / network.std)[:, 1:]
    torch.testing.assert_close(network.features(images), expected.unflatten(1, (14, 14)), rtol=1e-3, atol=1e-3)
    with pytest.raises(AssetError, match="is no timm vit_large"):
        ClipPatches(size="large", weights=tmp_path / "model.safetensors")
