"""One-D-Piece: a two-stage TiTok of which any prefix of the tokens decodes (arXiv 2501.10064)."""

from __future__ import annotations

from vistok.registry import preset, register
from vistok.tokenizers.titok import TwoStageTiTok


@register("tokenizer", "one_d_piece")
class OneDPiece(TwoStageTiTok):
    """Two-stage TiTok with tail token drop: encode once, decode the first 1..K tokens.

    Encoder, quantizer, decoder and state dict are those of `titok_two_stage`. What differs is training: the decoder
    sees the first k tokens, k uniform on 1..K, in both stages and also while the encoder is frozen; the quantizer's
    losses are over all K. Dropped tokens are absent, neither zeros nor a padding id. The official code draws one k per
    process and forward pass; here k is drawn per sample, or once a step (`train.step.lengths`), so that it does not
    depend on the number of processes.

    Every id depends on the whole picture: with the published weights' `legacy_layout` a token mixes features of all
    latents, so what is ordered is the tokens, not the latents.

    Args:
        image_size: Side in pixels, or (H, W); multiples of 16.
        num_tokens: Latent tokens, K.
        encoder: Shape of the encoder, a published size or {width, depth, heads}.
        decoder: Shape of the decoder.
        quantizer: Any registered quantizer that needs no grid.
        legacy_layout: Latent features are reshaped instead of transposed, as in the published weights.
        proxy_codes: Codes of the proxy tokenizer; 1024 for the published weights.
        proxy_dim: Channels of a proxy code; 256 for the published weights.
        pixel_channels: Base width of the pixel decoder; 128 for the published weights.
        pixel_groups: Groups of its norms; 32 for the published weights.
        start: Initialisation, `published` or `local` (ours, for short runs, best without `legacy_layout`; see
            `vistok.layers.local_start`).

    Example:
        >>> tok = vistok.load("one_d_piece_s256.in1k")
        >>> tokens = tok.encode("photo.jpg")                     # 256 tokens, 384 bytes
        >>> rough, fine = tok.decode(tokens[:, :32]), tok.decode(tokens)
    """

    nested = True


_TINY = {"width": 64, "depth": 2, "heads": 2}
preset(
    "tokenizer",
    "one_d_piece_tiny",
    builder="one_d_piece",
    config={
        "image_size": 64,
        "num_tokens": 16,
        "encoder": _TINY,
        "decoder": _TINY,
        "quantizer": {"name": "vq", "codebook_size": 256, "dim": 8, "l2_norm": True},
        "proxy_codes": 64,
        "proxy_dim": 8,
        "pixel_channels": 32,
    },
)
