"""What a rewired model must compute, written down as a plain loop over the decoder layers of a transformers model.

    logits = oracle("qwen3_moe", model, inputs, "farskip", layers=range(1, 3))

This file is the definition that the graph passes are tested against, so it shares nothing with them: it imports neither
farskip_fx nor passes, it knows every model by name, and it calls the model's own submodules in eager mode.

Terms.  *R*: the residual stream.  A decoder layer is one or more MIXERS (attention, linear attention, Mamba, a
convolution) and an MLP (or MoE).  A block *reads* a state of the stream, computes a *contribution*, and an *update*
makes the next state:

    R' = update(R,  attention(read(A)))        A = what attention may see: R, or a state that lacks the MLP before it
    R  = update(R', routed + ready)            ready = the shared expert, or all of a dense MLP: waits for no exchange

A *third block* stands between an MLP and the next attention and works on each token alone.  It cannot wait for what is
in flight either: it reads A, its one contribution c goes into the stream, and attention reads update(A, c).

Of several mixers in a layer the first reads A; the others read the stream as in the model.  An encoder's layers are
numbered before the decoder's; nothing is in flight from one stream to the other.

Steps.  1. Run the model once and record what it hands to each mixer (masks, rotary tables): none of it depends on the
connectivity.  2. Walk the layers with READS[connectivity].  3. Let the model go on from R: its decoder after an encoder
(and record that again), its own norm and head at the end.

Gradients flow through the oracle; put it under torch.no_grad() where they are not wanted.
"""
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

ATTENTION, MLP = "attention", "mlp"

# What each block reads: "full" (as the model has it), "outdated" (the state before the block in front of it), or
# "partial" (that block's update with the routed experts left out). "routed outdated": the router and the routed experts are
# outdated, a shared expert reads "full"; without one the whole block is outdated.
READS = {  # connectivity: (attention k, MLP k)
    "none": ("full", "full"),
    "farskip": ("partial", "outdated"),
    "farskip_shared": ("partial", "routed outdated"),
    "attn_only": ("partial", "full"),
    "mlp_only": ("full", "outdated"),
    "ladder": ("outdated", "outdated"),
}


class Undefined(Exception):
    """The connectivity asks for a state of the stream that this model's update does not have."""


class Contribution(NamedTuple):
    """What an MLP adds to the stream, split by when it is there. None: the layer has no such part."""

    routed: Tensor | None  # needs the exchange between the ranks
    ready: Tensor | None   # shared expert or dense MLP: local to the rank


def oracle(family: str, model: nn.Module, inputs: dict, connectivity: str,
           layers: Collection[int] | None = None) -> Tensor:
    """Logits of `model` under a connectivity; `layers` are the decoder layers it converts (None: all of them)."""
    shape = shape_of(family)
    stacks = stacks_of(shape, model)
    count = sum(map(len, stacks))
    converted = set(range(count) if layers is None else layers)
    assert converted <= set(range(count)), f"layers {sorted(converted - set(range(count)))} of {count}"

    record, first = Record(shape, model, inputs), 0
    for stack in stacks:
        R = shape.walk(shape, record, stack, READS[connectivity], {k - first for k in converted})
        record, first = record.going_on(stack[-1], R), first + len(stack)
    return record.logits


def walk(shape: "Shape", record: "Record", layers: list["Layer"], reads: tuple[str, str], converted: set) -> Tensor:
    """The stream behind the last of `layers`, which share one stream."""
    attention_reads, mlp_reads = reads
    R = record.input_of(layers[0])
    before_mlp, contribution, carried = None, None, None  # of the layer in front: R', its MLP's output, shared indices
    for k, layer in enumerate(layers):
        A = R
        if k and {k - 1, k} <= converted and attention_reads != "full":
            A = read_of_attention(shape, layers[k - 1], attention_reads, R, before_mlp, contribution)
        if k:
            A, R = third_block(shape, record, layers[k - 1], A, R)

        for mixer in shape.mixers_of(layer):
            mixed, carried = attend(mixer, record, A, carried)
            R_before_mixer, R = R, mixer.update(R, mixed)
            A = R  # of several mixers only the first has something in flight in front of it

        before_mlp = R
        in_the_model = R_before_mixer if shape.parallel else before_mlp
        outdated = k in converted and mlp_reads != "full"
        contribution = contribute(shape, layer, record, R_before_mixer if outdated else in_the_model)
        if k in converted and mlp_reads == "routed outdated" and None not in contribution:
            contribution = contribution._replace(ready=contribute(shape, layer, record, in_the_model).ready)
        R = shape.update(layer.mlp, MLP, before_mlp, add_parts(contribution, R.dtype))
    return third_block(shape, record, layers[-1], R, R)[1]


