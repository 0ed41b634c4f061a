"""What composes with what in training, row by row: each function trains one step on two ranks and says what came out.

A row returns "equal" (gradients of one process that sees the whole batch, 1e-5 in fp32), "within bf16" where the row is about
16 bits, or the text of the error. ``docs/training.md`` holds the table, ``test_training.py`` runs it.
"""
import copy
import os
import shutil
import tempfile
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from transformers.distributed import DistributedConfig

import farskip_fx as fs
from test_data_parallel import batch, largest_difference, mesh_of, model_of, own_rows, parallel_model, reference, step

BF16 = 3e-2


def outcome(difference, *, tolerance=1e-5, name="equal"):
    return name if difference <= tolerance else f"off by {difference:.1e}"


def converted(model, **options):
    return fs.apply(model, **{"inner": "eager", **options})


def compiled(model, **options):
    return torch.compile(model, backend="farskip", options={"inner": "eager", **options})


def own(rank):
    return own_rows(batch(), rank, 2)


def gradients_equal(model, rank, want, **how):
    step(model, own(rank))
    return outcome(largest_difference(inner_of(model), want), **how)


def inner_of(model):
    for name in ("module", "_orig_mod"):
        model = getattr(model, name, model)
    return model


# --- ours -----------------------------------------------------------------------------------------------------------

def ours_experts(rank):
    model = model_of()
    want = reference(model, batch(), "farskip")
    return gradients_equal(parallel_model(model, mesh_of(1, 2)), rank, want)


def ours_replicas(rank):
    model = model_of()
    want = reference(model, batch(), "farskip")
    return gradients_equal(parallel_model(model, mesh_of(2, 1)), rank, want)


def ours_torch_compile(rank):
    model, mesh = model_of(), mesh_of(1, 2)
    want = reference(model, batch(), "farskip")
    sharded = fs.expert_parallel(copy.deepcopy(model), mesh["ep"])
    parallel = fs.data_parallel(sharded, mesh["dp"], bucket_mb=0.01)
    fast = compiled(sharded, connectivity="farskip", data_parallel=parallel)
    return gradients_equal(fast, rank, want)


def ours_group_in_options(rank):
    fast = compiled(fs.expert_parallel(model_of(), mesh_of(1, 2)["ep"]), data_parallel=mesh_of(1, 2)["dp"])
    step(fast, own(rank))


# --- what people have -------------------------------------------------------------------------------------------------

def _ddp(rank, optimizer):
    model = model_of()
    want = reference(model, batch(), "farskip")
    # Small enough buckets that DDPOptimizer has something to split.
    with torch._dynamo.config.patch(optimize_ddp=optimizer), mock.patch.object(dist, "_DEFAULT_FIRST_BUCKET_BYTES", 2000):
        fast = compiled(DistributedDataParallel(copy.deepcopy(model), bucket_cap_mb=0.01), connectivity="farskip")
        return gradients_equal(fast, rank, want)


def ddp_no_optimization(rank):
    return _ddp(rank, "no_optimization")


def ddp_default(rank):
    return _ddp(rank, "ddp_optimizer")


def ddp_around_applied(rank):
    model = model_of()
    want = reference(model, batch(), "farskip")
    return gradients_equal(DistributedDataParallel(converted(copy.deepcopy(model))), rank, want)


def _full(model):
    return {n: p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad for n, p in model.named_parameters()}


def _off(got, want):
    return max(((got[n] - want[n]).abs().max() / want[n].abs().max().clamp(min=1e-6)).item() for n in want)


def fsdp_on_the_root(rank):
    model = model_of()
    want = reference(model, batch(), "farskip")
    sharded = fully_shard(copy.deepcopy(model), mesh=mesh_of(2, 1)["dp"])
    step(compiled(sharded, connectivity="farskip"), own(rank))
    return outcome(_off(_full(sharded), want))


def fsdp_on_each_layer(rank):
    model, mesh = copy.deepcopy(model_of()), mesh_of(2, 1)["dp"]
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    step(compiled(fully_shard(model, mesh=mesh), connectivity="farskip"), own(rank))


def replicate_(rank):
    from torch.distributed._composable.replicate import replicate
    model = model_of()
    want = reference(model, batch(), "farskip")
    copied = replicate(copy.deepcopy(model), process_group=mesh_of(2, 1)["dp"].get_group())
    with torch._dynamo.config.patch(optimize_ddp="no_optimization"):
        return gradients_equal(compiled(copied, connectivity="farskip"), rank, want)


