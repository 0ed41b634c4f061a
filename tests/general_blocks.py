"""Blocks of general residual programs: mixers, dense MLPs, MoEs, a per-layer input.

Terms
  x          what the block reads of the stream, before its own norm, in the layout of the program
  parts      (routed, shared): the two terms of its contribution, either None where there is none
  context    what blocks give to each other beside the stream: keys and values, indices, the ids, the layout

``Block.forward`` is what a user writes; ``Block.terms`` is what it means.
"""
import torch
import torch.nn.functional as F
from torch import nn

from programs import HEADS, WIDTH, LayerSpec, Mlp, Undefined, norm

MIXERS = ("sdpa", "products", "indexed", "conv", "decay", "cached")
DENSE = ("gated_dense", "dense", "refine")
EXPERTS = ("gather", "einsum", "loop", "index_add", "top1", "grouped_choice")
COMBINE = ("routed_first", "shared_first", "inplace", "routed_scaled", "shared_scaled", "average", "wide")


def to_btd(x, context):
    """A value in the program's layout as (batch, tokens, width)."""
    layout, batch, tokens = context["layout"], context["batch"], context["tokens"]
    if layout == "flat":
        return x.view(batch, tokens, x.shape[-1])
    return x.transpose(0, 1) if layout == "tbd" else x


def from_btd(x, context):
    if context["layout"] == "flat":
        return x.reshape(-1, x.shape[-1])
    return x.transpose(0, 1) if context["layout"] == "tbd" else x


class Mixer(nn.Module):
    """(B, T, D) -> (B, T, D), up to the output projection ``down``."""

    def __init__(self, spec, share: str) -> None:
        super().__init__()
        self.kind, self.share, self.odd = spec.how, share, False
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.down = nn.Linear(WIDTH, WIDTH, bias=False)
        if self.kind == "conv":
            self.conv = nn.Conv1d(WIDTH, WIDTH, 3, groups=WIDTH, padding=2)
        self.mix = nn.Parameter(torch.tensor(0.5))

    def hidden(self, x, context):
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        if self.kind == "cross":
            k, v = context["memory"].chunk(2, dim=-1)
            k, v = k.to(q.dtype), v.to(q.dtype)
        elif self.share == "kv":                        # an odd layer uses the keys and values of the one before
            if self.odd and "kv" in context:
                k, v = context["kv"]
            context["kv"] = k, v
        elif self.share == "value":                     # the values of the first layer come back in all
            if "value" in context:
                v = v + self.mix * context["value"]
            else:
                context["value"] = v
        return self.attend(q, k, v, context)

    def attend(self, q, k, v, context):
        causal = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool, device=q.device).tril()
        if self.kind in ("sdpa", "cached", "cross"):
            if self.kind == "cached":
                cache = torch.zeros(q.shape[0], q.shape[1] + 2, q.shape[2], dtype=q.dtype)
                cache[:, torch.arange(q.shape[1])] = k  # a write that the attention reads back
                k = cache[:, : q.shape[1]]
            split = lambda t: t.view(*t.shape[:2], HEADS, -1).transpose(1, 2)  # noqa: E731
            y = F.scaled_dot_product_attention(split(q), split(k), split(v), is_causal=True)
            return y.transpose(1, 2).reshape(q.shape)
        scores = (q @ k.transpose(-1, -2)).masked_fill(~causal, -1e9)
        if self.kind == "products":
            return scores.softmax(-1) @ v
        if self.kind == "indexed":                      # a top-k that is not routing; odd layers may reuse it
            if self.share == "topk" and self.odd and "topk" in context:
                index = context["topk"]
            else:
                index = scores.topk(3, dim=-1).indices
            context["topk"] = index
            kept = torch.full_like(scores, -1e9).scatter(-1, index, 0.0)
            return (scores + kept).softmax(-1) @ v
        if self.kind == "conv":
            return self.conv(q.transpose(1, 2))[..., : q.shape[1]].transpose(1, 2) * torch.sigmoid(k)
        return torch.cumsum(torch.tanh(k) * v, dim=1) * torch.sigmoid(q)     # "decay": a linear recurrence


class Dense(nn.Module):
    def __init__(self, spec) -> None:
        super().__init__()
        self.kind = spec.how
        self.up = nn.Linear(WIDTH, 2 * WIDTH, bias=False)
        self.down = nn.Linear(WIDTH, WIDTH, bias=False)

    def hidden(self, x, context):
        if self.kind == "refine":           # a residual chain of its own, longer than that of the model
            for _ in range(6):
                x = x + torch.tanh(self.up(norm(x, 1.0))[..., :WIDTH])
            return x
        if self.kind == "dense":
            return F.gelu(self.up(x)[..., :WIDTH])
        gate, up = self.up(x).chunk(2, dim=-1)
        return F.silu(gate) * up


