"""The distillation loss: forward KL from the student to the frozen teacher, from hidden states, chunk by chunk.

    loss, sums = distillation_loss(hidden, head, Dense(teacher_hidden, teacher_head), targets)

Contract
    Logits are computed in float32 (float64 for float64 inputs), also under autocast and with 16-bit weights, for a chunk of
    tokens at a time: [tokens, vocabulary] never exists at once, for neither model. The gradients with respect to the
    student's hidden states and to its head are computed in the same pass, by formula; backward only scales them.

Formulas, for one token, with student logits z, teacher logits u and temperature T
    p = softmax(z / T), q = softmax(u / T)
    KL = sum_v q_v (log q_v - log p_v)          the teacher's distribution comes first: "forward"
    loss = kl T^2 KL + cross_entropy (-log softmax(z)_target)
    d loss / d z = kl T (p - q) + cross_entropy (softmax(z) - onehot(target))
T^2 keeps the size of the gradient where T changes (Hinton et al., 1503.02531).

Where the teacher is known by its k largest log-probabilities and the mass of the tail (a cache), the tail is one more
class: KL over k + 1 classes, a lower bound of the KL over all. For a token v of the tail d KL / d z_v is
p_v (1 - q_tail / p_tail), so the gradient sums to zero, which dropping the tail would not give (2503.16870).

With bf16 weights on a GPU the products of 16-bit numbers are summed in float32 (exact products, true float32 logits); the
gradient of the logits is rounded to bf16 before the two matrix products of the backward, as any bf16 layer does.
"""
from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import ConfigError

_BLOCK = 8192           # rows of the head that are widened to float32 at a time


@dataclass(frozen=True, kw_only=True)
class Head:
    """What turns hidden states into logits: ``softcap tanh(scale (hidden weight^T + bias) / softcap)``.

    Attributes:
        weight: [vocabulary, hidden].
        bias: [vocabulary] or None.
        scale: Granite's 1 / logits_scaling, Cohere's logit_scale.
        softcap: Gemma's final_logit_softcapping; None: no cap.
    """
    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def with_weights(self, weight: Tensor, bias: Tensor | None) -> Head:
        """The same way to make logits, of other tensors."""
        return replace(self, weight=weight, bias=bias)

    def detached(self) -> Head:
        return self.with_weights(self.weight.detach(), None if self.bias is None else self.bias.detach())

    def logits(self, hidden: Tensor) -> Tensor:
        """[tokens, vocabulary] in float32 (float64), without gradients: of one chunk."""
        logits = _times_transposed(hidden, self.weight)
        if self.bias is not None:
            logits += self.bias
        if self.scale != 1.0:
            logits *= self.scale
        if self.softcap is not None:
            logits.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits


@dataclass(frozen=True)
class Dense:
    """A teacher given by its hidden states, [tokens, hidden], and its head; ``states`` of all layers where somebody asked for them."""
    hidden: Tensor
    head: Head
    states: tuple[Tensor, ...] = ()

    def rows(self, index: Tensor) -> Dense:
        return Dense(self.hidden[index], self.head)


@dataclass(frozen=True)
class TopK:
    """A teacher given by its largest log-probabilities and the rest of the mass, at the temperature of the loss.

    Attributes:
        indices: [tokens, k] vocabulary indices, the likeliest first.
        log_probs: [tokens, k].
        log_tail: [tokens] log of the mass of all other tokens; -inf: none.
    """
    indices: Tensor
    log_probs: Tensor
    log_tail: Tensor

    def rows(self, index: Tensor) -> TopK:
        return TopK(self.indices[index], self.log_probs[index], self.log_tail[index])


NAMES = ("tokens", "kl", "agree", "cross_entropy", "teacher_cross_entropy", "correct", "teacher_correct")


@dataclass(frozen=True)
class Sums:
    """Sums over tokens, as one float64 tensor of ``NAMES``: add them over micro-batches and ranks, divide at the end.

    ``agree``: the likeliest token is the teacher's. ``correct``: it is the target. A ``TopK`` teacher has no
    ``teacher_cross_entropy``: it is nan.
    """
    values: Tensor

    def __add__(self, other: Sums) -> Sums:
        return Sums(self.values + other.values)

    def means(self) -> dict[str, float]:
        """Per token; ``tokens`` itself is the count."""
        found = dict(zip(NAMES, self.values.tolist()))
        return {name: value if name == "tokens" else value / max(found["tokens"], 1.0) for name, value in found.items()}