def walk_normed(shape, record, layers, reads, converted) -> Tensor:
    """minimax: the norms stand in the stream, R' = norm(a R + b attention(R)); the next layer's ends a layer."""
    attention_reads, mlp_reads = reads
    R, before_mlp = layers[0].mlp.input_layernorm(record.input_of(layers[0])), None
    for k, (layer, _) in enumerate(layers):
        A = R
        if k and {k - 1, k} <= converted and attention_reads != "full":
            empty = before_mlp * layers[k - 1].mlp.mlp_alpha_factor  # no shared expert: nothing is ready
            A = before_mlp if attention_reads == "outdated" else layer.input_layernorm(empty)
        mixed = record.calls[layer.self_attn].repeat(A)[0]
        before_attention = R
        before_mlp = layer.post_attention_layernorm(R * layer.attn_alpha_factor + mixed * layer.attn_beta_factor)
        x = before_attention if k in converted and mlp_reads != "full" else before_mlp
        R = before_mlp * layer.mlp_alpha_factor + layer.mlp(x) * layer.mlp_beta_factor
        if k + 1 < len(layers):
            R = layers[k + 1].mlp.input_layernorm(R)
    return R


def layer_kinds(family: str, model: nn.Module) -> list[dict]:
    """dense: no routed experts; shared: a shared expert beside them. One entry per decoder layer."""
    shape = shape_of(family)
    kinds = []
    for layer in layers_of(shape, model):
        moe = is_moe(shape, layer)
        kinds.append(dict(dense=not moe, shared=moe and shape.has_shared(layer)))
    return kinds


def read_of_attention(shape, in_front, how, R, before_mlp, contribution) -> Tensor:
    """The state that lacks what is in flight from the layer in front."""
    if how == "partial" and contribution.routed is None:
        return R  # nothing of a dense MLP is in flight
    if how == "outdated":
        return before_mlp
    if shape.nonlinear and contribution.ready is not None:
        raise Undefined(shape.nonlinear)
    return shape.update(in_front.mlp, MLP, before_mlp, contribution.ready)


def third_block(shape, record, layer, A, R) -> tuple[Tensor, Tensor]:
    """(A, R) behind the block that follows the MLP of `layer`: it is computed once, from A."""
    if shape.third is None:
        return A, R
    contribution = shape.third(record, layer.mlp, A)
    return shape.third_update(layer.mlp, A, contribution), shape.third_update(layer.mlp, R, contribution)


def attend(mixer, record, state, carried) -> tuple[Tensor, object]:
    """The mixer's output, and the top-k indices that sparse attention passes on to the next layer (None elsewhere)."""
    call = record.calls[mixer.module]
    kwargs = dict(call.kwargs)
    if "prev_topk_indices" in kwargs:  # computed from the stream, so the recorded ones belong to the other connectivity
        kwargs["prev_topk_indices"] = carried
    out = call.repeat(mixer.read(state), kwargs)
    if not isinstance(out, tuple):
        return out, None
    return out[0], out[2] if len(out) == 3 else None


def contribute(shape, layer, record, state) -> Contribution:
    x = shape.read(shape, layer.mlp, MLP, state)
    if not is_moe(shape, layer):
        return Contribution(None, shape.dense(shape, layer)(x))
    routed, ready = shape.split(shape, layer.mlp, x, record)
    return Contribution(routed.reshape(x.shape), None if ready is None else ready.reshape(x.shape))


def add_parts(contribution: Contribution, dtype) -> Tensor:
    """Reference association of the paper: the stream gets (routed + shared) as one term."""
    parts = [part for part in contribution if part is not None]
    return sum(parts[1:], parts[0]).to(dtype)


# --- recording -------------------------------------------------------------------------------------------------------
class Call(NamedTuple):
    module: nn.Module
    args: tuple
    kwargs: dict

    def repeat(self, hidden_states: Tensor, kwargs: dict | None = None):
        """The same call on another hidden state, which is the first argument or the one of that name."""
        kwargs = {name: without_cache(value) for name, value in (self.kwargs if kwargs is None else kwargs).items()}
        if self.args:
            return self.module(hidden_states, *map(without_cache, self.args[1:]), **kwargs)
        return self.module(**{**kwargs, "hidden_states": hidden_states})


def without_cache(argument):
    """The recording run filled the cache: on top of it the oracle would attend to every token twice."""
    return None if isinstance(argument, Cache) else argument


