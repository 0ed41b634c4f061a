"""``expert_parallel(chunks="auto")``: whether an exchange is worth cutting in two.

In chunks the experts of one part run while the other part travels, so of two exchanges and the experts between them the
larger remains and not the sum. That pays where the exchanges take a good part of the experts' time, and costs where the link
is fast: more, smaller kernels. Both times grow with the number of tokens, so their ratio does not depend on it, and ranks with
other numbers of tokens decide alike; ``rates`` are equal on all ranks.
"""
from __future__ import annotations

from torch import nn

from .routes import share_of_tokens
from .passes.costs import Rates

PAYS_FROM = 0.5     # exchanges over experts. In the lab two chunks cost 4 % of a step (training) and more of a forward
_TOP_K = ("num_experts_per_tok", "moe_topk", "moe_top_k", "top_k_experts", "moe_k", "experts_per_token")


def chunks_for(experts: nn.Module, ranks: int, rates: Rates) -> int:
    """1, or 2 where it pays, for a module of transformers' experts interface that is not sharded yet."""
    weights = [p for p in experts.parameters() if p.dim() == 3]
    if not weights:
        return 1
    top_k = next((k for name in _TOP_K if isinstance(k := getattr(experts.config, name, None), int)), 1)
    local = experts.num_experts // ranks
    rows = (ranks - 1) * share_of_tokens(experts.num_experts, local, min(top_k, experts.num_experts))      # that leave, of a token
    exchanges = 2 * rows * experts.config.hidden_size * weights[0].element_size() / rates.link_bytes
    compute = 2 * top_k * sum(p.numel() for p in weights) / experts.num_experts / rates.matmul_flops
    return 2 if exchanges >= PAYS_FROM * compute else 1
