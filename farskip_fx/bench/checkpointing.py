"""What activation checkpointing saves, and what it runs twice: one process, nothing on a network.

    python -m farskip_fx.bench.checkpointing --layers 4 --tokens 512

HF Qwen3-MoE with expert parallelism over one rank: every exchange is in the graph, and each row travels to itself.
AOTAutograd makes the forward and the backward graph; they run as they are, without Inductor.

none    no checkpointing: all that the backward reads is kept
ours    layers are computed again, exchanges and routing are kept
full    layers are computed again, exchanges included: what PyTorch makes of a checkpointed layer by itself
"""
from __future__ import annotations

import argparse
import time
import warnings

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch.fx import GraphModule, Node
from torch.utils.checkpoint import CheckpointPolicy

from ..passes._torch import optimization_hint
from ..passes.checkpointing import inline_checkpoints, is_exchange
from .model import build, logits_of, loss_of, tokens
from .spec import Shape

CONNECTIVITIES = ("none", "farskip")
KINDS = ("none", "ours", "full")
ROUNDS = 3


def measure(shape: Shape, connectivity: str, kind: str) -> dict[str, float]:
    """One row of the table; ``digest`` is a number made of all gradients."""
    import farskip_fx as fs

    torch._dynamo.reset()
    model, ids = build(shape, seed=0).train(), tokens(shape, seed=0, rank=0)
    fs.expert_parallel(model, dist.group.WORLD)
    if kind != "none":
        model.activation_checkpointing_enable()
    graphs: dict[str, GraphModule] = {}

    def backend(gm, example_inputs):
        inline_checkpoints(gm)
        if connectivity == "none":
            gm.recompile()
        else:
            fs.farskip_backend(gm, example_inputs, options={"inner": "eager", "connectivity": connectivity})
        if kind == "full":
            _compute_all_again(gm)
        return _aot(gm, example_inputs, graphs)

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    seconds = []
    for _ in range(1 + ROUNDS):         # the first compiles
        model.zero_grad(set_to_none=True)
        start = time.perf_counter()
        loss_of(logits_of(compiled, ids), ids).backward()
        seconds.append(time.perf_counter() - start)
    return {"saved": _saved_bytes(graphs), "ms": 1e3 * min(seconds[1:]),
            "forward": _launches(graphs["forward"]), "backward": _launches(graphs["backward"]),
            "digest": sum(p.grad.double().abs().sum().item() for p in model.parameters() if p.grad is not None)}


def _compute_all_again(gm: GraphModule) -> None:
    for module in gm.modules():
        for node in module.graph.nodes if isinstance(module, GraphModule) else ():
            if "recompute" in node.meta:
                node.meta["recompute"] = CheckpointPolicy.PREFER_RECOMPUTE


def _aot(gm: GraphModule, example_inputs: list, graphs: dict[str, GraphModule]):
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.aot_autograd import make_boxed_func
    from torch._functorch.partitioners import min_cut_rematerialization_partition

    def keep(name):
        def compiler(graph, inputs):
            graphs[name] = graph
            return make_boxed_func(graph.forward)
        return compiler

    return aot_autograd(fw_compiler=keep("forward"), bw_compiler=keep("backward"),
                        partition_fn=min_cut_rematerialization_partition)(gm, example_inputs)


def _saved_bytes(graphs: dict[str, GraphModule]) -> int:
    """What the forward computes and keeps for the backward; parameters and inputs are there anyway."""
    taken = {n.name for n in graphs["backward"].graph.nodes if n.op == "placeholder"}
    values = [n.meta["val"] for n in graphs["forward"].graph.output_node().args[0]
              if isinstance(n, Node) and n.op != "placeholder" and n.name in taken]
    return sum(optimization_hint(v.numel(), 0) * v.element_size() for v in values if isinstance(v, torch.Tensor))


def _launches(gm: GraphModule) -> int:
    return sum(is_exchange(n) and "wait_tensor" not in str(n.target) for n in gm.graph.nodes)


def main() -> None:
    shape = Shape()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=shape.layers)
    parser.add_argument("--hidden", type=int, default=shape.hidden)
    parser.add_argument("--tokens", type=int, default=shape.tokens)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    shape = Shape(layers=args.layers, hidden=args.hidden, tokens=args.tokens)
    table = Table(title=f"Qwen3-MoE, {shape.layers} layers, hidden {shape.hidden}, {shape.tokens} tokens, "
                        f"{shape.experts} experts, top-{shape.top_k}; one step, forward + backward")
    for name in ("connectivity", "checkpointing", "saved MB", "exchanges forward", "exchanges backward", "ms",
                 "gradients (sum)"):
        table.add_column(name, justify="left" if name in ("connectivity", "checkpointing") else "right")
    for connectivity in CONNECTIVITIES:
        rows = {kind: measure(shape, connectivity, kind) for kind in KINDS}
        for kind, row in rows.items():
            difference = abs(row["digest"] / rows["none"]["digest"] - 1)
            table.add_row(connectivity, kind, f"{row['saved'] / 1e6:.1f}", str(row["forward"]), str(row["backward"]),
                          f"{row['ms']:.0f}", f"{difference:.0e}")
    Console(width=120).print(table)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
