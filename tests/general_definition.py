"""What a connectivity means for a general program: a plain evaluation over the program's own parts.

The stream is states s_0, s_1, ...; update i makes s_{i+1} = U_i(s_i, b_i). A layer is one or more mixers and the MoE,
or else the first dense MLP, of the blocks that follow them. Token-wise blocks between the MLP of layer k-1 and
the first mixer of layer k are *between*.

  outdated MLP k        reads the state before the block directly in front of it; farskip_shared: but for what an MoE has that is
                        not routed
  attention k           reads the stream without X(k-1), and so do the blocks between; X is the routed part (farskip,
                        farskip_shared, attn_only; nothing where layer k-1 is dense) or all of the MLP (ladder)
  without a part        U(s, what is left of b); without everything of a block: the state before it
  weights of U          (gates, mixing matrices computed from the stream) are made from the s that this U is evaluated
                        on: the real state, or the stream without X(k-1) for a block between

An MoE that begins the model is a layer without attention; mixers after the last MLP read as the model has it.

Readings. Where a norm (or a mix with the embedding, or a linear map) stands between an addition and the next block, and
its result is both read and skipped to, there are two ways to say where the state is: before it (``entry="block"``: a
block applies its own to whatever it reads, if it has one) or after it (``entry="state"``: it belongs to the update).
``entry="joint"``: as "state", and a parallel layer is one update, of which U without its MLP is left (a norm or a scale
after the sum stays). ``entry="split"``: in a * s + b * x0 the scale belongs to the update before, the rest to a block.
"""
from programs import Undefined


def layers_of(specs) -> list[tuple[int, int]]:
    """(first mixer, MLP or MoE) of each layer, as indices of blocks; -1 for no mixer."""
    layers, i = [], 0
    while i < len(specs):
        first = i if specs[i].kind == "mixer" else -1
        while i < len(specs) and specs[i].kind == "mixer":
            i += 1
        group = []
        while i < len(specs) and specs[i].kind != "mixer":
            group.append(i)
            i += 1
        experts = [g for g in group if specs[g].kind == "moe"]
        if experts or group and first >= 0:
            layers.append((first, experts[0] if experts else group[0]))
    return layers


def interpret(program, ids, connectivity: str, converted, entry: str = "block"):
    """What the rewired program must give: a tuple like that of ``program.forward``.

    Raises:
        Undefined: the connectivity asks for a part that cannot be told apart.
    """
    return _Definition(program, ids, entry).run(connectivity, converted)


class _Definition:
    def __init__(self, program, ids, entry: str) -> None:
        self.program, self.own_entry = program, entry in ("block", "split")
        self.split, self.joint = entry == "split", entry == "joint"
        self.blocks = [b for layer in program.layers for b in layer]
        self.updates = [u for layer in program.updates for u in layer]
        self.specs = program.spec.blocks
        sizes = [len(layer) for layer in program.spec.layers]
        self.starts = [sum(sizes[:k]) for k in range(len(sizes))]
        self.c = program.context(ids, "btd", False)
        self.states = [(program.begin(ids, self.c), 0)]          # (value, how many updates it has seen)

    def run(self, connectivity, converted):
        layers = layers_of(self.specs)
        self.lacking = {}
        first_of = {first: k for k, (first, _) in enumerate(layers)}
        mlp_of = {mlp: k for k, (_, mlp) in enumerate(layers)}
        hides = self.hides(connectivity, converted, layers)
        for i, (block, update) in enumerate(zip(self.blocks, self.updates)):
            index = i - self.specs[i].back
            read = self.states[index]
            behind = next((k for k, (first, mlp) in enumerate(layers)
                           if k and hides[k] and layers[k - 1][1] < i <= first), None)
            k = mlp_of.get(i)
            as_it_is = read
            if k is not None and k in converted and connectivity in ("farskip", "farskip_shared", "mlp_only", "ladder"):
                read = self.states[max(min(index, i - 1), 0)]
            elif behind is not None:
                read = self.lacking.get(index, read)
            x = self.read(read, i)
            self.c["previous_x"] = self.read(self.states[i - 1], i - 1) if i else None
            halves = connectivity == "farskip_shared" and k in converted and self.specs[i].kind == "moe" and as_it_is is not read
            b, kept = block.terms(x, self.c, self.read(as_it_is, i) if halves else None)
            if b is None:
                raise kept
            self.c["previous_b"] = b
            self.states.append((self.update(i, self.states[i], b), i + 1))
            if k is not None and k + 1 < len(layers) and hides[k + 1]:
                if hides[k + 1] == "all" and self.joint and self.specs[i].joined:
                    self.lacking = {i + 1: (self.update(i, self.states[i], None), i + 1)}
                elif hides[k + 1] == "all":
                    self.lacking = {i + 1: self.states[i]}
                elif isinstance(kept, Undefined):
                    raise kept
                else:
                    self.lacking = {i + 1: (self.update(i, self.states[i], kept), i + 1)}
            elif behind is not None and i not in first_of and i in self.lacking:
                self.lacking[i + 1] = (self.update(i, self.lacking[i], b, self.lacking[i]), i + 1)
        return self.outputs()

    def hides(self, connectivity, converted, layers):
        """What the first mixer of each layer may not see of the MLP before: "", "routed" or "all"."""
        result = []
        for k in range(len(layers)):
            both = k > 0 and k in converted and k - 1 in converted
            moe = k > 0 and self.specs[layers[k - 1][1]].kind == "moe"
            result.append("all" if both and connectivity == "ladder" else
                          "routed" if both and moe and connectivity in ("farskip", "farskip_shared", "attn_only") else "")
        return result

    def entered(self, state, i):
        """A state after the entry of block i, or after its own."""
        value, seen = state
        position = i if self.own_entry and not self.specs[i].back and self.updates[i].has_entry else seen
        if position == len(self.blocks):
            return value
        c, first = self.c, self.starts
        layer = max(k for k, start in enumerate(first) if start <= position)
        mirror = len(first) - 1 - layer
        c["index"], c["long"] = position, self.states[first[mirror]][0] if mirror < layer else None
        update = self.updates[position]
        if self.split and update.kind in ("x0", "x0_later") and update.first and seen != position:
            return value + update.mix * c["x0"]         # not the state whose scale the update before has applied
        return update.entry(value, c)

    def read(self, state, i):
        s = self.entered(state, i)
        return self.updates[i].collapse(s, self.updates[i].weights(s))

    def update(self, i, state, b, weighed=None):
        """U_i(state, b): gates and mixing weights from the state ``weighed``, never from what the block read."""
        real = self.updates[i].weights(self.entered(weighed or self.states[i], i))
        return self.updates[i].define(self.entered(state, i), b, real)

    def outputs(self):
        program = self.program
        result = [program.end(self.states[-1][0])]
        if program.spec.hidden:
            result += [*(self.states[i][0] for i in self.starts), self.states[-1][0]]
        return (*result, *self.c["logits"])
