"""SEED: a picture as 32 causal tokens of meaning, which a diffusion model turns into a picture again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vistok.config import Of, Spec, create
from vistok.hub import load_strictly
from vistok.image import Preprocess, to_tensor
from vistok.layers.attention import float32_linear
from vistok.layers.position import resize_table
from vistok.layers.qformer import QFormer
from vistok.layers.transformer import Size, Transformer
from vistok.quantizers.base import Quantizer
from vistok.registry import preset, register
from vistok.tokenizers.base import Tokenizer, TokenizerOutput
from vistok.tokenizers.seed_text import TextBranch, TextBranchSize
from vistok.tokenizers.shape import check_1d, patch_grid
from vistok.tokens import Tokens

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
Detokenizer = Literal["mlp", "qformer"]


@dataclass(frozen=True)
class VisionSize:
    """Shape of the EVA vision transformer.

    Attributes:
        width: Width, D.
        depth: Number of blocks.
        heads: Attention heads.
        hidden: Hidden width of the MLPs.
        patch_size: Side of a patch in pixels.
    """

    width: int = 1408
    depth: int = 39
    heads: int = 16
    hidden: int = 6144
    patch_size: int = 14


def eva_tower(size: VisionSize, image_size: tuple[int, int]) -> nn.Module:
    """EVA-CLIP's vision transformer from timm, without a final norm; `forward_features` gives (B, 1 + h * w, D)."""
    from timm.models.eva import Eva

    return Eva(
        img_size=image_size,
        patch_size=size.patch_size,
        num_classes=0,
        global_pool="",
        embed_dim=size.width,
        depth=size.depth,
        num_heads=size.heads,
        mlp_ratio=size.hidden / size.width,
        use_post_transformer_norm=False,
        use_fc_norm=False,
    )


class Float32Norm(nn.LayerNorm):
    """Layer norm in float32 whatever the precision around it."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> float32, (B, N, D)."""
        with torch.autocast(x.device.type, enabled=False):
            return F.layer_norm(x.float(), self.normalized_shape, self.weight.float(), self.bias.float(), self.eps)