class Layer(NamedTuple):
    """The modules that hold the two blocks of a decoder layer: nearly always the same one."""

    attention: nn.Module
    mlp: nn.Module


class Mixer(NamedTuple):
    module: nn.Module
    read: Callable[[Tensor], Tensor]            # what it is given of a state
    update: Callable[[Tensor, Tensor], Tensor]  # the state with its contribution


class Record:
    """One run of the model: how it calls its layers, mixers and MLPs, and the logits.

    `swaps` are layers whose output is replaced: the run goes on from another state of the stream.
    """

    def __init__(self, shape: "Shape", model: nn.Module, inputs: dict, swaps: dict[nn.Module, Tensor] | None = None):
        if inputs.get("past_key_values") is not None:
            raise ValueError("the oracle is defined on whole sequences: give it all tokens and no cache")
        self.shape, self.model, self.inputs, self.swaps = shape, model, inputs, swaps or {}
        self.calls: dict[nn.Module, Call] = {}
        watched = set()
        for layer in layers_of(shape, model):
            watched |= {*layer, *(mixer.module for mixer in shape.mixers_of(layer)), shape.mlp_of(layer)}
        watched.discard(None)
        handles = [module.register_forward_pre_hook(self._keep, with_kwargs=True) for module in watched]
        handles += [module.register_forward_hook(self._swap) for module in self.swaps]
        try:
            self.logits = model(**inputs)["logits"]
        finally:
            for handle in handles:
                handle.remove()

    def _keep(self, module, args, kwargs):
        self.calls[module] = Call(module, args, kwargs)

    def _swap(self, module, args, out):
        return (self.swaps[module], *out[1:]) if isinstance(out, tuple) else self.swaps[module]

    def input_of(self, layer: Layer) -> Tensor:
        call = self.calls[layer.attention]
        return call.args[0] if call.args else call.kwargs["hidden_states"]

    def going_on(self, last: Layer, R: Tensor) -> "Record":
        """The model's own norm, head, soft-capping (or decoder) after `R`, the stream behind the layer `last`."""
        owner = last.attention if self.shape.mlp_inside else last.mlp
        return Record(self.shape, self.model, self.inputs, {**self.swaps, owner: R})


def layers_of(shape: "Shape", model: nn.Module) -> list[Layer]:
    return [layer for stack in stacks_of(shape, model) for layer in stack]


def stacks_of(shape: "Shape", model: nn.Module) -> list[list[Layer]]:
    """The layers of each stream: one stack, or an encoder's and a decoder's."""
    names = (shape.stack,) if isinstance(shape.stack, str) else shape.stack
    return [stack_of(shape, list(model.get_submodule(name))) for name in names]


def stack_of(shape: "Shape", stack: list[nn.Module]) -> list[Layer]:
    if shape.mlp_inside:
        return [Layer(module, shape.mlp_inside(module)) for module in stack]
    if not shape.one_block_per_module:
        return [Layer(module, module) for module in stack]
    layers = [Layer(*pair) for pair in zip(stack[0::2], stack[1::2])]
    mixers_and_moes = [block.block_type in ("moe", "mlp") for block in stack]
    assert mixers_and_moes == [False, True] * len(layers), "blocks must alternate: a mixer, then an MLP or MoE"
    return layers


def is_moe(shape: "Shape", layer: Layer) -> bool:
    return getattr(shape.mlp_of(layer), shape.experts, None) is not None


# --- reads and updates of the stream ---------------------------------------------------------------------------------
def norm(shape, holder, block, state):
    """x = norm(R), the pre-norm of all plain families."""
    name = shape.norms[block]
    return state if name is None else holder.get_submodule(name)(state)


def add(holder, block, state, contribution):
    return state if contribution is None else state + contribution


def add_multiplied(holder, block, state, contribution):  # granite
    return state if contribution is None else state + contribution * holder.residual_multiplier


def add_to_scaled(holder, block, state, contribution):  # doge: the scale is on the stream, so it stays in every read
    scaled = (holder.input_residual if block == ATTENTION else holder.post_attention_residual) * state
    return scaled if contribution is None else scaled + contribution


def add_convolved(holder, block, state, contribution):  # inkling: a causal depthwise convolution without bias is linear
    convolution = holder.attn_sconv if block == ATTENTION else holder.mlp_sconv
    return state if contribution is None else state + convolution(contribution)


def add_normed(attention: str, mlp: str):  # sandwich: R + postnorm(f)
    def update(holder, block, state, contribution):
        post_norm = holder.get_submodule(attention if block == ATTENTION else mlp)
        return state if contribution is None else state + post_norm(contribution)
    return update


