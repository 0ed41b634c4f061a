"""One graph: what keeps Dynamo from tracing a model whole, and is harmless to change while it traces.

    with one_graph(model):
        torch.compile(model, backend=farskip_backend)(ids)

Contract
    Inside the scope the model computes what it computed before, bit by bit, and Dynamo finds fewer reasons to break its
    graph. Nothing of it stays: not on the model, not on its classes, not in Dynamo's settings.

Three things are changed
    sizes       Dynamo follows sizes that depend on data (``nonzero``, ``.item()``) instead of breaking there.
    effects     A checkpointed layer may hand things out besides its result (transformers' output hooks collect router
                logits): once, in the forward.
    experts     Many models of transformers compute their experts in a Python loop over those that got a token:

                    hit = torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero()
                    for expert in hit:
                        position, token = torch.where(mask[expert[0]])
                        ...
                        total.index_add_(0, token, ...)

                How often it runs depends on data, so no graph can hold it. Inside the scope it runs for every expert:
                one without tokens adds nothing. Only a loop of exactly this form is taken, also where it is the "eager"
                one among transformers' implementations of experts.

Outside the scope (a bare ``torch.compile``) some models have a public switch that does the same with other kernels:
``model.set_experts_implementation("grouped_mm")``; ``way_to_one_graph`` says what a model needs.
"""
from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from unittest.mock import patch

import torch
from torch import nn


def one_graph(model: nn.Module) -> AbstractContextManager:
    """Trace ``model`` inside this scope, and call what was compiled there inside it too (a recompile traces again)."""
    return prepare(model)()


def prepare(model: nn.Module) -> Callable[[], AbstractContextManager]:
    """The scope for many calls of one model: looks at its modules once."""
    counted = {type(module) for module in model.modules() if isinstance(getattr(module, "num_experts", None), int)}
    loops = {kind: every for kind in counted if (every := forward_over_every_expert(kind)) is not None}

    @contextmanager
    def scope() -> Iterator[None]:
        with ExitStack() as changed:
            changed.enter_context(torch._dynamo.config.patch(capture_scalar_outputs=True,
                                                             capture_dynamic_output_shape_ops=True,
                                                             skip_fwd_side_effects_in_bwd_under_checkpoint=True))
            for kind, every_expert in loops.items():
                # On the class: an attribute of the instance would travel with copies and pickles of the model.
                changed.enter_context(patch.object(kind, "forward", every_expert))
            yield

    return scope


def way_to_one_graph(model: nn.Module) -> str | None:
    """What keeps ``model`` from being one graph outside of the scope, and what its user can do; None: nothing known."""
    for name, module in model.named_modules():
        every_expert = forward_over_every_expert(type(module))
        if every_expert is None or type(module).__dict__.get("forward") is every_expert:    # inside the scope
            continue
        switch = ""
        if _is_switched(type(module)):
            if getattr(module.config, "_experts_implementation", None) not in (None, "eager"):
                continue
            switch = ", or switch them with model.set_experts_implementation(\"grouped_mm\")"
        return (f"the experts of {name!r} run in a Python loop over those that got a token: convert the model with "
                f"farskip_fx.apply, which runs that loop for every expert{switch}")
    return None


@functools.cache
def forward_over_every_expert(kind: type) -> Callable | None:
    """``kind.forward`` with its loop over the experts that were hit run for every expert; None if there is none."""
    forward = kind.__dict__.get("forward")
    if not _is_switched(kind):
        return over_every_expert(forward)
    every_expert = over_every_expert(forward.__wrapped__)
    if every_expert is None:
        return None

    @functools.wraps(forward, updated=())
    def switched(self, *args, **kwargs):
        eager = self.config._experts_implementation in (None, "eager")
        return (every_expert if eager else forward)(self, *args, **kwargs)

    return switched