def _tensor_parallel(rank, connectivity):
    """transformers shards while it reads a checkpoint, and both ranks have the same batch. Its parameters are DTensors."""
    model, folder = model_of(num_attention_heads=4, num_key_value_heads=2), [tempfile.mkdtemp() if rank == 0 else None]
    want = reference(model, batch(), connectivity)
    torch._dynamo.reset()
    dist.broadcast_object_list(folder)
    try:
        if rank == 0:
            model.save_pretrained(folder[0])
        dist.barrier()
        sharded = AutoModelForCausalLM.from_pretrained(folder[0], distributed_config=DistributedConfig(tp_plan="auto"))
        dist.barrier()
    finally:
        if rank == 0:
            shutil.rmtree(folder[0])
    step(converted(sharded, connectivity=connectivity), batch())
    return outcome(_off(_full(sharded), want))


def tensor_parallel(rank):
    return _tensor_parallel(rank, "none")


def tensor_parallel_rewired(rank):
    return _tensor_parallel(rank, "ladder")


def one_layer(rank):
    model = model_of()
    for layer in model.model.layers:
        layer.forward = torch.compile(layer.forward, backend="farskip", options={"inner": "eager"})
    step(model, own(rank))


def head_outside(rank):
    model = model_of()
    fast = parallel_model(model, mesh_of(2, 1))
    hidden = fast.model(input_ids=own(rank)).last_hidden_state
    fast.lm_head(hidden).sum().backward()


# --- numbers --------------------------------------------------------------------------------------------------------------

def autocast(rank):
    model = model_of()
    want = reference(model, batch(), "farskip")
    fast = parallel_model(model, mesh_of(1, 2))
    with torch.autocast("cpu", torch.bfloat16):
        loss = fast(input_ids=own(rank), labels=own(rank)).loss
    loss.backward()
    kept = {p.grad.dtype for p in fast.parameters() if p.grad is not None}
    return outcome(largest_difference(fast, want), tolerance=BF16, name="within bf16") if kept == {torch.float32} else str(kept)


def bf16_parameters(rank):
    model = model_of()
    want = reference(model, batch(), "farskip")
    fast = parallel_model(model.to(torch.bfloat16), mesh_of(1, 2))
    return gradients_equal(fast, rank, {n: g.to(torch.bfloat16) for n, g in want.items()}, tolerance=2 * BF16, name="within bf16")


def fp32_masters(rank):
    """bf16 parameters, fp32 copies in the optimizer: the copies see the averaged gradients."""
    model = model_of()
    fast = parallel_model(model.to(torch.bfloat16), mesh_of(1, 2))
    masters = {n: p.detach().float().clone().requires_grad_() for n, p in fast.named_parameters()}
    optimizer = torch.optim.SGD(masters.values(), lr=0.1)
    step(fast, own(rank))
    for name, parameter in fast.named_parameters():
        masters[name].grad = parameter.grad.float()
    before = {n: m.detach().clone() for n, m in masters.items()}
    optimizer.step()
    with torch.no_grad():
        for name, parameter in fast.named_parameters():
            parameter.copy_(masters[name])
    moved = all(torch.allclose(masters[n], before[n] - 0.1 * masters[n].grad) for n in masters)
    dense = torch.cat([m.detach().reshape(-1) for n, m in masters.items() if "experts" not in n])
    other = dense.clone()
    dist.broadcast(other, 0)
    return "equal" if moved and torch.equal(other, dense) else "the copies differ"


def auxiliary_loss(rank):
    """The load-balancing loss of each rank's own tokens, averaged, as stock data parallelism has it."""
    model = model_of(output_router_logits=True, router_aux_loss_coef=0.1)
    want, plain = {}, converted(copy.deepcopy(model), connectivity="farskip")
    for other in range(2):
        step(plain, own(other))
    want = {n: p.grad / 2 for n, p in plain.named_parameters()}
    torch._dynamo.reset()
    return gradients_equal(parallel_model(model, mesh_of(1, 2)), rank, want)