def distillation_loss(hidden: Tensor, head: Head, teacher: Dense | TopK, targets: Tensor, *, temperature: float = 1.0,
                      kl: float = 1.0, cross_entropy: float = 0.0, ignore_index: int = -100,
                      items: Tensor | float | None = None, chunk_mb: float = 64.0) -> tuple[Tensor, Sums]:
    """The loss of one micro-batch, and what there is to report about it.

    Args:
        hidden: the student's, [tokens, hidden] or [batch, length, hidden]; the gradient goes here.
        head: the student's; the gradient goes to its weight and bias where they require one.
        teacher: ``Dense`` or ``TopK``, over the same tokens (flattened, or with the batch dimensions of ``hidden``).
        targets: the next token of each position, [tokens] or [batch, length], *already shifted*; positions with
            ``ignore_index`` count nowhere, and no logits are computed for them.
        temperature: of both distributions in the KL.
        kl, cross_entropy: weights of the two terms.
        items: divide the sum over tokens by this: the number of targets of the whole step, over accumulation and ranks.
            None: by the targets of this call.
        chunk_mb: MiB of one [chunk, vocabulary] buffer in float32; about four of them exist at a time.

    Returns:
        The loss (0-d float32, or float64) and ``Sums``.

    Raises:
        ConfigError: shapes, vocabularies or options that do not fit.
    """
    width = hidden.shape[-1]
    flat, targets = hidden.reshape(-1, width), targets.reshape(-1)
    teacher = _flat(teacher)
    _check(flat, head, teacher, targets, temperature, kl, cross_entropy)
    if targets.device != flat.device:
        targets = targets.to(flat.device)
    kept = (targets != ignore_index).nonzero().squeeze(1)
    how = _How(head=head.detached(), temperature=float(temperature), kl=float(kl), cross_entropy=float(cross_entropy),
               rows=max(1, int(chunk_mb * 2**20 / (4 * head.weight.shape[0]))))
    total, sums = _Distillation.apply(flat, head.weight, head.bias, teacher, targets, kept, how)
    items = len(kept) if items is None else items
    items = items.clamp(min=1) if isinstance(items, Tensor) else max(items, 1)
    return total / items, Sums(sums)


@dataclass(frozen=True, kw_only=True)
class _How:
    head: Head
    temperature: float
    kl: float
    cross_entropy: float
    rows: int