def add_normed_moe(holder, block, state, contribution):  # axk1: the norm is inside the MoE block, after the sum
    post_norm = getattr(holder.mlp, "post_mlp_layernorm", None) if block == MLP else None
    if contribution is not None and post_norm is not None:
        contribution = post_norm(contribution)
    return add(holder, block, state, contribution)


def add_scaled_by_depth(holder, block, state, contribution):  # beam: sandwich norms, and the skip path shrinks too
    count = holder.attn_residual_add_idx if block == ATTENTION else holder.mlp_residual_add_idx
    kept = state * ((count - 1) / count) ** 0.5
    if contribution is None:
        return kept
    post_norm = holder.post_attention_layernorm if block == ATTENTION else holder.post_feedforward_layernorm
    return kept + post_norm(contribution) * count ** -0.5


def gate_and_add(holder, block, state, contribution):  # muse_spark: sandwich norms, and learned weights for both sides
    name = "attention" if block == ATTENTION else "feedforward"
    gate = holder.get_submodule(f"post_{name}_residual_gate")
    if contribution is None:
        return gate(state, torch.zeros_like(state))
    return gate(state, holder.get_submodule(f"post_{name}_layernorm")(contribution))


def collapse_alone(shape, holder, block, state):  # hy_v4: the streams are not mixed with each other
    return norm(shape, holder, block, hyper_connection(holder, block)(state)[1])


def expand_alone(holder, block, state, contribution):
    if contribution is None:
        return state
    post, _ = hyper_connection(holder, block)(state)
    return post.unsqueeze(-1) * contribution.unsqueeze(-2) + state


def hyper_connection(holder, block):
    return holder.attn_hc if block == ATTENTION else holder.ffn_hc


def collapse_and_norm(shape, holder, block, state):
    _, _, collapsed = hyper_connection(holder, block)(state)
    return norm(shape, holder, block, collapsed)


def expand_and_mix(holder, block, state, contribution):
    """The weights are made from the state that is updated, never from the one that was read."""
    post, comb, _ = hyper_connection(holder, block)(state)
    mixed = torch.matmul(comb.to(state.dtype).transpose(-1, -2), state)
    if contribution is None:
        return mixed
    return post.to(state.dtype).unsqueeze(-1) * contribution.unsqueeze(-2) + mixed


def add_normed_and_scale(attention: str, mlp: str):  # diffusion_gemma: the layer ends with a factor on the stream
    add_normed_to = add_normed(attention, mlp)

    def update(holder, block, state, contribution):
        state = add_normed_to(holder, block, state, contribution)
        return state * holder.layer_scalar if block == MLP else state
    return update


def gated_residual(holder, block):
    return holder.attn_hyper_connection if block == ATTENTION else holder.mlp_hyper_connection


def mixed_input(shape, holder, block, state):  # qwen4_exp
    return gated_residual(holder, block)(state)[0]


def inject(holder, block, state, contribution):
    if contribution is None:
        return state
    _, stream, weights = gated_residual(holder, block)(state)
    return stream + (contribution.unsqueeze(-2) * weights.unsqueeze(-1)).flatten(-2)


# --- blocks beside the usual two --------------------------------------------------------------------------------------
def per_layer_input(record, holder, state):  # gemma4
    if not holder.hidden_size_per_layer_input:
        return None
    gate = holder.act_fn(holder.per_layer_input_gate(state))
    projected = holder.per_layer_projection(gate * record.calls[holder].args[1])
    return holder.post_per_layer_input_norm(projected)


def add_and_scale(holder, state, contribution):
    return (state if contribution is None else state + contribution) * holder.layer_scalar


def no_mixer(holder):
    return None


def ngram_embedding(holder):  # qwen4_exp: not token-wise, it ends in a convolution over the tokens
    return None if holder.ple is None else Mixer(holder.ple, lambda state: state, lambda state, out: state + out)


def cross_attention(attention: str, norm: str):
    def mixer(holder):
        try:
            module = holder.get_submodule(attention)
        except AttributeError:  # an encoder's layer
            return None
        return Mixer(module, holder.get_submodule(norm), lambda state, out: state + out)
    return mixer


# --- MoE blocks: (routed, shared or None) ----------------------------------------------------------------------------
def route(shape, moe, x, *gate_extra) -> Tensor:
    """gate(x) -> (logits, weights, indices); experts(x, indices, weights)."""
    flat = x.reshape(-1, x.shape[-1])
    _, weights, indices = moe.get_submodule(shape.router)(flat, *gate_extra)
    return moe.get_submodule(shape.experts)(flat, indices, weights)


