"""SEED against the official implementation: ids, embeddings, losses, both de-tokenizers; pictures through unCLIP."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

import vistok
from tests.fill import fill, image
from vistok.hub import LoadError, on_meta

REVERSE = ("image_down.", "distill_image_proj.weight")


def _state(ref, *, reverse):
    state = ref.state_dict()
    state["query_tokens"] = state["query_tokens"] * math.sqrt(32 * ref.meta["config"]["hidden"])
    if reverse:
        state = {k: v for k, v in state.items() if not k.startswith(REVERSE)}
        extra = ref.meta["state_dict_extra_reverse"]
        state |= {
            k: torch.arange(s[1]).unsqueeze(0) if k.endswith("_ids") else torch.from_numpy(fill(k, tuple(s)))
            for k, s in extra
        }
    return state


@pytest.fixture(params=[False, True], ids=["mlp", "reverse"])
def official(request, golden, tmp_path):
    """The golden weights as the official project saves them, with either de-tokenizer."""
    from safetensors.torch import save_file

    ref = golden("seed_qformer")
    state = _state(ref, reverse=request.param)
    (tmp_path / "config.json").write_text(json.dumps(ref.meta["config"]))
    save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "model.safetensors")
    return ref, vistok.load(tmp_path), request.param


def _features(ref):
    config = ref.meta["config"]
    shape = (2, (config["img"] // 14) ** 2 + 1, config["vis_dim"])
    return torch.from_numpy(np.random.default_rng(3).standard_normal(shape).astype(np.float32))


@pytest.mark.parity
def test_pictures_give_the_official_ids_and_embeddings(official):
    ref, tok, reverse = official
    x = image(2, 112, 0)
    with torch.no_grad():
        visual = tok.vision.forward_features((x - tok.mean) / tok.std)
    torch.testing.assert_close(visual[:, ::8, ::4], ref["img_vis_sample"], rtol=2e-4, atol=2e-5)
    tokens = tok.encode(x)
    assert torch.equal(tokens.ids, ref["img_ids"])
    if not reverse:
        torch.testing.assert_close(tok.embed(tokens), ref["img_generation_embed"], rtol=2e-4, atol=2e-5)


@pytest.mark.parity
def test_features_give_the_official_tokens_and_both_embeddings(official):
    ref, tok, reverse = official
    with torch.no_grad():
        causal = tok.causal_embeddings(_features(ref))
        projected = tok.project(causal)
        quantized = tok.quantizer(projected)
        rebuilt = tok.rebuild(tok.from_code(quantized.codes))
    torch.testing.assert_close(causal[..., ::2], ref["feat_hidden"], rtol=2e-4, atol=2e-5)
    torch.testing.assert_close(projected, ref["feat_down"], rtol=2e-4, atol=2e-5)
    sure = ref["feat_margin"] > 1e-4
    assert torch.equal(quantized.ids[sure], ref["feat_ids"][sure])
    name = "reverse_generation_embed" if reverse else "feat_generation_embed"
    torch.testing.assert_close(tok.embed(ref["feat_ids"]), ref[name], rtol=2e-4, atol=2e-5)
    legacy = quantized.losses["commitment"] + 0.25 * quantized.losses["codebook"]
    cosine = (1 - torch.cosine_similarity(rebuilt, causal, dim=-1)).mean()
    torch.testing.assert_close(torch.stack([legacy, cosine]).double(), ref["feat_losses"], rtol=2e-4, atol=2e-5)


@pytest.mark.parity
def test_earlier_tokens_do_not_see_later_queries(official):
    ref, tok, _ = official
    features = _features(ref)
    with torch.no_grad():
        before = tok.causal_embeddings(features)
        tok.queries[20:] += 1
        after = tok.causal_embeddings(features)
    assert torch.equal(before[:, :20], after[:, :20])
    assert not torch.allclose(before[:, 20:], after[:, 20:])


@pytest.mark.parity
def test_a_file_alone_whose_heads_cannot_be_known_is_refused(golden, tmp_path):
    torch.save(_state(golden("seed_qformer"), reverse=False), tmp_path / "seed_quantizer.pt")
    with pytest.raises(LoadError, match="96 is no multiple of the published head of 64 channels. Put 'heads'"):
        vistok.load(tmp_path / "seed_quantizer.pt")


def test_the_published_model_has_the_shape_of_the_card():
    model = on_meta("tokenizer", "seed_2.ailab_cvc")
    assert len(model.vision.blocks) == 39
    assert tuple(model.vision.blocks[0].attn.qkv.weight.shape) == (4224, 1408)
    assert tuple(model.vision.pos_embed.shape) == (1, 257, 1408)
    assert model.head.proj.weight.shape == (1024, 1024)
    assert [layer.cross is not None for layer in model.qformer.layers] == [True, False] * 6


def test_decoding_without_a_pipeline_says_what_to_do():
    tok = vistok.create("tokenizer", "seed_tiny").eval()
    with pytest.raises(ValueError, match=r"unCLIP pipeline and none was given. Call tokenizer.attach_pipeline"):
        tok.decode(torch.zeros(1, 8, dtype=torch.int64))


@pytest.fixture(scope="session")
def unclip(tmp_path_factory):
    """A tiny unCLIP pipeline of our own in a folder, as diffusers writes it; embeddings of 16 channels."""
    from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, StableUnCLIPImg2ImgPipeline, UNet2DConditionModel
    from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer
    from tokenizers import Tokenizer, models
    from transformers import (
        CLIPImageProcessor,
        CLIPTextConfig,
        CLIPTextModel,
        CLIPTokenizerFast,
        CLIPVisionConfig,
        CLIPVisionModelWithProjection,
    )

    torch.manual_seed(0)
    words = {"<|startoftext|>": 0, "<|endoftext|>": 1, "a</w>": 2}
    tokenizer = CLIPTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE(words, [], unk_token="<|endoftext|>")),
        bos_token="<|startoftext|>",
        eos_token="<|endoftext|>",
        unk_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        model_max_length=8,
    )
    text = CLIPTextConfig(
        vocab_size=3, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=8, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=16,
        projection_dim=16,
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(16, 32), layers_per_block=1, cross_attention_dim=16, attention_head_dim=8,
        norm_num_groups=8, class_embed_type="projection", projection_class_embeddings_input_dim=32,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(16, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=8,
        latent_channels=4,
    )
    pipeline = StableUnCLIPImg2ImgPipeline(
        feature_extractor=CLIPImageProcessor(size=32, crop_size=32),
        image_encoder=CLIPVisionModelWithProjection(vision),
        image_normalizer=StableUnCLIPImageNormalizer(16),
        image_noising_scheduler=DDPMScheduler(num_train_timesteps=10),
        tokenizer=tokenizer,
        text_encoder=CLIPTextModel(text),
        unet=unet,
        scheduler=DDIMScheduler(num_train_timesteps=10),
        vae=vae,
    )
    folder = tmp_path_factory.mktemp("unclip")
    pipeline.save_pretrained(folder)
    return folder


def test_ids_become_pictures_through_a_local_pipeline(unclip):
    tok = vistok.create("tokenizer", "seed_tiny", pipeline=str(unclip)).eval()
    ids = torch.randint(64, (3, 8))
    pictures = tok.decode(ids, steps=2, guidance=3.0, generator=torch.Generator().manual_seed(1))
    assert pictures.shape == (3, 3, 16, 16)
    assert 0 <= float(pictures.min()) <= float(pictures.max()) <= 1
    again = tok.decode(ids, steps=2, guidance=3.0, generator=torch.Generator().manual_seed(1))
    assert torch.equal(pictures, again)
    other = tok.decode(ids.flip(0), steps=2, guidance=3.0, generator=torch.Generator().manual_seed(1))
    assert not torch.equal(pictures, other)  # the tokens decide, not the noise alone
    large = tok.decode(ids[:1], steps=1, size=(32, 16), generator=torch.Generator().manual_seed(1))
    assert large.shape == (1, 3, 32, 16)


def test_saved_models_keep_ids_and_know_their_pipeline(unclip, tmp_path):
    tok = vistok.create("tokenizer", "seed_tiny", pipeline=str(unclip)).eval()
    x = torch.rand(2, 3, 56, 56)
    tok.save_pretrained(tmp_path / "saved")
    back = vistok.load(tmp_path / "saved")
    assert torch.equal(back.encode(x).ids, tok.encode(x).ids)
    assert back.decode(tok.encode(x), steps=1).shape == (2, 3, 16, 16)


@pytest.mark.parametrize("size", [(28, 70), (56, 56)])
def test_the_tower_takes_other_sizes_through_resizing(size):
    tok = vistok.create("tokenizer", "seed_tiny").eval().resized(size)
    assert tok.encode(torch.rand(1, 3, *size)).ids.shape == (1, 8)
