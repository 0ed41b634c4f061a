"""``bisect``: which stage, layer and half makes a converted model compute something else than its connectivity says, or makes
it slower than stock; found by halving.

Outputs
  1. As it runs: the whole pipeline with PyTorch's caches, twice, as the second run may come from a cache. If both agree with
     the oracle, nothing is wrong.
  2. The same without caches. If that agrees, it is a cache, and one more run tells which.
  3. The traced graph as it is, interpreted. If that differs from the eager model, tracing is wrong.
  4. Halve the pipeline (``runs.stages_of``): the first stage that differs, held fixed from here on.
  5. Nothing converted, at this stage. If that is wrong too, the conversion has no part in it: halve the number of decoder
     layers. Else halve the layers: the shortest range of converted ones that is wrong, and of its last layer one half.

Time: stock Inductor, the rewired model under it, and the schedule, in turn; then the layers, by where their time is.

What halving assumes: what is wrong with some layers converted stays wrong with more of them. Where that does not hold it still
finds two neighbours of which one is right and the other is not.
"""
from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from ..config import FarskipConfig
from ..connectivity import CONNECTIVITIES, DENSE, Reads, register_connectivity
from ..convert import settings_of
from ..errors import ConfigError, FarskipError
from .runs import Runs, Stage, Timing, Trial, counted, stages_of, words

MARGIN = 0.05       # slower than stock by less is no finding
_ROUNDS = 7
_CACHES = {"inductor": "Inductor's cache of graphs (torch._inductor.config.fx_graph_cache)",
           "aot": "AOTAutograd's cache (torch._functorch.config.enable_autograd_cache)"}
_FAULTS = {
    "trace": "the traced graph (Dynamo, or what farskip_fx normalizes in it)", "rewire": "the rewiring",
    "causal": "the skipping of causal masks (causal_attention)", "aot": "AOTAutograd", "inductor": "Inductor",
    "schedule": "the schedule", "fence": "the fence", "split": "the splitting of attention into parts", "cache": "a cache",
}
_USERS_PASSES = ("pre_grad_custom_pass", "joint_custom_pre_pass", "joint_custom_post_pass", "post_grad_custom_pre_pass",
                 "post_grad_custom_post_pass", "_pre_fusion_custom_pass", "_post_fusion_custom_pass")


@dataclass(frozen=True, kw_only=True)
class Bisection:
    """What ``bisect`` found. True if nothing is wrong.

    Args:
        stage: the first that is wrong: "trace", "rewire", "causal" (masks skipped), "aot" (AOTAutograd), "inductor",
            "schedule", "fence", "split" (attention in parts) or "cache"; None: nothing is.
        layer, half: decoder layer, and "attention", "moe" or "mlp" of it; a half is None where both are needed, or where
            nothing needs to be converted.
        conversion: of the smallest reproducer: a connectivity for each layer that is converted.
        layers: decoder layers of the smallest reproducer; None: all.
        independent: it is wrong with nothing converted, too.
        amount: the difference, or by how much it is slower, relative.
        trials: all runs, in order.
        script: the smallest reproducer, as ``write`` writes it; empty where there is nothing to reproduce.
    """
    connectivity: str
    slower: bool
    amount: float
    tolerance: float
    stage: str | None = None
    detail: str = ""
    layer: int | None = None
    label: str = ""
    half: str | None = None
    conversion: Mapping[str, str] = field(default_factory=dict)
    layers: int | None = None
    independent: bool = False
    trials: tuple[Trial | Timing, ...] = ()
    script: str = field(default="", repr=False)
    files: Mapping[str, object] = field(default_factory=dict, repr=False, compare=False)    # what the script reads, by name

    @property
    def ok(self) -> bool:
        return self.stage is None

    def __bool__(self) -> bool:
        return self.ok

    @property
    def verdict(self) -> str:
        """One sentence, or two."""
        if self.ok and self.slower:
            return (f"connectivity {self.connectivity}: not slower than stock (step {self.amount:+.1%}, margin "
                    f"{self.tolerance:.0%})")
        if self.ok:
            return (f"connectivity {self.connectivity}: nothing wrong found; outputs agree with the oracle "
                    f"({self.amount:.1e}, tolerance {self.tolerance:.1e})")
        what = f"makes it slower than stock, by {self.amount:.1%}" if self.slower else (
            "fails" if self.amount == float("inf") else
            f"makes outputs differ, by {self.amount:.1e} (tolerance {self.tolerance:.1e})")
        return f"{_FAULTS[self.stage]}{self._where} {what}{self._how}{f'. {self.detail}' if self.detail else ''}"

    @property
    def _where(self) -> str:
        if self.layer is None:
            return ""
        half = f"{self.half} of " if self.half else ""
        return f" at {half}layer {self.layer}{f' ({self.label})' if self.label else ''}"

    @property
    def _how(self) -> str:
        if self.independent:
            return ", with nothing converted too" + (f"; shown by {counted(self.layers)}" if self.layers else "")
        return f"; converted: {', '.join(f'{k}: {v}' for k, v in self.conversion.items())}" if self.conversion else ""

    def __str__(self) -> str:
        return "\n".join([*map(str, self.trials), self.verdict])

    def to_dict(self) -> dict:
        """JSON: without the files."""
        data = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in ("files", "trials")}
        return {**data, "conversion": dict(self.conversion), "ok": self.ok, "verdict": self.verdict,
                "trials": [{"kind": type(t).__name__.lower(), **dataclasses.asdict(t)} for t in self.trials]}

    def write(self, folder: str | Path) -> Path:
        """Write the script, and what it reads, to ``folder``.

        Raises:
            ConfigError: nothing was found, or it was called with ``reproducer=False``.
        """
        if not self.script:
            raise ConfigError("there is no reproducer to write: " + ("nothing wrong was found" if self.ok else
                              "farskip_fx.bisect was called with reproducer=False"))
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name, value in self.files.items():
            torch.save(value, folder / name)
        path = folder / "reproduce.py"
        path.write_text(self.script, encoding="utf-8")
        return path


