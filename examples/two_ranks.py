"""Expert parallelism over torch.distributed, with the exchanges behind compute. CPU (gloo) or GPU (NCCL).

    torchrun --nproc-per-node 2 examples/two_ranks.py

Every rank holds half of the experts and its own tokens. The same script runs on many nodes.
"""
import os

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

import farskip_fx as fs

device = "cuda" if torch.cuda.is_available() else "cpu"
torch.set_num_threads(1)
if device == "cuda":
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
mesh = init_device_mesh(device, (int(os.environ["WORLD_SIZE"]),), mesh_dim_names=("ep",))
rank = dist.get_rank()

torch.manual_seed(0)                                    # every rank builds the same model ...
model = AutoModelForCausalLM.from_config(Qwen3MoeConfig(
    vocab_size=512, hidden_size=128, intermediate_size=256, moe_intermediate_size=64, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, head_dim=32, num_experts=8, num_experts_per_tok=2)).to(device)
fs.expert_parallel(model, mesh["ep"])                   # ... and keeps its share of the experts
fast = torch.compile(model, backend="farskip")

torch.manual_seed(rank)                                 # its own tokens
ids = torch.randint(0, 512, (1, 256), device=device)
loss = fast(ids, labels=ids, use_cache=False).loss
loss.backward()
if rank == 0:
    report = next(r for r in reversed(fs.last_reports()) if r.layers)
    print(report)
    if not report.schedules:
        print("the schedules come from Inductor's cache: run with TORCHINDUCTOR_FORCE_DISABLE_CACHES=1 to see them made")
    for name, schedule in zip(("forward", "backward"), report.schedules):
        print(f"{name}: {len(schedule.collectives)} collectives, simulated {schedule.before_s * 1e3:.1f} ms as "
              f"traced, {schedule.after_s * 1e3:.1f} ms as scheduled")
    print(f"loss {loss.item():.4f}")
dist.destroy_process_group()
