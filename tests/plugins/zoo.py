"""One tiny random host per family, and prompts for it.

A sample is a list of items `("image" | "video", seed)` with text between them. `prompt` builds a left-padded batch the
way the family's processor does.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from tests.plugins.hosts import IMAGE, TEXT, VOCAB, pad_left, picture, sharpen, words
from vistok.plugins.families.base import family_of

VIDEO, START, END = 61, 62, 63
Sample = list[tuple[str, int]]
CLIP = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 56,
    "patch_size": 14,
}
MROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
ANYRES = [[56, 56], [112, 56], [56, 112]]


class Host:
    """A tiny host with its way of building prompts."""

    video = False

    def __init__(self, attn: str = "sdpa", dtype: torch.dtype = torch.float32) -> None:
        config = self.config()
        config._attn_implementation = attn
        self.model: Any = sharpen(self.host_class()(config)).to(dtype)
        self.family = family_of(self.model)

    def config(self) -> Any:
        raise NotImplementedError

    def host_class(self) -> Any:
        raise NotImplementedError

    def pixels(self, items: Sample) -> dict[str, Any]:
        """Encoder arguments for the pictures and clips of a batch, in order."""
        raise NotImplementedError

    def extra(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Arguments that follow from the ids."""
        return {}

    def run(self, kind: str, size: int) -> list[int]:
        """Ids of one picture or clip."""
        return [IMAGE if kind == "image" else VIDEO] * size

    def prompt(self, samples: list[tuple[int, Sample]]) -> dict[str, Any]:
        """A batch; every sample has a seed for its text."""
        items = [item for _, sample in samples for item in sample]
        dtype = self.model.dtype
        given = self.pixels(items) if items else {}
        pixels = {k: v.to(dtype) if v.is_floating_point() else v for k, v in given.items()}
        sizes = {
            kind: [len(f) for f in self.family.features(self.model, out)]
            for kind, out in self.family.encode(self.model, pixels).items()
        }
        queues = {kind: iter(found) for kind, found in sizes.items()}
        rows = []
        for seed, sample in samples:
            row = words(3 + seed % 3, seed)
            for i, (kind, _) in enumerate(sample):
                row += self.ids(kind, queues[kind]) + words(2 + (i + seed) % 2, seed + i + 1)
            rows.append(row + words(3 + seed % 4, seed + 50))
        inputs = pad_left(rows)
        return {**inputs, **pixels, **self.extra(inputs)}

    def ids(self, kind: str, sizes: Any) -> list[int]:
        """Ids of the next picture or clip."""
        return self.run(kind, next(sizes))


class LlavaNext(Host):
    def config(self) -> Any:
        from transformers import CLIPVisionConfig, LlamaConfig, LlavaNextConfig

        return LlavaNextConfig(
            vision_config=CLIPVisionConfig(**CLIP),
            text_config=LlamaConfig(**TEXT),
            image_token_index=IMAGE,
            image_grid_pinpoints=ANYRES,
            vision_feature_layer=-2,
        )

    def host_class(self) -> Any:
        from transformers import LlavaNextForConditionalGeneration

        return LlavaNextForConditionalGeneration

    def pixels(self, items: Sample) -> dict[str, Any]:
        sizes = [[(56, 56), (100, 50), (50, 112)][seed % 3] for _, seed in items]
        pictures = [picture(3, 3, 56, 56, seed=seed) for _, seed in items]
        return {"pixel_values": torch.stack(pictures), "image_sizes": torch.tensor(sizes)}


class LlavaOnevision(LlavaNext):
    video = True

    def config(self) -> Any:
        from transformers import LlavaOnevisionConfig, Qwen2Config, SiglipVisionConfig

        return LlavaOnevisionConfig(
            vision_config=SiglipVisionConfig(**CLIP),
            text_config=Qwen2Config(**TEXT),
            image_token_index=IMAGE,
            video_token_index=VIDEO,
            image_grid_pinpoints=ANYRES,
            vision_feature_layer=-1,
        )

    def host_class(self) -> Any:
        from transformers import LlavaOnevisionForConditionalGeneration

        return LlavaOnevisionForConditionalGeneration

    def pixels(self, items: Sample) -> dict[str, Any]:
        images = [item for item in items if item[0] == "image"]
        clips = [picture(2, 3, 56, 56, seed=seed) for kind, seed in items if kind == "video"]
        found = super().pixels(images) if images else {}
        return found | ({"pixel_values_videos": torch.stack(clips)} if clips else {})


class Qwen2VL(Host):
    video = True
    vision: ClassVar[dict[str, Any]] = {
        "depth": 2,
        "embed_dim": 32,
        "hidden_size": TEXT["hidden_size"],
        "num_heads": 4,
        "mlp_ratio": 2,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    }
    patch = 14

    def text(self) -> dict[str, Any]:
        return {**TEXT, "rope_parameters": MROPE}

    def special(self) -> dict[str, Any]:
        return {
            "image_token_id": IMAGE,
            "video_token_id": VIDEO,
            "vision_start_token_id": START,
            "vision_end_token_id": END,
        }

    def config(self) -> Any:
        from transformers import Qwen2VLConfig

        return Qwen2VLConfig(vision_config=self.vision, text_config=self.text(), **self.special())

    def host_class(self) -> Any:
        from transformers import Qwen2VLForConditionalGeneration

        return Qwen2VLForConditionalGeneration

    def run(self, kind: str, size: int) -> list[int]:
        return [START, *super().run(kind, size), END]

    def pixels(self, items: Sample) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for kind, name, grid in (
            ("image", "pixel_values", "image_grid_thw"),
            ("video", "pixel_values_videos", "video_grid_thw"),
        ):
            seeds = [seed for k, seed in items if k == kind]
            if not seeds:
                continue
            frames = 1 if kind == "image" else 2
            grids = [(frames, 8 if seed % 2 else 4, 4 + 2 * (seed % 3)) for seed in seeds]
            width = 3 * 2 * self.patch**2
            found[name] = torch.cat([picture(t * h * w, width, seed=s) for s, (t, h, w) in zip(seeds, grids)])
            found[grid] = torch.tensor(grids)
        return found

    def extra(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        ids = inputs["input_ids"]
        return {"mm_token_type_ids": (ids == IMAGE).int() + 2 * (ids == VIDEO).int()}


class Qwen25VL(Qwen2VL):
    vision: ClassVar[dict[str, Any]] = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 4,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "out_hidden_size": TEXT["hidden_size"],
        "window_size": 56,
        "fullatt_block_indexes": [1],
    }

    def config(self) -> Any:
        from transformers import Qwen2_5_VLConfig

        return Qwen2_5_VLConfig(vision_config=self.vision, text_config=self.text(), **self.special())

    def host_class(self) -> Any:
        from transformers import Qwen2_5_VLForConditionalGeneration

        return Qwen2_5_VLForConditionalGeneration


