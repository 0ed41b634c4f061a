"""How much memory the loss takes, beside one that makes all logits: ``python -m farskip_fx.distill.memory``.

Each row is a process of its own: the most that it held while loss and gradients were computed, above what it held before (a
GPU's allocator where there is one, the resident set otherwise).
"""
from __future__ import annotations

import argparse
import multiprocessing
import resource

import torch
from rich.console import Console
from rich.table import Table
from torch.nn import functional as F

from .loss import Dense, Head, distillation_loss

ALL_LOGITS = "all logits"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048, help="of one micro-batch")
    parser.add_argument("--vocabulary", type=int, default=131072)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--chunk-mb", type=float, nargs="+", default=[16, 64, 256])
    given = parser.parse_args()
    table = Table()
    for name in ("loss", "MiB"):
        table.add_column(name, justify="right" if name == "MiB" else "left")
    context = multiprocessing.get_context("spawn")
    for chunk in (ALL_LOGITS, *given.chunk_mb):
        with context.Pool(1) as pool:
            peak = pool.apply(peak_mib, (given.tokens, given.vocabulary, given.hidden, chunk))
        table.add_row(chunk if chunk == ALL_LOGITS else f"chunks of {chunk:g} MiB", f"{peak:.0f}")
    console = Console()
    console.print(f"{given.tokens} tokens, vocabulary {given.vocabulary}, hidden {given.hidden}, float32; the logits of one "
                  f"model are {given.tokens * given.vocabulary / 2**18:.0f} MiB", highlight=False)
    console.print(table)


def peak_mib(tokens: int, vocabulary: int, width: int, chunk: float | str) -> float:
    """Of loss and gradients, the gradient of the head included."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    hidden, other = (torch.randn(tokens, width, device=device) for _ in range(2))
    weight = torch.randn(vocabulary, width, device=device).requires_grad_()
    hidden.requires_grad_()
    targets = torch.randint(vocabulary, (tokens,), device=device)
    (hidden[:1] @ weight[:8].t()).sum().backward()      # what the first backward loads
    hidden.grad = weight.grad = None
    before = _most(device, reset=True)
    if chunk == ALL_LOGITS:
        student, teacher = hidden @ weight.t(), (other @ weight.t()).detach()
        F.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="batchmean").backward()
    else:
        head = Head(weight=weight)
        distillation_loss(hidden, head, Dense(other, head), targets, chunk_mb=chunk)[0].backward()
    return (_most(device) - before) / 2**20


def _most(device: str, reset: bool = False) -> float:
    """Bytes at the worst moment so far."""
    if device == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if reset:
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    return torch.cuda.max_memory_allocated()


if __name__ == "__main__":
    main()
