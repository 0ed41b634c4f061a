"""Updates of general residual programs: U(s, b) = finish(skip(s) + term(b)), and the ways to write it down.

``Update.define`` is the definition. ``Update.forward`` is the same written as users write it (``spec.add``). Weights
that are computed from the stream (``Update.weights``) belong to U.
"""
import torch
import torch.nn.functional as F
from torch import nn

from programs import WIDTH, norm

STREAMS = ("plain", "skip_scale", "layer_scalar", "post", "post_final", "after_norm", "after_norm_mixer", "highway",
           "highway_convex", "lerp", "static_streams", "dynamic_streams", "x0", "x0_later", "concat", "times", "unet",
           "mixed_map")
WITH_ENTRY = ("post", "post_final", "after_norm", "after_norm_mixer", "x0", "x0_later", "unet", "mixed_map")
SCALES = ("one", "half", "rezero", "layerscale")
ADDS = ("plain", "reversed", "torch_add", "keywords", "method", "method_keyword", "sub", "alpha", "addcmul", "addmm",
        "baddbmm", "inplace", "inplace_method", "branch_inplace", "stack_sum", "out")
INPLACE = ("inplace", "inplace_method", "branch_inplace")
COPIES = 3      # parallel streams of hyper-connections


class Update(nn.Module):
    def __init__(self, program, block, first: bool, last: bool) -> None:
        super().__init__()
        self.kind, self.spec, self.first, self.last = program.stream, block, first, last
        self.part = bool(block.back) and block.joined       # the second update of a parallel layer
        self.fuses = program.dtype == "same" and not any(b.extra for b in program.blocks)
        self.casts = program.dtype == "high" and not block.cast_back
        scale = {"half": 0.5, "rezero": torch.tensor(0.7), "layerscale": 1 + 0.3 * torch.randn(WIDTH)}.get(block.scale)
        self.learned = isinstance(scale, torch.Tensor)
        self.scale = nn.Parameter(scale) if self.learned else scale
        kind = self.kind
        if kind in ("skip_scale", "x0", "x0_later"):
            self.skip_scale = nn.Parameter(1 + 0.2 * torch.randn(WIDTH))
        if kind == "layer_scalar":
            self.scalar = nn.Parameter(torch.tensor(0.8))
        if kind in ("highway", "highway_convex"):
            self.gate = nn.Linear(WIDTH, WIDTH)
        if kind == "lerp":
            self.t = nn.Parameter(torch.rand(WIDTH))
        if kind == "concat":
            self.join = nn.Linear(2 * WIDTH, WIDTH, bias=False)
        if kind in ("post", "post_final", "after_norm", "after_norm_mixer"):
            self.norm = nn.Parameter(1 + 0.1 * torch.randn(WIDTH))
        if kind in ("x0", "x0_later", "unet"):
            self.mix = nn.Parameter(torch.tensor(0.3))
        if kind == "mixed_map":
            self.map = nn.Linear(WIDTH, WIDTH, bias=False)
        if kind == "static_streams":
            self.pre = nn.Parameter(torch.rand(COPIES))
            self.post = nn.Parameter(torch.rand(COPIES))
            self.comb = nn.Parameter(torch.eye(COPIES) + 0.2 * torch.randn(COPIES, COPIES))
        if kind == "dynamic_streams":
            self.mixes = nn.Linear(COPIES * WIDTH, COPIES * (2 + COPIES))

    # --- the definition -------------------------------------------------------------------------------------------

    def entry(self, s, context):
        """What happens to the stream between the last addition and this block, for reads and skip alike."""
        kind = self.kind
        if kind == "after_norm" or kind in ("post", "post_final") and context["index"] > 0:
            return norm(s, self.norm) if not self.part else s
        if kind == "after_norm_mixer" and self.spec.kind == "mixer":
            return norm(s, self.norm)
        if self.first and (kind == "x0" or kind == "x0_later" and context["index"] > 0):
            return self.skip_scale * s + self.mix * context["x0"]
        if kind == "mixed_map" and self.first and context["index"] > 0:
            return self.map(s)
        if kind == "unet" and self.first and context["long"] is not None:
            return s + self.mix * context["long"]
        return s

    @property
    def has_entry(self) -> bool:
        kind = self.kind
        if kind in ("x0", "x0_later", "mixed_map", "unet"):
            return self.first
        if kind == "after_norm_mixer":
            return self.spec.kind == "mixer"
        return kind in ("after_norm", "post", "post_final") and not self.part

    def weights(self, s):
        """Weights computed from the stream."""
        if self.kind in ("highway", "highway_convex"):
            return torch.sigmoid(self.gate(s))
        if self.kind == "times":
            return s
        if self.kind == "dynamic_streams":
            mixes = self.mixes(norm(s.flatten(2), 1.0))
            pre, post, comb = mixes.split([COPIES, COPIES, COPIES * COPIES], dim=-1)
            comb = comb.view(*comb.shape[:-1], COPIES, COPIES).softmax(dim=-1)
            return torch.sigmoid(pre), 2 * torch.sigmoid(post), comb / comb.sum(dim=-2, keepdim=True)
        return None

    def collapse(self, s, w):
        """What a block reads of a stream with several copies."""
        if self.kind == "static_streams":
            return (self.pre.unsqueeze(-1) * s).sum(dim=2)
        if self.kind == "dynamic_streams":
            return (w[0].unsqueeze(-1) * s).sum(dim=2)
        return s

    def skip(self, s, w):
        kind = self.kind
        if kind == "skip_scale" and not self.part:
            return self.skip_scale * s
        if kind == "highway_convex":
            return (1 - w) * s
        if kind == "lerp":
            return (1 - self.t) * s
        if kind == "concat":
            return F.linear(s, self.join.weight[:, :WIDTH])
        if kind == "static_streams":
            return torch.einsum("nm,btmd->btnd", self.comb, s)
        if kind == "dynamic_streams":
            return torch.matmul(w[2].transpose(-1, -2), s)
        return s

    def scaled(self, b):
        return b if self.spec.scale == "one" else b * self.scale

    def term(self, b, w):
        kind, b = self.kind, self.scaled(b)
        if kind in ("highway", "highway_convex", "times"):
            return w * b
        if kind == "lerp":
            return self.t * b
        if kind == "concat":
            return F.linear(b.to(self.join.weight.dtype), self.join.weight[:, WIDTH:])
        if kind == "static_streams":
            return self.post.unsqueeze(-1) * b.unsqueeze(-2)
        if kind == "dynamic_streams":
            return w[1].unsqueeze(-1) * b.unsqueeze(-2)
        return b

    def finish(self, s):
        if self.casts:
            s = s.to(torch.float32)
        return s * self.scalar if self.kind == "layer_scalar" and self.last else s

    def define(self, s, b, w):
        """U(s, b); b is None for nothing."""
        return self.finish(self.skip(s, w) if b is None else self.skip(s, w) + self.term(b, w))

    # --- how users write it ---------------------------------------------------------------------------------------

    def forward(self, s, b, w):
        add = self.spec.add
        if add == "branch_inplace" and b.dtype != s.dtype:
            add = "plain"           # the stream would take on the branch's dtype
        if self.kind == "lerp" and add != "reversed":
            b = self.scaled(b)
            new = torch.lerp(s, b, self.t) if add == "plain" and s.dtype == b.dtype else s + self.t * (b - s)
        elif self.kind == "concat":
            new = self.join(torch.cat([s, self.scaled(b).to(s.dtype)], dim=-1))
        elif self.kind == "times":
            new = s * (1 + self.scaled(b)) if add != "reversed" else self.scaled(b) * s + s
        elif add == "alpha" and self.spec.scale == "half" and self.kind in ("plain", "skip_scale", "layer_scalar"):
            new = torch.add(self.skip(s, w), b, alpha=0.5)
        elif add == "addcmul" and self.learned and self.kind not in (
                "highway", "highway_convex", "static_streams", "dynamic_streams"):
            new = torch.addcmul(self.skip(s, w), self.scale.expand_as(b), b)
        else:
            new = spell(add, self.skip(s, w), self.term(b, w))
        return self.finish(new)

    def fused(self, s, fused_input):
        """The output projection and the addition in one operation: skip + h @ W."""
        (h, weight), base = fused_input, self.skip(s, None)
        factor = {} if self.spec.scale == "one" else {"alpha": self.scale}
        if self.spec.add == "addmm" or h.dim() == 2:
            flat = torch.addmm(base.reshape(-1, WIDTH), h.reshape(-1, WIDTH), weight.t(), **factor)
            return self.finish(flat.view(base.shape))
        return self.finish(torch.baddbmm(base, h, weight.t().expand(h.shape[0], -1, -1), **factor))

    @property
    def can_fuse(self) -> bool:
        """Whether skip + h @ W is all that this update does."""
        return self.spec.add in ("addmm", "baddbmm") and self.kind not in (
            "highway", "highway_convex", "lerp", "concat", "times", "static_streams", "dynamic_streams") \
            and self.fuses and not self.learned and self.spec.kind in ("mixer", "dense") \
            and not (self.spec.input_gate or self.spec.sandwich or self.spec.branch_op or self.spec.joined)


