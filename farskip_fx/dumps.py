"""Graphs as Python files that run: ``with farskip_fx.dump_graphs("folder"):`` around the first call of a compiled model.

Each compile in the block writes what came into its passes and what came out of them, in order:

    n000_Qwen3MoeModel_forward_before_normalize.py      import it and call ``run()``, or run the file
    n001_Qwen3MoeModel_forward_after_normalize.py
    n002_Qwen3MoeModel_forward_after_rewire.py
    n003_Qwen3MoeModel_forward_model_explorer.json      both graphs, for github.com/google-ai-edge/model-explorer
    n004_Qwen3MoeModel_forward_before_schedule_forward.py
    ...

A dump imports torch and what the graph calls, and not farskip_fx. Its inputs are random numbers of the right shapes from a
fixed seed, or with ``save_inputs`` those of the first call. A dump that cannot run says so in its first lines, and imports.
"""
from __future__ import annotations

import json
import re
import sys
import textwrap
import threading
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

import torch
from torch.fx import Graph, GraphModule, Node

from .passes._torch import module_of_op, optimization_hint
from .view import model_explorer

_open: ContextVar[tuple[Folder, ...]] = ContextVar("farskip_dump_graphs", default=())
_MOST = 60              # characters of a graph's name
_UNKNOWN_SIZE = 8       # of what is only known when the program runs
_WANT_GRAPHS = ("tag_activation_checkpoint", "autograd_function_apply")    # and not just modules


@contextmanager
def dump_graphs(folder: str | Path, *, save_inputs: bool = False) -> Iterator[Folder]:
    """Write each graph that farskip_fx compiles in this block, on this thread, as a file that runs.

    Inductor's cache is not asked for these graphs. Files of an earlier block stay. Several ranks may write to one folder.

    Args:
        folder: made if it is not there.
        save_inputs: also write the inputs of the first call, weights included, so that a dump gives the same numbers.
    """
    one = Folder(Path(folder), save_inputs=save_inputs)
    token = _open.set((*_open.get(), one))
    try:
        yield one
    finally:
        _open.reset(token)
        one.close()


def begin(name: str, example_inputs: Sequence, *, rank: int = 0) -> Compile | None:
    """The dumps of one compile, of a graph ``name``; None if nobody asked for any."""
    folders = _open.get()
    return Compile(folders, name, example_inputs, rank) if folders else None


class Folder:
    """What ``dump_graphs`` gives: ``paths`` are the files so far."""

    def __init__(self, path: Path, *, save_inputs: bool) -> None:
        self.path, self.save_inputs, self.paths = path, save_inputs, []
        self._lock, self._closed = threading.Lock(), False
        path.mkdir(parents=True, exist_ok=True)

    def close(self) -> None:
        with self._lock:
            self._closed = True

    def new(self, name: str, ending: str, rank: int) -> Path | None:
        """The path of the next file; None after the block has ended (a backward that is compiled later)."""
        prefix = f"rank{rank}_" if rank else ""
        with self._lock:
            if self._closed:
                return None
            used = [int(m[1]) for p in self.path.iterdir() if (m := re.match(rf"{prefix}n(\d+)_", p.name))]
            path = self.path / f"{prefix}n{max(used, default=-1) + 1:03d}_{name}{ending}"
            path.touch()
            self.paths.append(path)
            return path


class Compile:
    def __init__(self, folders: Sequence[Folder], name: str, example_inputs: Sequence, rank: int) -> None:
        self.uuid = uuid.uuid4().hex
        self._folders, self._rank, self._title = folders, rank, name
        self._name = re.sub(r"\W+", "_", name, flags=re.ASCII).strip("_")[:_MOST] or "graph"
        self._before: list[dict] | None = None          # the nodes that ``rewire`` gets
        self._described = [_described(x) for x in example_inputs]
        self._inputs: dict[Folder, str] = {}
        values = [x.detach() if isinstance(x, torch.Tensor) else _size(x) if isinstance(x, torch.SymInt) else x
                  for x in example_inputs]
        if all(map(_can_be_saved, values)):             # now, before the program writes to one of them
            for folder in folders:
                if folder.save_inputs and (path := folder.new(f"{self._name}_inputs", ".pt", rank)):
                    torch.save(values, path)
                    self._inputs[folder] = path.name

    def graph(self, stage: str, gm: GraphModule, *, changes: Sequence[dict]) -> None:
        for folder in self._folders:
            path = folder.new(f"{self._name}_{stage}", ".py", self._rank)
            if path is not None:
                # A forward of AOTAutograd takes what the Dynamo graph takes, unless two inputs are one tensor.
                same = [_described(_value(n)) for n in _placeholders(gm)] == self._described
                path.write_text(_source(path, gm, f"{self._title}, {stage.replace('_', ' ')}",
                                        self._inputs.get(folder) if same else None), encoding="utf-8")
        if stage == "after_normalize":
            self._before = model_explorer.nodes_of(gm)
        elif stage == "after_rewire" and self._before is not None:
            both = json.dumps(model_explorer.collection(self._before, model_explorer.nodes_of(gm), changes, label=self._title))
            for folder in self._folders:
                if path := folder.new(f"{self._name}_model_explorer", ".json", self._rank):
                    path.write_text(both, encoding="utf-8")


