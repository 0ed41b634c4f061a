"""``expert_parallel(chunks="auto")``: whether an exchange is worth cutting in two, or in four.

In chunks the experts of one part run while another part travels, so of two exchanges and the experts between them the
larger remains and not the sum. That pays where the exchanges take a good part of the experts' time, and costs where the link
is fast: more, smaller kernels. What no chunk hides is the first part's dispatch and the last one's combine: where the
exchanges take much longer than the experts, more and smaller parts leave less of that.

Both times grow with the number of tokens, so their ratio does not depend on it, and ranks with other numbers of tokens decide
alike; ``rates`` are equal on all ranks.
"""
from __future__ import annotations

from torch import nn

from .passes.costs import Rates
from .routes import share_of_tokens

# Exchanges over experts, and chunks from there on. Four instead of two (docs/performance.md): a forward is a fifth faster at
# 7, a training step the same; compile time doubles.
PAYS_FROM = {3.0: 4, 0.5: 2}
_TOP_K = ("num_experts_per_tok", "moe_topk", "moe_top_k", "top_k_experts", "moe_k", "experts_per_token")


def chunks_for(experts: nn.Module, ranks: int, rates: Rates) -> int:
    """1, or 2 or 4 where they pay, for a module of transformers' experts interface that is not sharded yet."""
    weights = [p for p in experts.parameters() if p.dim() == 3]
    if not weights:
        return 1
    top_k = next((k for name in _TOP_K if isinstance(k := getattr(experts.config, name, None), int)), 1)
    local = experts.num_experts // ranks
    rows = (ranks - 1) * share_of_tokens(experts.num_experts, local, min(top_k, experts.num_experts))      # that leave, of a token
    exchanges = 2 * rows * experts.config.hidden_size * weights[0].element_size() / rates.link_bytes
    compute = 2 * top_k * sum(p.numel() for p in weights) / experts.num_experts / rates.matmul_flops
    return next((chunks for share, chunks in PAYS_FROM.items() if exchanges >= share * compute), 1)