def shared_of(shape, moe, x) -> Tensor | None:
    shared = getattr(moe, shape.shared, None) if shape.shared else None
    return None if shared is None else shared(x.reshape(-1, x.shape[-1]))


def common(shape, holder, x, record):
    moe = holder.get_submodule(shape.mlp)
    return route(shape, moe, x), shared_of(shape, moe, x)


def scaled_routed(factor: str):
    def split(shape, holder, x, record):
        moe = holder.get_submodule(shape.mlp)
        return route(shape, moe, x) * getattr(moe, factor), shared_of(shape, moe, x)
    return split


def gated_shared(shape, holder, x, record):
    moe = holder.get_submodule(shape.mlp)
    gate = torch.sigmoid(moe.shared_expert_gate(x.reshape(-1, x.shape[-1])))
    return route(shape, moe, x), gate * shared_of(shape, moe, x)


def afmoe(shape, holder, x, record):
    moe = holder.mlp
    _, weights, indices = moe.router(x, moe.expert_bias)  # this router wants (batch, tokens, hidden)
    return moe.experts(x.reshape(-1, x.shape[-1]), indices, weights), shared_of(shape, moe, x)


def cohere2_moe(shape, holder, x, record):
    routed, shared = common(shape, holder, x, record)
    if shared is not None and holder.mlp.shared_expert_combination_strategy == "average":
        return routed / 2, shared / 2  # exact: a power of two
    return routed, shared


def dbrx(shape, holder, x, record):
    ffn = holder.ffn
    return ffn.experts(x, *reversed(ffn.route_tokens_to_experts(ffn.router(x)))), None


def deepseek_v4(shape, holder, x, record):
    moe = holder.mlp
    hashed = (record.calls[moe].kwargs["input_ids"],) if moe.is_hash else ()  # hash layers route by token, not by state
    _, weights, indices = moe.gate(x, *hashed)
    return moe.experts(x.reshape(-1, x.shape[-1]), indices, weights), moe.shared_experts(x)


def doge(shape, holder, x, record):
    """Routed experts are single neurons in two embedding tables; the shared expert is the dense MLP beside them."""
    moe = holder.mlp
    tokens = x.shape[0] * x.shape[1]
    halves = moe.router_gate(x).view(2, tokens, -1)
    (scores_x, scores_y), (indices_x, indices_y) = halves.topk(moe.num_keys, dim=-1)
    scores = (scores_x.unsqueeze(-1) + scores_y.unsqueeze(-2)).flatten(-2)
    indices = (indices_x.unsqueeze(-1) * moe.num_keys + indices_y.unsqueeze(-2)).flatten(-2)
    scores, chosen = scores.topk(moe.top_k, dim=-1)
    weights = torch.softmax(scores, dim=-1)
    if moe.norm_topk_prob:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    experts = indices.gather(-1, chosen)
    hidden = torch.matmul(moe.down_embed(experts), x.reshape(tokens, -1, 1)).view(tokens, -1)
    routed = torch.matmul((moe.act_fn(hidden) * weights).view(tokens, 1, -1), moe.up_embed(experts))
    return routed, moe.down_proj(moe.act_fn(moe.gate_proj(x)) * moe.up_proj(x))


def ernie4_5_vl_moe(shape, holder, x, record):
    moe = holder.mlp
    return route(replace(shape, experts="experts"), moe.text_moe, x), shared_of(shape, moe, x)


def all_routed(shape, holder, x, record):
    """No shared expert, and an MoE block that is called with more than its tokens."""
    return record.calls[holder.get_submodule(shape.mlp)].repeat(x), None


def biased_router(name: str):
    def split(shape, holder, x, record):
        moe = holder.get_submodule(shape.mlp)
        return route(shape, moe, x, getattr(moe, name)), None
    return split


def shared_beside(shape, holder, x, record):  # granite: the shared MLP is a sibling of the MoE block
    moe = holder.get_submodule(shape.mlp)
    return route(shape, moe, x), None if holder.shared_mlp is None else holder.shared_mlp(x)


def gemma(shape, holder, state, record):
    """A dense MLP beside the experts, each with norms of its own before and after; the router reads the raw state."""
    flat = state.reshape(-1, state.shape[-1])
    _, weights, indices = holder.router(flat)
    routed = holder.experts(holder.pre_feedforward_layernorm_2(flat), indices, weights)
    dense = holder.mlp(holder.pre_feedforward_layernorm(state))
    return holder.post_feedforward_layernorm_2(routed), holder.post_feedforward_layernorm_1(dense)


