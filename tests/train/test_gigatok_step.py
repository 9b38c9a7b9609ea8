"""GigaTok's objective: its terms, their schedule, and a frozen teacher from local weights."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import vistok
from tests.fill import image
from vistok.config import create
from vistok.data.base import Batch
from vistok.train.steps.base import Losses, LossSpec, Weighting

TEACHER = "vit_tiny_patch16_224"


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A file with a random small vision transformer of timm."""
    import timm
    from safetensors.torch import save_file

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("teacher") / "model.safetensors"
    save_file(timm.create_model(TEACHER, num_classes=0, img_size=32).state_dict(), path)
    return path


def spec(path, **over):
    return {"name": "repa", "teacher": TEACHER, "image_size": 32, "grid": 4, "antialias": False, "weights": path} | over


def losses():
    names = {"mse": 1.0, "quantizer": 1.0, "features": 1.0, "semantic": 0.5, "direct": 1.0}
    found = {n: LossSpec(Weighting(weight=w), {"name": n} if n == "mse" else None) for n, w in names.items()}
    return Losses(found | {"adversarial": LossSpec(Weighting(weight=0.5, start=3), None)})


def step(model, **over):
    made = create(
        "step",
        "gigatok",
        discriminator={"name": "patchgan_discriminator", "layers": 1, "width": 16},
        gan={"name": "hinge_gan"},
        **over,
    )
    made.setup(model, losses())
    return made


def parts(made, number):
    batch = Batch(image(2, 64), torch.arange(2))
    return list(made.run(batch, number, torch.Generator().manual_seed(0)))


def test_terms_are_those_of_the_paper_with_their_weights(teacher):
    model = vistok.create("tokenizer", "gigatok_tiny", semantic_dim=192).train()
    made = step(model, teacher=spec(teacher), direct_until=2)
    (part,) = parts(made, 1)
    assert list(part.terms) == ["mse", "features", "semantic", "direct", "quantizer"]
    assert part.weights == {"mse": 1.0, "features": 1.0, "semantic": 0.5, "direct": 1.0, "quantizer": 1.0}
    total = sum(part.weights[name] * float(term.detach()) for name, term in part.terms.items())
    assert float(part.loss.detach()) == pytest.approx(total, rel=1e-5)
    out = model(image(2, 64), direct=True)
    expected = F.mse_loss(out.extras["direct"], image(2, 64)).detach()
    torch.testing.assert_close(part.terms["direct"].detach(), expected, rtol=1e-4, atol=0)


def test_the_direct_path_ends_and_the_discriminator_starts(teacher):
    model = vistok.create("tokenizer", "gigatok_tiny", semantic_dim=192).train()
    made = step(model, teacher=spec(teacher), direct_until=2, discriminator_weight=0.25)
    assert "direct" not in parts(made, 2)[0].terms
    generator, critic = parts(made, 3)
    assert generator.weights["adversarial"] == 0.5
    assert float(critic.loss.detach()) == pytest.approx(0.25 * float(critic.terms["discriminator"].detach()), rel=1e-5)


def test_the_feature_loss_teaches_the_transformers_and_not_the_encoder(teacher):
    model = vistok.create("tokenizer", "gigatok_tiny", semantic_dim=192).train()
    made = step(model, teacher=spec(teacher))
    (part,) = parts(made, 0)
    grads = torch.autograd.grad(
        part.terms["features"], [model.to_map.head.weight, model.decoder.conv_out.weight], allow_unused=True
    )
    assert grads[0].abs().amax() > 0
    assert grads[1] is None


def test_the_teacher_is_frozen_and_gives_the_cosine(teacher):
    loss = create("loss", **spec(teacher))
    x = image(2, 64)
    own = loss.features(x)  # (2, 2, 2, 192)
    assert own.shape == (2, 2, 2, 192)
    assert not any(p.requires_grad for p in loss.parameters())
    torch.testing.assert_close(loss(own, x), -torch.ones(2), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("name", "dim", "with_teacher", "message"),
    [
        ("gigatok_tiny", 32, True, "The teacher has 192 channels: set model.semantic_dim to that, now 32"),
        ("gigatok_tiny", 32, False, "builds a head that nothing trains"),
        ("titok_tiny", None, False, "trains a gigatok or gigatok_2d, got TiTok"),
    ],
)
def test_what_does_not_fit_is_one_clear_line(teacher, name, dim, with_teacher, message):
    model = vistok.create("tokenizer", name, **({} if dim is None else {"semantic_dim": dim}))
    with pytest.raises(ValueError, match=message):
        step(model, teacher=spec(teacher) if with_teacher else None)


@pytest.mark.parametrize("over", [{"weights": None}, {"teacher": "vit_nowhere"}])
def test_other_teachers_need_a_name_of_timm_and_a_file(teacher, over):
    with pytest.raises(ValueError, match="teacher is one of small, base, large, or a vision transformer of timm"):
        create("loss", **spec(teacher, **over))


def test_it_can_go_without_a_teacher():
    model = vistok.create("tokenizer", "gigatok_2d_tiny", semantic_dim=None).train()
    (part,) = parts(step(model), 0)
    part.loss.backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []
