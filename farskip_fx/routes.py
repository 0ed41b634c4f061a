"""What the exchanges of tokens are made of: which rows go where, how many, and back.

Terms
    row         a token on its way to a rank
    pair        a (token, expert) pair: `tokens * top_k` of them
    counts      the few numbers that tell each rank what to expect, exchanged first (the counts exchange)
    splits      send and receive sizes of the two big exchanges in rows, read back to the host
    dispatch    rows to the ranks that hold their experts
    combine     results back to the rows' home
"""
from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .collectives import all_to_all
from .passes._torch import allow_scalar_outputs, optimization_hint, override_optimization_hint, patch_dynamo_config
from .payload import travel

RunExperts = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(rows [n, hidden], local expert ids [n, k], weights [n, k]) -> weighted sums [n, hidden], on the local experts."""


@dataclasses.dataclass(frozen=True)
class ExpertGroup:
    """The ranks that together hold all experts once, as plain values: Dynamo, deepcopy and pickle take them as they are.

    Attributes:
        levels: of ranks on several nodes, node by node: the group of this rank's node, and the group of the ranks with its
            place on each node. Empty where nobody asked for them.
    """

    name: str
    size: int
    rank: int
    levels: tuple[ExpertGroup, ...] = ()


@dataclasses.dataclass(frozen=True)
class Options:
    """Of an exchange; the same on all ranks. See `expert_parallel` for what they mean."""

    chunks: int = 1
    payload: str = ""
    backward_payload: str = ""


def parts_of(chunks: int, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """Equal parts of the leading size. Always ``chunks`` of them, on every rank, whatever its number of tokens."""
    if chunks == 1:
        return [tensors]
    size = tensors[0].size(0)
    ends = [size * i // chunks for i in range(chunks + 1)]
    return [tuple(t[first:end] for t in tensors) for first, end in zip(ends, ends[1:])]


def exchange_counts(counts: Tensor, group: ExpertGroup) -> Tensor:
    """[rank, part, n], what goes to each rank -> [rank, part, n], what comes from each."""
    even = [counts.numel() // group.size] * group.size
    return all_to_all(counts.flatten(), even, even, group.name).view(counts.shape)


def on_host(table: Tensor, hints: list[int]) -> list[list[int]]:
    """[rows, size] -> numbers of the host; what the compiler shall assume of each row is ``hints``.

    One tensor, and that one copied to the host first: `.tolist()` on a device tensor synchronises once an element.
    """
    there = table.cpu()
    if not torch.compiler.is_compiling():
        return there.tolist()
    allow_scalar_outputs()
    with patch_dynamo_config(capture_scalar_outputs=True):  # for the tracing of this line only
        rows = there.tolist()
    for row, hint in zip(rows, hints):
        for number in row:
            torch._check(number >= 0)
            override_optimization_hint(number, hint)  # or the compiler's estimates assume absurd sizes
    return rows


class Once:
    """A token goes to each rank that holds some of its experts, once.

    Beside a row travel top_k weights, 0 where the expert is elsewhere, and top_k local ids, ``num_local_experts`` there. The
    same in ``expert_ids``: an id that is one more than all there are is of an expert elsewhere, and goes nowhere.
    """

    def __init__(self, num_local_experts: int, group: ExpertGroup, options: Options, tokens: Tensor, expert_ids: Tensor,
                 weights: Tensor) -> None:
        _require_whole_numbers(num_local_experts, tokens.dtype)
        self.num_local_experts, self.group, self.options = num_local_experts, group, options
        self.tokens, self.expert_ids, self.weights = tokens, expert_ids, weights
        self.rank_of = expert_ids // num_local_experts                                  # [tokens, top_k]
        goes = torch.zeros(group.size + 1, tokens.size(0), dtype=torch.bool, device=tokens.device)
        goes = goes.scatter(0, self.rank_of.t(), torch.ones_like(self.rank_of.t(), dtype=torch.bool))
        pairs = torch.zeros(group.size + 1, dtype=torch.int64, device=tokens.device)
        flat = self.rank_of.reshape(-1)
        pairs = pairs.scatter_add(0, flat, torch.ones_like(flat, dtype=torch.int64))
        self.goes, pairs = goes[:-1], pairs[:-1]                                        # the last rank is nowhere
        self.counts = torch.stack([self.goes.sum(dim=1), pairs], dim=1)

    def sizes(self, received: Tensor) -> Tensor:
        return torch.stack([self.counts[:, 0], received[:, 0], received[:, 1]])

    def hints(self) -> list[int]:
        """With balanced routing: rows to a rank, rows from a rank, pairs from a rank."""
        count, top_k = (optimization_hint(size, 0) for size in self.expert_ids.shape)
        rows = round(count * share_of_tokens(self.num_local_experts * self.group.size, self.num_local_experts, top_k))
        return [rows, rows, count * top_k // self.group.size]

    def dispatch(self, send: list[int], receive: list[int], pairs: Sequence[int] = ()) -> None:
        self.send, self.receive, self.pairs = send, receive, sum(pairs)
        count, top_k = self.expert_ids.shape
        self.going = _places_of(self.goes.flatten(), sum(send))                         # rows by rank, then by token
        self.token_of = self.going % count
        elsewhere = self.rank_of[self.token_of] != (self.going // count).unsqueeze(-1)
        ids = (self.expert_ids % self.num_local_experts)[self.token_of].masked_fill(elsewhere, self.num_local_experts)
        weights = self.weights[self.token_of].masked_fill(elsewhere, 0.0)
        beside = torch.cat([weights, ids.to(weights.dtype)], dim=1)
        self.rows, beside = _travel(self, self.tokens[self.token_of], beside, receive, send)
        self.here = beside[:, :top_k]
        self.ids = beside[:, top_k:].detach().to(torch.int64)

    def arrived(self) -> tuple[Tensor, Tensor, Tensor]:
        """The pairs of the local experts; the other slots of a row are left out before they cost anything."""
        ids = self.ids.flatten()
        pairs = _places_of(ids < self.num_local_experts, self.pairs)
        self.row_of = pairs // self.ids.size(1)
        return self.rows[self.row_of], ids[pairs].unsqueeze(-1), self.here.flatten()[pairs].unsqueeze(-1)

    def combine(self, outputs: Tensor) -> Tensor:
        return self.home(outputs.new_zeros(self.rows.size(0), outputs.size(1)).index_add(0, self.row_of, outputs))

    def home(self, sums: Tensor) -> Tensor:
        """One sum for each row that arrived -> one for each token."""
        back, _ = _travel(self, sums, sums[:, :0], self.send, self.receive)
        whole = back.new_zeros(self.tokens.size(0), back.size(1)).index_add(0, self.token_of, back)
        return whole.to(self.tokens.dtype)


def share_of_tokens(experts: int, local: int, top_k: int) -> float:
    """Of all tokens, those that go to a rank with ``local`` of the experts; balanced routing."""
    return 1 - math.comb(experts - local, top_k) / math.comb(experts, top_k)


def _require_whole_numbers(most: int, dtype: torch.dtype) -> None:
    if most > 2 / torch.finfo(dtype).eps:
        raise ValueError(f"ids of {most} experts would travel as {dtype}, which has no whole numbers so large; use "
                         "exchange='all_to_all_pairs'")


def _places_of(mask: Tensor, count: int) -> Tensor:
    """Where ``mask`` [n] is true, ascending; ``count`` places. Without a sort, and without asking the device how many."""
    slot = torch.where(mask, mask.cumsum(0) - 1, count)         # the others all go into one slot more, which is cut off
    places = torch.arange(mask.numel(), device=mask.device)
    return torch.zeros(count + 1, dtype=torch.int64, device=mask.device).scatter(0, slot, places)[:count]


class Pairs:
    """Each (token, expert) pair is a row, sorted by expert; weights and sums stay at home, so that only rows have
    gradients to carry back."""

    def __init__(self, num_local_experts: int, group: ExpertGroup, options: Options, tokens: Tensor, expert_ids: Tensor,
                 weights: Tensor) -> None:
        self.num_local_experts, self.group, self.options = num_local_experts, group, options
        self.tokens, self.expert_ids, self.weights = tokens, expert_ids, weights
        flat = expert_ids.reshape(-1)
        counts = torch.zeros(group.size * num_local_experts, dtype=torch.int64, device=flat.device)
        counts = counts.scatter_add(0, flat, torch.ones_like(flat, dtype=torch.int64))
        self.order = torch.argsort(flat, stable=True)
        self.counts = counts.view(group.size, num_local_experts)

    def sizes(self, received: Tensor) -> Tensor:
        self.received = received
        return torch.stack([self.counts.sum(1), received.sum(1)])

    def hints(self) -> list[int]:
        return [optimization_hint(self.order.numel(), 0) // self.group.size] * 2

    def dispatch(self, send: list[int], receive: list[int]) -> None:
        self.send, self.receive = send, receive
        rows = self.tokens[self.order // self.expert_ids.size(-1)]
        self.rows, _ = _travel(self, rows, rows[:, :0], receive, send)

    def arrived(self) -> tuple[Tensor, Tensor, Tensor]:
        """Rows arrive by sender, and within a sender by expert."""
        ids = torch.arange(self.num_local_experts, device=self.received.device).repeat(self.group.size)
        ids = ids.repeat_interleave(self.received.reshape(-1), output_size=sum(self.receive)).unsqueeze(-1)
        return self.rows, ids, torch.ones_like(ids, dtype=self.rows.dtype)

    def combine(self, outputs: Tensor) -> Tensor:
        # index_copy undoes the sort; its backward is a gather, where indexing by the inverse would scatter.
        outputs, _ = _travel(self, outputs, outputs[:, :0], self.send, self.receive)
        unsorted = outputs.new_empty(self.order.numel(), outputs.size(-1)).index_copy(0, self.order, outputs)
        weighted = unsorted.view(*self.expert_ids.shape, outputs.size(-1)) * self.weights.unsqueeze(-1)
        return weighted.sum(dim=1).to(self.tokens.dtype)


def _travel(part: Once | Pairs, rows: Tensor, beside: Tensor, receive: list[int], send: list[int]) -> tuple[Tensor, Tensor]:
    return travel(rows, beside, receive, send, part.group.name, payload=part.options.payload,
                  backward_payload=part.options.backward_payload)
