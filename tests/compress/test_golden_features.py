"""Selections before the language model against the official code."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tests.fill import fill
from vistok.compress.correlation import outliers, redundant, sampling_keys, similar_counts, upper_fence
from vistok.compress.crops import (
    Crop,
    cells,
    content_counts,
    guided_scores,
    retention_ratios,
    split_axis,
    stitch,
    valid_rectangle,
)
from vistok.compress.greedy import determinantal, drop_duplicates, farthest_points, greatest_coverage, unit
from vistok.compress.hash_attention import load_vq_attention
from vistok.compress.kmeans import choose_clusters, cluster_means, cluster_tokens, plus_plus, sweep

pytestmark = pytest.mark.parity


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.tensor(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


def probabilities(seed: int, *shape: int, scale: float = 1.0) -> torch.Tensor:
    return torch.tensor(scale * np.random.default_rng(seed).standard_normal(shape)).softmax(-1).float()


def best(scores: torch.Tensor, count: int) -> torch.Tensor:
    return scores.sort(descending=True, stable=True).indices[..., :count]


def mask_of(index: torch.Tensor, n: int) -> torch.Tensor:
    return torch.zeros(len(index), n, dtype=torch.bool).scatter(1, index, True)


@pytest.mark.parametrize("case", ["r098", "small", "half"])
def test_divprune_chooses_in_the_official_order(golden, case):
    ref = golden("divprune")
    setting = ref.meta["cases"][case]
    x = normal(setting["seed"], *setting["shape"])
    x[len(x) // 2] = 1.5 * x[0]
    assert torch.equal(farthest_points(x[None], setting["kept"])[0], ref[f"{case}/order"])


@pytest.mark.parametrize("case", ["a", "a2"])
def test_scope_chooses_in_the_official_order(golden, case):
    ref = golden("select_before_llm")
    setting = ref.meta["cases"]["scope"][case]
    batch, n, _ = setting["shape"]
    x = normal(setting["features_seed"], *setting["shape"])
    saliency = probabilities(setting["features_seed"] + 1, batch, 4, n).sum(1)
    found = greatest_coverage(x, saliency, setting["keep"], setting["alpha"])
    assert torch.equal(found, ref[f"scope/{case}/order"])


@pytest.mark.parametrize("case", ["a", "b"])
def test_vispruner_keeps_the_official_tokens(golden, case):
    ref = golden("select_before_llm")
    setting = ref.meta["cases"]["vispruner"][case]
    batch, n, _ = setting["features_shape"]
    order = best(probabilities(setting["seed"], batch, setting["heads"], n).mean(1), n)
    important = int(setting["keep"] * setting["important_ratio"])
    x = normal(setting["features_seed"], *setting["features_shape"])
    diverse = drop_duplicates(x, order[:, important:], setting["keep"] - important)
    assert torch.equal(mask_of(torch.cat([order[:, :important], diverse], 1), n), ref[f"vispruner/{case}/mask"])


@pytest.mark.parametrize(("case", "text"), [("a", (1,)), ("seg2", (2,))])
def test_cdpruner_keeps_the_official_tokens(golden, case, text):
    ref = golden("select_before_llm")
    setting = ref.meta["cases"]["cdp"][case]
    batch, n, width = setting["features_shape"]
    matrix = np.random.default_rng(setting["features_seed"] + 1).standard_normal((width, setting["D"])) * width**-0.5
    projected = normal(setting["features_seed"], batch, n, width) @ torch.tensor(matrix.astype(np.float32))
    pictures = unit(normal(setting["image_embeds_seed"], batch, n, setting["embed_dim"]))
    words = unit(normal(setting["text_embeds_seed"], *text, setting["embed_dim"]))
    relevance = -(pictures @ words.T).mean(-1)
    relevance = (relevance - relevance.min() + 1e-6) / (relevance.max() - relevance.min())  # of the whole batch
    found = determinantal(projected, relevance, setting["keep"])
    assert torch.equal(mask_of(found, n), ref[f"cdp/{case}/mask"])


def test_fastervlm_keeps_the_official_tokens(golden):
    ref = golden("select_before_llm")
    setting = ref.meta["cases"]["faster"]["a"]
    found = best(probabilities(setting["seed"], *setting["shape"]).mean(1), setting["keep"])
    assert torch.equal(mask_of(found, setting["shape"][-1]), ref["faster/a/mask"])


@pytest.mark.parametrize("case", ["g22", "g13"])
def test_hired_shares_out_as_released(golden, case):
    ref = golden("select_before_llm")
    setting = ref.meta["cases"]["hired"][case]
    crops, n, alpha = setting["crops"], setting["tokens"], setting["alpha"]
    shape = (crops, setting["heads"], 1, n + 1)
    first = probabilities(setting["top_seed"], *shape)[:, :, 0, 1:].sum(1)
    last = probabilities(setting["bottom_seed"], *shape, scale=2.0)[:, :, 0, 1:].sum(1)
    layout, side = tuple(setting["grid_h_w"]), int(n**0.5)
    total = int(crops * n * setting["token_budget_rate"])
    full = min(int(total * alpha), n)
    counts = content_counts(first[0], cells((side, side), layout, spatial=False), layout[0] * layout[1], alpha)
    rest = min(total - full, (crops - 1) * n)
    budgets = [full, *[min(int(rest * c / int(counts.sum())), n) for c in counts.tolist()]]
    assert budgets == ref[f"hired/{case}/budgets"].tolist()
    for row, expected, count in zip(last, ref[f"hired/{case}/mask"], budgets):
        assert torch.equal(mask_of(best(row, count)[None], n)[0], expected)


def globalcom2_case(case: int, meta: dict[str, Any]) -> dict[str, torch.Tensor]:
    seed, n, width = meta["inputs"]["seed"], meta["side"] ** 2, meta["dim"]
    crops = meta["grids"][case][0] * meta["grids"][case][1]
    return {
        "overview": 2 * normal(seed + 70 + case, n),
        "features": normal(seed + 80 + case, crops, n, width),
        "scores": 2 * normal(seed + 90 + case, crops, n),
    }


@pytest.mark.parametrize("case", [0, 1, 2])
def test_globalcom2_shares_out_scores_and_stitches_as_released(golden, case):
    ref = golden("globalcom2_alloc")
    side, (cols, rows) = ref.meta["side"], ref.meta["grids"][case]
    ratios = retention_ratios(ref[f"A_scores_{case}"], (side, side), (rows, cols), 0.25)
    torch.testing.assert_close(ratios, ref[f"A_scales_{case}"], atol=1e-9, rtol=0)
    given = globalcom2_case(case, ref.meta)
    assert torch.equal(best(given["overview"], 144), ref[f"B{case}_thumb_indices"])
    ratios = retention_ratios(given["overview"], (side, side), (rows, cols), 0.25)
    torch.testing.assert_close(ratios, ref[f"B{case}_scales"], atol=1e-9, rtol=0)
    top, bottom, left, right = rectangle = valid_rectangle(tuple(ref.meta["image_sizes_w_h"][case]), (rows, cols), side)
    chosen, tokens = [], []
    down, across = split_axis((top, bottom), side, rows), split_axis((left, right), side, cols)
    for c in range(rows * cols):
        (y, h), (x, w) = down[c // cols], across[c % cols]
        first = (max(top - side * (c // cols), 0), max(left - side * (c % cols), 0))
        cut = (slice(first[0], first[0] + h), slice(first[1], first[1] + w))
        crop = Crop(number=c, layout=(rows, cols), top=y, left=x, mosaic=(bottom - top, right - left))
        local = given["scores"][c].view(side, side)[cut].flatten()
        scores = guided_scores(local, given["overview"].view(side, side), crop, (h, w))
        torch.testing.assert_close(scores, ref[f"B{case}_crop{c}_score"], atol=1e-6, rtol=0)
        chosen.append(best(scores, int(len(scores) * float(ratios[c]))))
        assert torch.equal(chosen[-1].sort().values, ref[f"B{case}_crop{c}_chosen_in_unpadded_crop"].sort().values)
        tokens.append(given["features"][c].view(side, side, -1)[cut].flatten(0, 1))
    places = stitch(chosen, rectangle, (rows, cols), side)
    found = torch.stack([ref["B_newline"] if c < 0 else tokens[c][t] for c, t in places])
    assert list(found.shape) == ref[f"B{case}_crop_tokens_shape"].tolist()
    torch.testing.assert_close(found.half(), ref[f"B{case}_crop_tokens_f16"], atol=1e-3, rtol=0)


def test_token_correlation_follows_the_card(golden):
    ref = golden("tokencorr")
    keys = ref["low_keys"][None].double()
    assert torch.equal(similar_counts(keys, ref.meta["tau"])[0], ref["similar_count"])
    found = redundant(keys, ref.meta["tau"], ref.meta["repeat_fraction"])[0]
    assert torch.equal(found, ref["redundant"]) and float(1 - found.double().mean()) == float(ref["density"])
    rows = {}
    for level in ("low", "deep"):
        heads = ref[f"{level}_keys"].view(64, 4, 8).transpose(0, 1)
        everything = torch.cat([ref[f"{level}_cls_key"].unsqueeze(1), heads], 1).double()
        logits = (everything @ ref[f"{level}_cls_query"].double().unsqueeze(-1))[..., 0] / 8**0.5
        rows[level] = logits.softmax(-1).mean(0)[1:]
        torch.testing.assert_close(rows[level], ref[f"{level}_cls_attention"], atol=1e-6, rtol=0)
    local = best(sampling_keys(rows["low"], ref["noise_u"]), max(1, int((~found).sum())))
    assert torch.equal(local.sort().values, ref["local_kept"].sort().values)
    fence = float(upper_fence(rows["deep"]))
    assert abs(fence - float(ref["iqr"][2])) < 1e-6
    apart = outliers(rows["deep"]).nonzero()[:, 0]
    assert torch.equal(apart, ref["global_kept"])
    assert torch.equal(torch.unique(torch.cat([local, apart])), ref["kept"])


def clip(args: dict[str, Any]) -> torch.Tensor:
    """The golden file's synthetic video, (T, h * w, D)."""
    rng = np.random.default_rng(args["fseed"])
    prototypes = rng.standard_normal((args["P"], args["D"]))
    base = rng.integers(0, args["P"], size=(args["h"], args["w"]))
    frames = []
    for t in range(args["T"]):
        labels = np.roll(base, t // 2, axis=1)
        labels[0] = (labels[0] + t) % args["P"]
        frames.append(prototypes[labels])
    shape = (args["T"], args["h"], args["w"])
    video = np.stack(frames) * (1 + 0.3 * rng.random((*shape, 1)))
    video = video + args["noise"] * rng.standard_normal((*shape, args["D"]))
    return torch.tensor(video.reshape(args["T"], -1, args["D"]).astype(np.float32))


def test_vqtoken_clusters_and_attends_as_released(golden):
    ref = golden("vqtoken")
    args = ref.meta["args"]
    video = clip(args)
    assert torch.equal(video[:, ::5, ::4], ref["tokens_sample"])
    x = unit(video.flatten(0, 1)[None])

    def init(clusters: int, seed: int) -> torch.Tensor:
        return torch.tensor(np.random.default_rng(seed).permutation(x.shape[1])[:clusters])[None]

    module = load_vq_attention(ref.state_dict(), ref.meta["vqattn_config"]["num_heads"])
    for clusters in args["Ks"]:
        found = cluster_tokens(x, init(clusters, args["iseed"]))
        means, _ = cluster_means(x, found.labels, clusters)
        assert torch.equal(found.labels.view(args["T"], -1), ref[f"fixed{clusters}_assign"])
        torch.testing.assert_close(means[0], ref[f"fixed{clusters}_means"], atol=1e-5, rtol=0)
        mixed = module(found.labels.view(1, args["T"], -1), means)[0]
        torch.testing.assert_close(mixed, ref[f"fixed{clusters}_vqattn"], atol=1e-4, rtol=1e-4)
    for case, seed in (("adaptive", args["iseed"]), ("adaptive2", args["iseed2"])):
        runs = sweep(x, lambda k, seed=seed: init(k, seed), range(12, args["maxK"] + 1))
        curve = torch.cat([value for _, value in runs]).double()
        torch.testing.assert_close(curve, ref[f"{case}_distortion"], atol=0, rtol=1e-5)
        chosen = choose_clusters(curve, 12, "elbow_reference")
        assert chosen == int(ref[f"{case}_K"])
        assert choose_clusters(curve, 12, "elbow") == ref.meta["margins"][case]["argmax_second_difference"] + 13
        assert torch.equal(runs[chosen - 12][0].labels.view(args["T"], -1), ref[f"{case}_assign"])
    uniform = np.random.default_rng(args["aseed_u"]).random(args["maxK"])
    assert torch.equal(plus_plus(x, args["maxK"], torch.tensor(uniform)[None])[0], ref["kpp_indices"])


def test_vq_attention_reads_the_published_prefix(golden):
    state = {f"model.cross_attention.{k}": v for k, v in golden("vqtoken").state_dict().items()}
    module = load_vq_attention({**state, "lm_head.weight": torch.zeros(2, 2)})
    assert sum(p.numel() for p in module.parameters()) == sum(v.numel() for v in state.values())
    assert torch.equal(
        module.to_q_proj.weight, torch.from_numpy(fill("to_q_proj.weight", tuple(module.to_q_proj.weight.shape)))
    )
    with pytest.raises(KeyError, match="No VQ-attention"):
        load_vq_attention({"lm_head.weight": torch.zeros(2, 2)})