def hy_v3(shape, holder, x, record):
    moe = holder.mlp
    routed, shared = route(shape, moe, x, moe.e_score_correction_bias), shared_of(shape, moe, x)
    return (routed.float(), shared.float()) if moe.enable_moe_fp32_combine else (routed, shared)


def inkling(shape, holder, x, record):
    moe = holder.mlp
    _, weights, indices, shared_weights = moe.gate(x)
    return moe.experts(x.reshape(-1, x.shape[-1]), indices, weights), moe.shared_experts(x, gammas=shared_weights)


def llama4(shape, holder, x, record):
    """Every expert sees every token, scaled by its score: no gather, so the routed part is a sum over the experts."""
    moe = holder.feed_forward
    flat = x.reshape(-1, x.shape[-1])
    scores, _ = moe.router(flat)
    experts = scores.shape[1]
    outputs = moe.experts(flat.repeat(experts, 1) * scores.transpose(0, 1).reshape(-1, 1))
    return outputs.reshape(experts, -1, outputs.shape[-1]).sum(dim=0), moe.shared_expert(flat)


def nemotron_h(shape, holder, x, record):
    moe = holder.mixer
    _, weights, indices = moe.gate(x)
    latent = moe.fc1_latent_proj(x.reshape(-1, x.shape[-1]))
    return moe.fc2_latent_proj(moe.experts(latent, indices, weights)), moe.shared_experts(x)


# --- one row of data per family --------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Shape:
    """Where a family keeps its parts, and how they meet the stream. The defaults are DeepSeek's and Qwen's names."""

    stack: str | tuple[str, ...] = "model.layers"  # of an encoder and a decoder: both, in this order
    mixers: tuple[str, ...] = ("self_attn", "linear_attn", "mamba")  # a layer has one of them
    mlp: str = "mlp"
    attention_norm: str | None = "input_layernorm"
    mlp_norm: str | None = "post_attention_layernorm"
    router: str = "gate"
    experts: str = "experts"             # a layer without this attribute is dense
    shared: str | None = "shared_experts"
    split: Callable = common
    walk: Callable = walk
    read: Callable = norm
    update: Callable = add
    first_mixer: Callable = no_mixer     # holder -> a mixer in front of the attention
    second_mixer: Callable = no_mixer    # holder -> a mixer behind it
    third: Callable | None = None        # contribution of a token-wise block behind the MLP
    third_update: Callable | None = None
    nonlinear: str = ""                  # why the update has no partial state; empty where it is linear
    parallel: bool = False               # attention and MLP read the same state in the model itself
    one_block_per_module: bool = False   # two modules of the stack make one decoder layer
    mlp_inside: Callable | None = None   # layer -> the module that has the MLP and its norm, where that is another one
    shared_in_layer: bool = False        # `shared` is an attribute of the layer, not of its MoE block
    always_shared: bool = False          # the shared expert has no module of its own

    @property
    def norms(self):
        return {ATTENTION: self.attention_norm, MLP: self.mlp_norm}

    def mixers_of(self, layer: Layer) -> list[Mixer]:
        holder = layer.attention
        attention = Mixer(self.mixer_of(layer), partial(self.read, self, holder, ATTENTION),
                          partial(self.update, holder, ATTENTION))
        mixers = self.first_mixer(holder), attention, self.second_mixer(holder)
        return [mixer for mixer in mixers if mixer is not None]

    def mixer_of(self, layer: Layer) -> nn.Module:
        for name in self.mixers:
            try:
                return layer.attention.get_submodule(name)
            except AttributeError:
                pass
        raise AttributeError(f"{type(layer.attention).__name__} has none of {self.mixers}")

    def mlp_of(self, layer: Layer) -> nn.Module | None:
        return getattr(layer.mlp, self.mlp, None)

    def has_shared(self, layer: Layer) -> bool:
        holder = layer.mlp if self.shared_in_layer else self.mlp_of(layer)
        return self.always_shared or (bool(self.shared) and getattr(holder, self.shared, None) is not None)

    def dense(self, shape: "Shape", layer: Layer) -> nn.Module:
        mlp = self.mlp_of(layer)
        return layer.mlp.shared_mlp if mlp is None else mlp  # granite without experts keeps only its shared MLP


QWEN_GATED = dict(shared="shared_expert", split=gated_shared)
SCALED_ROUTED = dict(split=scaled_routed("routed_scaling_factor"))
GEMMA_NORMS = ("post_attention_layernorm", "post_feedforward_layernorm")
GEMMA = dict(mlp="experts", experts="gate_up_proj", mlp_norm=None, split=gemma, always_shared=True)
GRANITE = dict(mlp="block_sparse_moe", router="router", shared="shared_mlp", split=shared_beside,
               shared_in_layer=True, update=add_multiplied)
