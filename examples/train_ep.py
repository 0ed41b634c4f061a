"""Train a small MoE from scratch with data parallelism x expert parallelism. One command, 2 processes or many nodes:

    torchrun --nproc-per-node 2 examples/train_ep.py --steps 50
    torchrun --nproc-per-node 4 examples/train_ep.py --ep 2              # dp 2 x ep 2
    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 examples/train_ep.py --experts 16

With --checkpoints FOLDER, which all ranks see, a run goes on from the last one, also when torchrun --max-restarts starts it again
(with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1; examples/multi_node says why, and is for Slurm, Kubernetes, two nodes on one machine).

The text is the source of Python's standard library, a byte a token: nothing is downloaded.
"""
import argparse
import os
import sysconfig
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

import farskip_fx


def text():
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    return torch.frombuffer(bytearray(b"".join(file.read_bytes() for file in files)), dtype=torch.uint8)


def batch(data, step, rows, length):
    """The same on every rank: (rows, length) tokens of the whole batch of a step."""
    starts = torch.randint(len(data) - length, (rows,), generator=torch.Generator().manual_seed(step))
    return torch.stack([data[s:s + length] for s in starts]).long()


def main(given):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    ep = given.ep or world
    mesh = init_device_mesh(device, (world // ep, ep), mesh_dim_names=("dp", "ep"))

    torch.manual_seed(0)        # the same weights on every rank
    model = AutoModelForCausalLM.from_config(Qwen3MoeConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, moe_intermediate_size=64, head_dim=16, num_hidden_layers=given.layers,
        num_attention_heads=4, num_key_value_heads=2, num_experts=given.experts, num_experts_per_tok=2, use_cache=False)).to(device)
    farskip_fx.expert_parallel(model, mesh["ep"])
    farskip_fx.apply(model, connectivity=given.connectivity, inner=given.inner, data_parallel=mesh["dp"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=given.lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, given.lr, total_steps=given.steps)

    data, begin, first = text(), time.time(), 0
    last = [given.checkpoints and farskip_fx.latest_checkpoint(given.checkpoints)]
    dist.broadcast_object_list(last)    # rank 0's: a network file system may show the others an older state of the folder
    if last[0]:
        state = farskip_fx.load_checkpoint(last[0], model, optimizer)
        first = state["step"]
        schedule.load_state_dict(state["extra"])
        if rank == 0:
            print(f"goes on after step {first}", flush=True)
    for step in range(first, given.steps):
        mine = batch(data, step, given.rows, given.length).chunk(world)[rank].to(device)
        total = torch.zeros((), device=device)
        for rows in mine.chunk(given.accumulate):
            loss = model(input_ids=rows, labels=rows).loss / given.accumulate
            loss.backward()             # the gradients are averaged in here, behind the rest of the backward
            total += loss.detach()
        norm = farskip_fx.clip_grad_norm_(model, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        dist.all_reduce(total)
        if rank == 0 and ((step + 1) % given.print_every == 0 or step == 0):
            print(f"step {step + 1:4}  loss {total / world:.6f}  norm {norm:.3f}  {time.time() - begin:.0f} s", flush=True)
        if given.checkpoints and (step + 1) % given.save_every == 0:
            farskip_fx.save_checkpoint(f"{given.checkpoints}/step-{step + 1:06}", model, optimizer, step=step + 1,
                                       extra=schedule.state_dict())
    dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ep", type=int, help="ranks that share the experts (default: all)")
    parser.add_argument("--connectivity", default="farskip", help="'none' trains the standard connectivity")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--experts", type=int, default=8, help="in a layer; a multiple of --ep")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rows", type=int, default=16, help="sequences in a batch, over all ranks and micro-steps")
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--accumulate", type=int, default=1, help="micro-steps a step")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--inner", default="inductor", help="'eager' starts at once, and hides nothing")
    parser.add_argument("--checkpoints", help="a folder that all ranks see; a run goes on from the last complete one in it")
    parser.add_argument("--save-every", type=int, default=50)
    parser.add_argument("--print-every", type=int, default=10)
    main(parser.parse_args())
