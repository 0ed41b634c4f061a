"""Not a Hugging Face model: an MoE decoder of plain torch modules, converted in one line and checked against a plain loop.

    python examples/own_model.py

Nothing in the model knows about farskip_fx. The residual stream, the router, its experts and the shared expert are found
in the traced graph; module names and class names do not matter.
"""
import torch
import torch.nn.functional as F
from torch import nn

import farskip_fx as fs

WIDTH, INNER, HEADS, EXPERTS, TOP, LAYERS, VOCABULARY = 64, 96, 4, 8, 2, 4, 256


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, dim=-1))
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.up = nn.Linear(WIDTH, INNER, bias=False), nn.Linear(WIDTH, INNER, bias=False)
        self.down = nn.Linear(INNER, WIDTH, bias=False)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Experts(nn.Module):
    """Top-2 of 8 with a sigmoid router and stacked weights: (token, choice) pairs, picked weights, index_add back."""

    def __init__(self):
        super().__init__()
        self.router = nn.Parameter(torch.randn(WIDTH, EXPERTS) * WIDTH ** -0.5)
        self.w1 = nn.Parameter(torch.randn(EXPERTS, WIDTH, INNER) * WIDTH ** -0.5)
        self.w2 = nn.Parameter(torch.randn(EXPERTS, INNER, WIDTH) * INNER ** -0.5)

    def forward(self, x):
        tokens = x.flatten(0, 1)
        gate, expert = torch.sigmoid(tokens @ self.router).topk(TOP, dim=-1)
        gate = gate / gate.sum(-1, keepdim=True)
        expert, token = expert.flatten(), torch.arange(tokens.shape[0]).repeat_interleave(TOP)
        hidden = F.gelu(torch.bmm(tokens[token].unsqueeze(1), self.w1[expert]))
        done = torch.bmm(hidden, self.w2[expert]).squeeze(1) * gate.reshape(-1, 1)
        return torch.zeros_like(tokens).index_add(0, token, done).view(x.shape)


class Moe(nn.Module):
    def __init__(self):
        super().__init__()
        self.routed, self.shared = Experts(), Mlp()

    def forward(self, x):
        return self.routed(x) + self.shared(x)


class Layer(nn.Module):
    def __init__(self, dense):
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.attention, self.mlp = Attention(), Mlp() if dense else Moe()

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.norm = nn.Embedding(VOCABULARY, WIDTH), nn.RMSNorm(WIDTH)
        self.layers = nn.ModuleList(Layer(dense=k == 0) for k in range(LAYERS))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


def plain_loop(model, ids):
    """What connectivity="farskip" means, written out."""
    stream = visible = model.embed(ids)         # visible: the stream without routed experts that are still in flight
    for layer in model.layers:
        after_attention = stream + layer.attention(layer.norm1(visible))
        x = layer.norm2(stream)                 # outdated: without this layer's attention
        if isinstance(layer.mlp, Moe):
            visible = after_attention + layer.mlp.shared(x)
            stream = visible + layer.mlp.routed(x)
        else:
            stream = visible = after_attention + layer.mlp(x)
    return model.head(model.norm(stream))


if __name__ == "__main__":
    torch.manual_seed(0)
    model, ids = Decoder().eval(), torch.randint(0, VOCABULARY, (2, 32))
    with torch.no_grad():
        original, expected = model(ids), plain_loop(model, ids)
        # One line, in place; or torch.compile(model, backend="farskip", options={"connectivity": "farskip"}).
        # inner="eager" skips Inductor so that this runs in seconds; leave it out for speed.
        fs.apply(model, connectivity="farskip", inner="eager")
        converted = model(ids)

    print(fs.last_reports()[-1])
    print(f"\nlogits moved by {(converted - original).abs().max():.3f}: the connectivity is another one")
    difference = (converted - expected).abs().max()
    print(f"the plain loop with this connectivity differs by {difference:.1e}")
    assert difference < 1e-4, "not the connectivity that was asked for"
