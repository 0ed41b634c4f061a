"""Random residual programs, and the definition of a connectivity run directly on them.

A ``Program`` is an ordinary ``nn.Module`` as users write them. ``interpret`` is the definition of section 3 of the
design, evaluated over the program's own parts: states s_0, s_1, ..., U(s, b) = s + scale * b, and each block reads the
stream without what its connectivity hides. It shares nothing with the passes.
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

WIDTH, TOKENS, VOCABULARY, EXPERTS, HEADS = 8, 6, 16, 4, 2
MIXERS = ("sdpa", "products", "indexed", "conv", "decay", "cached")
MLPS = ("dense", "gated_dense", "einsum", "loop", "gather", "index_add", "top1", "grouped_choice")
SHARED = ("none", "plain", "gated")
ADDS = ("plain", "reversed", "inplace", "method", "inplace_method")


@dataclass(frozen=True)
class LayerSpec:
    mixer: str
    mlp: str
    shared: str = "none"
    add: str = "plain"
    scale: float = 1.0
    view: bool = False          # the MoE works on (tokens, width) and is viewed back
    half: bool = False          # branches compute in another dtype and are cast back
    inplace_sum: bool = False   # shared.add_(routed)
    post_norm: bool = False     # a norm between the contribution and the stream

    @property
    def is_moe(self) -> bool:
        return self.mlp not in ("dense", "gated_dense")


def norm(x, weight):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * weight


class Mixer(nn.Module):
    def __init__(self, spec: LayerSpec) -> None:
        super().__init__()
        self.kind = spec.mixer
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH, bias=spec.half)
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, groups=WIDTH, padding=2)
        self.register_buffer("cache", torch.zeros(2, TOKENS, WIDTH))

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        causal = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
        if self.kind in ("sdpa", "cached"):
            if self.kind == "cached":
                cache = torch.zeros_like(self.cache)
                cache[:, torch.arange(x.shape[1])] = k      # a write that the attention reads back
                k = cache[:, : x.shape[1]]
            split = lambda t: t.view(*t.shape[:2], HEADS, -1).transpose(1, 2)  # noqa: E731
            y = F.scaled_dot_product_attention(split(q), split(k), split(v), is_causal=True)
            y = y.transpose(1, 2).reshape(x.shape)
        elif self.kind == "products":
            y = (q @ k.transpose(-1, -2)).masked_fill(~causal, -1e9).softmax(-1) @ v
        elif self.kind == "indexed":        # a top-k that is not routing
            scores = (q @ k.transpose(-1, -2)).masked_fill(~causal, -1e9)
            kept = torch.full_like(scores, -1e9).scatter(-1, scores.topk(3, dim=-1).indices, 0.0)
            y = (scores + kept).softmax(-1) @ v
        elif self.kind == "conv":
            y = self.conv(q.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2) * torch.sigmoid(k)
        else:                               # "decay": a linear recurrence in closed form
            y = torch.cumsum(k * v, dim=1) * q
        return self.out(y)


class Mlp(nn.Module):
    """Dense or MoE; ``parts`` gives (routed, shared), either None where there is none."""

    def __init__(self, spec: LayerSpec) -> None:
        super().__init__()
        self.spec = spec
        self.up = nn.Linear(WIDTH, 2 * WIDTH, bias=False)
        self.down = nn.Linear(WIDTH, WIDTH, bias=False)
        if spec.is_moe:
            self.router = nn.Linear(WIDTH, EXPERTS, bias=False)
            self.bias = nn.Parameter(torch.randn(EXPERTS) * 0.1)
            self.w1 = nn.Parameter(torch.randn(EXPERTS, WIDTH, WIDTH) * 0.4)
            self.w2 = nn.Parameter(torch.randn(EXPERTS, WIDTH, WIDTH) * 0.4)
            self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=True) for _ in range(EXPERTS))
            self.gate = nn.Linear(WIDTH, 1, bias=False)

    def dense(self, x):
        if self.spec.mlp == "dense":
            return self.down(F.gelu(self.up(x)[..., :WIDTH]))
        gate, up = self.up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)

    def shared(self, x):
        y = self.dense(x)
        return torch.sigmoid(self.gate(x)) * y if self.spec.shared == "gated" else y

    def routed(self, x, seen=None):
        """(tokens, width) -> (tokens, width); the router's logits go to the list ``seen``."""
        logits, kind = self.router(x), self.spec.mlp
        scores = logits.softmax(-1)
        if seen is not None:
            seen.append(logits)
        if kind == "top1":
            best, index = scores.max(dim=-1)
            return best.unsqueeze(-1) * torch.einsum("th,tho->to", x, self.w1[index])
        if kind == "grouped_choice":        # group-limited, with a bias that only the choice sees
            choice = scores + self.bias
            groups = choice.view(-1, 2, EXPERTS // 2).topk(1, dim=-1)[0].sum(-1)
            allowed = torch.zeros_like(groups).scatter_(1, groups.topk(1, dim=-1)[1], 1).bool()
            allowed = allowed.unsqueeze(-1).expand(-1, 2, EXPERTS // 2).reshape(-1, EXPERTS)
            index = choice.masked_fill(~allowed, float("-inf")).topk(2, dim=-1)[1]
            weight = scores.gather(1, index)
        else:
            weight, index = scores.topk(2, dim=-1)
        weight = weight / weight.sum(-1, keepdim=True)
        if kind == "einsum":
            onehot = F.one_hot(index, EXPERTS).to(x.dtype)
            combine = torch.einsum("tk,tke->te", weight, onehot)
            hidden = F.silu(torch.einsum("th,eho->teo", x, self.w1))
            return torch.einsum("te,teo->to", combine, torch.einsum("teh,eho->teo", hidden, self.w2))
        if kind == "loop":
            total = torch.zeros_like(x)
            for e, expert in enumerate(self.experts):
                total = total + (weight * (index == e)).sum(-1, keepdim=True) * expert(x)
            return total
        if kind == "index_add":
            order = index.reshape(-1).argsort(stable=True)
            token = order // index.shape[-1]
            hidden = torch.bmm(x[token].unsqueeze(1), self.w1[index.reshape(-1)[order]]).squeeze(1)
            return torch.zeros_like(x).index_add_(0, token, hidden * weight.reshape(-1)[order].unsqueeze(-1))
        hidden = torch.einsum("th,tkho->tko", x, self.w1[index])
        return (torch.einsum("tkh,tkho->tko", F.silu(hidden), self.w2[index]) * weight.unsqueeze(-1)).sum(1)

    def parts(self, x):
        if not self.spec.is_moe:
            return None, self.dense(x)
        routed = self.routed(x.reshape(-1, WIDTH))
        shared = None if self.spec.shared == "none" else self.shared(x.reshape(-1, WIDTH) if self.spec.view else x)
        if not self.spec.view:
            routed = routed.view(x.shape)
        return routed, shared

    def forward(self, x):
        routed, shared = self.parts(x)
        if routed is None:
            return shared
        if shared is None:
            return routed.view(x.shape)
        if self.spec.inplace_sum:
            shared.add_(routed)
            return shared.view(x.shape)
        return (routed + shared).view(x.shape)


class Layer(nn.Module):
    def __init__(self, spec: LayerSpec) -> None:
        super().__init__()
        self.spec = spec
        self.mixer, self.mlp = Mixer(spec), Mlp(spec)
        self.norms = nn.ParameterList(1 + 0.1 * torch.randn(WIDTH) for _ in range(3))

    def update(self, state, contribution):
        """The user's way to write residual + contribution."""
        spec = self.spec
        if spec.scale != 1.0:
            contribution = contribution * spec.scale
        if spec.add == "reversed":
            return contribution + state
        if spec.add == "method":
            return state.add(contribution)
        if spec.add == "inplace":
            state += contribution
            return state
        if spec.add == "inplace_method":
            return contribution.add_(state)
        return state + contribution

    def attention(self, state):
        return self.cast(self.mixer(norm(self.cast(state), self.norms[0])))

    def cast(self, x):
        return x.to(torch.float32) if self.spec.half else x

    def ffn_input(self, state):
        return norm(self.cast(state), self.norms[1])

    def after(self, contribution):
        return norm(contribution, self.norms[2]) if self.spec.post_norm else contribution

    def forward(self, state):
        state = self.update(state, self.attention(state))
        return self.update(state, self.after(self.cast(self.mlp(self.ffn_input(state)))))


class Program(nn.Module):
    def __init__(self, specs: tuple[LayerSpec, ...], seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(Layer(spec) for spec in specs)
        self.final = nn.Parameter(1 + 0.1 * torch.randn(WIDTH))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, ids):
        state = self.embed(ids)
        for layer in self.layers:
            state = layer(state)
        return self.head(norm(state, self.final))


class Undefined(Exception):
    """The connectivity asks for the stream without a part that cannot be told apart."""


def interpret(program: Program, ids, connectivity: str, converted) -> torch.Tensor:
    """The definition, evaluated: what the rewired program must compute."""
    stream = program.embed(ids)
    before_mlp, kept, previous_moe = None, None, False
    for k, layer in enumerate(program.layers):
        scale = layer.spec.scale
        on = k in converted
        reads_past = on and k > 0 and (k - 1) in converted
        attention_reads = stream
        if reads_past and connectivity == "ladder":
            attention_reads = before_mlp
        elif reads_past and connectivity in ("farskip", "farskip_shared", "attn_only") and previous_moe:
            if isinstance(kept, Undefined):
                raise kept
            attention_reads = before_mlp if kept is None else before_mlp + kept
        mlp_outdated = on and connectivity in ("farskip", "farskip_shared", "mlp_only", "ladder")
        before_mlp = stream + scale * layer.attention(attention_reads)
        x = layer.ffn_input(stream if mlp_outdated else before_mlp)
        routed, shared = layer.mlp.parts(x)
        if on and connectivity == "farskip_shared" and None not in (routed, shared):
            if layer.spec.post_norm:
                raise Undefined("a norm over routed + shared")
            shared = layer.mlp.parts(layer.ffn_input(before_mlp))[1]
        total = shared if routed is None else routed if shared is None else routed + shared
        stream = before_mlp + scale * layer.after(total.view(x.shape))
        previous_moe = layer.spec.is_moe
        kept = None if shared is None or routed is None else scale * shared.view(x.shape)
        if kept is not None and layer.spec.post_norm:
            kept = Undefined("a norm over routed + shared")
    return program.head(norm(stream, program.final))
