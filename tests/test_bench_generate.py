"""The generate bench: each step's logits are the reference's, and every figure is there. Nothing asserts a time."""
from __future__ import annotations

import json
import os

import pytest
from rich.console import Console

from farskip_fx.bench.generate import run, table_of
from farskip_fx.bench.generate_spec import GenerateSpec
from farskip_fx.bench.spec import Shape, SpecError

TINY = Shape(layers=2, hidden=64, tokens=64, experts=4, moe_intermediate=32, heads=2, kv_heads=1, head_dim=32, vocab=64)


@pytest.mark.parametrize("spec, message", [
    (GenerateSpec(shape=TINY, batches=(64,)), "--batch"), (GenerateSpec(shape=TINY, batches=(0,)), "--batch"),
    (GenerateSpec(shape=TINY, new_tokens=2), "--new-tokens"), (GenerateSpec(shape=TINY, ratio=0.0), "--comm-ratio"),
])
def test_what_cannot_be_measured_is_refused(spec, message):
    with pytest.raises(SpecError, match=message):
        spec.check()


def test_spec_round_trip(tmp_path):
    spec = GenerateSpec(shape=TINY, batches=(2, 4), ratio=0.25)
    spec.write(tmp_path / "spec.json")
    assert GenerateSpec.read(tmp_path / "spec.json") == spec


@pytest.mark.slow
def test_end_to_end_without_inductor(tmp_path):
    spec = GenerateSpec(shape=TINY, batches=(4,), new_tokens=4, inner="eager", rounds=1, silence_s=480.0)
    with open(os.devnull, "w") as nowhere:
        result = run(spec, Console(file=nowhere), kinds=("loopback",), json_path=tmp_path / "out.json")
    assert json.loads((tmp_path / "out.json").read_text())["batches"] == json.loads(json.dumps(result["batches"]))
    (batch,) = result["batches"]
    assert (batch["batch"], batch["prompt"]) == (4, 16)
    assert [one["name"] for one in batch["variants"]] == ["stock", "farskip"]
    for one in batch["variants"]:
        assert one["max_diff"] < 1e-5
        assert all(one[f"{what}_{on}_ms"] > 0 for what in ("first", "next") for on in ("fast", "slow"))
    table_of(batch)
