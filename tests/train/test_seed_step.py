"""SEED's second stage: what it minimises, what it refuses, and that it learns."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F

import vistok
from tests.train.tiny import recipe
from vistok.config import create
from vistok.data.base import Batch
from vistok.train.steps.base import Losses, LossSpec, Weighting

MODEL = {
    "name": "seed",
    "image_size": 56,
    "num_tokens": 6,
    "vision": {"width": 32, "depth": 1, "heads": 2, "hidden": 64},
    "qformer": {"width": 32, "depth": 1, "heads": 2},
    "decoder_depth": 1,
    "decoder_heads": 2,
    "embedding_dim": 256,
    "quantizer": {"name": "vq", "codebook_size": 32, "dim": 8},
}
TEACHER = {"name": "alexnet_embedding"}


def _step(model=None, losses=None, **settings):
    step = create("step", "seed", **{"teacher": TEACHER, **settings})
    step.setup(vistok.create("tokenizer", **(model or MODEL)), losses or Losses({}))
    return step


def _batch():
    return Batch(images=torch.rand(3, 3, 56, 56), positions=torch.arange(3))


def test_terms_are_those_of_the_paper():
    step, batch = _step(quantizer_weights={"codebook": 0.25, "commitment": 1.0}), _batch()
    model = step.trained["model"]
    (part,) = step.run(batch, 0, torch.Generator())
    out = model(batch.images)
    target = step.helpers["teacher"](batch.images)
    torch.testing.assert_close(part.terms["embedding"], (out.extras["embedding"] - target).square().mean())
    cosine = F.cosine_similarity(out.extras["rebuilt"], out.extras["causal"], dim=-1)
    torch.testing.assert_close(part.terms["rebuilt"], (1 - cosine).mean())
    losses = out.quantized.losses
    torch.testing.assert_close(part.terms["quantizer"], 0.25 * losses["codebook"] + losses["commitment"])
    torch.testing.assert_close(part.loss, sum(part.terms.values()))
    assert set(part.stats) >= {"embedding/cosine", "embedding/retrieved", "quantizer/usage"}


def test_weights_of_the_recipe_count():
    entries = {"embedding": LossSpec(Weighting(weight=0.5), None), "rebuilt": LossSpec(Weighting(weight=0.0), None)}
    (part,) = _step(losses=Losses(entries)).run(_batch(), 0, torch.Generator())
    torch.testing.assert_close(part.loss, 0.5 * part.terms["embedding"] + part.terms["quantizer"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"teacher": {"name": "mse"}}, "'mse' does not embed pictures"),
        ({"model": {**MODEL, "embedding_dim": 16}}, "256 channels. Set model.embedding_dim=256"),
        ({"model": {"name": "titok_tiny"}}, "trains a seed tokenizer, got TiTok"),
        ({"quantizer_weights": {"codebok": 1.0}}, "codebok: the quantizer has codebook, commitment"),
    ],
)
def test_what_does_not_fit_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        _step(**settings)


def test_a_random_clip_is_no_teacher(tmp_path):
    with pytest.raises(ValueError, match="without weights is a random target"):
        create("loss", "clip_embedding", model="ViT-B-32")


def test_a_clip_model_of_a_local_folder_teaches(tmp_path):
    import open_clip
    from safetensors.torch import save_file

    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16, "head_width": 32},
        "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1},
    }
    preprocess = {"mean": [0.5] * 3, "std": [0.5] * 3}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))
    clip = open_clip.CLIP(**config).eval()
    save_file(clip.state_dict(), tmp_path / "open_clip_model.safetensors")
    teacher = create("loss", "clip_embedding", model=f"local-dir:{tmp_path}")
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(teacher(x), clip.encode_image((x - teacher.mean) / teacher.std))
    assert teacher(torch.rand(2, 3, 48, 40)).shape == (2, 16)
    assert not list(teacher.parameters())


def test_frozen_parts_stay_and_the_rest_learns(tmp_path):
    from vistok.train.loop import train

    over = {
        "model": MODEL,
        "losses": None,
        "train": {"step": {"name": "seed", "teacher": TEACHER}, "freeze": ["vision.*", "qformer.*"], "steps": 6},
    }
    values = recipe(tmp_path / "plain").resolved() | {"losses": {}, "model": MODEL}
    values["train"] |= over["train"] | {"out": str(tmp_path / "run"), "global_batch": 4, "ema": 0.0}
    from vistok.train.recipe import from_dict

    torch.manual_seed(0)
    train(from_dict(values))
    done = vistok.load(tmp_path / "run" / "tokenizer")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert done.num_tokens == 6
