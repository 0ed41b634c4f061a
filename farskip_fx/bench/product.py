"""The one place where the lab touches farskip_fx itself: how to shard, what to compile with, how to read a report."""
from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .spec import EP, Spec


def shard(model: nn.Module, spec: Spec, means: bool) -> Any:
    """Share the experts in place; with ``means``, what the backend needs to average gradients (else None).

    Rank dp_rank * EP + ep_rank, as ``init_device_mesh`` numbers them: neighbours share the experts.
    """
    from torch.distributed.device_mesh import init_device_mesh

    import farskip_fx as fs

    mesh = init_device_mesh("cpu", (spec.dp, EP), mesh_dim_names=("dp", "ep"))
    fs.expert_parallel(model, mesh["ep"], exchange=spec.exchange)
    return fs.data_parallel(model, mesh["dp"], bucket_mb=spec.bucket_mb) if means else None


def reshard(model: nn.Module, **options: Any) -> nn.Module:
    """The same shards with other options of their exchange. ``model`` must not be another variant's."""
    from dataclasses import replace

    for module in model.modules():
        shard = getattr(module, "_farskip_experts", None)
        if shard is not None:
            module._farskip_experts = replace(shard, options=replace(shard.options, **options))
    return model


def groups_of_means(parallel: Any) -> set[str]:
    return {parallel.dense_group, parallel.expert_group}


def clip(model: nn.Module, max_norm: float) -> Tensor:
    import farskip_fx as fs

    return fs.clip_grad_norm_(model, max_norm)


def backend() -> Any:
    import farskip_fx as fs

    return fs.farskip_backend


def rates(**measured: float) -> dict[str, float]:
    """Measured rates as the option of that name; what was not measured keeps its default."""
    from farskip_fx.passes.costs import Rates

    return Rates(**measured).to_dict()


def kernels(model: nn.Module, ids: Tensor, connectivity: str, *, gradients: bool) -> dict[str, float]:
    """Seconds of each kernel of a step, measured while all ranks compute, and equal on all."""
    import torch.distributed as dist

    from farskip_fx.kernels import kernels_of, measured

    nodes = {}
    for causal in (True, False):        # stock's attention has its mask
        nodes |= kernels_of(model, config={"connectivity": connectivity, "causal_attention": causal}, gradients=gradients,
                            input_ids=ids, use_cache=False)
    return measured(nodes, dist.group.WORLD)


def layers() -> list[dict]:
    """The last compile's rewiring, one entry a layer."""
    return [{"index": layer.index, "attention_reads": layer.attention_reads, "mlp_reads": layer.mlp_reads,
             "rewired": layer.rewired, "reason": None if layer.reason is None else str(layer.reason),
             "attention_read_before": layer.attention_read_before, "mlp_read_before": layer.mlp_read_before}
            for layer in last_report().layers]


def schedules() -> list[dict]:
    """The last compile's schedules (forward, then backward): what hides behind what, as the scheduler predicts it."""
    return [{"collectives": [{"name": c.name, "kind": c.kind, "bytes": c.bytes, "ms": c.seconds * 1e3,
                              "hidden_ms": c.hidden_s * 1e3, "exposed_ms": c.exposed_s * 1e3, "behind": list(c.behind)}
                             for c in schedule.collectives],
             "predicted_ms": schedule.after_s * 1e3, "bound_ms": schedule.bound_s * 1e3}
            for schedule in last_report().schedules]


def exposed(report: Any, step: Any) -> dict:
    """Exposed communication of a step, predicted by the schedule and measured under torch.profiler; this rank's."""
    from farskip_fx.diagnose.profiling import profile

    found = profile(step, steps=5, report=report)
    return {"predicted_ms": found.predicted_s * 1e3, "measured_ms": found.measured_s * 1e3,
            "costs": [{"kind": cost.kind, "predicted_ms": cost.predicted_s * 1e3, "measured_ms": cost.measured_s * 1e3}
                      for cost in found.costs],
            "collectives": [{"phase": row.phase, "place": row.place, "predicted_ms": row.predicted_s * 1e3,
                             "measured_ms": row.measured_s * 1e3} for row in found.exposures]}


def last_report() -> Any:
    """Of the last compile that met decoder layers; graphs without any reach the backend too."""
    import farskip_fx as fs

    for report in reversed(fs.last_reports()):
        if report.layers:
            return report
    raise RuntimeError("farskip_fx reports no graph with decoder layers after a compile with its backend; was the "
                       "model split over several graphs?")
