"""Checkpoints in the middle of training: resumed at other numbers of ranks with an equal loss curve; a rank that dies
while it saves; what is refused; safetensors for serving.

The batch of a step is the same for every number of ranks, each of which takes its part of it.
"""
import json
import os
import pickle

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh

import farskip_fx as fs
from ranks import run_each_rank, run_ranks

TOLERANCE = 1e-5
BATCH, TOKENS = 4, 12
SAVED_AT, STEPS = 2, 4


# ---------------------------------------------------------------------------------------------------------------------
# A training loop for any grid of ranks
# ---------------------------------------------------------------------------------------------------------------------


def small(connectivity=None, **sizes):
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
    torch.manual_seed(0)
    defaults = dict(vocab_size=64, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=2,
                    num_attention_heads=2, num_key_value_heads=1, head_dim=16, num_experts=4, num_experts_per_tok=2,
                    initializer_range=0.2, tie_word_embeddings=True)
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**{**defaults, **sizes}))
    return model if connectivity is None else fs.apply(model, connectivity=connectivity, inner="eager")


def sharded(dp, ep):
    """(model, optimizer) on a grid of ranks; expert parameters in a group of their own, without weight decay."""
    model = small()
    if dist.is_initialized():
        fs.expert_parallel(model, init_device_mesh("cpu", (dp, ep), mesh_dim_names=("dp", "ep"))["ep"])
    experts = [p for name, p in model.named_parameters() if ".experts." in name]
    dense = [p for name, p in model.named_parameters() if ".experts." not in name]
    groups = [{"params": dense}, {"params": experts, "weight_decay": 0.0}]
    return model, torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.1)


def train(model, optimizer, steps, dp, ep):
    """The loss of each step, over the whole batch."""
    rank, size = (dist.get_rank(), dp * ep) if dist.is_initialized() else (0, 1)
    experts = {id(p) for p in fs.expert_parameters(model).values()}
    mesh = init_device_mesh("cpu", (dp, ep), mesh_dim_names=("dp", "ep")) if size > 1 else None
    same_experts = mesh["dp"].get_group() if size > 1 else None
    losses = []
    for step in steps:
        tokens = torch.randint(64, (BATCH, TOKENS), generator=torch.Generator().manual_seed(step)).chunk(size)[rank]
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        mean = loss.detach().clone()
        if size > 1:
            for parameter in model.parameters():
                parameter.grad /= size
                dist.all_reduce(parameter.grad, group=same_experts if id(parameter) in experts else None)
            dist.all_reduce(mean)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(mean.item() / size)
        optimizer.param_groups[0]["lr"] *= 0.9
    return losses


# ---------------------------------------------------------------------------------------------------------------------
# Resumed
# ---------------------------------------------------------------------------------------------------------------------


def saves(rank, folder):
    """Two ranks. The uninterrupted run, which saves on the way; the same continued from there; a rank that dies."""
    model, optimizer = sharded(1, 2)
    begin = train(model, optimizer, range(SAVED_AT), 1, 2)
    extra = {"random": torch.get_rng_state(), "rank": rank}
    for _ in range(2):      # the second replaces the first
        fs.save_checkpoint(f"{folder}/run/last", model, optimizer, step=SAVED_AT, extra=extra)
    exported = fs.full_state_dict(model)
    if rank == 0:
        torch.save(logits_of_full(exported), f"{folder}/logits.pt")
        model.save_pretrained(f"{folder}/served", state_dict=exported)      # takes the tied ones out of `exported`
    converted_on_two(rank, folder)
    losses = train(model, optimizer, range(SAVED_AT, STEPS), 1, 2)
    results = {"begin": begin, "losses": losses, "1x2": resumed(folder, 1, 2), "2x1": resumed(folder, 2, 1)}
    try:
        fs.save_checkpoint(f"{folder}/run/other", model, extra=Runs() if rank == 1 else None)
    except fs.FarskipError as error:
        results[f"refused on {rank}"] = str(error)
    torch.save(results, f"{folder}/results{rank}.pt")

    write = dcp.FileSystemWriter.write_data

    def dies(self, *args, **kwargs):
        if rank == 1:
            os._exit(9)
        return write(self, *args, **kwargs)

    dcp.FileSystemWriter.write_data = dies
    fs.save_checkpoint(f"{folder}/run/last", model, optimizer, step=STEPS)


def converted_on_two(rank, folder):
    """A converted checkpoint of one process is loaded on two ranks, and saved from there."""
    if rank == 0:
        small("farskip").save_pretrained(f"{folder}/one", max_shard_size="10KB")
    dist.barrier()
    loaded = fs.from_pretrained(f"{folder}/one", expert_parallel=init_device_mesh("cpu", (2,)), inner="eager")
    state = fs.full_state_dict(loaded)
    if rank == 0:
        loaded.save_pretrained(f"{folder}/two", state_dict=state)
    torch.save(logits_of(loaded), f"{folder}/converted{rank}.pt")       # both ranks send tokens


def logits_of_full(state):
    model = small()
    model.load_state_dict(state)
    return logits_of(model)


