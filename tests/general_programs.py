"""General residual programs: every kind of stream, update, block structure and sharing, in any combination.

A ``ProgramSpec`` is plain data: its repr is a reproducer. ``GeneralProgram`` is the model, written as users write
models; ``general_definition.interpret`` is what its connectivity means, and shares nothing with the passes.

Terms
  back      how many states before the newest one a block reads; 1 in a parallel block
  joined    the block and the one in front read the same state and are added together: a parallel layer
  entry     what happens to the stream between an addition and the next block, for reads and skip alike (a norm whose
            result is also the residual, the embedding mixed in again)
"""
from dataclasses import dataclass

import torch
from torch import nn

from general_blocks import Block, from_btd
from general_updates import COPIES, Update, pass_through, spell
from programs import VOCABULARY, WIDTH, norm


@dataclass(frozen=True)
class BlockSpec:
    kind: str = "mixer"             # "mixer", "dense", "moe" or "ple" (a per-layer input)
    how: str = "sdpa"
    shared: str = "none"            # "none", "plain", "gated", or "beside": a dense MLP with a norm of its own
    combine: str = "routed_first"
    view: bool = False              # the MoE works on (tokens, width)
    sandwich: bool = False          # a norm over the contribution
    input_gate: bool = False        # a gate from the block's own normed input
    add: str = "plain"
    scale: str = "one"
    back: int = 0
    joined: bool = False
    norm_of: int = 0                # reads what the norm of so many blocks before gave
    extra: str = ""                 # "state" or "contribution": reads that of the block before as well
    cast_back: bool = True          # mixed precision: the contribution is cast, or else the new state
    state_op: str = ""
    branch_op: str = ""
    flat: bool = False              # added as (batch * tokens, width)


@dataclass(frozen=True)
class ProgramSpec:
    layers: tuple[tuple[BlockSpec, ...], ...]
    stream: str = "plain"
    norm: str = "pre"               # or "none": blocks read the stream itself
    dtype: str = "same"             # branches in float32 ("low") or the stream in float32 ("high")
    layout: str = "btd"             # "flat" or "tbd", with "_layer": back between layers
    share: str = ""                 # "kv", "value", "topk" or "router" (logits are an output)
    join: str = "chain"             # how a parallel layer is added: "chain", "chain_reversed", "sum", "sum_reversed"
    hidden: bool = False            # all states are outputs
    tied: bool = False              # all layers are the same modules
    writes: bool = False            # after layer 0 its first state is overwritten
    seed: int = 0

    @property
    def blocks(self) -> tuple[BlockSpec, ...]:
        return tuple(b for layer in self.layers for b in layer)