def bisect(model: nn.Module, *args, config: FarskipConfig | Mapping | None = None, tolerance: float | None = None,
           gradients: bool | None = None, slower: bool = False, reproducer: bool = True, source: str | Path | None = None,
           told: Callable[[Trial | Timing], None] | None = None, **inputs) -> Bisection:
    """Find what makes a conversion wrong, or slower than stock, and make the smallest reproducer of it.

    The model is run many times, and stays as it is. Under torchrun every rank calls this with its part of the model and gets
    the same answer: what differs on any rank counts.

    Args:
        model: converted or not.
        args, inputs: what it is called with.
        config: of the conversion: a ``FarskipConfig`` or its fields; None: what the model was converted with, or its checkpoint
            says, or the defaults.
        tolerance: largest difference allowed, relative to the largest value (None: as in ``verify``, and at least 1e-4 with
            gradients); with ``slower`` the slowdown that is none (None: 5 %). In bfloat16 half of the largest value is still
            rounding: a model in float32 shows much smaller faults.
        gradients: run and compare the backward too; None: if the model is in training mode and gradients are on.
        slower: ask for time instead of outputs.
        reproducer: also make a script, which takes a few more runs.
        source: a Python file with ``build()`` that makes this model, for the script of one that is not from transformers.
        told: called with each run, as it is done.

    Raises:
        ConfigError: the options contradict the conversion, or cannot be bisected.
        RefusedError: a layer cannot be rewired; or the traced graph has no stream that can be interpreted.
    """
    if gradients is None:
        gradients = model.training and torch.is_grad_enabled()
    chosen = settings_of(model, config)
    if gradients and chosen.data_parallel is not None:
        raise ConfigError("bisect does not compare averaged gradients: pass gradients=False, or leave data_parallel out")
    runs = Runs(model, args, inputs, chosen, gradients=gradients, tolerance=tolerance, told=told)
    found = _slower(runs, MARGIN if tolerance is None else tolerance) if slower else _outputs(runs)
    found = dataclasses.replace(found, connectivity=str(chosen.connectivity), slower=slower)
    if not found.ok and reproducer:
        from .script import script_of
        found = script_of(found, runs, model, args, inputs, source=source)
    return dataclasses.replace(found, trials=tuple(runs.trials))


# --- halving -----------------------------------------------------------------------------------------------------

def first(low: int, high: int, wrong: Callable[[int], bool]) -> int:
    """A number in (low, high] that is wrong while the one before it is not; ``low`` is known to be right, ``high`` wrong."""
    while high - low > 1:
        middle = (low + high) // 2
        if wrong(middle):
            high = middle
        else:
            low = middle
    return high


def half_of(name: str, half: str) -> str:
    """The connectivity that changes only ``half`` ("attention" or "mlp") of what ``name`` does; registered where it is new."""
    if half == "mlp" and name in ("farskip", "ladder", "mlp_only"):
        return "mlp_only"
    if half == "attention" and name in ("farskip", "attn_only"):
        return "attn_only"
    own = f"{name}_{half}_half"
    if own not in CONNECTIVITIES:
        whole = CONNECTIVITIES[name]
        parts = ("attention",) if half == "attention" else ("mlp", "shared")
        register_connectivity(own, lambda layer, earlier: Reads(**{part: getattr(whole(layer, earlier), part) for part in parts}),
                              dense=name in DENSE)
    return own


# --- outputs -----------------------------------------------------------------------------------------------------

