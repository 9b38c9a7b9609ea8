"""SEED's first stage: its loss, its text branch, what stands still, and that stage II starts from what it leaves."""

from __future__ import annotations

import re

import pytest
import torch

import vistok
from tests.train import tiny
from tests.train.test_processes import finish, launch, written
from tests.train.test_seed_step import MODEL, TEACHER
from tests.train.test_sharding import SHARDED
from vistok.config import create
from vistok.data.base import Batch
from vistok.hub import LoadError, rename
from vistok.tokenizers.official.seed import RULES, TEXT_RULES
from vistok.tokenizers.seed import SEED
from vistok.tokenizers.seed_text import TextBranchSize, clean
from vistok.train import log
from vistok.train.loop import train
from vistok.train.steps.base import Losses, LossSpec, Weighting
from vistok.train.steps.seed_contrastive import contrast

BRANCH = {"kind": "words", "vocabulary": 64, "positions": 40, "length": 12, "dim": 16}
FIRST = {**MODEL, "qformer": {"width": 32, "depth": 2, "heads": 2}, "text_branch": BRANCH}
TEXTS = ("A red cup.", "Two dogs at a window of a white house", "")


def recipe(out, **over):
    """Stage I on the photographs, without dropout."""
    values = {
        "model": {**FIRST, "text_branch": {**BRANCH, "dropout": 0.0}},
        "data": {"captions": True},
        "losses": None,
        "train": {"step": {"name": "seed_contrastive"}, "freeze": ["vision.*"], "ema": 0.0, "log_every": 1, **over},
    }
    return out, values


def built(model=None, losses=None, **settings):
    step = create("step", "seed_contrastive", **settings)
    step.setup(vistok.create("tokenizer", **(model or FIRST)).eval(), losses or Losses({}))
    return step


def batch(text=TEXTS):
    return Batch(images=torch.rand(3, 3, 56, 56), positions=torch.arange(3), text=text)


def formula(picture, text, temperature, smoothing):
    """The loss written out; what stands on the right of a product is a constant."""
    total = 0.0
    for asks, answers in ((picture, text.detach()), (text, picture.detach())):
        for i in range(len(asks)):
            logits = torch.stack([asks[i] @ answer for answer in answers]) / temperature
            log_p = logits - logits.exp().sum().log()
            total = total - (1 - smoothing) * log_p[i] - smoothing * log_p.mean()
    return total / (2 * len(picture))


