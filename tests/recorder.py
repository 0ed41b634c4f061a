"""A graph like Dynamo's, in a fraction of the time: what lets a test look at thousands of programs.

Contract: ``record(model, *args)`` gives the graph that Dynamo gives for ``model(*args)`` where the model is plain
Python without data-dependent control flow: parameters, buffers and tensor arguments are placeholders, calls keep the
spelling of the user (operator, function or method), and every node has its value in ``meta["example_value"]`` (a real
one, which costs less than a fake one for tensors as small as these).
``test_programs.py`` compares it with Dynamo's; Dynamo stays the reference.
"""
import operator

import torch
from torch import fx, nn
from torch.fx._lazy_graph_module import _LazyGraphModule
from torch.overrides import TorchFunctionMode

_CONCRETE = {"shape", "dtype", "device", "ndim", "layout", "requires_grad"}
_CONCRETE_CALLS = {"size", "dim", "numel", "stride", "is_floating_point", "element_size"}
_FIELDS = ("values", "indices")          # of the named tuples that topk, max and sort return
_FACTORIES = {torch.ones, torch.zeros, torch.arange, torch.full, torch.empty}


class _Value(fx.Proxy):
    """A proxy that knows its value, so that sizes are numbers and tuples have a length."""

    def __getattr__(self, name):
        value = self.node.meta.get("example_value")
        if name in _CONCRETE:
            return getattr(value, name)
        if name in _CONCRETE_CALLS:
            return lambda *args: getattr(value, name)(*args)
        if name in _FIELDS and isinstance(value, tuple):
            return self[_FIELDS.index(name)]
        return fx.proxy.Attribute(self, name)

    def __len__(self):
        return len(self.node.meta["example_value"])

    def __iter__(self):
        return (self[i] for i in range(len(self)))

    def __setitem__(self, index, value):
        self.tracer.create_proxy("call_function", operator.setitem, (self, index, value), {})

    def __iadd__(self, other):
        return self.tracer.create_proxy("call_function", operator.iadd, (self, other), {})

    def __imul__(self, other):
        return self.tracer.create_proxy("call_function", operator.imul, (self, other), {})


class _Factories(TorchFunctionMode):
    """Tensors that are made from nothing are nodes too."""

    def __init__(self, tracer) -> None:
        self.tracer = tracer

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in _FACTORIES:
            return self.tracer.create_proxy("call_function", function, args, kwargs or {})
        return function(*args, **(kwargs or {}))


class _Tracer(fx.Tracer):
    def __init__(self, model: nn.Module) -> None:
        super().__init__(param_shapes_constant=False)
        self.names = {id(t): f"L_self_{_path(name, kind)}" for kind, tensors in (
            ("parameters", model.named_parameters()), ("buffers", model.named_buffers())) for name, t in tensors}
        self.inputs: dict[int, fx.Proxy] = {}
        self.values: list[torch.Tensor] = []

    def is_leaf_module(self, module, name):
        return False

    def call_module(self, module, forward, args, kwargs):
        return forward(*args, **kwargs)

    def getattr(self, attribute, value, cache):
        return self.input(value, self.names[id(value)]) if id(value) in self.names else value

    def input(self, tensor: torch.Tensor, name: str) -> fx.Proxy:
        """The placeholder of a tensor; made on first use, like Dynamo's."""
        if id(tensor) not in self.inputs:
            last = list(self.inputs.values())[-1].node if self.inputs else None
            before = last.next if last is not None else next(iter(self.graph.nodes))
            with self.graph.inserting_before(before):
                node = self.graph.placeholder(name)
            node.meta["example_value"] = tensor
            self.inputs[id(tensor)] = _Value(node, self)
            self.values.append(tensor)
        return self.inputs[id(tensor)]

    def proxy(self, node):
        return _Value(node, self)

    def create_proxy(self, kind, target, args, kwargs, name=None, type_expr=None, proxy_factory_fn=None):
        proxy = super().create_proxy(kind, target, args, kwargs, name, type_expr)
        node = proxy.node
        if kind not in ("call_function", "call_method"):
            return proxy
        known = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["example_value"])
        call = target if kind == "call_function" else getattr(known[0][0], target)
        with torch._C.DisableTorchFunction():
            node.meta["example_value"] = call(*(known[0] if kind == "call_function" else known[0][1:]), **known[1])
        return proxy

    def create_arg(self, a):
        if isinstance(a, torch.Tensor):
            return self.input(a, self.names.get(id(a), f"L_tensor_{len(self.inputs)}_")).node
        return super().create_arg(a)


def record(model: nn.Module, *args: torch.Tensor) -> tuple[fx.GraphModule, list[torch.Tensor]]:
    """(graph module, its inputs). ``gm(*inputs)`` is ``model(*args)``, as a tuple of tensors."""
    tracer = _Tracer(model)
    tracer.graph, tracer.root = fx.Graph(), model
    tracer.tensor_attrs, tracer.submodule_paths = {}, None
    tracer.graph.output(())
    anchor = next(iter(tracer.graph.nodes))
    tracer.graph.inserting_before(anchor)
    getattr_of = nn.Module.__getattr__

    def patched(module, name):
        return tracer.getattr(name, getattr_of(module, name), None)

    given = [tracer.input(a, f"L_args_{i}_") for i, a in enumerate(args)]
    nn.Module.__getattr__ = patched
    try:
        with _Factories(tracer):
            result = model.forward(*given)
    finally:
        nn.Module.__getattr__ = getattr_of
    flat = [p.node for p in (result if isinstance(result, (tuple, list)) else (result,))]
    anchor.args = (tuple(flat),)
    anchor.meta["example_value"] = tuple(n.meta["example_value"] for n in flat)
    for node in reversed(list(tracer.graph.nodes)):
        if node.target is operator.getitem and not node.users:      # Dynamo unpacks only what is used
            tracer.graph.erase_node(node)
    tracer.graph.lint()
    return _module(tracer.graph), list(tracer.values)


def copy_of(gm: fx.GraphModule) -> fx.GraphModule:
    """A graph module of its own; unlike ``copy.deepcopy`` it does not write its code before somebody runs it."""
    graph, known = fx.Graph(), {}
    result = graph.graph_copy(gm.graph, known)
    last = next(n for n in reversed(gm.graph.nodes) if n.op == "output")
    graph.output(result).meta = dict(last.meta)
    return _module(graph)


def _module(graph: fx.Graph) -> fx.GraphModule:
    gm = _LazyGraphModule({}, graph)
    gm.compile_subgraph_reason = None       # what Dynamo's graph modules have
    return gm


def _path(name: str, kind: str) -> str:
    *modules, last = name.split(".")
    return "".join(f"modules_{m}_" for m in modules) + f"{kind}_{last}_"


def shape_of(graph: fx.Graph) -> list[tuple[str, str]]:
    """(op, what is called) of every call, in order: for comparing two graphs of one program."""
    return [(n.op, n.target if isinstance(n.target, str) else getattr(n.target, "__name__", str(n.target)))
            for n in graph.nodes if n.op.startswith("call")]