def _outputs(runs: Runs) -> Bisection:
    stages, compiles = stages_of(runs.config), runs.config.inner == "inductor"
    traced = runs.traced() if runs.config.names else None
    names = runs.config.of_layers(runs.count) if runs.config.names else None
    whole = stages[-1]
    if traced is not None and traced.wrong:
        return _found(traced, "trace", detail="The connectivity has no part in it; try torch.compile(model, backend=\"eager\")")
    as_run = [runs.trial(names, whole, caches=compiles, label="as it runs")]
    if compiles and _caches_on() and not as_run[0].wrong:
        as_run.append(runs.trial(names, whole, caches=True, label="as it runs, again"))
    if not as_run[-1].wrong:
        return _found(max(as_run, key=lambda t: t.difference), None)
    if compiles and _caches_on():
        anew = runs.trial(names, whole, label="without caches")
        if not anew.wrong:
            return _cache(runs, names, whole, as_run[-1])
        as_run.append(anew)
    known = {len(stages) - 1: as_run[-1]}

    def wrong(i: int) -> bool:
        if i not in known:
            known[i] = runs.trial(names, stages[i])
        return known[i].wrong

    # What costs no compile of Inductor first.
    cheap = next((i for i, s in reversed(list(enumerate(stages[:-1]))) if s.options.get("inner") in ("eager", "aot_eager")), -1)
    at = first(-1, cheap, wrong) if cheap >= 0 and wrong(cheap) else first(cheap, len(stages) - 1, wrong)
    return _place(runs, names, stages[at], known[at])


def _place(runs: Runs, names: Sequence[str] | None, stage: Stage, whole: Trial) -> Bisection:
    """Which layer and half, at a stage that is wrong."""
    if names is None or stage.name != "rewire" and (alone := runs.trial(None, stage)).wrong:
        return _independent(runs, stage, whole if names is None else alone)
    converted = [i for i, name in enumerate(names) if name != "none"]
    seen = {tuple(names): whole}

    def trial(chosen: Sequence[str]) -> Trial:
        if tuple(chosen) not in seen:
            seen[tuple(chosen)] = runs.trial(chosen, stage)
        return seen[tuple(chosen)]

    def between(start: int, end: int) -> tuple[str, ...]:
        return tuple(name if i in converted[start:end] else "none" for i, name in enumerate(names))

    end = first(0, len(converted), lambda n: trial(between(0, n)).wrong)
    # Mostly the layer alone, or with the one before it, whose contribution it may not see.
    start = next((s for s in (end - 1, end - 2) if s >= 0 and trial(between(s, end)).wrong), None)
    if start is None:
        start = max(end - 2, 0) - first(0, max(end - 2, 0), lambda n: trial(between(max(end - 2, 0) - n, end)).wrong)
    chosen, layer, half = between(start, end), converted[end - 1], None
    for side in ("attention", "mlp"):
        narrow = tuple(half_of(names[layer], side) if i == layer else name for i, name in enumerate(chosen))
        if trial(narrow).wrong:
            chosen, half = narrow, "attention" if side == "attention" else runs.kind(layer)
            break
    layers, last = _shortened(runs, chosen, stage, layer + 1)
    return _found(last or trial(chosen), stage.name, layer=layer, label=runs.label(layer), half=half, layers=layers,
                  conversion={str(i): name for i, name in enumerate(chosen) if name != "none"},
                  detail=_users_passes(runs, chosen, stage, layers))


def _independent(runs: Runs, stage: Stage, whole: Trial) -> Bisection:
    """Nothing converted, and wrong: the smallest number of decoder layers with which it still is."""
    smallest: dict[int, Trial] = {}

    def wrong(layers: int) -> bool:
        found = _attempt(runs, None, stage, layers)
        if found is None or not found.wrong:
            return False
        smallest[layers] = found
        return True

    count = runs.decoder_layers
    layers = first(0, count, wrong) if count > 1 else count
    last = smallest.get(layers)
    return _found(last or whole, stage.name, independent=True, layer=layers - 1 if last is not None else None,
                  layers=layers if last is not None else None,
                  detail=_users_passes(runs, None, stage, layers if last is not None else None))


def _shortened(runs: Runs, names: Sequence[str], stage: Stage, layers: int) -> tuple[int | None, Trial | None]:
    """The model without the layers behind the last one that is converted, if it is wrong without them."""
    if not layers < runs.decoder_layers == runs.count:
        return None, None
    found = _attempt(runs, names[:layers], stage, layers)
    return (layers, found) if found is not None and found.wrong else (None, None)


def _attempt(runs: Runs, names: Sequence[str] | None, stage: Stage, layers: int) -> Trial | None:
    """None where the model does not run with fewer layers: not every model does, and that is no finding."""
    try:
        return runs.trial(names, stage, layers=layers)
    except (FarskipError, RuntimeError, LookupError, ValueError, TypeError, AttributeError):
        return None