def test_loss_is_the_formula_on_the_last_query_and_the_first_text_token():
    step, given = built(), batch()
    model = step.trained["model"]
    (part,) = step.run(given, 0, torch.Generator())
    branch, causal = model.text_branch, model.causal_embeddings(model.visual_features(given.images))
    picture = branch.picture_proj(causal[:, -1])
    picture, text = picture / picture.norm(dim=1, keepdim=True), branch(model.qformer, TEXTS)
    torch.testing.assert_close(text.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(part.loss, formula(picture, text, 0.07, 0.1))
    torch.testing.assert_close(model.similarity(given.images, TEXTS[:2]), (picture @ text.T)[:, :2])
    torch.testing.assert_close(model.similarity(given.images[:1], TEXTS[0]), (picture @ text.T)[:1, :1])
    assert float(part.stats["contrastive/temperature"]) == pytest.approx(0.07)


def test_gradients_are_the_formulas_and_reach_everything_that_stage_one_trains():
    features = [torch.nn.functional.normalize(torch.randn(5, 8), dim=1).requires_grad_() for _ in range(2)]
    heat = torch.tensor([0.07], requires_grad=True)
    ours = torch.autograd.grad(contrast(*features, heat, 0.1)[0], [*features, heat])
    theirs = torch.autograd.grad(formula(*features, heat, 0.1).squeeze(), [*features, heat])
    torch.testing.assert_close(ours, theirs)
    step = built()
    (part,) = step.run(batch(), 0, torch.Generator())
    part.loss.backward()
    without = {n.split(".")[0] for n, p in step.trained["model"].named_parameters() if p.grad is None}
    assert without == {n for n in SEED.second_stage if list(getattr(step.trained["model"], n).parameters())}


def test_the_recipes_weight_counts():
    entries = {"contrastive": LossSpec(Weighting(weight=0.5), None)}
    (part,) = built(losses=Losses(entries)).run(batch(), 0, torch.Generator())
    torch.testing.assert_close(part.loss, 0.5 * part.terms["contrastive"])


def test_texts_share_attention_and_have_their_own_mlp():
    model = vistok.create("tokenizer", **FIRST).eval()
    images = torch.rand(1, 3, 56, 56)

    def both():
        out = model(images, captions=TEXTS[:1]).extras
        return out["picture"], out["text"]

    def moved(*parameters):
        old = both()
        with torch.no_grad():
            for p in parameters:
                p += torch.randn_like(p)
        return [not torch.equal(a, b) for a, b in zip(old, both())]

    first = model.qformer.layers[0]
    assert moved(first.fc1.weight) == [True, False]
    assert moved(model.text_branch.layers[0].fc1.weight) == [False, True]
    assert moved(first.attn.value.weight) == [True, True]
    assert moved(first.cross.value.weight) == [True, False]
    texts = model.text_branch(model.qformer, ["a red cup", "a red saucer"])
    assert not torch.allclose(texts[0], texts[1], atol=1e-4)  # the first token sees the last word


def test_padding_and_neighbours_do_not_matter():
    model = vistok.create("tokenizer", **FIRST).eval()
    branch = model.text_branch
    together = branch(model.qformer, TEXTS)
    for text, feature in zip(TEXTS, together):
        torch.testing.assert_close(branch(model.qformer, [text])[0], feature)
    longer = vistok.create("tokenizer", **{**FIRST, "text_branch": {**BRANCH, "length": 40}}).eval()
    longer.load_state_dict(model.state_dict())
    torch.testing.assert_close(longer.text_branch(longer.qformer, TEXTS), together)
    with torch.no_grad():
        branch.words.weight[0] += 1
    assert torch.equal(branch(model.qformer, TEXTS), together)


def test_dropout_is_for_training_only():
    model = vistok.create("tokenizer", **FIRST)
    features = [model(torch.ones(1, 3, 56, 56), captions=["a cup"]).extras for _ in range(2)]
    assert not torch.equal(features[0]["picture"], features[1]["picture"])
    assert not torch.equal(features[0]["text"], features[1]["text"])
    assert model.eval().qformer.layers[0].attn.dropout == 0.1
    assert vistok.create("tokenizer", **MODEL).qformer.dropout == 0.0


@pytest.mark.parity
def test_the_text_branch_is_that_of_transformers_blip_2():
    from transformers import Blip2QFormerConfig
    from transformers.models.blip_2.modeling_blip_2 import Blip2QFormerModel, Blip2TextEmbeddings

    config = Blip2QFormerConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128,
        max_position_embeddings=40, encoder_hidden_size=32, use_qformer_text_input=True, attn_implementation="eager",
    )  # fmt: skip
    theirs, tables = Blip2QFormerModel(config).eval(), Blip2TextEmbeddings(config).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.copy_(torch.randn_like(p) * 0.2)
    ours = vistok.create("tokenizer", **FIRST).eval()
    names = {"attention.attention.": "attention.self.", "layernorm.": "embeddings.LayerNorm."}
    words = {f"embeddings.{k}": v for k, v in tables.state_dict().items() if "position_ids" not in k}
    state = theirs.state_dict() | words
    for there, lavis in names.items():
        state = {re.sub(rf"^{there}" if there == "layernorm." else there, lavis, k): v for k, v in state.items()}
    named = rename({f"Qformer.bert.{k}": v for k, v in state.items()}, (*TEXT_RULES, *RULES))
    own = ours.state_dict()
    assert {k for k in own if k.startswith("qformer.")} == {k for k in named if k.startswith("qformer.")}
    assert {k for k in own if re.match(r"text_branch\.(layers|words|positions)", k)} | set(named) == set(named)
    ours.load_state_dict(own | named)
    ids, mask = ours.text_branch.tokenise(TEXTS)
    with torch.no_grad():
        embedded = tables(input_ids=ids)
        hidden = theirs(query_embeds=embedded, query_length=0, attention_mask=mask.long()).last_hidden_state[:, 0]
        want = torch.nn.functional.normalize(ours.text_branch.proj(hidden), dim=1)
        torch.testing.assert_close(ours.text_branch(ours.qformer, TEXTS), want, rtol=1e-4, atol=1e-5)


