"""WebDataset shards: index, random access, downloads, damage."""

from __future__ import annotations

import functools
import http.server
import io
import json
import tarfile
import threading
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

import vistok
from vistok.data.augment import Augment
from vistok.data.base import fingerprint
from vistok.data.loader import Loader
from vistok.data.shards import expand
from vistok.image import PictureError


def jpeg(colour: int) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (24, 16), (colour, colour, colour)).save(data, "JPEG")
    return data.getvalue()


def write(path, members: dict[str, bytes]):
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture
def folder(tmp_path):
    for shard in range(2):
        members: dict[str, bytes] = {}
        for i in range(3):
            key = f"{shard}{i}"
            members[f"{key}.jpg"] = jpeg(100 * shard + 10 * i)
            members[f"{key}.txt"] = f"picture {key}\n".encode()
            members[f"{key}.cls"] = str(i).encode()
        write(tmp_path / f"set-{shard:03d}.tar", members)
    return tmp_path


def shards(folder, pattern="set-{000..001}.tar", **options):
    return vistok.create("dataset", "webdataset", path=str(folder / pattern), cache=str(folder / "cache"), **options)


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("a.tar", ["a.tar"]),
        ("a-{08..11}.tar", ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar"]),
        ("{x,y}/{0..1}.tar", ["x/0.tar", "x/1.tar", "y/0.tar", "y/1.tar"]),
    ],
)
def test_braces_are_written_out(pattern, names):
    assert expand(pattern) == names


def test_samples_come_in_order_with_captions_and_classes(folder):
    data = shards(folder, captions=True, labels=True)
    samples = [data.read(i) for i in range(len(data))]
    assert [data.name(i) for i in (0, 5)] == ["set-000.tar:00", "set-001.tar:12"]
    assert [s.text for s in samples][::5] == ["picture 00", "picture 12"]
    assert [s.label for s in samples] == [0, 1, 2, 0, 1, 2]
    assert [round(np.asarray(s.picture).mean() / 10) for s in samples] == [0, 1, 2, 10, 11, 12]


def test_caption_may_stand_in_json(tmp_path):
    write(tmp_path / "j.tar", {"a.png": jpeg(5), "a.json": json.dumps({"caption": "five"}).encode()})
    assert shards(tmp_path, "j.tar", captions=True).read(0).text == "five"


def test_members_without_picture_and_unknown_endings_are_left_out(tmp_path):
    write(tmp_path / "m.tar", {"a.txt": b"lonely", "d/b.jpg": jpeg(1), "d/b.npy": b"?"})
    data = shards(tmp_path, "m.tar")
    assert data.keys == ["d/b"]


def test_second_opening_reads_the_index_only(folder, monkeypatch):
    first = fingerprint(shards(folder))
    monkeypatch.setattr(tarfile, "open", None)
    assert fingerprint(shards(folder)) == first


def test_changed_shard_is_indexed_anew(folder):
    assert len(shards(folder, "set-000.tar")) == 3
    write(folder / "set-000.tar", {"only.jpg": jpeg(9)})
    assert shards(folder, "set-000.tar").keys == ["only"]


def test_shards_behind_an_address_are_fetched_once(folder):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        asked: list[str] = []  # noqa: RUF012

        def log_message(self, *words):
            self.asked.append(self.path)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        path = f"http://127.0.0.1:{server.server_port}/set-{{000..001}}.tar"
        for _ in range(2):
            data = vistok.create("dataset", "webdataset", path=path, cache=str(folder / "cache"))
        assert len(data) == 6 and len(Quiet.asked) == 2
        with pytest.raises(FileNotFoundError, match=r"nothing\.tar could not be fetched"):
            bad = path.replace("set-{000..001}", "nothing")
            vistok.create("dataset", "webdataset", path=bad, cache=str(folder / "cache"))
    finally:
        server.shutdown()
        server.server_close()
    assert not list((folder / "cache").glob(".*"))


def test_a_download_that_breaks_off_is_refused_and_not_kept(folder):
    class Short(http.server.BaseHTTPRequestHandler):
        def log_message(self, *words):
            pass

        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", "1000000")
            self.end_headers()
            self.wfile.write((folder / "set-000.tar").read_bytes())

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Short)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        with pytest.raises(FileNotFoundError, match=r"x\.tar could not be fetched: .* of 1000000 bytes; start again"):
            address = f"http://127.0.0.1:{server.server_port}/x.tar"
            vistok.create("dataset", "webdataset", path=address, cache=str(folder / "cache"))
    finally:
        server.shutdown()
        server.server_close()
    assert not any((folder / "cache").iterdir())


def test_damaged_picture_is_skipped_by_the_loader(tmp_path):
    write(tmp_path / "d.tar", {"a.jpg": jpeg(1), "b.jpg": jpeg(2)[:200], "c.jpg": jpeg(3)})
    write(tmp_path / "e.tar", {"a.jpg": b"no picture"})
    data = shards(tmp_path, "d.tar")
    with pytest.raises(PictureError, match=r"d\.tar:b is damaged or not fully written"):
        data.read(1)
    with pytest.raises(PictureError, match=r"e\.tar:a is not a picture that Pillow reads\.$"):
        shards(tmp_path, "e.tar").read(0)
    loader = Loader(data, Augment(size=(8, 8)), seed=0, global_batch=3)
    with warnings.catch_warnings(action="ignore"):
        list(loader.steps(0, 2))
    assert loader.skipped == {"d.tar:b": 2}


def test_shard_cut_off_after_indexing_is_named(folder):
    data = shards(folder, "set-000.tar")
    whole = (folder / "set-000.tar").read_bytes()
    (folder / "set-000.tar").write_bytes(whole[:1000])
    with pytest.raises(OSError, match="ends early"):
        data.read(2)


def test_workers_and_thread_agree(folder):
    made = [
        torch.stack(
            [
                b.images
                for (b,) in Loader(shards(folder), Augment(size=(8, 8)), seed=1, global_batch=4, workers=w).steps(0, 3)
            ]
        )
        for w in (0, 2)
    ]
    assert torch.equal(*made)


@pytest.mark.parametrize(
    ("content", "message"), [(b"no tar at all" * 99, "not a plain tar file"), (None, "no shard .*Patterns are like")]
)
def test_wrong_file_is_named(tmp_path, content, message):
    if content is not None:
        (tmp_path / "x.tar").write_bytes(content)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        shards(tmp_path, "x.tar")


def test_shards_without_pictures_are_refused(tmp_path):
    write(tmp_path / "t.tar", {"a.txt": b"words"})
    with pytest.raises(ValueError, match=r"no picture in the shards .*t\.tar"):
        shards(tmp_path, "t.tar")
