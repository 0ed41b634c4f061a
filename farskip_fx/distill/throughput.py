"""What a distillation step costs beside a plain training step of the same model: ``python -m farskip_fx.distill.throughput``.

The model is Qwen3-MoE of the given sizes over bytes; both steps are forward, backward, clipping and AdamW on the same tokens, run
by the same ``inner``, in turn, in one process. The distillation step has the teacher's forward in it (``teacher="copy"``); the last
row also has the states between layers in its loss, and Muon instead of AdamW.
"""
from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from ..bench.curves import model_of
from ..convert import apply
from .evaluation import targets_of
from .head import hidden_states
from .loss import distillation_loss
from .muon import Muon, groups_of
from .states import states_loss
from .teacher import make_teacher


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--inner", choices=("inductor", "eager"), default="eager")
    given = parser.parse_args()
    torch.manual_seed(0)
    model = model_of(given.layers, given.hidden).train().to("cuda" if torch.cuda.is_available() else "cpu")
    ids = torch.randint(256, (given.rows, given.length), device=model.device)
    plain, student, short = (copy.deepcopy(model) for _ in range(3))
    steps = {"plain training": plain_step(apply(plain, connectivity="none", inner=given.inner), ids),
             "distillation": distillation_step(student, ids, given.inner),
             "with states and Muon": distillation_step(short, ids, given.inner, short=True)}
    seconds = {name: [] for name in steps}
    for number in range(given.rounds + 2):
        for name, step in steps.items():
            began = time.perf_counter()
            step()
            if number > 1:      # the first two compile
                seconds[name].append(time.perf_counter() - began)
    first = statistics.median(seconds["plain training"])
    table = Table()
    for name in ("step", "ms", "against plain training"):
        table.add_column(name, justify="left" if name == "step" else "right")
    for name, all_of in seconds.items():
        table.add_row(name, f"{1e3 * statistics.median(all_of):.0f}", f"{statistics.median(all_of) / first:.2f}x")
    Console().print(table)


def plain_step(model: nn.Module, ids: Tensor) -> Callable[[], None]:
    return _step(model, lambda: model(input_ids=ids, labels=ids, use_cache=False).loss)


def distillation_step(model: nn.Module, ids: Tensor, inner: str, short: bool = False) -> Callable[[], None]:
    teacher = make_teacher("copy", model, inner=inner)
    apply(model, connectivity="farskip", inner=inner)
    targets = targets_of({"input_ids": ids})
    call = dict(input_ids=ids, use_cache=False, **({"output_hidden_states": True} if short else {}))

    def loss() -> Tensor:
        target = teacher(**call)
        hidden, output = hidden_states(model, **call)
        own = model.get_output_embeddings().weight
        found = distillation_loss(hidden, teacher.head.with_weights(own, None), target, targets)[0]
        return found + states_loss(output.hidden_states, target.states, targets) if short else found
    return _step(model, loss, Muon(groups_of(model, 0.0), lr=1e-5) if short else None)


def _step(model: nn.Module, loss: Callable[[], Tensor], optimizer: torch.optim.Optimizer | None = None) -> Callable[[], None]:
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=1e-5)

    def step() -> None:
        loss().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    return step


if __name__ == "__main__":
    main()