def logits_of(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(TOKENS)[None]).logits


def resumed(folder, dp, ep, again=None):
    model, optimizer = sharded(dp, ep)
    loaded = fs.load_checkpoint(f"{folder}/run/last", model, optimizer)
    assert (loaded["step"], loaded["world_size"]) == (SAVED_AT, 2)
    assert loaded["extra"]["rank"] == (dist.get_rank() if dist.is_initialized() and dist.get_rank() < 2 else 0)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    if again is not None:
        fs.save_checkpoint(f"{folder}/{again}", model, optimizer, step=SAVED_AT, extra=loaded["extra"])
    return train(model, optimizer, range(SAVED_AT, STEPS), dp, ep)


def on_four(rank, folder):
    return {"2x2": resumed(folder, 2, 2, again="from_2x2"), "1x4": resumed(folder, 1, 4, again="from_1x4")}


def stored(path):
    """All tensors of a checkpoint, as DCP itself reads them."""
    tensors = {name: torch.zeros(entry.size, dtype=entry.properties.dtype)
               for name, entry in dcp.FileSystemReader(path).read_metadata().state_dict_metadata.items()}
    dcp.load(tensors, checkpoint_id=path)
    return tensors


def test_resumed_on_other_ranks(tmp_path):
    """Saved on dp x ep = 1 x 2; one rank then dies in the next save of the same name. Resumed on 1x2, 2x1, 2x2, 1x4 and
    without torch.distributed."""
    outcomes = run_each_rank(saves, collective_timeout=60, folder=str(tmp_path))
    assert [o.status for o in outcomes] == ["raised", "died"] and outcomes[1].value == 9, outcomes
    assert (tmp_path / "run/.last.partial").is_dir()
    assert fs.latest_checkpoint(tmp_path / "run") == tmp_path / "run/last"
    with pytest.raises(fs.CheckpointError, match="has no farskip.json, which is written last: the save was not"):
        fs.load_checkpoint(tmp_path / "run/.last.partial", small())

    by_rank = [torch.load(tmp_path / f"results{rank}.pt") for rank in range(2)]
    assert by_rank[0].pop("refused on 0").startswith("rank 1 failed: ConfigError: extra holds something")
    assert by_rank[1].pop("refused on 1").startswith("extra holds something")
    assert by_rank[0] == by_rank[1]
    got, whole = by_rank[0], by_rank[0]["losses"]
    assert got["1x2"] == whole                      # the same ranks: to the last bit
    curves = {"2x1": got["2x1"], **run_ranks(on_four, 4, folder=str(tmp_path))[0]}
    curves["alone"] = resumed(tmp_path, 1, 1)
    never = sharded(1, 1)
    assert train(*never, range(SAVED_AT), 1, 1) == pytest.approx(got["begin"], abs=TOLERANCE)
    curves["one process, never interrupted"] = train(*never, range(SAVED_AT, STEPS), 1, 1)
    for name, curve in curves.items():
        assert curve == pytest.approx(whole, abs=TOLERANCE), name

    first = stored(tmp_path / "run/last")
    assert first["optimizer.model.layers.0.mlp.experts.down_proj.exp_avg"].shape == (4, 32, 16)
    assert "model.lm_head.weight" not in first      # tied: kept once
    for again in ("from_2x2", "from_1x4"):          # nothing lost on the way
        second = stored(tmp_path / again)
        assert second.keys() == first.keys() and all(torch.equal(second[name], first[name]) for name in first)

    from transformers import AutoModelForCausalLM
    served = AutoModelForCausalLM.from_pretrained(tmp_path / "served")
    assert torch.equal(logits_of(served), torch.load(tmp_path / "logits.pt"))
    assert list(tmp_path.glob("served/*.safetensors"))

    one, two = small("farskip"), fs.from_pretrained(tmp_path / "two", inner="eager")
    assert len(list(tmp_path.glob("one/*.safetensors"))) > 2
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    for rank in range(2):
        torch.testing.assert_close(torch.load(tmp_path / f"converted{rank}.pt"), logits_of(one), rtol=0, atol=TOLERANCE)


# ---------------------------------------------------------------------------------------------------------------------
# Refused, in one process
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    """A checkpoint of a model converted to farskip, with an optimizer."""
    model = small("farskip")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    fs.save_checkpoint(tmp_path / "a", model, optimizer, step=7, extra=[1, {"two": 2.0}])
    return tmp_path / "a"


def test_connectivity(saved, tmp_path):
    same = small("farskip")
    with torch.no_grad():
        same.lm_head.weight.zero_()
    assert fs.load_checkpoint(saved, same) == {"step": 7, "extra": [1, {"two": 2.0}], "world_size": 1}
    assert same.lm_head.weight.abs().sum() > 0

    new = small()
    with pytest.warns(fs.FarskipWarning, match=r"connectivity 'farskip', and the model is not converted: call "
                                               r"farskip_fx.apply\(model\)"):
        fs.load_checkpoint(saved, new)
    assert new.config.farskip["connectivity"] == "farskip"
    with pytest.raises(fs.ConfigError, match="connectivity='ladder' disagrees with the checkpoint"):
        fs.apply(new, connectivity="ladder")

    before = small("ladder")
    weight = before.lm_head.weight.clone()
    with pytest.raises(fs.ConfigError, match="connectivity='ladder' disagrees with the checkpoint, which says 'fars"):
        fs.load_checkpoint(saved, before)
    assert torch.equal(before.lm_head.weight, weight)

    fs.save_checkpoint(tmp_path / "original", small())
    with pytest.raises(fs.ConfigError, match="connectivity='farskip' disagrees with the checkpoint, which says 'none'"):
        fs.load_checkpoint(tmp_path / "original", same)


