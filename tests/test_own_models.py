"""Decoders that people write themselves: what is routed is found by dataflow, in whatever form the experts are written.

Every kind of router and experts below is put into a plain decoder, with and without a shared expert, and compared with
the connectivity's definition: a Python loop over the layers (``define``) that uses the blocks' own ``parts``. And the
reverse: a top-k that is not routing does not make an MoE of its block, and experts without a router that is understood
are refused, never called dense.
"""
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import farskip_fx as fs
from compiled import _attempt, _copy
from farskip_fx.connectivity import BUILT_IN as CONNECTIVITIES

WIDTH, INNER, EXPERTS, TOKENS, BATCH, VOCABULARY = 8, 16, 4, 10, 2, 24
IDS = torch.randint(0, VOCABULARY, (BATCH, TOKENS), generator=torch.Generator().manual_seed(3))


def weight(*shape, scale=0.4):
    return nn.Parameter(torch.randn(*shape) * scale)


def norm(x):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)

    def heads(self, x):
        return [t.view(*t.shape[:2], 2, -1).transpose(1, 2) for t in self.qkv(x).chunk(3, dim=-1)]

    def forward(self, x):
        y = F.scaled_dot_product_attention(*self.heads(x), is_causal=True)
        return self.out(y.transpose(1, 2).reshape(x.shape))


class Dense(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.gate = nn.Linear(WIDTH, INNER, bias=False), nn.Linear(WIDTH, INNER, bias=False)
        self.down = nn.Linear(INNER, WIDTH, bias=False)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))

    def parts(self, x):
        return None, self(x)


class Moe(nn.Module):
    """A router and stacked experts. A subclass says what ``routed`` is: (tokens, width) -> (tokens, width)."""
    stacked = True

    def __init__(self, shared=False):
        super().__init__()
        self.shared = Dense() if shared else None
        self.router = nn.Linear(WIDTH, EXPERTS, bias=False)
        if self.stacked:
            self.w1, self.w2 = weight(EXPERTS, WIDTH, INNER), weight(EXPERTS, INNER, WIDTH)
        else:
            self.experts = nn.ModuleList(self.expert() for _ in range(EXPERTS))
        self.extra()

    def extra(self):
        """What else a subclass needs."""

    def expert(self):
        return nn.Sequential(nn.Linear(WIDTH, INNER), nn.GELU(), nn.Linear(INNER, WIDTH))

    def scores(self, x):
        return self.router(x)

    def choose(self, x, k=2):
        value, index = self.scores(x).softmax(-1).topk(k, dim=-1)
        return value / value.sum(-1, keepdim=True), index

    def every_expert(self, x):
        """(tokens, width) -> (tokens, experts, width)."""
        if not self.stacked:
            return torch.stack([expert(x) for expert in self.experts], dim=1)
        return torch.einsum("tef,efd->ted", F.gelu(torch.einsum("td,edf->tef", x, self.w1)), self.w2)

    def each_its_own(self, x):
        """(experts, slots, width) -> the same, each expert on its own slots."""
        if not self.stacked:
            return torch.stack([expert(chunk) for expert, chunk in zip(self.experts, x.unbind(0))])
        return torch.bmm(F.gelu(torch.bmm(x, self.w1)), self.w2)

    def parts(self, x):
        routed = self.routed(x.reshape(-1, WIDTH)).view(x.shape)
        return routed, None if self.shared is None else self.shared(x)

    def forward(self, x):
        routed, shared = self.parts(x)
        return routed if shared is None else routed + shared


class Layer(nn.Module):
    def __init__(self, mlp, attention=Attention):
        super().__init__()
        self.attention, self.mlp = attention(), mlp()

    def forward(self, x):
        x = x + self.attention(norm(x))
        return x + self.mlp(norm(x))