HYPER = dict(read=collapse_and_norm, update=expand_and_mix)
POST_NORM = "a norm stands over the sum of routed and shared experts: the shared part alone has no place in the stream"

PLAIN_SHAPES = {
    "aria": Shape(router="router"),
    "axk2": Shape(),
    "bailing_hybrid": Shape(),
    "dbrx": Shape("transformer.blocks", ("norm_attn_norm.attn",), "ffn", "norm_attn_norm.norm_1",
                  "norm_attn_norm.norm_2", shared=None, split=dbrx),
    "deepseek_ocr2": Shape(),
    "deepseek_v2": Shape(),
    "deepseek_v3": Shape(),
    "deepseek_v32": Shape(),
    "dots3_note": Shape(),
    "ernie4_5_moe": Shape(),
    "ernie4_5_vl_moe": Shape(experts="text_moe", split=ernie4_5_vl_moe),
    "exaone_moe": Shape(),
    "flint": Shape(shared="shared_expert"),
    "glm4_moe": Shape(),
    "glm4_moe_lite": Shape(),
    "glm4v_moe": Shape(),
    "glm_moe_dsa": Shape(),
    "gpt_oss": Shape(router="router"),
    "hy_v3": Shape(split=hy_v3),
    "jamba": Shape(mlp="feed_forward", mlp_norm="pre_ff_layernorm", router="router"),
    "laguna": Shape(**SCALED_ROUTED),
    "llama4": Shape(mlp="feed_forward", shared="shared_expert", split=llama4),
    "mellum": Shape(),
    "mimo_v2_flash": Shape(),
    "minimax_m3_vl": Shape(**SCALED_ROUTED),
    "mistral4": Shape(),
    "mistral_large4": Shape(),
    "mixtral": Shape(),
    "nemotron_h": Shape(mixers=("mixer",), mlp="mixer", attention_norm="norm", mlp_norm="norm",
                        split=nemotron_h, one_block_per_module=True),
    "olmoe": Shape(),
    "openai_privacy_filter": Shape(router="router", split=scaled_routed("num_experts")),
    "qwen2_moe": Shape(**QWEN_GATED),
    "qwen3_moe": Shape(),
    "qwen3_next": Shape(**QWEN_GATED),
    "qwen3_omni_moe": Shape(),
    "qwen3_omni_moe_talker": Shape(**QWEN_GATED),
    "qwen3_vl_moe": Shape(),
    "step3p7": Shape(**SCALED_ROUTED),
    "unlimited_ocr": Shape(),
}
LINEAR_SHAPES = {  # not x + f(norm(x)), but the update is linear in the contribution: every connectivity is defined
    "doge": Shape(experts="router_gate", split=doge, update=add_to_scaled, always_shared=True),
    "granitemoe": Shape(**{**GRANITE, "split": common, "shared": None}),
    "granitemoe_swa": Shape(**GRANITE),
    "granitemoehybrid": Shape(**GRANITE),
    "granitemoeshared": Shape(**GRANITE),
    "inkling": Shape(split=inkling, update=add_convolved),
}
PARALLEL_SHAPES = {  # x + attention(norm(x)) + mlp(norm(x)), one norm for both
    "cohere2_moe": Shape(mlp_norm="input_layernorm", split=cohere2_moe, parallel=True),
}
SANDWICH_SHAPES = {  # a norm after the block: outdated reads are defined, partial ones only without a shared expert
    "afmoe": Shape(mlp_norm="pre_mlp_layernorm", split=afmoe, nonlinear=POST_NORM,
                   update=add_normed("post_attention_layernorm", "post_mlp_layernorm")),
    "diffusion_gemma": Shape(update=add_normed_and_scale(*GEMMA_NORMS), nonlinear=POST_NORM, **GEMMA),
    "flex_olmo": Shape(attention_norm=None, mlp_norm=None, nonlinear=POST_NORM,
                       update=add_normed("post_attention_layernorm", "post_feedforward_layernorm")),
    "gemma4": Shape(update=add_normed(*GEMMA_NORMS), nonlinear=POST_NORM, third=per_layer_input,
                    third_update=add_and_scale, **GEMMA),
    "kolibri1": Shape(nonlinear=POST_NORM, update=add_normed("post_self_attn_layernorm", "post_mlp_layernorm")),
}
HYPER_SHAPES = {  # linear too: several streams side by side, mixed by weights that are made from the stream
    "deepseek_v4": Shape(split=deepseek_v4, **HYPER),
    "glm5_next": Shape(**HYPER),
    "qwen4_exp": Shape(read=mixed_input, update=inject, first_mixer=ngram_embedding, **QWEN_GATED),
}
TWO_STREAM_SHAPES = {  # encoder and decoder; a decoder layer has two mixers
    "nllb_moe": Shape(("model.encoder.layers", "model.decoder.layers"), mlp="ffn", shared=None, split=all_routed,
                      attention_norm="self_attn_layer_norm", mlp_norm="ff_layer_norm",
                      second_mixer=cross_attention("cross_attention", "cross_attention_layer_norm")),
    "switch_transformers": Shape(("encoder.block", "decoder.block"), ("layer.0.SelfAttention",), shared=None,
                                 split=all_routed, attention_norm="layer.0.layer_norm", mlp_norm="layer_norm",
                                 mlp_inside=lambda block: block.layer[-1],
                                 second_mixer=cross_attention("layer.1.EncDecAttention", "layer.1.layer_norm")),
}
MORE_SHAPES = {  # of tests/more_families.py
    "axk1": Shape(nonlinear=POST_NORM, update=add_normed_moe),
    "beam": Shape(mlp_norm="pre_feedforward_layernorm", update=add_scaled_by_depth, **SCALED_ROUTED),
    "dots1": Shape(),
    "hunyuan_v1_moe": Shape(shared="shared_mlp"),
    "hy_v4": Shape(read=collapse_alone, update=expand_alone),
    "kimi_linear": Shape(),
    "lfm2_moe": Shape(mixers=("self_attn", "conv"), mlp="feed_forward", attention_norm="operator_norm",
                      mlp_norm="ffn_norm", split=biased_router("expert_bias")),
    "minimax": Shape(walk=walk_normed),
    "minimax_m2": Shape(split=biased_router("e_score_correction_bias")),
    "muse_spark": Shape(mlp_norm="pre_feedforward_layernorm", update=gate_and_add, split=all_routed),
    "phimoe": Shape(router="router"),
    "qwen3_5_moe": Shape(**QWEN_GATED),
    "solar_open": Shape(),
}
SHAPES = {**PLAIN_SHAPES, **LINEAR_SHAPES, **PARALLEL_SHAPES, **SANDWICH_SHAPES, **HYPER_SHAPES, **TWO_STREAM_SHAPES}