def test_incomplete_or_damaged(saved):
    with pytest.raises(fs.CheckpointError, match="is not a folder that this rank can see"):
        fs.load_checkpoint(saved.with_name("b"), small())
    data = saved / "__0_0.distcp"
    data.write_bytes(data.read_bytes()[:-1])
    with pytest.raises(fs.CheckpointError, match=r"is damaged: __0_0.distcp has \d+, and should have \d+ bytes"):
        fs.load_checkpoint(saved, small("farskip"))
    assert fs.latest_checkpoint(saved.parent) is None
    data.unlink()
    with pytest.raises(fs.CheckpointError, match="__0_0.distcp is missing"):
        fs.load_checkpoint(saved, small("farskip"))


def test_dies_between_the_renames(saved):
    saved.rename(saved.with_name(".a.old"))
    assert fs.latest_checkpoint(saved.parent) == saved
    assert fs.load_checkpoint(saved, small("farskip"))["step"] == 7
    fs.save_checkpoint(saved, small("farskip"), step=8)
    assert fs.load_checkpoint(saved, small("farskip"))["step"] == 8
    fs.save_checkpoint(saved.with_name("b"), small("farskip"), step=3)
    assert fs.latest_checkpoint(saved.parent) == saved


class Runs:
    def __reduce__(self):
        return os.mkdir, ("made_by_a_pickle",)


def test_no_code_runs(saved, tmp_path, monkeypatch):
    """Metadata and .pt files that would call something when they are unpickled."""
    monkeypatch.chdir(tmp_path)
    metadata = saved / ".metadata"
    good = metadata.read_bytes()
    manifest = json.loads((saved / "farskip.json").read_bytes())
    for file, error in ((metadata, fs.CheckpointError), (saved / "extra-0.pt", pickle.UnpicklingError)):
        if file is metadata:
            file.write_bytes(pickle.dumps(Runs()))
        else:
            metadata.write_bytes(good)
            torch.save(Runs(), file)
        manifest["files"] |= {file.name: file.stat().st_size, ".metadata": metadata.stat().st_size}
        (saved / "farskip.json").write_text(json.dumps(manifest))
        with pytest.raises(error, match="mkdir"):
            fs.load_checkpoint(saved, small("farskip"))
    assert not (tmp_path / "made_by_a_pickle").exists()
    with pytest.raises(fs.ConfigError, match=r"extra holds something that torch.load\(weights_only=True\) does"):
        fs.save_checkpoint(tmp_path / "b", small(), extra=Runs())
    assert not (tmp_path / "b").exists()


def test_other_model_or_optimizer(saved):
    wider = small("farskip")
    wider.model.norm.weight = torch.nn.Parameter(torch.ones(33))
    with pytest.raises(fs.CheckpointError, match=r"model.norm.weight is torch.float32 of shape \(32,\) in the"):
        fs.load_checkpoint(saved, wider)
    with pytest.raises(fs.CheckpointError, match="is torch.float32 of shape .*, and torch.bfloat16"):
        fs.load_checkpoint(saved, small("farskip").bfloat16())
    more = small("farskip")
    more.extra_layer = torch.nn.Linear(2, 2)
    with pytest.raises(fs.CheckpointError, match="it lacks model.extra_layer.bias, model.extra_layer.weight"):
        fs.load_checkpoint(saved, more)
    model = small("farskip")
    with pytest.raises(fs.ConfigError, match="group 0 of the optimizer .* is none of the checkpoint's groups"):
        fs.load_checkpoint(saved, model, torch.optim.SGD([model.lm_head.weight]))
    with pytest.raises(fs.ConfigError, match="make the optimizer after farskip_fx.expert_parallel"):
        fs.load_checkpoint(saved, model, torch.optim.SGD(more.parameters()))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    fs.load_checkpoint(saved, model, optimizer)
    group = optimizer.param_groups[0]
    assert (group["lr"], group["momentum"]) == (0.5, 0.9)
    assert all(torch.equal(optimizer.state[p]["momentum_buffer"], torch.ones_like(p)) for p in model.parameters())


def test_wrapped(saved):
    """Names are those of the unwrapped model."""
    model = small("farskip")
    wrapped = torch.compile(model, backend="eager")
    assert fs.load_checkpoint(saved, wrapped)["step"] == 7
    fs.save_checkpoint(saved, wrapped, torch.optim.AdamW(wrapped.parameters()), step=9)
    assert fs.load_checkpoint(saved, small("farskip"))["step"] == 9
