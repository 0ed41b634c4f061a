"""Steps 0 to 3 on tiny hand-written decoders: what the graph looks like afterwards.

    s0 = embed      s1 = s0 + attn(s0)      s2 = s1 + moe(s1)      s3 = s2 + attn(s2)      s4 = s3 + moe(s3)
"""
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import FileCheck

import farskip_fx as fs
from farskip_fx.connectivity import CONNECTIVITIES
from farskip_fx.passes.dataflow import Dataflow
from farskip_fx.passes.detect import NoBlocks, detect, is_busy
from farskip_fx.passes.normalize import normalize
from farskip_fx.passes.residual import NoStream, find_streams
from farskip_fx.passes.rewire import Missing, Reads, rewire
from programs import LayerSpec, Program

IDS = torch.arange(6).view(1, 6)
MOE = LayerSpec("sdpa", "gather", "plain")


def traced(model, *inputs):
    """Dynamo's graph of ``model``."""
    torch._dynamo.reset()
    graphs = []

    def keep(gm, _):
        graphs.append(gm)
        return gm.forward
    with torch.no_grad():
        torch.compile(model, backend=keep, fullgraph=True)(*inputs)
    return graphs[0]


def blocks_of(gm):
    normalize(gm.graph)
    return detect(find_streams(gm.graph, busy=is_busy))


def test_stream_and_blocks():
    blocks = blocks_of(traced(Program((MOE, LayerSpec("conv", "dense")), 0).eval(), IDS))
    assert [(layer.attention.kind, layer.mlp.kind, layer.mlp.shared) for layer in blocks.layers] == [
        ("mixer", "moe", True), ("mixer", "mlp", False)]
    assert "topk" in blocks.layers[0].mlp.evidence and blocks.layers[0].mlp.label == "layers.0.mlp"
    states = blocks.streams[0].states
    assert len(states) == 5
    for update, before, after in zip(blocks.streams[0].updates, states, states[1:]):
        assert update.before is before and update.after is update.add is after


def test_farskip_reads_the_partial_and_the_outdated_stream():
    """attention 1 <- s1 + shared(0), MoE 1 <- s2; the stream itself is untouched."""
    gm = traced(Program((MOE, MOE), 0).eval(), IDS)
    blocks = blocks_of(gm)
    first, second = blocks.layers
    states, adds = blocks.streams[0].states, [u.add for u in blocks.streams[0].updates]
    readers = [set(s.users) - {a} for s, a in zip(states, adds)]
    before = [a.args for a in adds]
    nodes = len(gm.graph.nodes)
    result = rewire(gm.graph, blocks, connectivity=CONNECTIVITIES["farskip"], layers=(0, 1))
    # The program views its sum back to (batch, tokens, width), so the kept part needs that view too.
    assert (result.rewired, result.nodes_added, len(gm.graph.nodes)) == (2, 2, nodes + 2)
    assert [a.args for a in adds] == before
    partial = [n for n in gm.graph.nodes if n.meta.get("farskip", "").endswith("without what is in flight")][-1]
    assert partial.args[0] is states[1]
    assert set(partial.users) == readers[2]
    assert all(states[2] in u.all_input_nodes for u in readers[3])
    FileCheck().check("embedding").check("scaled_dot_product").check("topk").check("scaled_dot_product") \
        .check("topk").run(gm.code)


@pytest.mark.parametrize("name, dependencies", [
    # does (attention 1, MoE 0, MoE 1) depend on (routed 0, attention 0, attention 1)?
    ("none", (True, True, True)), ("farskip", (False, False, False)), ("attn_only", (False, True, True)),
    ("mlp_only", (True, False, False)), ("ladder", (False, False, False)),
])
def test_what_each_branch_depends_on(name, dependencies):
    gm = traced(Program((MOE, MOE), 0).eval(), IDS)
    blocks = blocks_of(gm)
    rewire(gm.graph, blocks, connectivity=CONNECTIVITIES[name], layers=(0, 1))
    flow, (first, second) = Dataflow(gm.graph), blocks.layers
    assert (flow.depends(second.attention.node, first.mlp.node),
            flow.depends(first.mlp.node, first.attention.node),
            flow.depends(second.mlp.node, second.attention.node)) == dependencies


def test_skipping_two_blocks_is_one_function():
    """The rewiring takes any set of missing contributions: here attention 2 without the routed parts of 0 and 1."""
    def far(layer, previous):
        return Reads(attention=tuple(Missing(layer=k, block="mlp", part="routed")
                                     for k in range(max(0, layer.index - 2), layer.index)))
    gm = traced(Program((MOE, MOE, MOE), 0).eval(), IDS)
    blocks = blocks_of(gm)
    result = rewire(gm.graph, blocks, connectivity=far, layers=range(3))
    assert result.layers[2].attention_reads == ("layer 1 output without the routed experts of layer 0 and the routed "
                                                "experts of layer 1")


def test_an_unconverted_layer_is_never_missing():
    gm = traced(Program((MOE, MOE, MOE), 0).eval(), IDS)
    blocks = blocks_of(gm)
    result = rewire(gm.graph, blocks, connectivity=CONNECTIVITIES["ladder"], layers=(0, 2))
    assert [layer.rewired for layer in result.layers] == [True, False, True]
    assert result.layers[2].attention_reads == "layer 1 output"