PLAIN = tuple(PLAIN_SHAPES)
LINEAR, PARALLEL = tuple(LINEAR_SHAPES), tuple(PARALLEL_SHAPES)
SANDWICH, HYPER_CONNECTED = tuple(SANDWICH_SHAPES), tuple(HYPER_SHAPES)
DEFINED = tuple(SHAPES)  # families that the oracle can run, for some connectivity at least

NOT_PLAIN = {
    "afmoe": "sandwich norms: post_attention_layernorm and post_mlp_layernorm stand between each block and the stream",
    "cohere2_moe": "parallel block: attention and MLP read one and the same normed stream",
    "deepseek_v4": "manifold-constrained hyper-connections: hc_mult streams, mixed before and after each block",
    "diffusion_gemma": "sandwich norms over dense MLP + experts, and the whole stream is scaled by layer_scalar",
    "doge": "residual scales: each block multiplies the stream by a learned vector before it adds",
    "flex_olmo": "post-norm only: blocks read the stream itself and a norm stands between each block and the stream",
    "gemma4": "sandwich norms over dense MLP + experts, a third block (per-layer input) and layer_scalar on the stream",
    "glm5_next": "hyper-connections: hc_mult streams, mixed before and after each block",
    "granitemoe": "residual_multiplier: the stream gets a fixed multiple of each contribution",
    "granitemoe_swa": "residual_multiplier: the stream gets a fixed multiple of each contribution",
    "granitemoehybrid": "residual_multiplier: the stream gets a fixed multiple of each contribution",
    "granitemoeshared": "residual_multiplier: the stream gets a fixed multiple of each contribution",
    "inkling": "a short convolution over the tokens stands between each block and the stream",
    "kolibri1": "sandwich norms: post_self_attn_layernorm, post_mlp_layernorm stand between each block and the stream",
    "nllb_moe": "encoder and decoder: two streams, and a decoder layer has three blocks (cross-attention)",
    "qwen4_exp": "hyper-connections (GatedResidual), and some layers begin with an n-gram embedding and a convolution",
    "switch_transformers": "encoder and decoder: two streams, and a decoder layer has three blocks (cross-attention)",
}


def shape_of(family: str) -> Shape:
    found = SHAPES.get(family) or MORE_SHAPES.get(family)
    if found is None:
        raise Undefined(f"no oracle was written for {family}")
    return found