class _Distillation(torch.autograd.Function):
    """The sum over tokens; gradients are ready when the forward is."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, bias: Tensor | None, teacher, targets: Tensor, kept: Tensor, how: _How):
        wide = _wide(hidden.dtype)
        to_hidden, to_weight, to_bias = ctx.needs_input_grad[:3]
        with torch.autocast(hidden.device.type, enabled=False):
            total = torch.zeros((), dtype=wide, device=hidden.device)
            sums = torch.zeros(len(NAMES), dtype=torch.float64, device=hidden.device)
            d_hidden = torch.zeros_like(hidden, dtype=wide) if to_hidden else None
            d_weight = torch.zeros_like(weight, dtype=wide) if to_weight else None
            d_bias = torch.zeros_like(bias, dtype=wide) if to_bias else None
            for rows in kept.split(how.rows):
                states = hidden[rows]
                loss, found, gradient = _chunk(states, teacher.rows(rows), targets[rows], how,
                                               to_hidden or to_weight or to_bias)
                total += loss
                sums += found
                if gradient is None:
                    continue
                if to_bias:
                    d_bias += gradient.sum(0)
                if weight.dtype is torch.bfloat16 and gradient.is_cuda:
                    gradient = gradient.bfloat16()
                if to_hidden:
                    d_hidden[rows] = _times(gradient, weight)
                if to_weight:
                    _add_outer(d_weight, gradient, states)
        ctx.gradients = (d_hidden, d_weight, d_bias)
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        ctx.mark_non_differentiable(sums)
        return total, sums

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, outer: Tensor, _):
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("the gradients of a distillation loss are computed once: call backward once a forward")
        scaled = (None if g is None else g.mul_(outer).to(dtype) for g, dtype in zip(gradients, ctx.dtypes))
        return *scaled, None, None, None, None


def _chunk(states: Tensor, teacher: Dense | TopK, targets: Tensor, how: _How, wanted: bool):
    """Of one chunk: the loss (a sum), the sums to report, and the gradient with respect to hidden weight^T + bias."""
    temperature, head = how.temperature, how.head
    student = head.logits(states)
    slope = 1 - (student / head.softcap).square() if wanted and head.softcap is not None else None
    entropy, best, normalizer = _read(student, targets)
    log_p = _log_softmax_(student, temperature, normalizer)         # in place of the logits
    if isinstance(teacher, Dense):
        divergence, gradient, seen = _against_dense(log_p, teacher, targets, how, wanted)
    else:
        divergence, gradient, seen = _against_top_k(log_p, teacher, targets, how, wanted)
    teacher_best, teacher_entropy, teacher_correct = seen
    loss = (how.kl * temperature**2 * divergence + how.cross_entropy * entropy).sum()
    columns = (torch.ones_like(entropy), divergence, best == teacher_best, entropy, teacher_entropy, best == targets,
               teacher_correct)
    sums = torch.stack([column.sum(dtype=torch.float64) for column in columns])
    if not wanted:
        return loss, sums, None
    if how.cross_entropy:
        if temperature == 1.0:
            log_softmax = log_p
        else:       # log_p = z / T - logsumexp(z / T): the logits up to a constant, which does not matter
            log_p *= temperature
            log_softmax = log_p.sub_(log_p.logsumexp(-1, keepdim=True))
        gradient.add_(log_softmax.exp_(), alpha=how.cross_entropy)
        here = targets[:, None]
        gradient.scatter_add_(1, here, torch.full_like(here, -how.cross_entropy, dtype=gradient.dtype))
    if slope is not None:
        gradient *= slope
    if head.scale != 1.0:
        gradient *= head.scale
    return loss, sums, gradient


def _against_dense(log_p: Tensor, teacher: Dense, targets: Tensor, how: _How, wanted: bool):
    log_q = teacher.head.logits(teacher.hidden).to(log_p.dtype)
    entropy, best, normalizer = _read(log_q, targets)
    log_q = _log_softmax_(log_q, how.temperature, normalizer)
    q = log_q.exp()
    divergence = log_q.sub_(log_p).mul_(q).sum(-1)
    gradient = torch.exp(log_p, out=log_q).sub_(q).mul_(how.kl * how.temperature) if wanted else None
    return divergence, gradient, (best, entropy, best == targets)


def _against_top_k(log_p: Tensor, teacher: TopK, targets: Tensor, how: _How, wanted: bool):
    indices, log_q = teacher.indices.long(), teacher.log_probs.to(log_p.dtype)
    log_tail = teacher.log_tail.to(log_p.dtype)
    known = log_p.gather(1, indices)
    rest = log_p.scatter(1, indices, -torch.inf)
    log_rest = rest.logsumexp(-1)
    no_tail = log_tail == -torch.inf
    q, tail = log_q.exp(), log_tail.exp()
    divergence = (q * (log_q - known)).sum(-1) + torch.where(no_tail, 0.0, tail * (log_tail - log_rest))
    gradient = None
    if wanted:
        share = torch.where(no_tail, 0.0, torch.exp(log_tail - log_rest))
        gradient = rest.exp_().mul_((1 - share)[:, None]).scatter_(1, indices, known.exp() - q)
        gradient *= how.kl * how.temperature
    best = indices[:, 0]
    return divergence, gradient, (best, torch.full_like(divergence, torch.nan), best == targets)


def _read(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy, the likeliest token, and the log-normalizer of each row."""
    normalizer = logits.logsumexp(-1)
    return normalizer - logits.gather(1, targets[:, None]).squeeze(1), logits.argmax(-1), normalizer


def _log_softmax_(logits: Tensor, temperature: float, normalizer: Tensor) -> Tensor:
    """In place; ``normalizer`` is that of temperature 1."""
    if temperature != 1.0:
        logits /= temperature
        normalizer = logits.logsumexp(-1)
    return logits.sub_(normalizer[:, None])