# --- a graph as source -------------------------------------------------------------------------------------------

def _source(path: Path, gm: GraphModule, title: str, inputs: str | None) -> str:
    module = _Module(gm)
    obstacle = module.obstacle
    body = module.source
    if not obstacle:
        try:
            compile(body, path.name, "exec")
        except SyntaxError as error:        # an argument that no source stands for: a process group, say
            obstacle = f"line {error.lineno} of it is no Python: {(error.text or '').strip()}"
    if obstacle:
        body = "\n".join(f"# {line}" for line in _ascii(body).split("\n")) + "\n\nGraph = None\n"
    if module.constants:
        constants = path.with_suffix(".constants.pt")
        torch.save(module.constants, constants)
    arguments = [_input(_value(node), seed) for seed, node in enumerate(_placeholders(gm))]
    return _FILE.format(
        title=_quotable(title), operations=len(gm.graph.nodes), obstacle=repr(_quotable(obstacle)),
        notes="".join(f"\n{textwrap.fill(note, 120)}" for note in _notes(gm, obstacle, inputs)),
        imports="\n".join(module.imports), body=body, saved=repr(inputs or ""),
        arguments="".join(f"        {a},\n" for a in arguments))


def _notes(gm: GraphModule, obstacle: str, inputs: str | None) -> Iterator[str]:
    if obstacle:
        yield _quotable(f"It cannot run: {obstacle}.")
    if any("c10d" in str(n.target) or "torch.distributed" in str(getattr(n.target, "__module__", ""))
           for m in gm.modules() if isinstance(m, GraphModule) for n in m.graph.nodes):
        yield "It has collectives: it needs the process group of the run that it comes from, on all ranks."
    yield (f"Its inputs are those of the first call, in {inputs}." if inputs else
           "Its inputs are random. Integers are 0 and 1, which may be no routing and no sizes that a model would come to.")