class PerLayerInput(nn.Module):
    """gemma4's third block: a gate from the stream times an embedding of the ids."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(16, WIDTH))
        self.gate = nn.Linear(WIDTH, WIDTH, bias=False)
        self.down = nn.Linear(WIDTH, WIDTH, bias=False)

    def hidden(self, x, context):
        ple = from_btd(F.embedding(context["ids"], self.table), context)
        return F.gelu(self.gate(x)) * ple


class Block(nn.Module):
    """One block: reads x, gives a contribution."""

    def __init__(self, spec, program, layer: int) -> None:
        super().__init__()
        self.spec, self.kind, self.dtype = spec, spec.kind, program.dtype
        self.norms = nn.ParameterList(1 + 0.1 * torch.randn(WIDTH) for _ in range(4))
        self.has_norm = program.norm == "pre" or program.stream == "after_norm_mixer" and spec.kind != "mixer"
        if spec.kind == "mixer":
            self.body = Mixer(spec, program.share)
            self.body.odd = layer % 2 == 1
        elif spec.kind == "moe":
            self.body = Mlp(LayerSpec("sdpa", spec.how, "none" if spec.shared == "none" else "plain"))
        else:
            self.body = PerLayerInput() if spec.kind == "ple" else Dense(spec)
        self.gate = nn.Linear(WIDTH, WIDTH, bias=False)
        self.shared_gate = nn.Linear(WIDTH, 1, bias=False)
        if spec.shared == "beside":
            self.beside = Dense(spec)
        self.collect = program.share == "router"

    def cast_parts(self, dtype) -> None:
        """The modules that compute the branch, in the branch's dtype."""
        for name in ("body", "gate", "shared_gate", "beside"):
            if hasattr(self, name):
                getattr(self, name).to(dtype)

    def enter(self, x, context, which=0):
        """The block's own norm, and what a breaker adds to its input."""
        if self.spec.norm_of and context["native"] and which == 0:     # a norm computed once and used by two blocks
            h = context["normed"][-self.spec.norm_of]
        else:
            h = norm(x, self.norms[which]) if self.has_norm else x
        if which == 0:
            context["normed"].append(h)
        if self.spec.extra == "state":
            h = h + 0.5 * norm(context["previous_x"], self.norms[3])
        elif self.spec.extra == "contribution":
            h = h + 0.5 * context["previous_b"]
        return self.cast(h)

    def cast(self, x):
        return x.to({"low": torch.float32, "high": torch.float64}[self.dtype]) if self.dtype in ("low", "high") else x

    def back(self, y, x):
        """A contribution in the dtype of the stream."""
        return y.to(x.dtype) if self.dtype in ("low", "high") and self.spec.cast_back else y

    def fused_input(self, x, context):
        """(input, weight) of the last projection, for updates that fuse it with the addition."""
        x = self.enter(x, context)
        if self.kind == "mixer":
            return from_btd(self.body.hidden(to_btd(x, context), context), context), self.body.down.weight
        return self.body.hidden(x, context), self.body.down.weight

    def parts(self, x, context):
        """(routed, shared) without what follows their sum."""
        h = self.enter(x, context)
        if self.kind == "mixer":
            y = from_btd(self.body.down(self.body.hidden(to_btd(h, context), context)), context)
            return None, y
        if self.kind != "moe":
            return None, self.body.down(self.body.hidden(h, context))
        tokens = h.reshape(-1, WIDTH)
        routed = self.body.routed(tokens, context["logits"] if self.collect else None)
        shared = None
        if self.spec.shared == "beside":
            inner = self.enter(x, context, which=1)
            shared = self.beside.down(self.beside.hidden(inner, context))
        elif self.spec.shared != "none":
            shared = self.body.dense(tokens if self.spec.view else h)
            if self.spec.shared == "gated":
                shared = torch.sigmoid(self.shared_gate(tokens if self.spec.view else h)) * shared
        if shared is None or not self.spec.view or self.spec.shared == "beside":
            routed = routed.view(h.shape)
        return routed, shared

    def forward(self, x, context):
        """The contribution, as a user writes it."""
        routed, shared = self.parts(x, context)
        how = self.spec.combine
        if routed is None:
            y = shared
        elif shared is None:
            y = routed * 2.5 if how == "routed_scaled" else routed
        elif how == "shared_first":
            y = shared + routed
        elif how == "inplace":
            y = shared.add_(routed)
        elif how == "routed_scaled":
            y = routed * 2.5 + shared
        elif how == "shared_scaled":
            y = routed + 0.5 * shared
        elif how == "average":
            y = (routed + shared) / 2
        elif how == "wide":
            y = (routed.to(torch.float64) + shared.to(torch.float64)).to(routed.dtype)
        else:
            y = routed + shared
        return self.after(y, x, context)

    def terms(self, x, context, of_shared=None):
        """(contribution, contribution without its routed term or None): what ``forward`` means. ``of_shared``: what the term beside
        the routed one reads, where that is not x; what stands over their sum reads x."""
        routed, shared = self.parts(x, context)
        if of_shared is not None and routed is not None and shared is not None:
            if self.spec.sandwich:
                return None, Undefined("a norm over routed + shared")
            shared = self.parts(of_shared, {**context, "normed": [], "logits": []})[1]
        how = self.spec.combine
        if routed is not None and how == "routed_scaled":
            routed = routed * 2.5
        if routed is not None and shared is not None:
            routed, shared = routed.reshape(x.shape), shared.reshape(x.shape)
            if how == "shared_scaled":
                shared = shared * 0.5
            elif how == "average":
                routed, shared = routed / 2, shared / 2
        whole = shared if routed is None else routed if shared is None else routed + shared
        kept = None
        if routed is not None and shared is not None:
            kept = Undefined("a norm over routed + shared") if self.spec.sandwich else self.after(shared, x, context)
        return self.after(whole, x, context), kept

    def after(self, y, x, context):
        y = y.view(x.shape)
        if self.spec.input_gate:
            y = torch.sigmoid(self.gate(self.cast(context["normed"][-1]))) * y
        if self.spec.sandwich:
            y = norm(y, self.norms[2].to(y.dtype))
        return self.back(y, x)