def _is_switched(kind: type) -> bool:
    """Whether transformers' ``use_experts_implementation`` decorates ``kind``: its forward wraps the "eager" one."""
    forward = kind.__dict__.get("forward")
    return inspect.isfunction(forward) and "experts_interface" in forward.__code__.co_freevars


def over_every_expert(forward: Callable | None) -> Callable | None:
    """A function like ``forward`` whose loop runs for every expert; None if it has no loop of the known form."""
    if not inspect.isfunction(forward) or forward.__closure__ or hasattr(forward, "__wrapped__"):
        return None
    try:
        lines, first = inspect.getsourcelines(forward)
    except (OSError, TypeError):       # defined in a shell, or by exec
        return None
    tree = ast.parse(textwrap.dedent("".join(lines)))
    definition = tree.body[0]
    hits = _loop_over_hits(definition) if isinstance(definition, ast.FunctionDef) else None
    if hits is None or definition.decorator_list:
        return None
    # Lists of one index in place of the rows of `nonzero`, so that `expert[0]` in the body still means the index.
    every = ast.parse("[[expert] for expert in range(self.num_experts)]", mode="eval").body
    for node in ast.walk(every):
        ast.copy_location(node, hits.value)
    hits.value = every
    ast.increment_lineno(tree, first - 1)   # so that messages of Dynamo point to the line of the model's own source
    made: dict = {}
    exec(compile(tree, inspect.getsourcefile(forward), "exec"), forward.__globals__, made)
    return functools.wraps(forward, updated=())(made[forward.__name__])


def _loop_over_hits(definition: ast.FunctionDef) -> ast.Assign | None:
    """The assignment ``hit = torch.greater(mask.sum(...), 0).nonzero()``, if one loop over ``hit`` is all that uses it,
    and what the loop takes of the tokens comes from ``torch.where(mask[...])`` and goes to ``index_add_``. The loop
    must use what it runs over as an index only."""
    for node in ast.walk(definition):
        if not (isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name)):
            continue
        mask = _counted(node.value)
        if mask is None:
            continue
        hit = node.targets[0].id
        loops = [n for n in ast.walk(definition) if isinstance(n, ast.For) and _is_name(n.iter, hit) and not n.orelse]
        uses = [n for n in ast.walk(definition) if _is_name(n, hit) and isinstance(n.ctx, ast.Load)]
        if len(loops) != 1 or len(uses) != 1:
            continue
        inside = list(ast.walk(loops[0]))
        if not isinstance(loops[0].target, ast.Name) or any(
                isinstance(n, ast.Attribute) and _is_name(n.value, loops[0].target.id) for n in inside):
            continue
        calls = [n for n in inside if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute)]
        picks = [n for n in calls if n.func.attr == "where" and len(n.args) == 1 and mask in _names(n.args[0])]
        adds = [n for n in calls if n.func.attr == "index_add_"]
        if len(picks) == 1 and len(adds) == 1:
            return node
    return None


def _counted(value: ast.expr) -> str | None:
    """mask, of ``torch.greater(mask.sum(...), 0).nonzero()`` or ``(mask.sum(...) > 0).nonzero()``."""
    if not (isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute) and value.func.attr == "nonzero"
            and not value.args and not value.keywords):
        return None
    above = value.func.value
    if isinstance(above, ast.Call) and isinstance(above.func, ast.Attribute) and above.func.attr == "greater":
        counts, bound = (above.args + [None, None])[:2]
    elif isinstance(above, ast.Compare) and isinstance(above.ops[0], ast.Gt) and len(above.ops) == 1:
        counts, bound = above.left, above.comparators[0]
    else:
        return None
    if not (isinstance(bound, ast.Constant) and bound.value == 0 and isinstance(counts, ast.Call)
            and isinstance(counts.func, ast.Attribute) and counts.func.attr == "sum"
            and isinstance(counts.func.value, ast.Name)):
        return None
    return counts.func.value.id


def _is_name(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name


def _names(node: ast.AST) -> set[str]:
    return {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