class CodeTransformer(nn.Module):
    """Positions and a few bidirectional blocks over decoded codes."""

    def __init__(self, num_tokens: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.randn(num_tokens, width) * 0.02)
        self.transformer = Transformer(width, depth, heads, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        return self.transformer(x + self.position)


class MLPHead(nn.Module):
    """De-tokenizer of the published weights: every token down to 32 channels, all of them flattened, one projection."""

    def __init__(self, num_tokens: int, width: int, out_dim: int) -> None:
        super().__init__()
        narrow = nn.Linear(width, 256, bias=False), nn.Linear(256, 128, bias=False), nn.Linear(128, 32, bias=False)
        self.down = nn.Sequential(narrow[0], nn.ReLU(), narrow[1], nn.ReLU(), narrow[2])
        self.proj = nn.Linear(32 * num_tokens, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, out_dim)."""
        return self.proj(self.down(x).flatten(1))


class QFormerHead(nn.Module):
    """De-tokenizer of the released training code: one learned query reads the tokens through a Q-Former."""

    def __init__(self, width: int, depth: int, heads: int, out_dim: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(1, width) * 0.02)
        self.qformer = QFormer(width, depth, heads, width)
        self.proj = nn.Linear(width, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, out_dim)."""
        return self.proj(self.qformer(self.query, x)[:, 0])


@register("tokenizer", "seed")
class SEED(Tokenizer):
    """SEED-2: ViT, causal Q-Former, VQ; decoded by an unCLIP diffusion model (arXiv 2307.08041, 2310.01218).

    Token i depends on tokens before it only, given the whole picture, so that a language model can write them. They
    hold meaning, not pixels: `embed` gives the CLIP image embedding they stand for, `decode` hands it to a diffusers
    unCLIP pipeline. Pictures are squashed to the input size. The official transform resizes bilinearly, the official
    tokenizer's own processor bicubically, which gives other ids; ours is the transform's.

    `forward` gives no pictures but, for `train/steps/seed`, `extras`: `causal` (B, N, D), the embeddings before
    quantising; `rebuilt` (B, N, D), their reconstruction from the codes; `embedding` (B, E). With `captions`, for
    `train/steps/seed_contrastive`, nothing is quantised and `extras` are `picture` and `text` (B, C), features to be
    compared, and `temperature` (1,).

    Args:
        image_size: Side in pixels, or (H, W); multiples of the patch size.
        num_tokens: Queries, N.
        vision: Shape of the EVA tower.
        qformer: Shape of the Q-Former; cross-attention in every second layer.
        decoder_depth: Blocks of either transformer over decoded codes.
        decoder_heads: Their attention heads.
        embedding_dim: Channels of the image embedding, E.
        detokenizer: `mlp` (published weights) or `qformer` (released training code).
        is_causal: Tokens depend on earlier ones only.
        quantizer: Any registered quantizer that needs no grid.
        text_branch: What reads captions in training stage I; None for a SEED that is past it.
        pipeline: Folder or hub id of a diffusers unCLIP pipeline, loaded when it is first needed.

    Attributes:
        second_stage: Submodules that training stage I neither has nor needs.

    Example:
        >>> tok = vistok.load("seed_2.ailab_cvc")
        >>> ids = tok.encode("photo.jpg").ids                              # (1, 32)
        >>> picture = tok.decode(ids, steps=20, guidance=10.0)             # (1, 3, 768, 768)
    """

    second_stage: ClassVar[tuple[str, ...]] = ("to_code", "quantizer", "from_code", "rebuild", "detokenize", "head")
    options = frozenset({"size", "generator", "steps", "guidance"})
    decoder_parts = ("from_code", "rebuild", "detokenize", "head", "text_branch")

    def __init__(
        self,
        *,
        image_size: int | tuple[int, int] = 224,
        num_tokens: int = 32,
        vision: VisionSize | None = None,
        qformer: Size | None = None,
        decoder_depth: int = 4,
        decoder_heads: int = 12,
        embedding_dim: int = 1024,
        detokenizer: Detokenizer = "mlp",
        is_causal: bool = True,
        quantizer: Annotated[Spec, Of("quantizer")],
        text_branch: TextBranchSize | None = None,
        pipeline: str | None = None,
    ) -> None:
        super().__init__()
        tower, size = vision or VisionSize(), qformer or Size(768, 12, 12)
        sides, self.patches = patch_grid(image_size, tower.patch_size)
        self.preprocess = Preprocess(size=sides, crop="squash", resample="bilinear")
        self.num_tokens, self.pipeline_source, self._pipeline = num_tokens, pipeline, None
        self.quantizer: Quantizer = create("quantizer", **quantizer)
        check_1d(self.quantizer, num_tokens)
        self.register_buffer("mean", torch.tensor(CLIP_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(CLIP_STD).view(1, 3, 1, 1), persistent=False)
        self.vision = eva_tower(tower, sides)
        self.norm_vision = Float32Norm(tower.width)
        self.queries = nn.Parameter(torch.randn(num_tokens, size.width) * 0.02)
        dropout = 0.0 if text_branch is None else text_branch.dropout
        self.qformer = QFormer(size.width, size.depth, size.heads, tower.width, is_causal=is_causal, dropout=dropout)
        wide, dim = size.width, self.quantizer.dim
        self.to_code = nn.Sequential(nn.Linear(wide, wide), nn.Tanh(), nn.Linear(wide, self.quantizer.in_dim))
        self.from_code = nn.Sequential(nn.Linear(dim, dim), nn.Tanh(), nn.Linear(dim, wide))
        self.rebuild = CodeTransformer(num_tokens, wide, decoder_depth, decoder_heads)
        self.detokenize = CodeTransformer(num_tokens, wide, decoder_depth, decoder_heads)
        if detokenizer == "mlp":
            self.head: nn.Module = MLPHead(num_tokens, wide, embedding_dim)
        else:
            self.head = QFormerHead(wide, size.depth, size.heads, embedding_dim)
        self.text_branch = None if text_branch is None else TextBranch(text_branch, size.width, size.depth)

    def visual_features(self, images: Tensor) -> Tensor:
        """Pictures in [0, 1], (B, 3, H, W) -> normalised features of class token and patches, (B, 1 + h * w, C)."""
        x = ((images - self.mean) / self.std).to(self.queries.dtype)
        return self.norm_vision(self.vision.forward_features(x))  # type: ignore[operator]

    def causal_embeddings(self, features: Tensor) -> Tensor:
        """Visual features (B, M, C) -> embeddings in causal order, (B, N, D)."""
        return self.qformer(self.queries, features.to(self.queries.dtype))

    def project(self, causal: Tensor) -> Tensor:
        """Causal embeddings (B, N, D) -> features for the quantizer, float32, (B, N, quantizer.in_dim)."""
        first, _, last = self.to_code
        return float32_linear(torch.tanh(float32_linear(causal, first)), last)  # type: ignore[arg-type]

    def encode_features(self, images: Tensor) -> Tensor:
        """Pictures in [0, 1], (B, 3, H, W) -> (B, N, quantizer.in_dim), float32."""
        return self.project(self.causal_embeddings(self.visual_features(images)))

    @torch.no_grad()
    def embed(self, tokens: Tokens | Tensor) -> Tensor:
        """Tokens or ids (B, N) -> the CLIP image embedding they stand for, not normalised, (B, E)."""
        return self.embed_codes(self.tokens_to_codes(tokens))

    def embed_codes(self, codes: Tensor) -> Tensor:
        """Codes (B, N, quantizer.dim) -> image embedding (B, E)."""
        return self.head(self.detokenize(self.from_code(codes.to(self.queries.dtype))))

    @torch.no_grad()
    def similarity(self, images: Any, captions: str | Sequence[str]) -> Tensor:
        """Cosines of pictures, as `encode` takes them, and captions, (B, T).

        Raises:
            ValueError: A model without a text branch.
        """
        batch = to_tensor(images, self.preprocess).to(self.device)
        branch, texts = self._branch(), [captions] if isinstance(captions, str) else captions
        return branch.pictures(self.causal_embeddings(self.visual_features(batch))) @ branch(self.qformer, texts).T

    def forward(
        self, images: Tensor, *, captions: Sequence[str] | None = None, generator: torch.Generator | None = None
    ) -> TokenizerOutput:
        """Encode, quantise and decode to embeddings for training; see the class for `extras` and `captions`."""
        causal = self.causal_embeddings(self.visual_features(images))
        size = (images.shape[-2], images.shape[-1])
        if captions is not None:
            branch = self._branch()
            features = {"picture": branch.pictures(causal), "text": branch(self.qformer, captions)}
            features["temperature"] = branch.temperature.clone()
            tokens = Tokens(ids=None, codes=causal, size=size)
            return TokenizerOutput(images=None, tokens=tokens, quantized=None, extras=features)
        quantized = self.quantizer(self.project(causal), generator=generator)
        tokens = Tokens(ids=quantized.ids, codes=quantized.codes, vocab=self.quantizer.vocab_sizes, size=size)
        decoded = self.from_code(quantized.codes.to(self.queries.dtype))
        extras = {
            "causal": causal,
            "rebuilt": self.rebuild(decoded),
            "embedding": self.head(self.detokenize(decoded)),
        }
        return TokenizerOutput(images=None, tokens=tokens, quantized=quantized, extras=extras)

    def start_from(self, other: Tokenizer, source: str) -> None:
        """Take another model's weights; the text branch of stage I is dropped by a model without one.

        Raises:
            LoadError: Weights that do not fit.
        """
        state = other.state_dict()
        if self.text_branch is None:
            state = {k: v for k, v in state.items() if not k.startswith("text_branch.")}
        load_strictly(self, state, source)

    def _branch(self) -> TextBranch:
        if self.text_branch is None:
            raise ValueError("This SEED reads no captions: it has no text branch. Build it with text_branch={...}.")
        return self.text_branch

    # -- pictures ------------------------------------------------------------------------------------------------

    def attach_pipeline(self, pipeline: Any) -> None:
        """Decode with this diffusers unCLIP pipeline: an object, a folder or a hub id."""
        self._pipeline = _load_pipeline(pipeline) if isinstance(pipeline, str) else pipeline

    @property
    def pipeline(self) -> Any:
        """The pipeline on this model's device.

        Raises:
            ValueError: None was given.
        """
        if self._pipeline is None:
            if self.pipeline_source is None:
                raise ValueError(
                    "SEED's tokens become pictures through a diffusers unCLIP pipeline and none was given. Call "
                    "tokenizer.attach_pipeline(folder, hub id or pipeline); embed(tokens) gives the image embedding."
                )
            self.attach_pipeline(self.pipeline_source)
        return self._pipeline.to(self.device)

    def target_size(self, tokens: Tokens | Tensor, size: tuple[int, int] | None) -> tuple[int, int]:
        """What was asked for, else (0, 0), the pipeline's own size: the size that was encoded says nothing."""
        return (0, 0) if size is None else super().target_size(tokens, size)

    def _place(self, size: tuple[int, int]) -> dict[str, Any]:
        return {"size": size} if all(size) else {}

    def decode_codes(
        self,
        codes: Tensor,
        *,
        size: tuple[int, int] | None = None,
        generator: torch.Generator | None = None,
        steps: int = 20,
        guidance: float = 10.0,
    ) -> Tensor:
        """Codes (B, N, quantizer.dim) -> pictures in [0, 1], (B, 3, H, W), of `size` or the pipeline's own size.

        Empty prompt and noise level 0 as in the official code, which draws its start noise once for all pictures; here
        it comes from `generator`, picture by picture, so a batch works.
        """
        embedding, (height, width) = self.embed_codes(codes), size or (None, None)
        pipeline = self.pipeline
        pictures = pipeline(
            prompt=[""] * len(embedding),
            image_embeds=embedding.to(pipeline.unet.dtype),
            noise_level=0,
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=generator,
            height=height,
            width=width,
            output_type="pt",
        ).images
        return pictures.to(embedding.device)

    def _resized_state(self, other: Any) -> dict[str, Tensor]:
        state = self.state_dict()
        table = state["vision.pos_embed"]
        state["vision.pos_embed"] = resize_table(table[0], self.patches, other.patches, prefix=1).unsqueeze(0)
        return state


def _load_pipeline(source: str) -> Any:
    from diffusers import StableUnCLIPImg2ImgPipeline

    pipeline = StableUnCLIPImg2ImgPipeline.from_pretrained(source)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


preset(
    "tokenizer",
    "seed_tiny",
    builder="seed",
    config={
        "image_size": 56,
        "num_tokens": 8,
        "vision": {"width": 32, "depth": 2, "heads": 2, "hidden": 64},
        "qformer": {"width": 32, "depth": 2, "heads": 2},
        "decoder_depth": 1,
        "decoder_heads": 2,
        "embedding_dim": 16,
        "quantizer": {"name": "vq", "codebook_size": 64, "dim": 8},
    },
)