def padded_batches(rank):
    model, ids = model_of(), batch()
    mask = torch.ones_like(ids)
    mask[::2, :4] = 0
    labels = ids.masked_fill(mask == 0, -100)
    whole = converted(copy.deepcopy(model), connectivity="farskip")
    whole(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
    want = {n: p.grad for n, p in whole.named_parameters()}
    torch._dynamo.reset()
    fast = parallel_model(model, mesh_of(1, 2))
    mine = [own_rows(t, rank, 2) for t in (ids, mask, labels)]
    # Ranks have the same number of labels here; in general pass num_items_in_batch, as Trainer does.
    fast(input_ids=mine[0], attention_mask=mine[1], labels=mine[2]).loss.backward()
    return outcome(largest_difference(fast, want))


def packed_batches(rank):
    model, ids = model_of(), batch()
    positions = torch.cat([torch.arange(5), torch.arange(7)]).expand_as(ids)
    whole = converted(copy.deepcopy(model), connectivity="farskip")
    whole(input_ids=ids, position_ids=positions, labels=ids).loss.backward()
    want = {n: p.grad for n, p in whole.named_parameters()}
    torch._dynamo.reset()
    fast, mine = parallel_model(model, mesh_of(1, 2)), own(rank)
    fast(input_ids=mine, position_ids=own_rows(positions, rank, 2), labels=mine).loss.backward()
    return outcome(largest_difference(fast, want))


def dropout(rank):
    """Each rank its own seed: masks differ between ranks, and the gradients are averaged all the same."""
    model, mesh = model_of(attention_dropout=0.3), mesh_of(2, 1)
    want = {}
    for other in range(2):
        torch._dynamo.reset()
        plain = converted(copy.deepcopy(model), connectivity="farskip")
        torch.manual_seed(other)
        step(plain, own(other))
        for n, p in plain.named_parameters():
            want[n] = want.get(n, 0) + p.grad / 2
    torch._dynamo.reset()
    fast = parallel_model(model, mesh)
    torch.manual_seed(rank)
    return gradients_equal(fast, rank, want)


# --- drivers ----------------------------------------------------------------------------------------------------------------

class _Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        row = batch()[index]
        return {"input_ids": row, "labels": row}


def trainer(rank):
    """HF Trainer under torchrun: it wraps a model in DDP, which leaves the experts' shards alone; ours averages all."""
    model = model_of()
    want = reference(model, batch(), "farskip")
    fast = parallel_model(model, mesh_of(1, 2))
    seen = {}

    class Watch(Trainer):
        def training_step(self, *args, **kwargs):
            loss = super().training_step(*args, **kwargs)
            seen.setdefault("off", largest_difference(inner_of(fast), want))
            return loss

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(folder, per_device_train_batch_size=4, max_steps=1, use_cpu=True, report_to=[],
                                      save_strategy="no", disable_tqdm=True, seed=0, learning_rate=1e-3)
        Watch(model=fast, args=arguments, train_dataset=_Rows()).train()
    return outcome(seen["off"])


def accelerate_(rank):
    from accelerate import Accelerator
    model = model_of()
    want = reference(model, batch(), "farskip")
    accelerator = Accelerator(cpu=True)
    fast = parallel_model(model, mesh_of(1, 2))
    optimizer = accelerator.prepare(torch.optim.AdamW(fast.parameters(), lr=1e-3))
    ids = own(rank)
    accelerator.backward(fast(input_ids=ids, labels=ids).loss)
    found = outcome(largest_difference(fast, want))
    optimizer.step()
    return found


ROWS = {
    "`expert_parallel` + `apply(model, data_parallel=mesh[\"dp\"])`, ep 2": ours_experts,
    "the same, dp 2": ours_replicas,
    "`torch.compile(model, backend=\"farskip\", options={\"data_parallel\": data_parallel(model, mesh[\"dp\"])})`": ours_torch_compile,
    "a group or a mesh in `options`": ours_group_in_options,
    "the head outside of the compiled graph": head_outside,
    "DDP, `optimize_ddp=\"no_optimization\"`": ddp_no_optimization,
    "DDP, default (`DDPOptimizer`)": ddp_default,
    "DDP around a model converted by `apply`": ddp_around_applied,
    "FSDP2 on the root": fsdp_on_the_root,
    "FSDP2 on each layer": fsdp_on_each_layer,
    "`replicate`": replicate_,
    "transformers' `DistributedConfig(tp_plan=\"auto\")`, `connectivity=\"none\"`": tensor_parallel,
    "the same, `connectivity=\"ladder\"` or `\"farskip\"`": tensor_parallel_rewired,
    "each layer compiled by itself": one_layer,
    "autocast to bf16": autocast,
    "bf16 parameters": bf16_parameters,
    "fp32 master weights": fp32_masters,
    "router auxiliary loss": auxiliary_loss,
    "padded batches": padded_batches,
    "packed batches": packed_batches,
    "dropout, a seed for each rank": dropout,
    "HF Trainer": trainer,
    "accelerate": accelerate_,
}


def run_rows(rank, *, names):
    os.environ.update(ACCELERATE_USE_CPU="true", MASTER_ADDR="127.0.0.1", MASTER_PORT="29512")     # as torchrun does
    found = {}
    for name in names:
        torch._dynamo.reset()
        try:
            found[name] = ROWS[name](rank)
        except Exception as error:      # noqa: BLE001 - the outcome of a row
            inner = getattr(error, "inner_exception", error)
            found[name] = f"{type(inner).__name__}: {inner}"
    return found