# ---------------------------------------------------------------------------------------------------------------------
# Matrix products in float32
# ---------------------------------------------------------------------------------------------------------------------


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype is torch.float64 else torch.float32


def _exact_on_device(a: Tensor, b: Tensor) -> bool:
    """Whether the device multiplies these 16-bit numbers into float32 by itself."""
    return a.is_cuda and a.dtype is torch.bfloat16 and b.dtype is torch.bfloat16


def _times_transposed(states: Tensor, weight: Tensor) -> Tensor:
    """states [n, h] times weight [v, h] transposed."""
    if _exact_on_device(states, weight):
        return torch.mm(states, weight.t(), out_dtype=torch.float32)
    wide = _wide(torch.promote_types(states.dtype, weight.dtype))
    states = states.to(wide)
    if weight.dtype is wide:
        return states @ weight.t()
    logits = torch.empty(len(states), len(weight), dtype=wide, device=states.device)
    for start in range(0, len(weight), _BLOCK):
        logits[:, start:start + _BLOCK] = states @ weight[start:start + _BLOCK].to(wide).t()
    return logits


def _times(gradient: Tensor, weight: Tensor) -> Tensor:
    """gradient [n, v] times weight [v, h]."""
    if _exact_on_device(gradient, weight):
        return torch.mm(gradient, weight, out_dtype=torch.float32)
    if weight.dtype is gradient.dtype:
        return gradient @ weight
    total = torch.zeros(len(gradient), weight.shape[1], dtype=gradient.dtype, device=gradient.device)
    for start in range(0, len(weight), _BLOCK):
        total.addmm_(gradient[:, start:start + _BLOCK], weight[start:start + _BLOCK].to(gradient.dtype))
    return total


def _add_outer(total: Tensor, gradient: Tensor, states: Tensor) -> None:
    """total [v, h] += gradient [n, v] transposed times states [n, h]."""
    if _exact_on_device(gradient, states):
        total += torch.mm(gradient.t(), states, out_dtype=torch.float32)
    else:
        total.addmm_(gradient.t().to(total.dtype), states.to(total.dtype))


# ---------------------------------------------------------------------------------------------------------------------
# What fits together
# ---------------------------------------------------------------------------------------------------------------------


def _flat(teacher: Dense | TopK) -> Dense | TopK:
    if isinstance(teacher, Dense):
        return Dense(teacher.hidden.detach().reshape(-1, teacher.hidden.shape[-1]), teacher.head.detached())
    k = teacher.indices.shape[-1]
    return TopK(teacher.indices.reshape(-1, k), teacher.log_probs.reshape(-1, k), teacher.log_tail.reshape(-1))


def _check(hidden: Tensor, head: Head, teacher: Dense | TopK, targets: Tensor, temperature, kl, cross_entropy) -> None:
    vocabulary = head.weight.shape[0]
    if not temperature > 0:
        raise ConfigError(f"temperature must be positive, got {temperature!r}")
    if kl < 0 or cross_entropy < 0 or not (kl or cross_entropy):
        raise ConfigError(f"kl={kl!r} and cross_entropy={cross_entropy!r} are weights: none negative, and not both zero")
    if hidden.shape[-1] != head.weight.shape[1]:
        raise ConfigError(f"hidden states of {hidden.shape[-1]} do not fit a head of {tuple(head.weight.shape)}")
    if len(targets) != len(hidden):
        raise ConfigError(f"{len(targets)} targets for {len(hidden)} positions: targets are shifted already, and there is "
                          "one for each position (ignore_index at the last)")
    if isinstance(teacher, Dense):
        rows, other = len(teacher.hidden), teacher.head.weight.shape[0]
        if other != vocabulary:
            raise ConfigError(f"the teacher's vocabulary has {other} tokens and the student's {vocabulary}: the teacher is "
                              "the same model before its conversion")
    else:
        rows = len(teacher.indices)
        if teacher.indices.shape[-1] > vocabulary:
            raise ConfigError(f"{teacher.indices.shape[-1]} tokens of the teacher were kept, of {vocabulary} there are")
    if rows != len(hidden):
        raise ConfigError(f"the teacher has {rows} positions and the student {len(hidden)}")
