"""Published methods inside the language model against their official code."""

from __future__ import annotations

import pytest
import torch

from tests.plugins import decoder
from vistok.compress.cluster import density_peaks
from vistok.compress.methods.sparsevlm import rater_weights
from vistok.compress.score import matrix_rank, transition
from vistok.plugins.attach import attach

pytestmark = pytest.mark.parity


def test_pyramiddrop_matches_the_official_decoder(golden):
    ref = golden("pyramiddrop")
    layout = [8, 96, 12]
    model = decoder.host(ref.meta["model"], ref.meta["state_dict"])
    with attach(model, "pyramiddrop", layers=[3, 6, 9], reference=True) as plugin:
        notes = decoder.record(plugin)
        out = decoder.prefill(model, decoder.prompt(200, layout, 64), layout, use_cache=True)
        assert decoder.lengths(out) == ref["kv_len"].tolist()
        steps = decoder.decode(model, out, 201, 2, sum(layout))
    for stage, note in enumerate(notes):
        torch.testing.assert_close(note["scores"], ref[f"score_stage{stage}"], atol=1e-6, rtol=0)
        assert torch.equal(note["kept"], ref[f"kept_stage{stage}"])
    torch.testing.assert_close(out.last_hidden_state[0, -4:], ref["last_hidden"], atol=2e-4, rtol=0)
    torch.testing.assert_close(steps, ref["decode_hidden"], atol=2e-4, rtol=0)


def test_transition_of_one_module_matches(golden):
    ref = golden("transprune_scores")
    valid = torch.ones(ref["A_before"].shape[:2], dtype=torch.bool)
    found = transition(ref["A_before"], ref["A_after"], valid)
    torch.testing.assert_close(found, ref["A_ttv"], atol=1e-6, rtol=0)


def test_transprune_matches_the_official_decoder(golden):
    ref = golden("transprune_scores")
    layout = [8, 64, 12]
    model = decoder.host(ref.meta["model"], ref.meta["state_dict"])
    with attach(model, "transprune", layers=[7, 9, 12], reference=True) as plugin:
        notes = decoder.record(plugin)
        out = decoder.prefill(model, decoder.prompt(102, layout, 64), layout, use_cache=True)
        assert decoder.lengths(out) == ref["D_kv_len"].tolist()
        steps = decoder.decode(model, out, 103, 2, sum(layout))
    for stage, note in enumerate(notes):
        torch.testing.assert_close(note["scores"], ref[f"D_score_stage{stage}"], atol=1e-6, rtol=0)
        assert torch.equal(note["kept"], ref[f"D_kept_stage{stage}"])
    torch.testing.assert_close(out.last_hidden_state[0, -4:], ref["D_last_hidden"], atol=2e-4, rtol=0)
    torch.testing.assert_close(steps, ref["D_decode_hidden"], atol=2e-4, rtol=0)


def test_transition_of_the_first_layer_matches(golden):
    ref = golden("transprune_scores")
    layout = [8, 64, 12]
    model = decoder.host(ref.meta["model"], ref.meta["state_dict"])
    with attach(model, "transprune", layers=[1], ratios=[0.5], reference=True) as plugin:
        decoder.prefill(model, decoder.prompt(102, layout, 64), layout, use_cache=True)
        found = plugin.runtime.last.transitions
    torch.testing.assert_close(found, ref["B_layer0_ttv"], atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["sparsevlm", "sparsevlm_plus"])
def test_raters_and_rank_match(golden, name):
    ref = golden(name)
    system, image, text = ref.meta["A"]["layout"]
    hidden = ref["A_hidden"]
    place = torch.arange(hidden.shape[1]).unsqueeze(0)
    is_image = (place >= system) & (place < system + image)
    is_text = place >= system + image
    weights = rater_weights(hidden, hidden, is_image, is_text)[0, -text:]
    torch.testing.assert_close(weights, ref["A_rater_scores"][0], atol=1e-5, rtol=0)
    raters = torch.where(weights > weights.mean())[0]
    assert torch.equal(raters, ref["A_raters"])
    rows = ref["A_attention"].mean(1)[0][system + image + raters, system : system + image]
    if name == "sparsevlm":
        torch.testing.assert_close(rows.mean(0), ref["A_relation"][0], atol=1e-5, rtol=0)
        assert int(matrix_rank(rows)) == int(ref["A_rank"])


@pytest.mark.parametrize("name", ["sparsevlm", "sparsevlm_plus"])
def test_clusters_match(golden, name):
    ref = golden(name)
    x, clusters = ref["B_x"], ref.meta["B"]["clusters"]
    member = torch.ones(x.shape[:2], dtype=torch.bool)
    label, _ = density_peaks(x, member, torch.tensor([clusters]))
    merged = [x[0][label[0] == c].sum(0) / ((label[0] == c).sum() + 1e-6) for c in range(clusters)]
    torch.testing.assert_close(torch.stack(merged), ref["B_merged"][0], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("name", "seed", "counts", "layers"),
    [("sparsevlm", 503, (300, 200, 110), [3, 7, 16]), ("sparsevlm_plus", 553, (238, 108, 60), [3, 7, 16])],
)
def test_sparsevlm_matches_the_official_decoder(golden, name, seed, counts, layers):
    ref = golden(name)
    spec = ref.meta["C"]
    extra = 17 - spec["model"]["num_hidden_layers"]  # a cut after the last golden layer needs a layer after it
    model = decoder.host(spec["model"], ref.meta["state_dict"], extra_layers=extra)
    seen = []
    ratios = [c / 576 for c in counts]
    with attach(model, name, layers=layers, ratios=ratios, reference=True) as plugin:
        notes = decoder.record(plugin)
        layer = model.model.language_model.layers[-1]
        with layer.register_forward_pre_hook(lambda module, args: seen.append(args[0])):
            embeds = decoder.prompt(seed, spec["layout"], spec["model"]["hidden_size"])
            out = decoder.prefill(model, embeds, spec["layout"], use_cache=True)
    for stage, note in zip((2, 6, 15), notes):
        relation = ref[f"C_layer{stage}_relation"]
        atol = float(1e-4 * relation.abs().clamp_min(1).max())
        torch.testing.assert_close(note["scores"], relation, atol=atol, rtol=0)
        best = note["scores"].sort(descending=True, stable=True).indices[: len(ref[f"C_layer{stage}_keep"])]
        assert torch.equal(best.sort().values, ref[f"C_layer{stage}_keep"])
    kv = ref["C_kv_len"].tolist()
    assert decoder.lengths(out)[: len(kv)] == kv
    hidden = model.model.language_model.norm(seen[0][0]) if extra else out.last_hidden_state[0]
    torch.testing.assert_close(hidden[-4:], ref["C_last_hidden"], atol=1e-3, rtol=0)
    torch.testing.assert_close(hidden.mean(-1), ref["C_row_mean"], atol=1e-3, rtol=0)