LAVIS = (
    (r"^text_branch\.(word|position)s\.", r"Qformer.bert.embeddings.\1_embeddings."),
    (r"^text_branch\.proj\.", "text_proj."),
    (r"^text_branch\.picture_proj\.", "vision_proj."),
    (r"^text_branch\.temperature$", "temp"),
    (r"^text_branch\.(layers\.\d+\.)fc1\.", r"\1intermediate.dense."),
    (r"^text_branch\.(layers\.\d+\.)fc2\.", r"\1output.dense."),
    (r"^text_branch\.(layers\.\d+\.)norm\.", r"\1output.LayerNorm."),
    (r"^qformer\.norm\.", "Qformer.bert.embeddings.LayerNorm."),
    (r"^qformer\.(layers\.\d+\.)fc1\.", r"\1intermediate_query.dense."),
    (r"^qformer\.(layers\.\d+\.)fc2\.", r"\1output_query.dense."),
    (r"^qformer\.(layers\.\d+\.)norm\.", r"\1output_query.LayerNorm."),
    (r"^qformer\.(layers\.\d+\.)attn\.", r"\1attention."),
    (r"^qformer\.(layers\.\d+\.)cross\.", r"\1crossattention."),
    (r"attention\.(query|key|value)\.", r"attention.self.\1."),
    (r"attention\.proj\.", "attention.output.dense."),
    (r"attention\.norm\.", "attention.output.LayerNorm."),
    (r"^layers\.", "Qformer.bert.encoder.layer."),
    (r"^queries$", "query_tokens"),
    (r"^norm_vision\.", "ln_vision."),
)


@pytest.fixture
def blip_2(tmp_path):
    """A model, and its first stage in two files as LAVIS saves them: Q-Former with heads, tower with more blocks."""
    model = vistok.create("tokenizer", **FIRST)
    first = {k: v for k, v in model.state_dict().items() if k.split(".")[0] not in SEED.second_stage}
    tower = {k.removeprefix("vision."): v for k, v in first.items() if k.startswith("vision.")}
    tower |= {"blocks.1.norm1.weight": torch.ones(32), "norm.weight": torch.ones(32)}
    saved = rename({k: v for k, v in first.items() if not k.startswith("vision.")}, LAVIS)
    saved |= {"query_tokens": saved["query_tokens"][None], "temp": saved["temp"].squeeze()}
    saved |= {"itm_head.bias": torch.ones(2), "Qformer.cls.predictions.bias": torch.ones(64)}
    saved["Qformer.bert.embeddings.position_ids"] = torch.arange(40)[None]
    files = tmp_path / "blip2_pretrained.pth", tmp_path / "eva_vit_g.pth"
    torch.save({"model": saved, "epoch": 3}, files[0])
    torch.save(tower, files[1])
    return model, tuple(map(str, files))


def test_it_starts_from_the_files_of_blip_2(blip_2):
    ref, files = blip_2
    model = built(blip_2=files).trained["model"]
    same = {k for k, v in model.state_dict().items() if torch.equal(v, ref.state_dict()[k])}
    assert {k for k in ref.state_dict() if k.split(".")[0] not in SEED.second_stage} <= same
    assert "to_code.0.weight" not in same
    with pytest.raises(LoadError, match=r"blip2_pretrained.pth does not fit SEED: missing \d+ \(vision.blocks"):
        built(blip_2=files[:1])
    with pytest.raises(LoadError, match=r"does not fit SEED: .*wrong shape .*text_branch.words.weight \(64, 32\)"):
        built({**FIRST, "text_branch": {**BRANCH, "vocabulary": 65}}, blip_2=files)
    with pytest.raises(LoadError, match="train.step.blip_2: nothing.pth cannot be read: There is no file"):
        built(blip_2=("nothing.pth",))


@pytest.fixture(scope="module")
def first_stage(tmp_path_factory):
    """A short run of stage I, and the model it began with."""
    out, values = recipe(tmp_path_factory.mktemp("first"), steps=8, global_batch=6)
    torch.manual_seed(0)
    begun = vistok.create("tokenizer", **values["model"])
    result = train(tiny.recipe(out, {**values, "optim": {"lr": 3e-3}}))
    return begun, vistok.load(result.out / "tokenizer"), result.out


def test_the_tower_and_what_comes_later_stand_still_and_the_rest_learns(first_stage):
    begun, done, out = first_stage
    before, after = begun.state_dict(), done.state_dict()
    still = {k for k in before if torch.equal(before[k], after[k])}
    assert still == {k for k in before if k.split(".")[0] in ("vision", *SEED.second_stage)}
    for layer, own in zip(done.qformer.layers, done.text_branch.layers):
        assert not torch.allclose(layer.fc1.weight, own.fc1.weight, atol=1e-3)
    rows = log.read(out / log.METRICS)
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert {"contrastive/retrieved", "contrastive/temperature"} <= set(rows[-1])


