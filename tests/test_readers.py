"""Files from elsewhere: whatever stands in a configuration, a checkpoint's metadata or a report, reading it gives something
that was checked, or an error of this package that says what is wrong. Never a crash, never code that runs.

A good file with a few places changed, cut off, or with bytes flipped; the same in every run. FUZZ_INPUTS says how many a reader.
"""
from __future__ import annotations

import copy
import dataclasses
import io
import json
import os
import pickle
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from rich.console import Console

import farskip_fx as fs
from farskip_fx.checkpoint import _MANIFEST, FORMAT, _manifest, _Reader
from farskip_fx.commands.calibrate import rates_of
from farskip_fx.commands.diff import diff
from farskip_fx.diagnose.planned import planned, ranks_for
from farskip_fx.distill import DistillConfig, Sensitivity
from farskip_fx.distill.sensitivity import LayerSensitivity
from farskip_fx.distill.structure import LayerStructure
from farskip_fx.errors import CheckpointError, FarskipError
from farskip_fx.passes.costs import Rates

INPUTS = int(os.environ.get("FUZZ_INPUTS", 500))
JUNK = (None, "", "x", "none", -1, 0, 1, 2**70, 0.5, float("inf"), float("nan"), True, [], [0], [[]], {}, {"a": 1}, "\0", "../..",
        "1-", "99999999999", "<script>")


def changed(document: object, draw: random.Random) -> object:
    """Up to four values replaced, added or taken out, anywhere."""
    document = copy.deepcopy(document)
    for _ in range(draw.randint(1, 4)):
        places = list(_places(document))
        if not places:
            break
        where, key = draw.choice(places)
        action = draw.random()
        if action < 0.2:
            del where[key]
        elif action < 0.3 and isinstance(where, dict):
            where[draw.choice(["", "version", "layers", "files", "x"])] = draw.choice(JUNK)
        else:
            where[key] = draw.choice(JUNK)
    return document


def _places(value: object) -> Iterator[tuple]:
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield value, key
        yield from _places(value[key])


def texts(document: object, seed: int = 0) -> Iterator[str]:
    draw = random.Random(seed)
    for _ in range(INPUTS):
        text = json.dumps(changed(document, draw))
        if draw.random() < 0.1:
            at = draw.randrange(len(text) + 1)
            text = text[:at] + draw.choice(["", "}", "\0", "é", text[at + 1:]])
        yield text


def outcomes(read: Callable[[str], object], document: object) -> set[str]:
    """"read", and the names of this package's errors; anything else comes through."""
    found = set()
    for text in texts(document):
        try:
            read(text)
            found.add("read")
        except FarskipError as error:
            assert str(error), text
            found.add(type(error).__name__)
    return found


def test_configuration():
    config = fs.FarskipConfig(connectivity={"0-3": "none", "4-": "farskip"}, rates=Rates())
    assert outcomes(fs.FarskipConfig.from_json, config.to_dict()) == {"read", "ConfigError"}
    one = fs.FarskipConfig(layers=[1, 2], payload="int8")
    assert outcomes(fs.FarskipConfig.from_json, one.to_dict()) == {"read", "ConfigError"}


def test_configuration_of_a_distillation():
    document = DistillConfig(layers=[0, 1]).to_dict()
    assert outcomes(lambda text: DistillConfig.from_dict(_mapping(text)), document) == {"read", "ConfigError"}


def _mapping(text: str) -> dict:
    try:
        data = json.loads(text)
    except ValueError:
        return {}
    return data if isinstance(data, dict) else {}


def test_sensitivity_scan(tmp_path):
    layer = LayerSensitivity(kl={"farskip": 0.5}, refused={},
                             structure=LayerStructure(label="layers.0", kind="moe", attention_flops=1e6, rows=2.0, row_bytes=64.0))
    good = Sensitivity(layers=(layer, layer), choices=("farskip",), tokens=64, model="0123").to_dict()
    path = tmp_path / "scan.json"

    def read(text: str) -> Sensitivity:
        path.write_text(text)
        return Sensitivity.load(path)

    assert outcomes(read, json.loads(json.dumps(good))) == {"read", "ConfigError"}