class _Module:
    """One graph module, and the graph modules in it, as classes; ``obstacle`` says why they would not run."""

    def __init__(self, gm: GraphModule) -> None:
        self.constants: dict[str, torch.Tensor] = {}
        self.obstacle = ""
        self._imports: set[str] = set()
        self._classes: list[str] = []
        self._class("Graph", gm)
        self.source = "\n\n".join(self._classes)

    @property
    def imports(self) -> list[str]:
        return sorted(self._imports)

    def _class(self, name: str, gm: GraphModule) -> None:
        graph = Graph()
        graph.output(graph.graph_copy(gm.graph, {}))        # a copy has its arguments one by one, whatever they are here
        code = graph.python_code("self")
        attributes = {n.target: False for n in graph.nodes if n.op in ("get_attr", "call_module")}
        attributes |= {a.target: True for n in graph.nodes if getattr(n.target, "__name__", "") in _WANT_GRAPHS
                       for a in n.all_input_nodes if a.op == "get_attr"}
        lines = [self._attribute(name, target, gm, traced) for target, traced in attributes.items()]
        for node in graph.nodes:
            self._import_for(node)
        for known, value in code.globals.items():
            if known not in _PREAMBLE:
                self._import(known, value)
        self._classes.append(f"class {name}(torch.nn.Module):\n    def __init__(self):\n        super().__init__()\n"
                             + "".join(f"        {line}\n" for line in lines) + "\n"
                             + textwrap.indent(code.src.strip(), "    ") + "\n")

    def _attribute(self, name: str, target: str, gm: GraphModule, traced: bool) -> str:
        value = gm
        for part in target.split("."):
            value = getattr(value, part)
        if isinstance(value, GraphModule):
            inner = f"{name}_{len(self._classes)}_{re.sub(r'[^0-9A-Za-z]+', '_', target)[:_MOST]}"
            self._class(inner, value)
            return f"_put(self, {target!r}, {f'_traced({inner}())' if traced else f'{inner}()'})"
        if isinstance(value, torch.Tensor) and type(value) is torch.Tensor and _can_be_saved(value):
            self.constants[f"{name}.{target}"] = value.detach()
            return f"_put(self, {target!r}, _constants()[{name + '.' + target!r}])"
        if isinstance(value, torch.Tensor):     # a weight
            return f"_put(self, {target!r}, {_input(value, len(self._classes))})"
        self.obstacle = self.obstacle or f"{target} is a {type(value).__name__}"
        return f"_put(self, {target!r}, None)"

    def _import_for(self, node: Node) -> None:
        """Operations that exist only once a module was imported."""
        if isinstance(node.target, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
            module = module_of_op("::".join(str(node.target).split(".")[:2]))
        else:
            module = getattr(node.target, "__module__", None) if node.op == "call_function" else None
            module = module if (module or "").startswith("torch.") else None
        if module in sys.modules and module != "__main__":
            self._imports.add(f"import {module}")

    def _import(self, name: str, value: object) -> None:
        module, attribute = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
        found = None
        if module and attribute and module != "__main__":
            found = sys.modules.get(module)
            for part in attribute.split("."):
                found = getattr(found, part, None)
        if found is value and value is not None:
            first, *others = attribute.split(".")
            self._imports.add(f"from {module} import {first} as {name}" if not others else
                              f"from {module} import {first} as _{name}; {name} = _{name}.{'.'.join(others)}")
        else:
            self.obstacle = self.obstacle or f"{name} ({type(value).__name__}) cannot be imported"


# --- inputs ------------------------------------------------------------------------------------------------------

def _placeholders(gm: GraphModule) -> list[Node]:
    return [n for n in gm.graph.nodes if n.op == "placeholder"]


def _value(node: Node) -> object:
    return node.meta.get("example_value", node.meta.get("val"))


def _can_be_saved(value: object) -> bool:
    """Into a file that loads with ``weights_only``: no subclasses, nothing without memory."""
    if isinstance(value, torch.Tensor):
        return type(value) in (torch.Tensor, torch.nn.Parameter) and not value.is_meta
    return value is None or isinstance(value, (bool, int, float, str))


def _size(size: int | torch.SymInt) -> int:
    return size if isinstance(size, int) else int(optimization_hint(size, _UNKNOWN_SIZE))


def _described(value: object) -> tuple:
    if isinstance(value, torch.Tensor):
        return tuple(map(_size, value.shape)), value.dtype, value.device.type
    return (_size(value),) if isinstance(value, (int, torch.SymInt)) else (type(value).__name__,)


def _input(value: object, seed: int) -> str:
    if isinstance(value, torch.Tensor):
        stride = tuple(map(_size, value.stride())) if value.layout == torch.strided else None
        return f"_tensor({tuple(map(_size, value.shape))}, {stride}, {value.dtype}, {str(value.device)!r}, {seed})"
    if isinstance(value, torch.SymInt):
        return repr(_size(value))
    if isinstance(value, (torch.SymFloat, torch.SymBool)):
        return "1.0" if isinstance(value, torch.SymFloat) else "True"
    return repr(value) if value is None or isinstance(value, (bool, int, float, str)) else "None"


def _quotable(text: str) -> str:
    """For a docstring: one line of printable ASCII without quotes and backslashes."""
    text = "".join(c if " " <= c <= "~" and c not in "\"'\\" else "?" for c in text)
    return text if len(text) <= 300 else f"{text[:297]}..."


def _ascii(text: str) -> str:
    return "".join(c if c == "\n" or " " <= c <= "~" else "?" for c in text)


_PREAMBLE = ("inf", "nan", "NoneType", "torch", "device", "fx_pytree", "pytree")
_FILE = '''\
"""{title}: {operations} operations. Written by farskip_fx.dump_graphs.
{notes}

    python this_file.py     runs it and says what comes out
    load()                  the graph as a module, and its inputs
    run()                   what the module returns for them
"""
from __future__ import annotations

from pathlib import Path

import torch
import torch.fx._pytree as fx_pytree
import torch.utils._pytree as pytree
from torch import device, inf, nan
{imports}

NoneType = type(None)
OBSTACLE = {obstacle}
SAVED = {saved}


def _constants():
    return torch.load(Path(__file__).with_suffix(".constants.pt"), weights_only=True)


def _put(module, name, value):
    *path, last = name.split(".")
    for part in path:
        if not hasattr(module, part):
            setattr(module, part, torch.nn.Module())
        module = getattr(module, part)
    setattr(module, last, value)


def _traced(module):
    with torch.enable_grad():       # straight-line code traces to itself, but for the switches in it
        return torch.fx.symbolic_trace(module)


def _tensor(shape, stride, dtype, device, seed):
    make = torch.Generator().manual_seed(seed)
    stride = stride or torch.empty(shape, device="meta").stride()
    count = 0 if 0 in shape else 1 + sum((size - 1) * step for size, step in zip(shape, stride))
    flat = torch.randn(count, generator=make) * 0.1 if dtype.is_floating_point or dtype.is_complex else \\
        torch.randint(0, 2, (count,), generator=make)
    return flat.to(dtype).to(device).as_strided(shape, stride)


{body}

def inputs():
    if SAVED:
        return torch.load(Path(__file__).with_name(SAVED), weights_only=True)
    return [
{arguments}    ]


def load():
    if OBSTACLE:
        raise RuntimeError("this graph cannot run from source: " + OBSTACLE)
    return Graph(), inputs()


def run():
    module, given = load()
    with torch.no_grad():
        return module(*given)


if __name__ == "__main__":
    for result in pytree.tree_leaves(run()):
        print(*(result.shape, result.dtype, result.float().norm().item()) if isinstance(result, torch.Tensor) else (result,))
'''