def _cache(runs: Runs, names: Sequence[str] | None, whole: Stage, as_run: Trial) -> Bisection:
    which = "inductor" if runs.trial(names, whole, caches="inductor", label="Inductor's cache alone").wrong else "aot"
    return _found(as_run, "cache", detail=f"It is {_CACHES[which]}. Set TORCHINDUCTOR_FORCE_DISABLE_CACHES=1, or empty "
                  "TORCHINDUCTOR_CACHE_DIR. A pass of Inductor whose uuid() does not change with what it does leads to it")


def _found(trial: Trial, stage: str | None, **more) -> Bisection:
    said = [trial.error, more.pop("detail", "")] if stage else []
    return Bisection(connectivity="", slower=False, amount=trial.difference, tolerance=trial.tolerance, stage=stage,
                     detail=". ".join(filter(None, said)), **more)


def _caches_on() -> bool:
    import torch._inductor.config as inductor
    return inductor.fx_graph_cache and not inductor.force_disable_caches


def _users_passes(runs: Runs, names: Sequence[str] | None, stage: Stage, layers: int | None) -> str:
    """Passes that the user gave to Inductor are the first suspects."""
    if stage.options.get("inner") in ("eager", "aot_eager") or runs.config.inner != "inductor":
        return ""
    import torch._inductor.config as inductor
    own = [name for name in _USERS_PASSES if getattr(inductor, name, None) is not None]
    if not own:
        return ""
    with inductor.patch(dict.fromkeys(own)):
        without = runs.trial(names, stage, layers=layers, label=f"{stage.name}, without your passes")
    where = "torch._inductor.config." + ", ".join(own)
    return f"Your own passes run in it ({where}): without them it is {'wrong too' if without.wrong else 'right'}"


# --- time --------------------------------------------------------------------------------------------------------

def _slower(runs: Runs, margin: float) -> Bisection:
    if runs.config.inner != "inductor":
        raise ConfigError(f"slower=True compares with stock Inductor, and inner={runs.config.inner!r} has none; leave it out")
    stages = {stage.name: stage for stage in stages_of(runs.config)}
    last = stages_of(runs.config)[-1]
    if not runs.config.names and not runs.config.overlap:
        raise ConfigError("connectivity='none' without overlap is stock Inductor; choose another connectivity, or overlap=True")
    names = None
    if runs.config.names:
        runs.traced()
        names = runs.config.of_layers(runs.count)
    plans = [(None, stages["inductor"], "stock"), (names, stages["inductor"], "rewired, stock Inductor"),
             (names, last, "scheduled")]
    stock, rewired, scheduled = (t.step_s for t in runs.times(plans, rounds=_ROUNDS))
    excess = scheduled / stock - 1

    def found(stage: str | None, **more) -> Bisection:
        return Bisection(connectivity="", slower=True, amount=excess, tolerance=margin, stage=stage, **more)

    if excess <= margin:
        return found(None)
    if names is not None and rewired - stock >= (scheduled - stock) / 2:
        stage = dataclasses.replace(stages["inductor"], name="rewire")
    elif "split" in stages:
        whole = (names, stages["fence"], "scheduled, attention in one part")
        stock, fenced = (t.step_s for t in runs.times([plans[0], whole], rounds=_ROUNDS))
        in_parts = fenced - stock < (scheduled - stock) / 2
        stage = last if in_parts else dataclasses.replace(stages["fence"], name="schedule")
    else:
        stage = dataclasses.replace(last, name="schedule")
    if names is None:
        return found(stage.name)
    low, high = _slow_layers(runs, names, stage)
    chosen = tuple(name if i in range(low, high) else "none" for i, name in enumerate(names))
    alone = high - low == 1
    detail = "" if alone else f"No single layer: {words(chosen)} have it together"
    return found(stage.name, layer=low if alone else None, label=runs.label(low) if alone else "", detail=detail,
                 conversion={str(i): name for i, name in enumerate(chosen) if name != "none"})


def _slow_layers(runs: Runs, names: Sequence[str], stage: Stage) -> tuple[int, int]:
    """The layers from which most of the time comes: halved while one half has three quarters of it."""
    low, high = 0, len(names)
    while high - low > 1:
        middle = (low + high) // 2
        cuts = [tuple(name if i < end else "none" for i, name in enumerate(names)) for end in (low, middle, high)]
        one, two, three = (t.step_s for t in runs.times([(cut, stage, stage.name) for cut in cuts], rounds=_ROUNDS))
        share = (two - one) / max(three - one, 1e-12)
        if 0.25 < share < 0.75:
            break
        low, high = (low, middle) if share >= 0.75 else (middle, high)
    return low, high