class Decoder(nn.Module):
    def __init__(self, *mlps, attention=Attention, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(Layer(mlp, attention) for mlp in mlps)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def pick(self, logits):
        return logits

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.pick(self.head(norm(x)))

    def define(self, ids, connectivity):
        """The connectivity by its definition, all layers converted: a plain loop."""
        hide_routed, hide_all = connectivity in ("farskip", "farskip_shared", "attn_only"), connectivity == "ladder"
        outdated = connectivity in ("farskip", "farskip_shared", "mlp_only", "ladder")
        stream = self.embed(ids)
        without_routed = without_mlp = stream           # the stream as the next attention may see it
        for layer in self.layers:
            seen = without_mlp if hide_all else without_routed if hide_routed else stream
            between = stream + layer.attention(norm(seen))
            routed, shared = layer.mlp.parts(norm(stream if outdated else between))
            if connectivity == "farskip_shared" and routed is not None and shared is not None:
                shared = layer.mlp.parts(norm(between))[1]
            rest = between if shared is None else between + shared
            without_mlp, without_routed = between, rest
            stream = rest if routed is None else rest + routed
        return self.pick(self.head(norm(stream)))


def outcomes(model, ids=IDS):
    """connectivity -> "exact" or the refusal; a number that is neither the definition's nor refused fails."""
    torch._dynamo.reset()
    built, chosen = [], "none"

    def fan_out(gm, example_inputs):
        built.append({c: _attempt(_copy(gm), example_inputs, {"connectivity": c, "inner": "eager"})
                      for c in CONNECTIVITIES})
        return lambda *args: built[0][chosen](*args)

    found = {}
    with torch.no_grad():
        compiled = torch.compile(model.eval(), backend=fan_out, fullgraph=True)
        assert torch.equal(compiled(ids), model(ids)), "the model is not deterministic"
        for chosen in CONNECTIVITIES:
            made = built[0][chosen]
            if isinstance(made, fs.FarskipError):
                found[chosen] = made
                continue
            want = model(ids) if chosen == "none" else model.define(ids, chosen)
            difference = (compiled(ids) - want).abs().max().item()
            assert difference <= 2e-5 * max(1.0, want.abs().max().item()), f"{chosen} is off by {difference:.2g}"
            found[chosen] = "exact"
    return found


EXACT = {name: "exact" for name in CONNECTIVITIES}


def param(cls):
    return pytest.param(cls, id=cls.__name__)


# --- routers --------------------------------------------------------------------------------------------------------

class OneHot(Moe):
    """The plainest form; the routers below only change ``choose``."""

    def routed(self, x):
        value, index = self.choose(x)
        gates = (F.one_hot(index, EXPERTS) * value.unsqueeze(-1)).sum(1)
        return torch.einsum("te,ted->td", gates, self.every_expert(x))


class MlpRouter(OneHot):
    def extra(self):
        self.before = nn.Linear(WIDTH, 2 * WIDTH)
        self.router = nn.Linear(2 * WIDTH, EXPERTS)

    def scores(self, x):
        return self.router(torch.tanh(self.before(x)))


class MatmulRouter(OneHot):
    def extra(self):
        self.router = weight(WIDTH, EXPERTS)

    def scores(self, x):
        return x @ self.router


class EinsumRouter(OneHot):
    def extra(self):
        self.router = weight(EXPERTS, WIDTH)

    def scores(self, x):
        return torch.einsum("td,ed->te", x.float(), self.router.float())


class CosineRouter(OneHot):
    def extra(self):
        self.temperature = weight(1)

    def scores(self, x):
        scale = self.temperature.clamp(max=4).exp()
        return F.normalize(x, dim=-1) @ F.normalize(self.router.weight, dim=-1).t() * scale


class GroupedSigmoid(OneHot):
    """DeepSeek-V3: a bias that only the choice sees, two of four groups."""

    def extra(self):
        self.bias = weight(EXPERTS)

    def choose(self, x):
        scores = torch.sigmoid(self.scores(x).float())
        choice = scores + self.bias
        groups = choice.view(-1, 2, EXPERTS // 2).topk(2, dim=-1)[0].sum(-1).topk(1, dim=-1)[1]
        mask = torch.zeros_like(choice.view(-1, 2, EXPERTS // 2)[..., 0]).scatter_(1, groups, 1.0)
        allowed = mask.unsqueeze(-1).expand(-1, 2, EXPERTS // 2).reshape(-1, EXPERTS)
        index = choice.masked_fill(allowed == 0, float("-inf")).topk(2, dim=-1, sorted=False)[1]
        value = scores.gather(1, index)
        return value / (value.sum(-1, keepdim=True) + 1e-20) * 2.5, index


class NoisyTopK(OneHot):
    """Shazeer's router: noise whose size another linear map gives, softmax over what was chosen."""

    def extra(self):
        self.noise = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.register_buffer("fixed", torch.randn(EXPERTS))     # deterministic, as the comparison needs

    def choose(self, x):
        noisy = self.router(x) + self.fixed * F.softplus(self.noise(x))
        value, index = noisy.topk(2, dim=-1)
        return value.softmax(-1), index


class ScatteredSoftmax(NoisyTopK):
    """nanoMoE, makeMoE: -inf where not chosen, then a softmax over all experts."""

    def routed(self, x):
        noisy = self.router(x) + self.fixed * F.softplus(self.noise(x))
        value, index = noisy.topk(2, dim=-1)
        gates = torch.full_like(noisy, float("-inf")).scatter(-1, index, value).softmax(-1)
        total = torch.zeros_like(x)
        for e in range(EXPERTS):
            hidden = F.gelu(x @ self.w1[e])
            total += gates[:, e].unsqueeze(1) * (hidden @ self.w2[e])
        return total


class JitterInFp32(OneHot):
    """Switch: the router's input is jittered and in float32, the experts' is not."""

    def extra(self):
        self.register_buffer("jitter", 1 + 0.01 * torch.randn(WIDTH))

    def scores(self, x):
        return F.linear(x.to(torch.float32) * self.jitter, self.router.weight.float())


class SortRouter(OneHot):
    def choose(self, x):
        value, index = torch.sort(self.scores(x).softmax(-1), dim=-1, descending=True)
        return value[:, :2], index[:, :2]


class TwoTimesMax(OneHot):
    """GShard's top-2 as two argmaxes, the second over what is left."""

    def routed(self, x):
        probabilities = self.scores(x).softmax(-1)
        first = F.one_hot(probabilities.argmax(-1), EXPERTS).to(x.dtype)
        second = F.one_hot((probabilities * (1 - first)).argmax(-1), EXPERTS).to(x.dtype)
        gates = probabilities * (first + second)
        gates = gates / gates.sum(-1, keepdim=True).clamp(min=1e-9)
        return torch.einsum("te,ted->td", gates, self.every_expert(x))


class NoChoiceOperator(OneHot):
    """The second best score as a threshold: the index is not used."""

    def routed(self, x):
        probabilities = self.scores(x).softmax(-1)
        least = probabilities.topk(2, dim=-1).values[:, -1:]
        gates = torch.where(probabilities >= least, probabilities, 0.0)
        return torch.einsum("te,ted->td", gates, self.every_expert(x))


class Relu(OneHot):
    """ReMoE: an expert is in where its score is above zero."""

    def routed(self, x):
        return torch.einsum("te,ted->td", F.relu(self.scores(x)), self.every_expert(x))


class LoopedMixtral(OneHot):
    """Experts of three maps in a loop that runs all of them (what the original becomes without ``nonzero``)."""
    stacked = False

    def expert(self):
        return Dense()

    def routed(self, x):
        value, index = self.choose(x)
        mask, total = F.one_hot(index, EXPERTS).permute(2, 1, 0), torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            total = total + expert(x) * (mask[e].t() * value).sum(-1, keepdim=True)
        return total


class LoopedWhere(LoopedMixtral):
    def routed(self, x):
        value, index = self.choose(x, k=1)
        total = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            total = torch.where(index == e, expert(x) * value, total)
        return total


class LoopedInPlace(LoopedMixtral):
    """Rows that are not an expert's are zeroed before it, and its output is weighted after."""

    def routed(self, x):
        value, index = self.choose(x)
        total = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            chosen = (index == e).any(-1, keepdim=True)
            total += expert(x.masked_fill(~chosen, 0.0)) * (value * (index == e)).sum(-1, keepdim=True)
        return total


# --- dispatch and combine -------------------------------------------------------------------------------------------

def capacity_masks(gates, chosen, capacity):
    """GShard: (tokens, experts, capacity) combine weights; tokens beyond an expert's capacity are dropped."""
    position = chosen.cumsum(0) * chosen - 1
    kept = chosen * (position < capacity)
    slot = F.one_hot((position * kept).clamp(min=0).long(), capacity).to(gates.dtype)
    return (gates * kept).unsqueeze(-1) * slot


class GShard(Moe):
    """Einsum dispatch and combine with a capacity, top-2."""
    capacity = 7

    def routed(self, x):
        value, index = self.choose(x)
        chosen = F.one_hot(index, EXPERTS).to(x.dtype)
        combine = sum(capacity_masks(chosen[:, k] * value[:, k: k + 1], chosen[:, k], self.capacity) for k in range(2))
        dispatch = (combine > 0).to(x.dtype)
        expert_inputs = torch.einsum("tec,td->ecd", dispatch, x)
        return torch.einsum("tec,ecd->td", combine, self.each_its_own(expert_inputs))


class GShardOfModules(GShard):
    stacked = False


class SwitchArgmax(Moe):
    """Switch: one expert a token, capacity, dropped tokens get nothing."""

    def routed(self, x):
        probabilities = F.softmax(self.scores(x), dim=-1, dtype=torch.float)
        chosen = F.one_hot(probabilities.argmax(-1), EXPERTS)
        chosen = chosen * (chosen.cumsum(0) <= 6)
        best = probabilities.max(-1).values.unsqueeze(-1)
        return best * torch.einsum("te,ted->td", chosen.to(x.dtype), self.every_expert(x))


class SwitchMax(Moe):
    def routed(self, x):
        best, index = self.scores(x).softmax(-1).max(dim=-1)
        hidden = F.gelu(torch.einsum("td,tdf->tf", x, self.w1[index]))
        return best.unsqueeze(-1) * torch.einsum("tf,tfd->td", hidden, self.w2[index])


class DeepSpeedTop1(Moe):
    """TopKGate with k = 1, as DeepSpeed-MoE writes it, and a chunk for each expert."""
    stacked, capacity = False, 6

    def routed(self, x):
        gates = F.softmax(self.scores(x.float()), dim=1)
        mask = F.one_hot(torch.argmax(gates, dim=1), num_classes=EXPERTS)
        locations = torch.cumsum(mask, dim=0) - 1
        mask = mask * torch.lt(locations, self.capacity)
        where = torch.sum(locations * mask, dim=1)
        gates = gates * mask.float()
        combine = torch.einsum("se,sc->sec", gates, F.one_hot(where, self.capacity).float())
        dispatched = torch.einsum("sec,sm->ecm", combine.bool().type_as(x), x)
        chunks = dispatched.chunk(EXPERTS, dim=0)
        outputs = torch.cat([expert(chunk) for expert, chunk in zip(self.experts, chunks)], dim=0)
        return torch.einsum("sec,ecm->sm", combine.type_as(x), outputs)


class TutelSlots(Moe):
    """Tokens are scattered to slots (expert * capacity + position) and gathered back."""
    capacity = 6

    def routed(self, x):
        value, index = self.choose(x, k=1)
        chosen = F.one_hot(index[:, 0], EXPERTS)
        position = (chosen.cumsum(0) * chosen).sum(-1) - 1
        kept = position < self.capacity
        slot = torch.where(kept, index[:, 0] * self.capacity + position, EXPERTS * self.capacity)
        buffer = x.new_zeros(EXPERTS * self.capacity + 1, WIDTH).index_add(0, slot, x)
        done = self.each_its_own(buffer[:-1].view(EXPERTS, self.capacity, WIDTH)).reshape(-1, WIDTH)
        done = torch.cat([done, done.new_zeros(1, WIDTH)])
        return done[slot] * value


class SlotsBySetItem(TutelSlots):
    def routed(self, x):
        value, index = self.choose(x, k=1)
        chosen = F.one_hot(index[:, 0], EXPERTS)
        position = ((chosen.cumsum(0) * chosen).sum(-1) - 1).clamp(max=self.capacity)
        buffer = x.new_zeros(EXPERTS, self.capacity + 1, WIDTH)
        buffer[index[:, 0], position] = x
        done = self.each_its_own(buffer)
        return done[index[:, 0], position] * value * (position < self.capacity).unsqueeze(-1)


class SortedIndexAdd(Moe):
    """Tokens sorted by expert, weights picked for each, index_add back."""

    def routed(self, x):
        value, index = self.choose(x)
        order = index.flatten().argsort(stable=True)
        token, expert = order // index.shape[-1], index.flatten()[order]
        hidden = F.gelu(torch.bmm(x[token].unsqueeze(1), self.w1[expert]))
        done = torch.bmm(hidden, self.w2[expert]).squeeze(1) * value.flatten()[order].unsqueeze(-1)
        return torch.zeros_like(x).index_add_(0, token, done)


class Grouped(Moe):
    """Grouped matmul over tokens sorted by expert."""

    def routed(self, x):
        value, index = self.choose(x)
        order = index.flatten().argsort(stable=True)
        token = order // index.shape[-1]
        ends = F.one_hot(index.flatten(), EXPERTS).sum(0).cumsum(0).to(torch.int32)
        hidden = F.gelu(torch._grouped_mm(x[token].bfloat16(), self.w1.bfloat16(), offs=ends))
        done = torch._grouped_mm(hidden, self.w2.bfloat16(), offs=ends).to(x.dtype)
        done = done * value.flatten()[order].unsqueeze(-1)
        return torch.zeros_like(x).scatter_add(0, token.unsqueeze(-1).expand(-1, WIDTH), done)


class Llama4(Moe):
    """Every expert on every token; the input is weighted, by a sigmoid of what was chosen."""

    def routed(self, x):
        logits = self.scores(x)
        value, index = logits.topk(1, dim=-1)
        gates = torch.full_like(logits, float("-inf")).scatter_(1, index, value).t()
        inputs = x.repeat(EXPERTS, 1) * torch.sigmoid(gates.float()).reshape(-1, 1).to(x.dtype)
        return self.each_its_own(inputs.view(EXPERTS, -1, WIDTH)).sum(0)


class FlatWeights(Moe):
    """megablocks: experts stacked in 2-D weights (experts * inner, width), viewed to 3-D."""

    def extra(self):
        self.w1, self.w2 = weight(EXPERTS * INNER, WIDTH), weight(EXPERTS * INNER, WIDTH)

    def every_expert(self, x):
        w1, w2 = self.w1.view(EXPERTS, INNER, WIDTH), self.w2.view(EXPERTS, INNER, WIDTH)
        return torch.einsum("tef,efd->ted", F.gelu(torch.einsum("td,efd->tef", x, w1)), w2)

    routed = OneHot.routed


class FlatActivations(FlatWeights):
    """The same weights as one wide MLP whose hidden features are weighted by their expert's gate."""

    def routed(self, x):
        value, index = self.choose(x)
        gates = (F.one_hot(index, EXPERTS) * value.unsqueeze(-1)).sum(1)
        hidden = F.gelu(F.linear(x, self.w1)).view(-1, EXPERTS, INNER) * gates.unsqueeze(-1)
        return hidden.view(-1, EXPERTS * INNER) @ self.w2


class ExpertsInTheMiddle(Moe):
    """The expert is not the first axis of the weights."""

    def extra(self):
        self.w1, self.w2 = weight(WIDTH, EXPERTS, INNER), weight(INNER, EXPERTS, WIDTH)

    def every_expert(self, x):
        return torch.einsum("tef,fed->ted", F.gelu(torch.einsum("td,def->tef", x, self.w1)), self.w2)

    routed = OneHot.routed


class UnboundExperts(Moe):
    """Stacked weights taken apart in a loop, with biases that are picked by the choice."""

    def extra(self):
        self.bias = weight(EXPERTS, WIDTH)

    def routed(self, x):
        value, index = self.choose(x)
        gates = (F.one_hot(index, EXPERTS) * value.unsqueeze(-1)).sum(1)
        total = gates @ self.bias
        for e, (up, down) in enumerate(zip(self.w1.unbind(0), self.w2.unbind(0))):
            total = total + gates[:, e, None] * (F.gelu(x @ up) @ down)
        return total


class Vmapped(Moe):
    def routed(self, x):
        value, index = self.choose(x)
        gates = (F.one_hot(index, EXPERTS) * value.unsqueeze(-1)).sum(1)
        done = torch.vmap(lambda a, b: F.gelu(x @ a) @ b)(self.w1, self.w2)
        return torch.einsum("te,etd->td", gates, done)


class FunctionalCall(Moe):
    """torch.func: one module, its parameters stacked for all experts."""

    def extra(self):
        self.template = [Dense().requires_grad_(False)]         # in a list: no parameters of this module
        self.stack = nn.ParameterDict({
            name.replace(".", "_"): weight(EXPERTS, *p.shape) for name, p in self.template[0].named_parameters()})

    def routed(self, x):
        value, index = self.choose(x)
        gates = (F.one_hot(index, EXPERTS) * value.unsqueeze(-1)).sum(1)
        parameters = {f"{name}.weight": self.stack[f"{name}_weight"] for name in ("up", "gate", "down")}
        done = torch.vmap(lambda p: torch.func.functional_call(self.template[0], p, (x,)))(parameters)
        return torch.einsum("te,etd->td", gates, done)


class LoraExperts(Moe):
    """Routed low-rank experts; their base is the shared part."""

    def extra(self):
        self.w1, self.w2 = weight(EXPERTS, WIDTH, 2), weight(EXPERTS, 2, WIDTH)

    routed = OneHot.routed


class MultiHead(Moe):
    """MH-MoE: a token is split into sub-tokens, each with its own choice."""

    def extra(self):
        half = WIDTH // 2
        self.router = nn.Linear(half, EXPERTS)
        self.w1, self.w2 = weight(EXPERTS, half, INNER), weight(EXPERTS, INNER, half)
        self.split, self.merge = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)

    def routed(self, x):
        pieces = self.split(x).view(-1, WIDTH // 2)
        return self.merge(OneHot.routed(self, pieces).view(x.shape))


class ManyTinyExperts(Moe):
    """PEER: experts of one neuron, their weights rows of embeddings, product keys."""
    keys = 4

    def extra(self):
        self.query = nn.Linear(WIDTH, 2 * self.keys, bias=False)
        self.into, self.out = nn.Embedding(self.keys ** 2, WIDTH), nn.Embedding(self.keys ** 2, WIDTH)

    def routed(self, x):
        (left, i), (right, j) = (side.topk(2, dim=-1) for side in self.query(x).chunk(2, dim=-1))
        scores = (left.unsqueeze(-1) + right.unsqueeze(-2)).flatten(-2)
        index = (i.unsqueeze(-1) * self.keys + j.unsqueeze(-2)).flatten(-2)
        best, where = scores.topk(2, dim=-1)
        index = index.gather(-1, where)
        hidden = F.gelu(torch.einsum("td,tkd->tk", x, self.into(index))) * best.softmax(-1)
        return torch.einsum("tk,tkd->td", hidden, self.out(index))


class ResidualMoe(Moe):
    """DeepSpeed's residual MoE: a softmax over two weighs the experts and the dense MLP; that is no router."""

    def extra(self):
        self.coefficient, self.dense = nn.Linear(WIDTH, 2), Dense()

    def parts(self, x):
        routed, weights = OneHot.routed(self, x.reshape(-1, WIDTH)).view(x.shape), self.coefficient(x).softmax(-1)
        dense = self.dense(x) * weights[..., 1:]
        return routed * weights[..., :1], dense if self.shared is None else dense + self.shared(x)


class GatedShared(Moe):
    """Qwen2-MoE: the shared expert has a gate of its own."""

    def extra(self):
        self.gate, self.shared = nn.Linear(WIDTH, 1), Dense()

    routed = OneHot.routed

    def parts(self, x):
        routed, shared = super().parts(x)
        return routed, torch.sigmoid(self.gate(x)) * shared


# --- no top-k over experts -----------------------------------------------------------------------------------------

class ExpertChoice(Moe):
    """Each expert picks its tokens."""

    def routed(self, x):
        probabilities = self.scores(x).softmax(-1)
        gates, token = probabilities.t().topk(5, dim=-1)                  # (experts, picked)
        done = self.each_its_own(x[token]) * gates.unsqueeze(-1)
        return torch.zeros_like(x).index_add_(0, token.flatten(), done.flatten(0, 1))


class ExpertChoiceByOneHot(Moe):
    """The same within each sequence, with one-hot dispatch."""

    def parts(self, x):
        gates, token = self.scores(x).softmax(-1).transpose(1, 2).topk(3, dim=-1)     # (batch, experts, picked)
        dispatch = F.one_hot(token, x.shape[1]).to(x.dtype)
        inputs = torch.einsum("bekt,btd->bekd", dispatch, x)
        hidden = F.gelu(torch.einsum("bekd,edf->bekf", inputs, self.w1))
        done = torch.einsum("bekf,efd->bekd", hidden, self.w2)
        routed = torch.einsum("bekt,bek,bekd->btd", dispatch, gates, done)
        return routed, None if self.shared is None else self.shared(x)


class ExpertChoiceFirstAxis(Moe):
    def routed(self, x):
        gates, token = self.scores(x).softmax(-1).topk(5, dim=0)          # (picked, experts)
        done = self.each_its_own(x[token.t()]) * gates.t().unsqueeze(-1)
        return torch.zeros_like(x).index_add(0, token.t().reshape(-1), done.reshape(-1, WIDTH))


class SoftMoe(Moe):
    """Dispatch and combine are softmaxes of one linear map; every slot is a mixture of tokens (it sees the future)."""
    slots = 3

    def extra(self):
        self.phi = weight(WIDTH, EXPERTS, self.slots)

    def logits(self, x):
        return torch.einsum("btd,des->btes", x, self.phi)

    def parts(self, x):
        logits = self.logits(x)
        dispatch = logits.softmax(dim=1)
        combine = logits.flatten(2).softmax(dim=-1).view(logits.shape)
        inputs = torch.einsum("btes,btd->besd", dispatch, x)
        hidden = F.gelu(torch.einsum("besd,edf->besf", inputs, self.w1))
        done = torch.einsum("besf,efd->besd", hidden, self.w2)
        routed = torch.einsum("btes,besd->btd", combine, done)
        return routed, None if self.shared is None else self.shared(x)


class SoftMoeNormed(SoftMoe):
    """lucidrains/soft-moe-pytorch: normed tokens and slot embeddings, a module for each expert."""
    stacked = False

    def extra(self):
        self.phi, self.gamma = weight(EXPERTS, self.slots, WIDTH), weight(WIDTH)

    def parts(self, x):
        slots = F.normalize(self.phi, dim=-1) * WIDTH ** 0.5 * self.gamma
        logits = torch.einsum("bnd,esd->bnes", F.normalize(x, dim=-1), slots)
        dispatch = logits.softmax(dim=1)
        combine = logits.reshape(*x.shape[:2], -1).softmax(dim=-1)
        inputs = torch.einsum("bnd,bnes->ebsd", x, dispatch)
        done = torch.stack([expert(own) for expert, own in zip(self.experts, inputs.unbind(0))])
        done = done.transpose(0, 1).reshape(x.shape[0], -1, WIDTH)
        routed = torch.einsum("bsd,bns->bnd", done, combine)
        return routed, None if self.shared is None else self.shared(x)


class SoftMoeFlat(SoftMoe):
    """Slots of all experts as outputs of one nn.Linear, matmul instead of einsum."""

    def extra(self):
        self.phi = nn.Linear(WIDTH, EXPERTS * self.slots, bias=False)

    def parts(self, x):
        logits = self.phi(x)
        inputs = (logits.softmax(dim=1).transpose(1, 2) @ x).view(x.shape[0], EXPERTS, self.slots, WIDTH)
        done = torch.matmul(F.gelu(torch.matmul(inputs, self.w1)), self.w2)
        routed = logits.softmax(dim=-1) @ done.reshape(x.shape[0], -1, WIDTH)
        return routed, None if self.shared is None else self.shared(x)


class Mixture(Moe):
    """Every expert, weighted by a softmax."""

    def routed(self, x):
        return torch.einsum("te,ted->td", self.scores(x).softmax(-1), self.every_expert(x))


class MixtureOfModules(Mixture):
    stacked = False

    def routed(self, x):
        gates = self.scores(x).softmax(-1)
        return sum(gates[:, e: e + 1] * expert(x) for e, expert in enumerate(self.experts))


class MixtureOfStack(Mixture):
    stacked = False

    def routed(self, x):
        return (self.scores(x).softmax(-1).unsqueeze(-1) * self.every_expert(x)).sum(dim=1)


class SigmoidMixture(Mixture):
    """Gates of their own for each expert; the hidden features are weighted, before the second map."""

    def routed(self, x):
        hidden = F.gelu(torch.einsum("td,edf->tef", x, self.w1)) * torch.sigmoid(self.scores(x)).unsqueeze(-1)
        return torch.einsum("tef,efd->td", hidden, self.w2)


class TwoExperts(Moe):
    """The smallest mixture: two modules, a softmax over two."""
    stacked = False

    def extra(self):
        self.router = nn.Linear(WIDTH, 2)
        self.experts = self.experts[:2]

    def routed(self, x):
        gates = self.router(x).softmax(-1)
        return gates[:, :1] * self.experts[0](x) + gates[:, 1:] * self.experts[1](x)


ROUTERS = (OneHot, MlpRouter, MatmulRouter, EinsumRouter, CosineRouter, GroupedSigmoid, NoisyTopK, ScatteredSoftmax,
           JitterInFp32, SortRouter, TwoTimesMax, NoChoiceOperator, Relu)
EXPERT_FORMS = (LoopedMixtral, LoopedWhere, LoopedInPlace, GShard, GShardOfModules, SwitchArgmax, SwitchMax,
                DeepSpeedTop1, TutelSlots, SlotsBySetItem, SortedIndexAdd, Grouped, Llama4, FlatWeights,
                FlatActivations, ExpertsInTheMiddle, UnboundExperts, Vmapped, FunctionalCall, LoraExperts, MultiHead,
                ManyTinyExperts, ResidualMoe, GatedShared)
WITHOUT_A_TOPK = (ExpertChoice, ExpertChoiceByOneHot, ExpertChoiceFirstAxis, SoftMoe, SoftMoeNormed, SoftMoeFlat,
                  Mixture, MixtureOfModules, MixtureOfStack, SigmoidMixture, TwoExperts)


@pytest.mark.parametrize("moe", [param(cls) for cls in ROUTERS + EXPERT_FORMS + WITHOUT_A_TOPK])
def test_routed_experts_are_found(moe):
    """One layer without a shared expert and one with, each read in part by the attention behind it."""
    assert outcomes(Decoder(Dense, moe, lambda: moe(shared=True), Dense)) == EXACT


# --- a top-k that is not routing ------------------------------------------------------------------------------------

class Indexer(Attention):
    """DeepSeek-V3.2: an indexer of its own picks the keys that a query sees; one weight a head."""

    def __init__(self):
        super().__init__()
        self.q, self.k = nn.Linear(WIDTH, 2 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.weights = nn.Linear(WIDTH, 2, bias=False)

    def bias(self, x):
        q = self.q(x).view(*x.shape[:2], 2, WIDTH)
        scores = torch.einsum("bqhd,bkd->bqhk", q, self.k(x)).relu() * self.weights(x).unsqueeze(-1)
        causal = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        scores = scores.sum(2).masked_fill(~causal, -1e9)
        kept = torch.full_like(scores, -1e9).scatter(-1, scores.topk(4, dim=-1).indices, 0.0)
        return kept.masked_fill(~causal, -1e9)

    def forward(self, x):
        y = F.scaled_dot_product_attention(*self.heads(x), attn_mask=self.bias(x).unsqueeze(1))
        return self.out(y.transpose(1, 2).reshape(x.shape))


class IndexerOfProducts(Indexer):
    def forward(self, x):
        q, k, v = self.heads(x)
        return self.out(((q @ k.transpose(-1, -2) + self.bias(x).unsqueeze(1)).softmax(-1) @ v)
                        .transpose(1, 2).reshape(x.shape))


class BlockSelection(Attention):
    """MoBA: each query sees its best blocks, by the mean of their keys."""

    def forward(self, x):
        q, k, v = self.heads(x)
        means = k.unflatten(2, (-1, 2)).mean(3)
        gates = torch.einsum("bhqd,bhnd->bhqn", q, means)
        chosen = torch.zeros_like(gates).scatter(-1, gates.topk(3, dim=-1).indices, 1.0).bool()
        causal = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        mask = (chosen.repeat_interleave(2, dim=-1) | torch.eye(x.shape[1], dtype=torch.bool)) & causal
        return self.out(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).reshape(x.shape))


class CompressedSelection(Attention):
    """NSA: blocks by the attention that goes to their compressed keys; three branches with gates."""

    def __init__(self):
        super().__init__()
        self.compress, self.gate = nn.Linear(2 * 4, 4, bias=False), nn.Linear(WIDTH, 2)

    def forward(self, x):
        q, k, v = self.heads(x)
        blocks = [self.compress(t.unflatten(2, (-1, 2)).flatten(3)) for t in (k, v)]
        weights = (q @ blocks[0].transpose(-1, -2)).softmax(-1)
        index = weights.sum(1, keepdim=True).topk(3, dim=-1).indices
        chosen = torch.zeros_like(weights[:, :1]).scatter(-1, index, 1.0).repeat_interleave(2, dim=-1).bool()
        mask = chosen | torch.eye(x.shape[1], dtype=torch.bool)
        picked = (q @ k.transpose(-1, -2)).masked_fill(~mask, -1e9).softmax(-1) @ v
        gate = torch.sigmoid(self.gate(x)).unsqueeze(1)
        both = gate[..., :1] * (weights @ blocks[1]) + gate[..., 1:] * picked
        return self.out(both.transpose(1, 2).reshape(x.shape))


class GatedHeads(Attention):
    """Linear attention whose heads have stacked weights and a gate each: as many gates as stacked weights."""

    def __init__(self):
        super().__init__()
        self.wq, self.wk, self.wv = (weight(EXPERTS, WIDTH, 2) for _ in range(3))
        self.wo, self.gate = weight(EXPERTS, 2, WIDTH), nn.Linear(WIDTH, EXPERTS)

    def forward(self, x):
        q, k, v = (torch.einsum("btd,hdk->bhtk", x, w) for w in (self.wq, self.wk, self.wv))
        causal = torch.ones(x.shape[1], x.shape[1]).tril()
        y = (q @ k.transpose(-1, -2) * causal) @ v * torch.sigmoid(self.gate(x)).transpose(1, 2).unsqueeze(-1)
        return torch.einsum("bhtk,hkd->btd", y, self.wo)


class GatedDecay(GatedHeads):
    """The same as a recurrence: no product of activations, a cumulative sum."""

    def forward(self, x):
        q, k, v = (torch.einsum("btd,hdk->bhtk", x, w) for w in (self.wq, self.wk, self.wv))
        y = q * torch.cumsum(k * v, dim=2) * self.gate(x).softmax(-1).transpose(1, 2).unsqueeze(-1)
        return torch.einsum("bhtk,hkd->btd", y, self.wo)


class TokenShift(Attention):
    """Nothing shows that it mixes tokens but an operation that is not known."""

    def forward(self, x):
        q, k, v = self.qkv(F.pad(x, (0, 0, 1, 0))[:, :-1] + x).chunk(3, dim=-1)
        return self.out(torch.sigmoid(q) * k + v)


@pytest.mark.parametrize("attention", [param(cls) for cls in (
    Indexer, IndexerOfProducts, BlockSelection, CompressedSelection, GatedHeads, GatedDecay, TokenShift)])
def test_attention_that_selects_stays_attention(attention):
    mlps = (Dense, lambda: OneHot(shared=True), lambda: Mixture(shared=True), Dense)
    assert outcomes(Decoder(*mlps, attention=attention)) == EXACT


class Sampler(Decoder):
    def pick(self, logits):
        return logits.argmax(-1).to(logits.dtype)


class TopKSampler(Decoder):
    """Everything but the best five is out; the best of the rest."""

    def pick(self, logits):
        value, index = logits.topk(5, dim=-1)
        weight = value.softmax(-1)
        cut = torch.full_like(logits, float("-inf")).scatter(-1, index, value)
        nucleus = torch.sort(cut, dim=-1, descending=True)[1][..., 0].to(logits.dtype)
        return torch.stack([(weight * index).sum(-1), nucleus])


class BeamSearch(Decoder):
    """One step of a beam: the best continuations of all beams, and the embeddings of what was picked."""

    def pick(self, logits):
        scores = logits[:, -1].log_softmax(-1)
        value, index = scores.flatten().topk(3)
        beam, token = index // VOCABULARY, index % VOCABULARY
        return torch.cat([logits[beam, -1], self.embed(token), value.unsqueeze(-1)], dim=-1)


class Feedback(Decoder):
    """What was picked is embedded and projected again (a draft head)."""

    def pick(self, logits):
        return self.head(self.embed(logits.argmax(-1)))


class MixtureOfHeads(Decoder):
    """Confidence: the largest probability, as a factor."""

    def pick(self, logits):
        best, index = logits.softmax(-1).max(-1, keepdim=True)
        return best * logits + index


@pytest.mark.parametrize("decoder", [param(cls) for cls in (
    Sampler, TopKSampler, BeamSearch, Feedback, MixtureOfHeads)])
def test_a_choice_over_the_logits_is_not_routing(decoder):
    assert outcomes(decoder(Dense, lambda: OneHot(shared=True), LoopedMixtral)) == EXACT


# --- dense blocks -----------------------------------------------------------------------------------------------------

class Winners(Dense):
    def forward(self, x):
        h = self.up(x)
        return self.down(h * torch.zeros_like(h).scatter(-1, h.topk(4, dim=-1).indices, 1.0))


class GatedWinners(Dense):
    def forward(self, x):
        gate = self.gate(x)
        return self.down(self.up(x) * gate.masked_fill(gate < gate.topk(4, dim=-1).values[..., -1:], 0.0))


class GroupedWinners(Dense):
    """The largest of each group of four features, then a map that is one block a group: no experts."""

    def __init__(self):
        super().__init__()
        self.blocks = weight(INNER // 4, 4, 4)

    def forward(self, x):
        h = self.up(x).unflatten(-1, (-1, 4))
        h = h * F.one_hot(h.argmax(-1), 4)
        return self.down(torch.einsum("btgi,gio->btgo", h, self.blocks).flatten(-2))


class Maxout(Dense):
    def forward(self, x):
        return self.down(torch.cat([self.up(x).unflatten(-1, (-1, 2)).max(dim=-1).values, self.gate(x)[..., :8]], -1))


class Quantized(Dense):
    def forward(self, x):
        h = F.silu(self.gate(x)) * self.up(x)
        scale = h.abs().max(dim=-1, keepdim=True).values
        return self.down((h / scale * 127).round() * scale / 127)


class Memory(Dense):
    """A memory: top-k over learned keys, the rows of an embedding added up and gated. Nothing computes on the token."""

    def __init__(self):
        super().__init__()
        self.keys, self.values = weight(16, WIDTH), nn.Embedding(16, WIDTH)
        self.swish = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        value, index = (self.gate(x)[..., :WIDTH] @ self.keys.t()).topk(3, dim=-1)
        rows = (value.softmax(-1).unsqueeze(-1) * self.values(index)).sum(-2)
        return self.down(self.up(rows * F.silu(self.swish(x))))


class Rolled(Dense):
    """An operation that is not known, along the features: it might mix tokens."""

    def forward(self, x):
        return self.down(self.up(x).roll(1, -1) + F.silu(self.gate(x)))


class Deep(Dense):
    """Equal layers in a row are not experts side by side."""

    def __init__(self):
        super().__init__()
        self.rest = nn.ModuleList(nn.Linear(INNER, INNER) for _ in range(5))

    def forward(self, x):
        h = self.up(x)
        for layer in self.rest:
            h = F.relu(layer(h))
        return self.down(h)


class Gates(Dense):
    """Softmax and sigmoid over features: as many as there are features, no experts."""

    def forward(self, x):
        return self.down(self.up(x).softmax(-1) * torch.sigmoid(self.gate(x)))


DENSE = (Dense, Deep, Gates)
FEATURES = (Winners, GatedWinners, Maxout, Quantized, Memory)
UNCLEAR = (GroupedWinners, Rolled)


@pytest.mark.parametrize("mlp", [param(cls) for cls in DENSE])
def test_dense_blocks_beside_routed_ones(mlp):
    assert outcomes(Decoder(mlp, lambda: OneHot(shared=True), mlp, OneHot)) == EXACT


@pytest.mark.parametrize("mlp", [param(cls) for cls in FEATURES])
def test_a_choice_of_features_is_not_routing(mlp):
    assert outcomes(Decoder(mlp, lambda: OneHot(shared=True), mlp, OneHot)) == EXACT


@pytest.mark.parametrize("mlp", [param(cls) for cls in UNCLEAR])
def test_a_block_that_may_be_several_things_is_refused(mlp):
    found = outcomes(Decoder(mlp, lambda: OneHot(shared=True), mlp, OneHot))
    assert all(isinstance(found[name], fs.RefusedError) for name in CONNECTIVITIES[1:]), found


class Depths(Decoder):
    """Mixture of depths: a layer works on the tokens that one score picks."""

    def __init__(self, *mlps, **kwargs):
        super().__init__(*mlps, **kwargs)
        self.score = nn.Linear(WIDTH, 1)

    def forward(self, ids):
        x = self.layers[0](self.embed(ids))
        gate, index = self.score(x).squeeze(-1).topk(5, dim=-1)
        index = index.sort(dim=-1)[0].unsqueeze(-1).expand(-1, -1, WIDTH)
        picked = x.gather(1, index)
        x = x.scatter_add(1, index, (self.layers[1](picked) - picked) * torch.sigmoid(gate).unsqueeze(-1))
        for layer in self.layers[2:]:
            x = layer(x)
        return self.head(norm(x))


def test_a_mixture_of_depths_is_refused():
    """Tokens that are picked for a whole layer are not tokens that are picked for experts."""
    for mlps in ((Dense,) * 3, (Dense, OneHot, OneHot, OneHot)):
        found = outcomes(Depths(*mlps))
        assert all(isinstance(found[name], fs.FarskipError) for name in CONNECTIVITIES[1:]), found


@pytest.mark.parametrize("mlp", [param(cls) for cls in DENSE])
def test_a_dense_model(mlp):
    """``ladder`` needs no router; the others say that there is none, and what to do."""
    found = outcomes(Decoder(mlp, mlp, mlp))
    assert found["ladder"] == found["none"] == "exact"
    for name in ("farskip", "attn_only", "mlp_only"):
        assert isinstance(found[name], fs.NoMoEError)
        assert "none of the 3 layers has a router" in str(found[name]) and "'ladder'" in str(found[name])


# --- experts without a router that is understood --------------------------------------------------------------------

class Hashed(Moe):
    """Experts by a hash of the token's values: no linear map gives scores."""

    def routed(self, x):
        index = (x.abs().sum(-1) * 100).long() % EXPERTS
        return torch.einsum("te,ted->td", F.one_hot(index, EXPERTS).to(x.dtype), self.every_expert(x))


class HashedModules(Hashed):
    stacked = False


class Distances(Moe):
    """Experts by the nearest centroid."""

    def extra(self):
        self.centroids = weight(EXPERTS, WIDTH)

    def routed(self, x):
        index = (x.unsqueeze(1) - self.centroids).pow(2).sum(-1).argmin(-1)
        return torch.einsum("te,ted->td", F.one_hot(index, EXPERTS).to(x.dtype), self.every_expert(x))


class AttentionRouter(Moe):
    """Yuan 2.0-M32: scores from a small attention among the experts' own features."""

    def extra(self):
        self.router = nn.Linear(WIDTH, 3 * EXPERTS, bias=False)

    def routed(self, x):
        q, k, v = self.router(x).view(-1, 3, EXPERTS).unbind(1)
        scores = ((q.unsqueeze(-1) @ k.unsqueeze(-2)).softmax(-1) @ v.unsqueeze(-1)).squeeze(-1)
        value, index = scores.topk(2, dim=-1)
        gates = (F.one_hot(index, EXPERTS) * value.softmax(-1).unsqueeze(-1)).sum(1)
        return torch.einsum("te,ted->td", gates, self.every_expert(x))


class Unequal(Moe):
    """Experts of different sizes in a loop."""
    stacked = False

    def extra(self):
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, n), nn.GELU(), nn.Linear(n, WIDTH))
                                     for n in (4, 6, 8, 10))

    def routed(self, x):
        value, index = self.choose(x)
        return sum(expert(x) * (value * (index == e)).sum(-1, keepdim=True) for e, expert in enumerate(self.experts))


class ZeroExperts(Moe):
    """MoE++, LongCat: more scores than experts; the last ones return the token."""

    def extra(self):
        self.router = nn.Linear(WIDTH, EXPERTS + 2)

    def routed(self, x):
        value, index = self.choose(x)
        gates = (F.one_hot(index, EXPERTS + 2) * value.unsqueeze(-1)).sum(1)
        done = torch.einsum("te,ted->td", gates[:, :EXPERTS], self.every_expert(x))
        return done + gates[:, EXPERTS:].sum(-1, keepdim=True) * x


@pytest.mark.parametrize("moe", [param(cls) for cls in (
    Hashed, HashedModules, Distances, AttentionRouter, Unequal, ZeroExperts)])
def test_experts_that_are_not_understood_are_never_dense(moe):
    """In every layer, or beside a router that is understood."""
    for mlps in ((moe, lambda: moe(shared=True)), (Dense, OneHot, moe)):
        found = outcomes(Decoder(*mlps))
        assert all(isinstance(found[name], fs.RefusedError) for name in CONNECTIVITIES[1:]), found
