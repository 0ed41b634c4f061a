"""Helpers of the tests: compile a model with the farskip backend, and look into what Dynamo wraps."""
import copy

import torch
from torch import nn

import farskip_fx as fs


def logits_of(output):
    return output["logits"] if isinstance(output, dict) or hasattr(output, "keys") else output.logits


def run(model, inputs, **options):
    """Logits of ``model`` compiled with ``options``; Dynamo starts afresh."""
    torch._dynamo.reset()
    return logits_of(torch.compile(model, backend=fs.farskip_backend, options=options)(**inputs))


def run_each(model, inputs, settings):
    """For each dict of options in ``settings``: logits, or the error that the backend raised.

    The model is traced once: the backend under test gets a copy of Dynamo's graph for every setting.
    """
    torch._dynamo.reset()
    built, chosen = [], 0

    def fan_out(gm, example_inputs):
        built.append([_attempt(_copy(gm), example_inputs, options) for options in settings])
        graph = len(built) - 1

        def call(*args):
            result = built[graph][chosen]
            if isinstance(result, Exception):
                raise result
            return result(*args)
        return call

    compiled = torch.compile(model, backend=fan_out)
    results = []
    for chosen in range(len(settings)):
        try:
            results.append(logits_of(compiled(**inputs)))
        except fs.FarskipError as error:
            results.append(error)
    return results


def _copy(gm):
    twin = copy.deepcopy(gm)
    twin.compile_subgraph_reason = gm.compile_subgraph_reason     # what Dynamo leaves outside of meta
    return twin


def _attempt(gm, example_inputs, options):
    try:
        return fs.farskip_backend(gm, example_inputs, options=options)
    except fs.FarskipError as error:
        error.report = fs.last_reports()[-1]
        return error


def cause(error):
    """The exception that a backend raised, out of Dynamo's BackendCompilerFailed."""
    return getattr(error, "inner_exception", error)


class Breaks(nn.Module):
    """Wraps a part of a model so that Dynamo must break the graph in front of it."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        torch._dynamo.graph_break()
        return self.inner(*args, **kwargs)
