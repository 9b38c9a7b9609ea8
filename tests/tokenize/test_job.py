"""Shards of tokens: the same bytes whatever the processes and interruptions, nothing lost, nothing twice."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from PIL import Image

import vistok
import vistok.data.base
import vistok.image
from tests.data.test_shards import jpeg, write
from vistok.data.manifest import ManifestError
from vistok.data.token_shards import id_type
from vistok.registry import register
from vistok.tokenize.job import Settings, TokenizeResult, tokenize
from vistok.tokenize.views import Views
from vistok.tokenizers.base import Tokenizer
from vistok.tokens import Tokens


class Colours:
    """Sample i is a picture of noise i with class and caption; those in `broken` cannot be read."""

    def __init__(self, count: int = 22, broken: tuple[int, ...] = (), prefix: str = "colour"):
        self.count, self.broken, self.prefix = count, set(broken), prefix

    def __len__(self):
        return self.count

    def name(self, index):
        return f"{self.prefix} {index}"

    def read(self, index):
        if index in self.broken:
            raise OSError("torn in two")
        noise = np.random.default_rng(index).integers(0, 256, (40, 36, 3), dtype=np.uint8)
        return vistok.data.base.Sample(Image.fromarray(noise), text=f"noise {index}", label=index % 3)


def titok(**config) -> Tokenizer:
    torch.manual_seed(0)
    return vistok.create("tokenizer", "titok_tiny", image_size=32, num_tokens=4, **config).eval()


def job(out: Path, dataset=None, tokenizer=None, *, batch=4, **settings) -> TokenizeResult:
    chosen = Settings(**{"shard_size": 6, **settings})
    return tokenize(tokenizer or titok(), dataset or Colours(), out, data={"name": "toy"}, settings=chosen, batch=batch)


def ids(out: Path, **options):
    return vistok.create("dataset", "ids", path=str(out), **options)


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def expected(dataset: Colours, tokenizer: Tokenizer, index: int) -> torch.Tensor:
    return tokenizer.encode(dataset.read(index).picture).ids


def test_every_sample_is_there_once_with_key_class_and_caption(tmp_path):
    result = job(tmp_path)
    assert (result.samples, result.shards, result.made, result.skipped) == (22, 4, 22, {})
    data, source, tokenizer = ids(tmp_path), Colours(), titok()
    assert len(data) == 22
    for i in range(22):
        sample = data.read(i)
        assert (sample.key, sample.label, sample.text) == (f"colour {i}", i % 3, f"noise {i}")
        assert torch.equal(sample.tokens.ids, expected(source, tokenizer, i))


def test_the_manifest_names_everything(tmp_path):
    tokenizer = titok()
    job(tmp_path, tokenizer=tokenizer, views=Views(augment="flip"))
    found = json.loads((tmp_path / "manifest.json").read_text())
    assert found["identity"]["tokenizer"]["model_id"] == tokenizer.model_id
    assert found["identity"]["tokenizer"]["config"]["num_tokens"] == 4
    assert found["identity"]["preprocess"]["size"] == [32, 32]
    assert found["identity"]["views"] == {"augment": "flip", "count": 2, "enlarge": None}
    assert found["identity"]["data"]["samples"] == found["samples"] == 22
    layout = {k: found["layout"][k] for k in ("kind", "dtype", "tokens", "vocab", "views", "size")}
    assert layout == {"kind": "ids", "dtype": "uint8", "tokens": 4, "vocab": [256], "views": 2, "size": [32, 32]}
    assert found["made_with"]["vistok"] == vistok.__version__
    assert [shard["samples"] for shard in found["shards"]] == [6, 6, 6, 4]
    assert found["complete"] and not list(tmp_path.glob(".shard*"))


def test_a_sample_decodes_to_the_picture(tmp_path):
    tokenizer = titok()
    job(tmp_path, tokenizer=tokenizer)
    tokens = ids(tmp_path, model_id=tokenizer.model_id).read(5).tokens
    want = tokenizer.decode(tokenizer.encode(Colours().read(5).picture))
    assert torch.equal(tokenizer.decode(tokens), want)


@pytest.mark.parametrize("form", ["safetensors", "webdataset"])
def test_the_bytes_are_the_same_every_time(tmp_path, form):
    for name in ("a", "b"):
        job(tmp_path / name, format=form, views=Views(augment="ten-crop"))
    assert content(tmp_path / "a") == content(tmp_path / "b")


def test_both_formats_hold_the_same(tmp_path):
    for form in ("safetensors", "webdataset"):
        job(tmp_path / form, Colours(broken=(3, 4)), format=form, views=Views(augment="flip"))
    one, other = (ids(tmp_path / form) for form in ("safetensors", "webdataset"))
    assert len(one) == len(other) == 20
    for i in range(20):
        mine, theirs = one.read(i), other.read(i)
        assert torch.equal(mine.tokens.ids, theirs.tokens.ids)
        assert (mine.key, mine.text, mine.label) == (theirs.key, theirs.text, theirs.label)


def test_the_tar_is_a_webdataset(tmp_path):
    import tarfile

    job(tmp_path, Colours(2), format="webdataset")
    with tarfile.open(tmp_path / "shard-00000.tar") as tar:
        assert tar.getnames() == [f"{i:09d}.{e}" for i in range(2) for e in ("npy", "json", "cls", "txt")]
        member = tar.extractfile("000000001.npy")
        assert member is not None
        assert np.load(io.BytesIO(member.read()), allow_pickle=False).dtype == np.uint8


def test_broken_pictures_are_skipped_counted_and_named(tmp_path):
    result = job(tmp_path, Colours(broken=(0, 7, 8)))
    assert result.samples == 19
    assert result.skipped == {f"colour {i}": "torn in two" for i in (0, 7, 8)}
    assert json.loads((tmp_path / "manifest.json").read_text())["skipped"] == result.skipped
    data = ids(tmp_path)
    assert [data.name(i) for i in range(3)] == ["colour 1", "colour 2", "colour 3"]


def test_a_shard_of_broken_pictures_alone_has_no_file(tmp_path):
    result = job(tmp_path, Colours(broken=tuple(range(6, 12))))
    assert (result.samples, result.shards) == (16, 3)
    assert not (tmp_path / "shard-00001.safetensors").exists()
    assert ids(tmp_path).name(6) == "colour 12"


def test_nothing_readable_is_an_error_with_its_cause(tmp_path):
    with pytest.raises(ValueError, match="None of the 3 pictures can be read. The first, colour 0: torn in two"):
        job(tmp_path, Colours(3, broken=(0, 1, 2)))


def test_a_finished_folder_is_left_alone(tmp_path):
    job(tmp_path)
    before = content(tmp_path)
    assert job(tmp_path, batch=3).made == 0
    assert content(tmp_path) == before


class Stop(Exception):
    pass


def test_an_interrupted_job_goes_on_to_the_same_bytes(tmp_path):
    job(tmp_path / "whole")
    seen = []

    def stop(done):
        seen.append(done)
        if done >= 14:
            raise Stop

    settings = Settings(shard_size=6)
    with pytest.raises(Stop):
        tokenize(titok(), Colours(), tmp_path / "b", data={"name": "toy"}, settings=settings, batch=4, progress=stop)
    with pytest.raises(ManifestError, match="not finished: 2 of 4 shards"):
        ids(tmp_path / "b")
    (tmp_path / "b" / ".shard-00003.safetensors.x1y2z3").write_bytes(b"half")  # as a kill while writing leaves it
    assert job(tmp_path / "b").made == 10
    assert content(tmp_path / "b") == content(tmp_path / "whole")


def test_a_damaged_or_missing_shard_is_named_and_made_anew(tmp_path):
    job(tmp_path)
    before = content(tmp_path)
    file, gone = tmp_path / "shard-00001.safetensors", tmp_path / "shard-00003.safetensors"
    flipped = bytearray(file.read_bytes())
    flipped[-1] ^= 1
    file.write_bytes(flipped)
    with pytest.raises(ManifestError, match="shard-00001.safetensors has another checksum.*makes missing and damaged"):
        ids(tmp_path, verify=True)
    gone.unlink()
    with pytest.raises(ManifestError, match=r"shard-00003\.safetensors is missing\."):
        ids(tmp_path)
    assert job(tmp_path).made == 10
    assert content(tmp_path) == before


def test_a_cut_off_shard_is_named(tmp_path):
    job(tmp_path)
    file = tmp_path / "shard-00002.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ManifestError, match="shard-00002.safetensors has 100 bytes instead of"):
        ids(tmp_path)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"tokenizer": lambda: titok(quantizer={"dim": 4})}, "tokenizer.model_id was"),
        ({"dataset": lambda: Colours(prefix="other")}, "data.fingerprint was"),
        ({"views": lambda: Views(augment="flip")}, 'views.augment was "none", is "flip"'),
        ({"shard_size": lambda: 7}, "shards.samples was 6, is 7"),
        ({"format": lambda: "webdataset"}, "shards.format was"),
    ],
)
def test_a_folder_of_another_job_is_refused(tmp_path, change, named):
    job(tmp_path)
    before = content(tmp_path)
    with pytest.raises(ManifestError, match=f"tokens of another job: .*{named}.* Choose another --out"):
        job(tmp_path, **{key: make() for key, make in change.items()})
    assert content(tmp_path) == before


@pytest.mark.parametrize(
    ("vocab", "name"),
    [
        ((256,), "uint8"),
        ((257,), "uint16"),
        ((4, 65536), "uint16"),
        ((65537,), "int32"),
        ((2**31,), "int32"),
        ((2**31 + 1,), "int64"),
        ((2**63,), "int64"),
    ],
)
def test_ids_take_the_smallest_type_that_holds_them(vocab, name):
    assert id_type(vocab) == name


class Wide(Tokenizer):
    """Ids of any vocabulary, a function of the picture."""

    def __init__(self, *, vocab: tuple[int, ...] = (2**63,), short: bool = False) -> None:
        super().__init__()
        self.quantizer = vistok.create("quantizer", "vq", codebook_size=4, dim=2)
        self.preprocess, self.num_tokens, self.vocab, self.short = vistok.image.Preprocess(size=(8, 8)), 3, vocab, short

    def encode(self, images, num_tokens=None, **_):
        top = torch.tensor([v - 1 for v in self.vocab])
        found = torch.stack([top, top // 2, top * 0]).expand(len(images), -1, -1)
        lengths = torch.tensor([2 + i % 2 for i in range(len(images))]) if self.short else None
        return Tokens(ids=found.squeeze(-1) if len(self.vocab) == 1 else found, vocab=self.vocab, lengths=lengths)


@pytest.fixture
def wide(scratch_registry):
    register("tokenizer", "wide")(Wide)
    return Wide


@pytest.mark.parametrize("form", ["safetensors", "webdataset"])
@pytest.mark.parametrize("vocab", [(2**63,), (70_000,), (1000,), (256,) * 8, (16, 70_000, 2)])
def test_large_and_grouped_ids_come_back_as_int64(tmp_path, wide, vocab, form):
    tokenizer = wide(vocab=vocab)
    job(tmp_path, Colours(3), tokenizer, format=form)
    found = ids(tmp_path).read(2).tokens
    assert found.ids.dtype == torch.int64 and found.vocab == vocab
    assert torch.equal(found.ids, tokenizer.encode(torch.zeros(1, 3, 8, 8)).ids)


@pytest.mark.parametrize("form", ["safetensors", "webdataset"])
def test_shorter_rows_keep_their_length(tmp_path, wide, form):
    job(tmp_path, Colours(4), wide(vocab=(9,), short=True), format=form)
    assert [int(ids(tmp_path).read(i).tokens.lengths) for i in range(4)] == [2, 3, 2, 3]


def test_ids_outside_the_vocabulary_are_never_written(tmp_path, wide):
    tokenizer = wide(vocab=(9,))
    encode = tokenizer.encode
    tokenizer.encode = lambda *a, **k: Tokens(ids=encode(*a, **k).ids + 1, vocab=(9,))
    with pytest.raises(ValueError, match="outside its vocabulary of 9"):
        job(tmp_path, Colours(3), tokenizer)


def test_a_nested_tokenizer_keeps_a_prefix(tmp_path):
    torch.manual_seed(0)
    tokenizer = vistok.create("tokenizer", "one_d_piece_tiny").eval()
    job(tmp_path / "all", Colours(2), tokenizer)
    job(tmp_path / "few", Colours(2), tokenizer, num_tokens=3)
    every, few = (ids(tmp_path / name).read(1).tokens for name in ("all", "few"))
    assert every.num_tokens == tokenizer.num_tokens
    assert torch.equal(few.ids, every.ids[:, :3])
    assert tokenizer.decode(few).shape == (1, 3, *tokenizer.preprocess.size)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_continuous_latents_are_stored_as_codes(tmp_path, dtype):
    torch.manual_seed(0)
    tokenizer = vistok.create("tokenizer", "titok_tiny", image_size=32, quantizer={"name": "gaussian", "dim": 4}).eval()
    job(tmp_path, Colours(3), tokenizer, codes=dtype)
    tokens = ids(tmp_path).read(2).tokens
    want = tokenizer.encode(Colours().read(2).picture).codes
    assert tokens.ids is None and tokens.codes.dtype == torch.float32
    torch.testing.assert_close(tokens.codes, want.to(getattr(torch, dtype)).float(), rtol=1e-2, atol=1e-4)
    assert tokenizer.decode(tokens).shape == (1, 3, 32, 32)


def test_codes_that_a_type_does_not_hold_are_refused(tmp_path):
    tokenizer = vistok.create("tokenizer", "titok_tiny", image_size=32, quantizer={"name": "gaussian", "dim": 4}).eval()
    encode = tokenizer.encode
    tokenizer.encode = lambda *a, **k: Tokens(ids=None, codes=encode(*a, **k).codes * 0 + 1e5)
    with pytest.raises(ValueError, match=r"Codes reach 1e\+05, which float16 does not hold"):
        job(tmp_path, Colours(2), tokenizer)
    assert job(tmp_path / "b", Colours(2), tokenizer, codes="bfloat16").samples == 2


def test_bfloat16_in_a_tar_is_refused():
    with pytest.raises(ValueError, match="no bfloat16"):
        Settings(format="webdataset", codes="bfloat16")


def test_worker_processes_change_nothing(tmp_path):
    job(tmp_path / "thread", Colours(broken=(3,)))
    settings = Settings(shard_size=6)
    dataset = Colours(broken=(3,))
    with warnings.catch_warnings(action="ignore"):  # torch counts the cores
        tokenize(titok(), dataset, tmp_path / "b", data={"name": "toy"}, settings=settings, batch=4, workers=2)
    assert content(tmp_path / "thread") == content(tmp_path / "b")


def test_a_webdataset_becomes_ids_with_captions_and_classes(tmp_path):
    members = {f"{i}.{end}": data for i in range(3) for end, data in _members(i).items()}
    write(tmp_path / "s.tar", {**members, "1.jpg": b"no picture"})
    spec = {"path": str(tmp_path / "s.tar"), "captions": True, "labels": True, "cache": str(tmp_path / "cache")}
    job(tmp_path / "out", vistok.create("dataset", "webdataset", **spec))
    samples = [ids(tmp_path / "out").read(i) for i in range(2)]
    assert [(s.key, s.text, s.label) for s in samples] == [("s.tar:0", "words 0", 0), ("s.tar:2", "words 2", 2)]


def _members(i: int) -> dict[str, bytes]:
    return {"jpg": jpeg(40 * i), "txt": f"words {i}".encode(), "cls": str(i).encode()}


def test_captions_go_to_a_tokenizer_that_reads_them(tmp_path):
    torch.manual_seed(0)
    tokenizer = vistok.create("tokenizer", "textok_tiny").eval()
    job(tmp_path, Colours(2), tokenizer)
    sample, picture = ids(tmp_path).read(1), Colours().read(1).picture
    assert sample.tokens.text == ("noise 1",)
    want = tokenizer.encode(picture, text="noise 1")
    torch.testing.assert_close(sample.tokens.codes, want.codes, rtol=1e-3, atol=1e-4)  # float16
    assert not torch.allclose(tokenizer.encode(picture).codes, want.codes, atol=0.005)


def test_pictures_of_their_own_size_are_refused(tmp_path):
    tokenizer = titok()
    tokenizer.preprocess = vistok.image.Preprocess(crop="none")
    with pytest.raises(ValueError, match="keeps each picture's own size.*encode --whole"):
        job(tmp_path, tokenizer=tokenizer)


TINY = [name for name in vistok.list("tokenizer") if name.endswith("_tiny")]


@pytest.mark.slow
@pytest.mark.parametrize("name", TINY)
def test_tokens_of_every_tokenizer_come_back(tmp_path, name):
    torch.manual_seed(0)
    tokenizer = vistok.create("tokenizer", name).eval()
    job(tmp_path, Colours(3), tokenizer, batch=3, views=Views(augment="flip"))
    found = ids(tmp_path, verify=True, model_id=tokenizer.model_id).read(2).tokens
    text = {"text": "noise 2"} if "text" in tokenizer.options else {}
    want = tokenizer.encode(Colours().read(2).picture, **text)
    assert (found.vocab, found.grid, found.size) == (want.vocab, want.grid, want.size)
    if want.ids is not None:
        assert torch.equal(found.ids[:1], want.ids)
    else:
        torch.testing.assert_close(found.codes[:1], want.codes, rtol=1e-3, atol=1e-3)
    tokenizer.check_tokens(found)


def work(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    result = job(Path(folder) / "two", Colours(broken=(9,)))
    assert (result.samples, result.made) == (21, 21)
    try:
        job(Path(folder) / "two", Colours(broken=(9,)), shard_size=5)
    except (ManifestError, RuntimeError) as err:
        (Path(folder) / f"refused{rank}").write_text(str(err))
    dist.destroy_process_group()


@pytest.mark.dist
def test_two_processes_write_the_bytes_of_one(tmp_path):
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    mp.spawn(work, args=(str(tmp_path),), nprocs=2)
    job(tmp_path / "one", Colours(broken=(9,)))
    assert content(tmp_path / "two") == content(tmp_path / "one")
    said = [(tmp_path / f"refused{rank}").read_text() for rank in (0, 1)]
    assert all("shards.samples was 6, is 5" in text for text in said)


KILLED = """
import sys, time, torch
from pathlib import Path
from tests.tokenize import test_job as t
real = t.Colours.read
def slow(self, index):
    time.sleep(0.02)
    return real(self, index)
t.Colours.read = slow
torch.set_num_threads(1)
t.job(Path(sys.argv[1]), t.Colours(120, broken=(5, 50)), views=t.Views(augment="flip"))
"""


@pytest.mark.slow
def test_killed_again_and_again_it_loses_and_repeats_nothing(tmp_path):
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    kills = 0
    for _ in range(40):
        process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path / "k")], env=env)
        began, before = time.monotonic(), len(list((tmp_path / "k").glob(".shard-*.json")))
        while process.poll() is None and time.monotonic() - began < 60:
            if len(list((tmp_path / "k").glob(".shard-*.json"))) >= before + 4:
                break
            time.sleep(0.01)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        if process.wait() == 0:
            break
    assert kills >= 3
    job(tmp_path / "whole", Colours(120, broken=(5, 50)), views=Views(augment="flip"))
    assert content(tmp_path / "k") == content(tmp_path / "whole")
    data = ids(tmp_path / "k", verify=True)
    assert [data.name(i) for i in range(len(data))] == [f"colour {i}" for i in range(120) if i not in (5, 50)]