def spell(add: str, s, b):
    """s + b."""
    if add == "reversed":
        return b + s
    if add == "torch_add":
        return torch.add(s, b)
    if add == "keywords":
        return torch.add(input=s, other=b)
    if add == "method":
        return s.add(b)
    if add == "method_keyword":
        return s.add(other=b)
    if add == "sub":
        return s - (-b)
    if add == "inplace":
        s += b
        return s
    if add == "inplace_method":
        return s.add_(b)
    if add == "branch_inplace":
        return b.add_(s)
    if add == "stack_sum":
        return torch.sum(torch.stack([s, b]), 0)
    if add == "out":
        return torch.add(s, b, out=torch.zeros(s.shape, dtype=s.dtype))
    return s + b


def pass_through(op: str, x):
    """Operations that change nothing."""
    if op == "clone":
        return x.clone()
    if op == "contiguous":
        return x.contiguous()
    if op == "expand_as":
        return x.expand_as(x)
    if op == "view":
        return x.view(x.shape)
    if op == "to":
        return x.to(x.dtype)
    if op == "dropout":
        return F.dropout(x, 0.1, False)
    if op == "dropout_zero":
        return F.dropout(x, 0.0, True)
    if op == "slice":
        return x[:]
    return x


OPERATIONS = ("clone", "contiguous", "expand_as", "view", "to", "dropout", "dropout_zero", "slice")