def test_stage_two_starts_from_it_without_the_text_branch(first_stage, tmp_path):
    _, done, out = first_stage
    second = {
        "model": {**FIRST, "text_branch": None},
        "losses": None,
        "train": {
            "step": {"name": "seed", "teacher": TEACHER},
            "freeze": ["vision.*", "norm_vision.*", "queries", "qformer.*"],
            "init_from": str(out / "tokenizer"),
            "steps": 1,
        },
    }
    result = train(tiny.recipe(tmp_path, second))
    later = vistok.load(result.out / "tokenizer")
    assert later.text_branch is None
    x = torch.rand(2, 3, 56, 56)
    with torch.no_grad():
        assert torch.equal(later.causal_embeddings(later.visual_features(x)), done(x, captions=TEXTS[:2]).tokens.codes)
    deeper = vistok.create("tokenizer", **{**MODEL, "qformer": {"width": 32, "depth": 3, "heads": 2}})
    with pytest.raises(LoadError, match=r"stage I does not fit SEED: missing .*qformer.layers.2"):
        deeper.start_from(done, "stage I")
    with pytest.raises(LoadError, match=r"missing .*text_branch"):
        done.start_from(later, "stage II")
    same = vistok.create("tokenizer", **second["model"])
    same.start_from(done, "stage I")
    assert same.eval().model_id == done.model_id  # tokens of both are the same


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize(
    "settings", [{}, {**SHARDED, "FSDP_TRANSFORMER_CLS_TO_WRAP": "QFormerLayer"}], ids=["", "fsdp"]
)
def test_two_processes_equal_one_of_twice_the_batch(tmp_path, monkeypatch, settings):
    for key, value in settings.items():
        monkeypatch.setenv(key, value)
    out, values = recipe(tmp_path / "one", steps=8, global_batch=6, save_every=0)
    values["optim"] = {"lr": 1e-4}
    finish(launch(written(tmp_path / "two", values), world=2))
    train(tiny.recipe(out, values))
    rows = [log.read(tmp_path / name / log.METRICS) for name in ("one", "two")]
    for key in ("loss", "loss/contrastive", "grad_norm", "contrastive/retrieved", "contrastive/temperature"):
        one, two = ([row[key] for row in run] for run in rows)
        assert two == pytest.approx(one, abs=1e-5, rel=1e-4), key
    one, two = (tiny.weights(tmp_path / n, 8) for n in ("one", "two"))
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=0, atol=1e-4)


def test_a_bert_tokenizer_of_a_folder_reads_captions(tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "cup", "##s"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    spec = {**BRANCH, "kind": "bert", "model": str(tmp_path), "length": 7}
    branch = vistok.create("tokenizer", **{**FIRST, "text_branch": {**spec, "vocabulary": 10}}).text_branch
    ids, mask = branch.tokenise(["A red cups!", "red " * 9])
    assert ids.tolist() == [[2, 5, 6, 7, 8, 3, 0], [2, 6, 6, 6, 6, 6, 3]]
    assert mask.sum(1).tolist() == [6, 7]
    small = vistok.create("tokenizer", **{**FIRST, "text_branch": {**spec, "vocabulary": 9}}).text_branch
    with pytest.raises(LoadError, match=r"has 10 tokens with \[DEC\].*Set model.text_branch.vocabulary=10"):
        small.tokenise(["a"])
    absent = vistok.create("tokenizer", **{**FIRST, "text_branch": {**spec, "model": str(tmp_path / "no")}})
    with pytest.raises(LoadError, match="BERT tokenizer .*cannot be loaded.*Set model.text_branch.model to a folder"):
        absent.text_branch.tokenise(["a"])


def test_published_sizes_and_cleaned_captions():
    spec = TextBranchSize()
    assert (spec.vocabulary, spec.positions, spec.length, spec.dim, spec.dropout) == (30523, 512, 32, 256, 0.1)
    assert clean('Two  DOGS, "outside" (a house)!\n') == "two dogs, outside a house"
    assert len(clean("word " * 60).split()) == 50


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: built(MODEL), r"reads captions. Set model.text_branch"),
        (lambda: built({"name": "titok_tiny"}), "trains a seed tokenizer, got TiTok"),
        (lambda: built(losses=Losses({"mse": LossSpec(Weighting(), {"name": "mse"})})), "Remove losses.mse"),
        (lambda: built(label_smoothing=1.0), "at least 0 and below 1, got 1.0"),
        (lambda: next(built().run(batch(None), 0, torch.Generator())), "needs a caption for every picture"),
        (lambda: built({**FIRST, "text_branch": {**BRANCH, "length": 41}}), r"length is 3..40 .*got 41"),
        (lambda: built({**FIRST, "text_branch": {**BRANCH, "vocabulary": 3}}), "at least 4, got 3"),
        (lambda: vistok.create("tokenizer", **MODEL).similarity(torch.rand(1, 3, 56, 56), ["a"]), "no text branch"),
    ],
)
def test_misuse_is_one_clear_line(call, message):
    with pytest.raises(ValueError, match=message):
        call()