class Qwen3VL(Qwen2VL):
    vision: ClassVar[dict[str, Any]] = {
        "depth": 3,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 4,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "out_hidden_size": TEXT["hidden_size"],
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0, 1, 2],
    }

    def text(self) -> dict[str, Any]:
        return {**TEXT, "head_dim": 8, "rope_parameters": MROPE}

    def config(self) -> Any:
        from transformers import Qwen3VLConfig

        return Qwen3VLConfig(vision_config=self.vision, text_config=self.text(), **self.special())

    def host_class(self) -> Any:
        from transformers import Qwen3VLForConditionalGeneration

        return Qwen3VLForConditionalGeneration

    def run(self, kind: str, size: int) -> list[int]:
        if kind == "image":
            return super().run(kind, size)
        frame = [START, *[VIDEO] * (size // 2), END]  # two frames, a time stamp before each
        return [*words(1, 1), *frame, *words(1, 2), *frame]


class InternVL(Host):
    def config(self) -> Any:
        from transformers import InternVLConfig, InternVLVisionConfig, Qwen2Config

        vision = InternVLVisionConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=[56, 56],
            patch_size=[14, 14],
        )
        return InternVLConfig(
            vision_config=vision, text_config=Qwen2Config(**TEXT), image_token_id=IMAGE, downsample_ratio=0.5
        )

    def host_class(self) -> Any:
        from transformers import InternVLForConditionalGeneration

        return InternVLForConditionalGeneration

    def pixels(self, items: Sample) -> dict[str, Any]:
        return {"pixel_values": torch.cat([picture(1 + seed % 3, 3, 56, 56, seed=seed) for _, seed in items])}

    def prompt(self, samples: list[tuple[int, Sample]]) -> dict[str, Any]:
        self.tiles = iter([1 + seed % 3 for _, sample in samples for _, seed in sample])
        return super().prompt(samples)

    def ids(self, kind: str, sizes: Any) -> list[int]:
        return self.run(kind, sum(next(sizes) for _ in range(next(self.tiles))))


class Idefics3(Host):
    def config(self) -> Any:
        from transformers import Idefics3Config, LlamaConfig

        vision: ClassVar[dict[str, Any]] = {**CLIP, "model_type": "idefics3_vision"}
        return Idefics3Config(
            vision_config=vision,
            text_config=LlamaConfig(**TEXT),
            image_token_id=IMAGE,
            scale_factor=2,
            pad_token_id=0,
        )

    def host_class(self) -> Any:
        from transformers import Idefics3ForConditionalGeneration

        return Idefics3ForConditionalGeneration

    def prompt(self, samples: list[tuple[int, Sample]]) -> dict[str, Any]:
        self.tiles = iter([1 + seed % 3 for _, sample in samples for _, seed in sample])
        self.per_sample = [[1 + seed % 3 for _, seed in sample] for _, sample in samples]
        self.seeds = [[seed for _, seed in sample] for _, sample in samples]
        return super().prompt(samples)

    def pixels(self, items: Sample) -> dict[str, Any]:
        most = max(sum(tiles) for tiles in self.per_sample)
        rows = torch.zeros(len(self.per_sample), most, 3, 56, 56)
        for row, tiles, seeds in zip(rows, self.per_sample, self.seeds):
            if tiles:
                found = torch.cat([picture(n, 3, 56, 56, seed=s) for n, s in zip(tiles, seeds)])
                row[: len(found)] = found
        return {"pixel_values": rows}

    def ids(self, kind: str, sizes: Any) -> list[int]:
        row: list[int] = []
        for i in range(next(self.tiles)):
            row += [*words(1, i), *self.run(kind, next(sizes))]
        return row


class SmolVLM(Idefics3):
    def config(self) -> Any:
        from transformers import LlamaConfig, SmolVLMConfig

        vision: ClassVar[dict[str, Any]] = {**CLIP, "model_type": "smolvlm_vision"}
        return SmolVLMConfig(
            vision_config=vision,
            text_config=LlamaConfig(**TEXT),
            image_token_id=IMAGE,
            scale_factor=2,
            pad_token_id=0,
        )

    def host_class(self) -> Any:
        from transformers import SmolVLMForConditionalGeneration

        return SmolVLMForConditionalGeneration


HOSTS: dict[str, type[Host]] = {
    "llava_next": LlavaNext,
    "llava_onevision": LlavaOnevision,
    "qwen2_vl": Qwen2VL,
    "qwen2_5_vl": Qwen25VL,
    "qwen3_vl": Qwen3VL,
    "internvl": InternVL,
    "idefics3": Idefics3,
    "smolvlm": SmolVLM,
}
assert VOCAB > END
