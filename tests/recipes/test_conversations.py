"""LLaVA's data files become what the recipes read."""

from __future__ import annotations

import json
import sys

from PIL import Image

from recipes.vlm import conversations
from vistok.data.folder import Folder
from vistok.train.steps.vlm import parse


def test_conversations_lie_beside_their_pictures(tmp_path, monkeypatch, capsys):
    (tmp_path / "a").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "a" / "b.png")
    turns = [("human", "<image>\nWhat is\tthis?"), ("gpt", "A box.\nA black one."), ("human", "Sure?"), ("gpt", "Yes.")]
    told = [{"from": who, "value": text} for who, text in turns]
    samples = [{"image": "a/b.png", "conversations": told}, {"image": "no.png", "conversations": told}]
    (tmp_path / "data.json").write_text(json.dumps([*samples, {"conversations": told}]))
    monkeypatch.setattr(sys, "argv", ["conversations.py", str(tmp_path / "data.json"), str(tmp_path)])
    conversations.main()
    assert "1 conversations beside their pictures, 2 samples left out" in capsys.readouterr().out
    sample = Folder(path=str(tmp_path), captions=True).read(0)
    assert parse(sample.text) == [("What is this?", "A box. A black one."), ("Sure?", "Yes.")]