def test_rates(tmp_path):
    path = tmp_path / "rates.json"

    def read(text: str) -> Rates:
        path.write_text(text)
        return rates_of(str(path))

    assert outcomes(read, dataclasses.asdict(Rates())) == {"read", "ConfigError"}


def test_report(tmp_path):
    with ranks_for(2):
        from transformers import Qwen3MoeConfig
        config = Qwen3MoeConfig(vocab_size=32, hidden_size=16, num_hidden_layers=2, intermediate_size=16, moe_intermediate_size=8,
                                num_attention_heads=2, num_key_value_heads=1, head_dim=8, num_experts=4, num_experts_per_tok=2)
        config.save_pretrained(tmp_path / "model")
        model, inputs = planned(tmp_path / "model", tokens=16, ep=2)
        report = json.loads(fs.explain(model, **inputs).to_json())
    for phase in report["phases"]:          # what the timelines draw; thousands of equal rows tell nothing new
        for side in ("before", "after"):
            phase[side].pop("events", None)
    good, other = tmp_path / "good.json", tmp_path / "other.json"
    good.write_text(json.dumps(report))
    screen = Console(file=io.StringIO())

    def read(text: str) -> int:
        other.write_text(text)
        return diff(good, other, screen, as_json=False)

    assert outcomes(read, report) == {"read", "ConfigError"}


def test_manifest_of_a_checkpoint(tmp_path):
    (tmp_path / "extra-0.pt").write_bytes(b"1234")
    good = {"format": FORMAT, "step": 3, "world_size": 2, "connectivity": {"connectivity": "farskip", "layers": "all", "version": 1},
            "files": {"extra-0.pt": 4}}
    (tmp_path / _MANIFEST).write_text(json.dumps(good))
    assert _manifest(tmp_path) == good

    def read(text: str) -> dict:
        (tmp_path / _MANIFEST).write_text(text)
        found = _manifest(tmp_path)
        assert {"format", "step", "world_size", "connectivity", "files"} <= set(found)
        return found

    assert outcomes(read, good) == {"read", "CheckpointError"}


def test_metadata_of_a_checkpoint(tmp_path):
    """A pickle, which DCP made: flipped bytes name other things, or build them from something else."""
    dcp.save({"weight": torch.zeros(4), "step": 3}, checkpoint_id=tmp_path)
    file = tmp_path / ".metadata"
    good, draw, found = file.read_bytes(), random.Random(0), set()
    for _ in range(INPUTS):
        data = bytearray(good)
        for _ in range(draw.randint(1, 3)):
            data[draw.randrange(len(data))] = draw.randrange(256)
        file.write_bytes(data[:draw.randrange(len(data))] if draw.random() < 0.1 else data)
        try:
            _Reader(tmp_path).read_metadata()
            found.add("read")
        except CheckpointError as error:
            assert str(error)
            found.add("CheckpointError")
    assert found == {"read", "CheckpointError"}


@pytest.mark.parametrize("data", [b"\x80\x04]r\xff\xff\xff\x7f.", b"\x80\x04]p2147483647\n.", b"\x80\x05\x96" + b"\xff" * 6 + b"\0\0.",
                                  b"\x80\x04\x8d" + b"\xff" * 6 + b"\0\0."])
def test_metadata_that_wants_all_memory(tmp_path, data):
    """Places of memos and lengths far beyond the file: refused before anything of that size is made."""
    (tmp_path / ".metadata").write_bytes(data)
    with pytest.raises(CheckpointError, match="is damaged: ValueError"):
        _Reader(tmp_path).read_metadata()


class Runs:
    def __reduce__(self):
        return Path.touch, (Path("ran"),)


def test_no_code_of_a_checkpoint_is_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Runs()))
    with pytest.raises(CheckpointError, match="which no checkpoint needs: it is damaged, or made to run code"):
        _Reader(tmp_path).read_metadata()
    assert not Path("ran").exists()
