"""Converted checkpoints: what is written, who refuses it, and how it is loaded."""
import copy
import json
import os
import pickle
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Qwen3MoeForCausalLM

import families
import farskip_fx as fs
from farskip_fx.convert import converted_of
from farskip_fx.distill import assert_rewired
from farskip_fx.saved import forget, record

from distill_cases import characters, model_of

IDS = torch.arange(3, 15)[None]
SAVED = {"version": 1, "connectivity": "attn_only", "layers": "all"}


def logits_of(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def same(model, other):
    """The same weights, and converted; without a forward, because each compiles."""
    ours, theirs = model.state_dict(), other.state_dict()
    return (converted_of(model) is not None and converted_of(model).forward.config.saved() == SAVED
            and ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The same weights saved before the conversion and after it, and the converted model."""
    folder = tmp_path_factory.mktemp("pretrained")
    model = model_of().eval()
    model.save_pretrained(folder / "plain")
    fs.apply(model, connectivity="attn_only", inner="eager")
    model.save_pretrained(folder / "converted", max_shard_size="20KB")
    model.save_pretrained(folder / "own_names", save_original_format=False)      # as the checkpoints of `distill`
    characters().save_pretrained(folder / "converted")
    return folder, model


def weights(folder):
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}
    return found


def test_what_is_written(made):
    """Another architecture, the same weights by the same names: those of the release, each expert by itself."""
    folder, _ = made
    written, plain = (json.loads((folder / name / "config.json").read_text()) for name in ("converted", "plain"))
    assert written["model_type"] == "farskip_fx" and written["architectures"] == ["FarskipQwen3MoeForCausalLM"]
    assert written["load_with"] == "farskip_fx.from_pretrained" and written["farskip"] == SAVED
    assert written["original"] == {**plain, "farskip": SAVED}
    ours, theirs = weights(folder / "converted"), weights(folder / "plain")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert "model.layers.1.mlp.experts.3.up_proj.weight" in ours
    assert len(list((folder / "converted").glob("model-*.safetensors"))) > 3


@pytest.mark.parametrize("name", ["converted", "own_names", "of_the_last_release"])
def test_from_pretrained(made, name, tmp_path):
    folder, model = made
    path = folder / name
    if name == "of_the_last_release":
        model.save_pretrained(tmp_path)
        path = tmp_path / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text())["original"]))
        path = tmp_path
    loaded = fs.from_pretrained(path, inner="eager")
    assert type(loaded) is Qwen3MoeForCausalLM and not loaded.training and loaded.config.farskip == SAVED
    assert same(loaded, model)
    with pytest.raises(fs.ConfigError, match="converted already"):
        fs.apply(loaded)
    if name == "converted":
        torch.testing.assert_close(logits_of(loaded), logits_of(model))
        assert assert_rewired(loaded) == 1              # attention 0 reads the embedding in any case


def test_torch_distributed_checkpoint(made, tmp_path):
    """In and out of a loaded model, and from there to the form that is served."""
    folder, model = made
    loaded = fs.from_pretrained(folder / "converted", inner="eager")
    fs.save_checkpoint(tmp_path / "dcp", loaded, step=3)
    with torch.no_grad():
        for parameter in loaded.parameters():
            parameter.zero_()
    assert fs.load_checkpoint(tmp_path / "dcp", loaded)["step"] == 3 and same(loaded, model)
    plain = model_of(seed=1).eval()
    with pytest.warns(fs.FarskipWarning, match="call farskip_fx.apply"):
        fs.load_checkpoint(tmp_path / "dcp", plain)
    plain.save_pretrained(tmp_path / "again")           # not converted yet, but it must be
    assert same(fs.from_pretrained(tmp_path / "again", inner="eager"), model)


ELSEWHERE = """
import sys, torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, Qwen3MoeForCausalLM, pipeline
path = sys.argv[1]
for load in (AutoConfig.from_pretrained, AutoModel.from_pretrained, AutoModelForCausalLM.from_pretrained,
             lambda path: AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True),
             lambda path: pipeline("text-generation", path)):
    try:
        load(path)
    except ValueError as error:
        assert "model type `farskip_fx`" in str(error), error
    else:
        raise SystemExit(f"{load} loaded it")
assert AutoTokenizer.from_pretrained(path)("abc")["input_ids"] == [1, 2, 3]
assert Qwen3MoeForCausalLM.from_pretrained(path).config.farskip["connectivity"] == "attn_only"
assert not any(name.startswith("farskip_fx") for name in sys.modules)
"""


def test_software_that_does_not_know_it_refuses(made):
    """In a process of its own, without farskip_fx. The tokenizer is everybody's."""
    folder, _ = made
    done = subprocess.run([sys.executable, "-c", ELSEWHERE, str(folder / "converted")], capture_output=True, text=True, timeout=240,
                          env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-2000:]


def test_auto_classes_name_the_way(made):
    folder, model = made
    for load in (AutoConfig.from_pretrained, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(fs.ConfigError, match=r"Load it with farskip_fx.from_pretrained\(path\)"):
            load(folder / "converted")
    assert AutoTokenizer.from_pretrained(folder / "converted")("abc")["input_ids"] == [1, 2, 3]
    named = Qwen3MoeForCausalLM.from_pretrained(folder / "converted")        # whoever names the class loads and applies
    with pytest.raises(fs.ConfigError, match="disagrees"):
        fs.apply(named, connectivity="ladder")
    assert same(fs.apply(named, inner="eager"), model)


def edited(made, tmp_path, change):
    text = json.loads((made[0] / "converted" / "config.json").read_text())
    for path in (made[0] / "converted").iterdir():
        (tmp_path / path.name).symlink_to(path)
    change(text)
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(text))
    return tmp_path


@pytest.mark.parametrize("change, error, text", [
    (lambda c: c["farskip"].update(connectivity="ladder"), fs.ConfigError, "two connectivities"),
    (lambda c: [f.update(connectivity="mine") for f in (c["farskip"], c["original"]["farskip"])], fs.ConfigError, "'mine'"),
    (lambda c: [f.update(version=9) for f in (c["farskip"], c["original"]["farskip"])], fs.ConfigError, "reads version 1"),
    (lambda c: c["original"].update(architectures=["MyModel"]), fs.ConfigError, "no class MyModel: import it and give it as model_cl"),
    (lambda c: c["original"].update(num_hidden_layers=3), fs.CheckpointError, "missing keys .model.layers.2"),
    (lambda c: c["original"].update(num_hidden_layers=1), fs.CheckpointError, "unexpected keys .model.layers.1"),
])
def test_damaged(made, tmp_path, change, error, text):
    with pytest.raises(error, match=text):
        fs.from_pretrained(edited(made, tmp_path, change))


@pytest.mark.parametrize("options, text", [
    (dict(connectivity="ladder"), "disagrees with the checkpoint"), (dict(trust_remote_code=True), "model_class="),
    (dict(use_safetensors=False), "a pickle can run code"), (dict(inner="tvm"), "inner='tvm'"),
    (dict(config=object()), "the checkpoint's own"),
])
def test_refused_options(made, options, text):
    with pytest.raises(fs.ConfigError, match=text):
        fs.from_pretrained(made[0] / "converted", **options)


def test_not_a_converted_one(made):
    with pytest.raises(fs.ConfigError, match="load it with AutoModelForCausalLM and call farskip_fx.apply"):
        fs.from_pretrained(made[0] / "plain")


class Mine(Qwen3MoeForCausalLM):
    """A class that is not in transformers."""


def test_a_class_of_ones_own(made, tmp_path):
    model = Mine.from_pretrained(made[0] / "converted")
    fs.apply(model, inner="eager").save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["FarskipMine"]
    with pytest.raises(fs.ConfigError, match="no class Mine: import it"):
        fs.from_pretrained(tmp_path)
    loaded = fs.from_pretrained(tmp_path, model_class=Mine, inner="eager")
    assert type(loaded) is Mine and same(loaded, made[1])


def test_adapters(made, tmp_path):
    """PEFT sees the architecture that it knows; adapters travel without the base, and fit one that was loaded."""
    from peft import LoraConfig, PeftModel, get_peft_model
    torch.manual_seed(0)
    base = fs.from_pretrained(made[0] / "converted", inner="eager")
    assert base.config.to_dict()["model_type"] == "qwen3_moe"
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapters")
    again = PeftModel.from_pretrained(fs.from_pretrained(made[0] / "converted", inner="eager"), tmp_path / "adapters")
    assert same(again, adapted) and any("lora_B" in name for name in again.state_dict())
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["model_type"] == "farskip_fx"


# --- the config's class --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss", "llama4", "nemotron_h"])
def test_configs(family, tmp_path):
    config = families.tiny(family).config
    kind, before = type(config), config.to_json_string()
    config.save_pretrained(tmp_path / "plain")
    record(config, SAVED)
    assert isinstance(config, kind) and type(config).__name__ == kind.__name__ and config.model_type == kind.model_type
    for twin in (copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert type(twin) is type(config) and twin.to_json_string() == config.to_json_string() and twin.farskip == SAVED
    config.save_pretrained(tmp_path / "converted")
    assert json.loads((tmp_path / "converted" / "config.json").read_text())["original"] == {
        **json.loads((tmp_path / "plain" / "config.json").read_text()), "farskip": SAVED}
    forget(config)
    assert type(config) is kind and config.to_json_string() == before
    read = kind.from_pretrained(tmp_path / "converted")
    assert read.farskip == SAVED and {**read.to_dict(), "farskip": 0, "_name_or_path": 0} == {
        **kind.from_pretrained(tmp_path / "plain").to_dict(), "farskip": 0, "_name_or_path": 0}
