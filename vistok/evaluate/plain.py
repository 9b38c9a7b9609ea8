"""The straightforward TiTok that `vistok bench tokenizer` measures against.

Written as a textbook would: `nn.MultiheadAttention` on sequence-first tensors, every block over the whole sequence,
contiguous (not channels-last) convolutions. Same weights, same results.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vistok.layers.conv import UpsampleConv2d
from vistok.layers.transformer import Block, Transformer
from vistok.tokenizers.titok import TiTok, TiTokDecoder, TiTokEncoder, TwoStageTiTok


class PlainBlock(nn.Module):
    """One pre-norm block on (N, B, D)."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        attention = block.attn
        self.norm1, self.norm2, self.mlp = (copy.deepcopy(m) for m in (block.norm1, block.norm2, block.mlp))
        self.attn = nn.MultiheadAttention(attention.proj.in_features, attention.num_heads)
        self.attn.in_proj_weight.data.copy_(attention.qkv.weight)
        self.attn.in_proj_bias.data.copy_(attention.qkv.bias)
        self.attn.out_proj.load_state_dict(attention.proj.state_dict())

    def forward(self, x: Tensor) -> Tensor:
        """x (N, B, D) -> the same shape."""
        y = self.norm1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class PlainTransformer(nn.Module):
    """All blocks over the whole sequence."""

    def __init__(self, transformer: Transformer) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(PlainBlock(b) for b in transformer.blocks)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """x (B, N, D) -> (B, N, D)."""
        x = x.transpose(0, 1)
        for block in self.blocks:
            x = block(x)
        return x.transpose(0, 1)


class PlainUpsample(nn.Module):
    """Nearest upsampling, then the convolution on the large map."""

    def __init__(self, conv: UpsampleConv2d) -> None:
        super().__init__()
        self.weight, self.bias = conv.weight, conv.bias

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, h, w) -> (B, out, 2 h, 2 w)."""
        return F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest"), self.weight, self.bias, padding=1)


class PlainTiTok(nn.Module):
    """Encode and decode with the weights of a TiTok, the straightforward way.

    Args:
        tokenizer: The tokenizer whose weights are copied.
    """

    def __init__(self, tokenizer: TiTok | TwoStageTiTok) -> None:
        super().__init__()
        self.tokenizer = copy.deepcopy(tokenizer)
        self.encoder_blocks = PlainTransformer(tokenizer.encoder.transformer)
        self.decoder_blocks = PlainTransformer(tokenizer.decoder.transformer)
        for parameter in self.tokenizer.parameters():
            parameter.data = parameter.data.contiguous()
        if isinstance(self.tokenizer, TwoStageTiTok):
            for level in self.tokenizer.pixel_decoder.up:
                if isinstance(level.upsample_conv, UpsampleConv2d):
                    level.upsample_conv = PlainUpsample(level.upsample_conv)

    def encode_features(self, images: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) -> features for the quantizer, (B, K, D)."""
        e: TiTokEncoder = self.tokenizer.encoder
        batch = images.shape[0]
        x = e.patch_embed(images).flatten(2).transpose(1, 2)
        x = torch.cat([e.class_token.expand(batch, 1, -1), x], dim=1) + e.position
        latents = e.latents.expand(batch, -1, -1) + e.latent_position
        x = self.encoder_blocks(e.norm_pre(torch.cat([x, latents], dim=1)))
        x = e.norm_post(x[:, -e.num_tokens :])
        if e.legacy_layout:
            x = x.reshape(batch, -1, e.num_tokens).transpose(1, 2)
        return e.head(x)

    def encode(self, images: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) -> ids (B, K)."""
        return self.tokenizer.quantizer(self.encode_features(images)).ids

    def decode(self, ids: Tensor) -> Tensor:
        """Ids (B, K) -> pictures (B, 3, H, W), clamped."""
        t = self.tokenizer
        d: TiTokDecoder = t.decoder
        batch, patches = ids.shape[0], d.grid[0] * d.grid[1]
        x = d.embed(t.quantizer.ids_to_codes(ids)) + d.latent_position
        masks = torch.cat([d.class_token.expand(batch, 1, -1), d.mask_token.expand(batch, patches, -1)], dim=1)
        x = self.decoder_blocks(d.norm_pre(torch.cat([masks + d.position, x], dim=1)))
        x = d.norm_post(x[:, 1 : 1 + patches])
        if isinstance(t, TwoStageTiTok):
            soft = t.head(x).softmax(-1) @ t.pixel_codebook.weight
            return t.pixel_decoder.layers(soft.transpose(1, 2).unflatten(2, d.grid).contiguous()).clamp(0, 1)
        return t.head(x, d.grid).clamp(0, 1)