class GeneralProgram(nn.Module):
    def __init__(self, spec: ProgramSpec) -> None:
        super().__init__()
        torch.manual_seed(spec.seed)
        self.spec = spec
        self.embed, self.cross = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, 2 * WIDTH, bias=False)
        layers, updates = [], []
        for k, layer in enumerate(spec.layers):
            if spec.tied and k and layer == spec.layers[0]:
                layers.append(layers[0])
            else:
                layers.append(nn.ModuleList(Block(b, spec, k) for b in layer))
            updates.append(nn.ModuleList(Update(spec, b, i == 0, i == len(layer) - 1) for i, b in enumerate(layer)))
        self.layers, self.updates = nn.ModuleList(layers), nn.ModuleList(updates)
        self.exit = nn.Parameter(1 + 0.1 * torch.randn(WIDTH))
        self.final = nn.Parameter(1 + 0.1 * torch.randn(WIDTH))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.double()
        if spec.dtype == "low":
            self.blocks_to(torch.float32)
        elif spec.dtype == "high":
            self.float()
            self.blocks_to(torch.float64)
        blocks = [b for layer in self.layers for b in layer]
        for i, block in enumerate(blocks):
            if block.spec.norm_of:
                block.norms[0] = blocks[i - block.spec.norm_of].norms[0]
        if spec.norm == "none":         # nothing keeps the stream small
            with torch.no_grad():
                for block in set(blocks):
                    for parameter in block.body.parameters():
                        parameter.mul_(0.7)

    def blocks_to(self, dtype) -> None:
        for layer in self.layers:
            for block in layer:
                block.cast_parts(dtype)

    def context(self, ids, layout: str, native: bool) -> dict:
        return {"ids": ids, "batch": ids.shape[0], "tokens": ids.shape[1], "layout": layout, "native": native,
                "memory": None, "logits": [], "normed": [], "index": 0, "long": None, "previous_x": None,
                "previous_b": None}

    def begin(self, ids, context):
        s = self.embed(ids)
        context["memory"] = self.cross(s) if any(b.how == "cross" for b in self.spec.blocks) else None
        context["x0"] = s
        if self.spec.stream in ("static_streams", "dynamic_streams"):
            s = s.unsqueeze(2).expand(-1, -1, COPIES, -1).contiguous()
        return s

    def end(self, s):
        if self.spec.stream in ("static_streams", "dynamic_streams"):
            s = s.mean(dim=2)
        if self.spec.stream == "post_final":
            s = norm(s, self.exit)
        return self.head(norm(s, self.final))

    def forward(self, ids):
        spec, layout = self.spec, self.spec.layout
        c = self.context(ids, layout.removesuffix("_layer"), True)
        s = self.begin(ids, c)
        if layout in ("flat", "tbd"):
            s = from_btd(s, c)
        hidden, starts, xs = [], [], []
        for k, (layer, updates) in enumerate(zip(self.layers, self.updates)):
            hidden.append(s)
            if layout.endswith("_layer"):
                s = from_btd(s, c)
            starts.append(s)
            mirror = len(self.layers) - 1 - k
            c["long"] = starts[mirror] if mirror < k else None
            layer, updates, i = list(layer), list(updates), 0
            while i < len(layer):
                step = 2 if i + 1 < len(layer) and layer[i + 1].spec.joined else 1
                s = self.step(s, layer[i:i + step], updates[i:i + step], xs, c)
                i += step
            if layout.endswith("_layer"):
                s = s.view(ids.shape[0], ids.shape[1], WIDTH) if layout == "flat_layer" else s.transpose(0, 1)
            if spec.writes and k == 0:
                starts[0].mul_(1.5)
        if layout == "flat":
            s = s.view(ids.shape[0], ids.shape[1], WIDTH)
        elif layout == "tbd":
            s = s.transpose(0, 1)
        outputs = [self.end(s)]
        if spec.hidden:
            outputs += [*hidden, s]
        return (*outputs, *c["logits"])

    def step(self, s, blocks, updates, xs, c):
        """One block and its addition, or a parallel pair."""
        block, update = blocks[0], updates[0]
        s = pass_through(block.spec.state_op, s)
        s = update.entry(s, c)
        w = update.weights(s)
        xs.append(update.collapse(s, w))
        c["index"] += len(blocks)
        if update.can_fuse and len(blocks) == 1:
            return update.fused(s, block.fused_input(xs[-1 - block.spec.back], c))
        b = self.contribution(block, xs[-1 - block.spec.back], c)
        if len(blocks) == 1:
            flat = block.spec.flat and s.dim() == 3 and w is None
            return self.flat_update(update, s, b) if flat else update(s, b, w)
        second, last = blocks[1], updates[1]
        b2 = self.contribution(second, xs[-1], c)
        xs.append(xs[-1])
        if self.spec.join == "chain":
            return last(update(s, b, w), b2, None)
        if self.spec.join == "chain_reversed":
            return last.finish(spell(block.spec.add, spell("plain", update.skip(s, w), last.term(b2, None)),
                                     update.term(b, w)))
        b, b2 = update.term(b, w), last.term(b2, None)
        both = b + b2 if self.spec.join == "sum" else b2 + b
        return last.finish(spell(block.spec.add, update.skip(s, w), both))

    def contribution(self, block, x, c):
        b = pass_through(block.spec.branch_op, block(x, c))
        c["previous_x"], c["previous_b"] = x, b
        return b

    @staticmethod
    def flat_update(update, s, b):
        return update(s.view(-1, WIDTH), b.reshape(-1, WIDTH), None).view(s.shape)
