"""Give the projector of the small LLaVA a start that the language model can read, in minutes and without running it.

    python recipes/vlm/warm_start.py DIR           # DIR from make_host.py --untrained; its projector is replaced

The projector learns to turn a patch inside a thing's box into the language model's own embedding of the thing's name,
and every other patch into that of ` photo`. What is learnt is names only; `scenes.yaml` then trains it through the
language model.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from vistok.data.scenes import Scenes, patches_inside

BACKGROUND = "photo"


def samples(model: Any, processor: Any, scenes: Scenes, count: int) -> tuple[Tensor, Tensor, list[str]]:
    """Tower features of every patch (n, D), the number of the word it should become (n,), and the words."""
    words = [BACKGROUND, *sorted({name for names in scenes.table.values() for name in names})]
    features, targets = [], []
    for start in range(0, count, 8):
        found = [scenes.scene(i) for i in range(start, min(start + 8, count))]
        pixels = processor.image_processor(images=[s.picture for s in found], return_tensors="pt")["pixel_values"]
        layer = model.config.vision_feature_layer
        states = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[layer][:, 1:]  # (B, N, D)
        side = int(states.shape[1] ** 0.5)
        for scene, rows in zip(found, states):
            target = np.zeros(len(rows), dtype=np.int64)
            for thing, box in scene.things:
                target[patches_inside([box], (side, side), scenes.size)] = words.index(thing.name)
            features.append(rows)
            targets.append(torch.from_numpy(target))
    return torch.cat(features).float(), torch.cat(targets), words


def main() -> None:
    """The command line."""
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dir", type=Path, help="model to change")
    parser.add_argument("--scenes", type=int, default=800)
    parser.add_argument("--steps", type=int, default=1500)
    args = parser.parse_args()
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration.from_pretrained(args.dir, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(args.dir)
    with torch.no_grad():
        features, targets, words = samples(model, processor, Scenes(seed=1), args.scenes)
        ids = [processor.tokenizer(f" {word}", add_special_tokens=False)["input_ids"] for word in words]
        table = model.get_input_embeddings().weight.float()
        wanted = torch.stack([table[torch.tensor(i)].mean(0) for i in ids])  # (words, D)
    weight = (1 / torch.bincount(targets, minlength=len(words)).clamp_min(1).float()).sqrt()
    projector = model.model.multi_modal_projector
    optimizer = torch.optim.AdamW(projector.parameters(), lr=1e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, args.steps)
    scale = wanted.std()
    for step in range(args.steps):
        pick = torch.randint(len(targets), (1024,))
        out = projector(features[pick]) / scale
        error = (out - wanted[targets[pick]] / scale).square().mean(-1)
        share = weight[targets[pick]]
        loss = (error * share).sum() / share.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 300 == 0 or step == args.steps - 1:
            near = F.normalize(out.detach(), dim=-1) @ F.normalize(wanted, dim=-1).T
            inside = targets[pick] > 0
            right = (near.argmax(-1) == targets[pick])[inside].float().mean()
            print(f"step {step}: squared error {loss.item():.3f}, names right inside boxes {right:.2f}", flush=True)
    model.to(torch.bfloat16).save_pretrained(args.dir)


if __name__ == "__main__":
    main()
