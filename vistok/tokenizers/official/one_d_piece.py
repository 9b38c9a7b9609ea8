"""Published One-D-Piece weights (turingmotors/One-D-Piece, commit 473665d); the layout is TiTok's, see `titok.py`."""

from __future__ import annotations

from vistok.registry import Weights, preset

_VQ4K = {"name": "vq", "codebook_size": 4096, "dim": 12, "l2_norm": True}

for _size, _name, _rfid in (("s", "small", 1.48), ("b", "base", 1.11), ("l", "large", 1.08)):
    preset(
        "tokenizer",
        f"one_d_piece_{_size}256.in1k",
        builder="one_d_piece",
        config={"num_tokens": 256, "encoder": _name, "decoder": _name, "quantizer": _VQ4K},
        weights=Weights(
            hub=f"turing-motors/One-D-Piece-{_size.upper()}-256",
            filename="model.safetensors",
            licence_code="Apache-2.0",
            licence_weights="UNKNOWN; the classes carry an `mit` tag for the hub (trained on ImageNet)",
            trained_on="ImageNet-1k",
            figures={"rFID": _rfid},
            source="README of turingmotors/One-D-Piece (rFID: ImageNet-val 50k, 256 px, all 256 tokens)",
            protocol="titok",
        ),
    )