class Shaped(nn.Module):
    """Decoders that are not plain; ``how`` names the trait."""

    def __init__(self, how):
        super().__init__()
        self.how, self.program = how, Program((MOE, MOE), 0)

    def forward(self, ids):
        state = self.program.embed(ids)
        for layer in self.program.layers:
            if self.how == "parallel":
                state = state + layer.attention(state) + layer.mlp(layer.ffn_input(state))
            elif self.how == "post-norm":
                state = F.layer_norm(state + layer.attention(state), (8,))
                state = F.layer_norm(state + layer.mlp(state), (8,))
            elif self.how == "parallel at once":
                state = state + (layer.attention(state) + layer.mlp(layer.ffn_input(state)))
            elif self.how == "scaled stream":
                state = 0.5 * state + layer.attention(state)
                state = 0.5 * state + layer.mlp(layer.ffn_input(state))
            elif self.how == "mixer twice":
                state = state + layer.attention(state)
                state = state + layer.attention(state)
                state = state + layer.mlp(layer.ffn_input(state))
            elif self.how == "one branch":      # attention and experts in a row, one addition for both
                inner = layer.attention(state)
                state = state + layer.mlp(layer.ffn_input(inner))
            elif self.how == "two MoEs":
                state = state + layer.attention(state)
                state = state + layer.mlp(layer.ffn_input(state))
                state = state + layer.mlp(layer.ffn_input(state))
        return self.program.head(state * self.program.final)


def found_in(how):
    gm = traced(Shaped(how).eval(), IDS)
    normalize(gm.graph)
    stream = find_streams(gm.graph, busy=is_busy)
    return stream if isinstance(stream, NoStream) else detect(stream)


@pytest.mark.parametrize("how, kinds, origins", [
    ("parallel", ["mixer moe", "mixer moe"], [0, 0, 2, 2]),
    ("parallel at once", ["mixer moe", "mixer moe"], [0, 0, 1, 1]),
    ("post-norm", ["mixer moe", "mixer moe"], [0, 1, 2, 3]),
    ("scaled stream", ["mixer moe", "mixer moe"], [0, 1, 2, 3]),
    ("mixer twice", ["mixer mixer moe", "mixer mixer moe"], [0, 1, 2, 3, 4, 5])])
def test_streams_that_are_not_plain(how, kinds, origins):
    blocks = found_in(how)
    assert [" ".join(b.kind for b in layer.blocks) for layer in blocks.layers] == kinds
    assert [b.contribution.origin for layer in blocks.layers for b in layer.blocks] == origins


@pytest.mark.parametrize("how, code", [("one branch", "parallel_block"), ("two MoEs", "not_alternating")])
def test_what_has_no_place_to_rewire_has_a_reason(how, code):
    result = found_in(how)
    assert isinstance(result, (NoStream, NoBlocks)) and result.reason.code == code, result


def test_writes_are_dependencies():
    """x -> cache[...] = x -> read of cache: a plain ancestor walk misses x."""
    class Cached(nn.Module):
        def forward(self, x, cache):
            key = x * 2
            cache[:, :2] = key
            return cache.sum() + 1
    gm = traced(Cached(), torch.randn(3, 2), torch.zeros(3, 4))
    flow = Dataflow(gm.graph)
    key = next(n for n in gm.graph.nodes if n.name == "key")
    total = next(n for n in gm.graph.nodes if str(n.target) == "sum")
    assert key not in total.all_input_nodes and flow.depends(total, key)


def test_in_place_arithmetic_becomes_plain_only_where_that_is_the_same():
    class Writes(nn.Module):
        def forward(self, x):
            fresh = x * 2
            fresh += 1                  # nothing else shows this memory
            base = x * 3
            view = base.view(-1)
            base.add_(1)                # seen through the view
            x.mul_(2)                   # the caller's own memory
            return fresh, view * 1
    gm = traced(Writes(), torch.randn(3, 2))
    assert normalize(gm.graph).functionalized == 1
    x = torch.randn(3, 2)
    got, want = gm(x.clone()), Writes()(x.clone())
    assert all(torch.equal(a, b) for a, b in zip(got, want))


def test_the_copy_of_a_dropout_drops_the_same_elements():
    """Training: s + dropout(routed + shared); the read without the routed part is s + mask * shared."""
    class Dropping(nn.Module):
        def __init__(self):
            super().__init__()
            self.program = Program((MOE, MOE), 0)

        def forward(self, ids):
            state = self.program.embed(ids)
            for layer in self.program.layers:
                state = state + layer.attention(state)
                routed, shared = layer.mlp.parts(layer.ffn_input(state))
                state = state + F.dropout(routed + shared, 0.5)
            return self.program.head(state)

        def define(self, ids):
            reads = state = self.program.embed(ids)
            for layer in self.program.layers:
                outdated, state = state, state + layer.attention(reads)
                routed, shared = layer.mlp.parts(layer.ffn_input(outdated))
                mask = F.dropout(torch.ones_like(state), 0.5)
                reads, state = state + mask * shared, state + mask * (routed + shared)
            return self.program.head(state)

    model = Dropping()
    compiled = torch.compile(model, backend=fs.farskip_backend, options={"inner": "eager"})
    with torch.no_grad():
        torch.manual_seed(3)
        want = model.define(IDS)
        torch.manual_seed(3)
        got = compiled(IDS)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
