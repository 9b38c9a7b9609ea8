"""What stands before a tokenizer of latents: a frozen KL autoencoder of diffusers, or nothing but a change of range."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vistok.config import ConfigError


@dataclass(frozen=True, kw_only=True)
class Vae:
    """Shape of a diffusers `AutoencoderKL` with plain down and up blocks.

    Attributes:
        channels: Width per level; every level but the last halves the picture.
        latent_channels: Channels of the latent.
        layers: Residual blocks per level of the encoder.
        groups: Groups of the group norms.
        quant_convs: Whether 1x1 convolutions stand around the latent.
        scaling_factor: Latents are multiplied by it.
        shift_factor: Subtracted before that.
        sample_posterior: Encode by drawing from the posterior (FlexTok's wrapper does so by default, which makes ids
            irreproducible); its mode if False.
        path: Local folder of a diffusers autoencoder; sizes, scale and weights are then its own. Only for building: a
            saved tokenizer carries the weights itself.
    """

    channels: tuple[int, ...] = (128, 256, 512, 512)
    latent_channels: int = 16
    layers: int = 2
    groups: int = 32
    quant_convs: bool = True
    scaling_factor: float = 1.0
    shift_factor: float = 0.0
    sample_posterior: bool = False
    path: Path | None = None

    def arguments(self) -> dict[str, Any]:
        """As diffusers' constructor takes them."""
        levels = len(self.channels)
        return {
            "down_block_types": ("DownEncoderBlock2D",) * levels,
            "up_block_types": ("UpDecoderBlock2D",) * levels,
            "block_out_channels": tuple(self.channels),
            "layers_per_block": self.layers,
            "latent_channels": self.latent_channels,
            "norm_num_groups": self.groups,
            "sample_size": 1024,
            "use_quant_conv": self.quant_convs,
            "use_post_quant_conv": self.quant_convs,
            "scaling_factor": self.scaling_factor,
        }


class PixelFrontend(nn.Module):
    """No autoencoder: the latents are the pixels, from [0, 1] to [-1, 1].

    Attributes:
        channels: 3.
        factor: 1, pixels per latent position.
    """

    channels, factor = 3, 1

    def encode(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> (B, 3, H, W) in [-1, 1]."""
        return 2 * images.float() - 1

    def decode(self, latents: Tensor) -> Tensor:
        """(B, 3, H, W) -> pictures around [0, 1]."""
        return (latents.float() + 1) / 2


class KLFrontend(nn.Module):
    """A frozen `AutoencoderKL`: never trained, always in evaluation mode and in float32 with autocast off.

    Args:
        shape: Its shape; `path` is resolved already, see `resolve`.
        weights: Its tensors; random where None.

    Attributes:
        channels: Channels of the latent.
        factor: Pixels per latent position.
    """

    def __init__(self, shape: Vae, weights: Mapping[str, Tensor] | None = None) -> None:
        from diffusers import AutoencoderKL

        super().__init__()
        self.shape = shape
        self.channels, self.factor = shape.latent_channels, 2 ** (len(shape.channels) - 1)
        self.vae = AutoencoderKL(**shape.arguments())
        if weights is not None:
            self.vae.load_state_dict(weights)
        self.requires_grad_(False)
        self.eval()

    def encode(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> scaled latents (B, C, H / factor, W / factor)."""
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            posterior = self.vae.encode(2 * images.float() - 1).latent_dist
            found = posterior.sample(generator) if self.shape.sample_posterior else posterior.mode()
            return (found - self.shape.shift_factor) * self.shape.scaling_factor

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents -> pictures around [0, 1]."""
        with torch.autocast(latents.device.type, enabled=False):
            plain = latents.float() / self.shape.scaling_factor + self.shape.shift_factor
            return (self.vae.decode(plain).sample + 1) / 2

    def train(self, mode: bool = True) -> KLFrontend:
        """Stays in evaluation mode."""
        return super().train(False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> KLFrontend:
        """Goes along to another device, but keeps float32: half precision moves latents enough to change ids."""

        def exact(x: Tensor) -> Tensor:
            moved = fn(x.new_empty(0)) if x.is_floating_point() and not x.is_meta else fn(x)
            return x.to(moved.device) if moved.numel() == 0 and x.numel() else moved

        super()._apply(exact, recurse)
        return self


def resolve(shape: Vae) -> tuple[Vae, dict[str, Tensor] | None]:
    """A shape without `path`, and the tensors found there (None without a path). Nothing is downloaded or executed.

    Raises:
        ConfigError: No diffusers autoencoder there, or one that is built otherwise.
    """
    if shape.path is None:
        return shape, None
    from vistok.hub import LoadError, read_folder

    try:
        config, tensors = read_folder(shape.path)
    except LoadError as err:
        raise ConfigError(f"vae.path: {err}") from err
    found = shape_of(config, tensors, str(shape.path))
    return Vae(**{**asdict(found), "sample_posterior": shape.sample_posterior}), modern_names(tensors)


def shape_of(config: Mapping[str, Any], tensors: Mapping[str, Tensor], source: str) -> Vae:
    """Shape of a diffusers autoencoder from its configuration (for the scale and the groups) and its tensors.

    Raises:
        ConfigError: Not such an autoencoder.
    """
    try:
        levels = sorted({k.split(".")[2] for k in tensors if k.startswith("encoder.down_blocks.")}, key=int)
        first = "encoder.down_blocks.{}.resnets.0.conv1.weight"
        blocks = {k.split(".")[4] for k in tensors if k.startswith("encoder.down_blocks.0.resnets.")}
        return Vae(
            channels=tuple(tensors[first.format(i)].shape[0] for i in levels),
            latent_channels=tensors["decoder.conv_in.weight"].shape[1],
            layers=len(blocks),
            groups=int(config.get("norm_num_groups", 32)),
            quant_convs="quant_conv.weight" in tensors,
            scaling_factor=float(config.get("scaling_factor") or 1.0),
            shift_factor=float(config.get("shift_factor") or 0.0),
        )
    except (KeyError, IndexError, ValueError, TypeError) as err:
        raise ConfigError(f"{source} is no diffusers AutoencoderKL: {type(err).__name__}: {err}.") from err


def modern_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Attention keys as diffusers names them today; files of before 2023 say query, key, value, proj_attn."""
    old = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
    renamed = {}
    for key, value in tensors.items():
        for before, after in old.items():
            key = key.replace(before, after)
        is_conv = ".attentions." in key and ".to_" in key and value.ndim == 4
        renamed[key] = value.flatten(1) if is_conv else value
    return renamed
