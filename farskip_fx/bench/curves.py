"""Loss curves: does overlap leave training as it is, and what does a connectivity cost when a model is trained from scratch?

    torchrun --nproc-per-node 2 -m farskip_fx.bench.curves --steps 200                     # stock against overlap
    python -m farskip_fx.bench.curves --settings none farskip --inner eager --steps 1000 --seeds 3

The model and the text are those of ``examples/train_ep.py``: Qwen3-MoE, the source of Python's standard library, a byte a
token. Every 20th file is held out. All settings see the same batches from the same weights; a seed changes both. Under
torchrun the ranks share the experts (expert parallelism) and each batch; started plainly, one process does the same without
collectives. Losses are in nats a byte.
"""
from __future__ import annotations

import argparse
import json
import os
import statistics
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from .progress import Progress

SETTINGS = {"stock": {"connectivity": "none", "overlap": False}, "none": {"connectivity": "none"},
            "farskip": {"connectivity": "farskip"}, "ladder": {"connectivity": "ladder"},
            "attn_only": {"connectivity": "attn_only"}, "mlp_only": {"connectivity": "mlp_only"}}
HELD_OUT_EVERY, HELD_OUT_ROWS = 20, 512
SAY_EVERY_S = 20.0


def text() -> tuple[Tensor, Tensor]:
    """Bytes for training, and bytes of other files."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    held_out = files[::HELD_OUT_EVERY]
    parts = ([file for file in files if file not in held_out], held_out)
    return tuple(torch.frombuffer(bytearray(b"".join(f.read_bytes() for f in part)), dtype=torch.uint8) for part in parts)


def rows_of(data: Tensor, seed: int, rows: int, length: int) -> Tensor:
    """[rows, length] tokens from random places, equal on every rank."""
    starts = torch.randint(len(data) - length, (rows,), generator=torch.Generator().manual_seed(seed))
    return torch.stack([data[s:s + length] for s in starts]).long()


def model_of(layers: int, hidden: int) -> nn.Module:
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    return AutoModelForCausalLM.from_config(Qwen3MoeConfig(
        vocab_size=256, hidden_size=hidden, intermediate_size=2 * hidden, moe_intermediate_size=hidden, head_dim=hidden // 4,
        num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2, num_experts=8, num_experts_per_tok=2,
        use_cache=False))


def curve(setting: str, seed: int, args: argparse.Namespace, said: Callable[[int, float], None] = lambda *_: None) -> dict:
    """Train once. ``losses``: of each step's batch, before the step; ``held_out``: the mean after the last one."""
    import farskip_fx as fs

    torch._dynamo.reset()
    torch.manual_seed(seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, training, held_out = model_of(args.layers, args.hidden).to(device), *text()
    rank, world, parallel = 0, 1, {}
    if dist.is_initialized():
        rank, world = dist.get_rank(), dist.get_world_size()
        fs.expert_parallel(model)
        parallel = {"data_parallel": fs.data_parallel(model)}
    fs.apply(model, **SETTINGS[setting], inner=args.inner, **parallel)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=args.steps)

    def loss_of(ids: Tensor) -> Tensor:
        own = ids.chunk(world)[rank].to(device)
        return model(input_ids=own, labels=own).loss

    losses = []
    for step in range(args.steps):
        loss = loss_of(rows_of(training, seed * args.steps + step, args.rows, args.length))
        loss.backward()
        fs.clip_grad_norm_(model, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(_mean(loss, world))
        said(step, losses[-1])
    with torch.no_grad():
        batches = rows_of(held_out, 0, HELD_OUT_ROWS, args.length).split(args.rows)
        return {"setting": setting, "seed": seed, "losses": losses,
                "held_out": statistics.mean(_mean(loss_of(ids), world) for ids in batches)}


def _mean(loss: Tensor, world: int) -> float:
    total = loss.detach().clone()
    if world > 1:
        dist.all_reduce(total)
    return total.item() / world


def compare(curves: list[dict]) -> list[dict]:
    """One row a setting: held-out losses by seed, and what differs from the first setting with the same seed."""
    first = {c["seed"]: c for c in curves if c["setting"] == curves[0]["setting"]}
    rows = []
    for setting in dict.fromkeys(c["setting"] for c in curves):
        own = [c for c in curves if c["setting"] == setting]
        held_out = [c["held_out"] for c in own]
        rows.append({
            "setting": setting, "held_out": held_out, "held_out_mean": statistics.mean(held_out),
            "last_tenth": statistics.mean(loss for c in own for loss in c["losses"][-max(1, len(c["losses"]) // 10):]),
            "largest_difference": max(abs(a - b) for c in own for a, b in zip(c["losses"], first[c["seed"]]["losses"])),
            "relative": statistics.mean(held_out) / statistics.mean(c["held_out"] for c in first.values()) - 1})
    return rows


def table_of(rows: list[dict], args: argparse.Namespace, world: int) -> Table:
    table = Table(title_justify="left", title=(
        f"{args.layers} layers, hidden {args.hidden}; {args.steps} steps of {args.rows} x {args.length} tokens, "
        f"lr {args.lr:g}; inner {args.inner}, {world} rank(s)"))
    for name in ("setting", "held-out loss by seed", "mean", f"over {rows[0]['setting']}", "training loss, last 10 %",
                 "largest difference of the curve"):
        table.add_column(name, justify="left" if name == "setting" else "right")
    for row in rows:
        table.add_row(row["setting"], " ".join(f"{loss:.4f}" for loss in row["held_out"]), f"{row['held_out_mean']:.4f}",
                      f"{row['relative']:+.2%}", f"{row['last_tenth']:.4f}", f"{row['largest_difference']:.1e}")
    return table


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=["stock", "none"], metavar="NAME",
                        help=f"of {', '.join(SETTINGS)}; the first is what the others are compared with (stock none)")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=1, help="runs of each setting (1)")
    parser.add_argument("--rows", type=int, default=16, help="sequences in a batch, over all ranks (16)")
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--inner", choices=("inductor", "aot_eager", "eager"), default="inductor")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the curves there")
    return parser.parse_args(given)


def main(given: list[str] | None = None) -> list[dict]:
    args = arguments(given)
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("gloo")
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    console = Console(width=140, quiet=rank > 0)
    progress, curves = Progress(console), []
    for seed in range(args.seeds):
        for setting in args.settings:
            began = spoke = time.monotonic()

            def said(step: int, loss: float) -> None:
                nonlocal spoke
                if time.monotonic() - spoke > SAY_EVERY_S:
                    spoke = time.monotonic()
                    left = (spoke - began) / (step + 1) * (args.steps - step - 1)
                    progress.say(f"{setting}, seed {seed}: step {step + 1} of {args.steps}, loss {loss:.3f}, "
                                 f"{left:.0f} s left")

            curves.append(curve(setting, seed, args, said))
            progress.say(f"{setting}, seed {seed}: held-out loss {curves[-1]['held_out']:.4f}")
    rows = compare(curves)
    console.print(table_of(rows, args, world))
    if args.json and rank == 0:
        settings = {name: value for name, value in vars(args).items() if name != "json"}
        args.json.write_text(json.dumps({"arguments": settings, "world": world, "rows": rows, "curves": curves}, indent=1))
    return rows


if __name__ == "__main__":
    main()
    if dist.is_initialized():
        dist.destroy_process_group()
