"""The reproducer of a ``Bisection``: a script that builds the model, runs one pipeline, and exits with 1 if it is wrong.

What it needs is tried out, smallest first: weights drawn from a seed and inputs drawn by their shapes; the inputs as they
were; the weights as well. What it needs to read lies beside it.
"""
from __future__ import annotations

import copy
import dataclasses
import inspect
import json
import os
import pprint
import runpy
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from ..config import FarskipConfig
from ..connectivity import BUILT_IN
from ..convert import converted_of
from ..errors import FarskipError
from ..saved import forget
from .bisect import Bisection, half_of
from .planned import own_group, ranks_for
from .runs import SEED, Runs, Stage, stages_of

_ROUNDS = 15
_WEIGHTS, _INPUTS, _MODEL = "weights", "inputs", "model"     # files beside the script, one for each rank


# --- what a script calls -----------------------------------------------------------------------------------------

def reproduce(build: Callable[[], tuple[nn.Module, dict]], *, stage: str, connectivity: Mapping[str, str], options: Mapping,
              tolerance: float, layers: int | None = None, gradients: bool = False, ep: int = 1, exchange: str = "all_to_all",
              slower: bool = False, device: str = "cpu") -> int:
    """Run what ``bisect`` found to be wrong; prints what comes out.

    Args:
        build: makes the whole model, and what it is called with.
        stage: as in ``Bisection``.
        connectivity: of each converted layer; a half of one as (name, half).
        options: the other fields of the configuration.
        layers: decoder layers to keep.
        ep: ranks that the experts are split over.
        device: "cpu" or "cuda".

    Returns:
        The exit status: 1 if it is wrong, 0 if it is not.
    """
    with ranks_for(ep, real=True):
        model, inputs = build()
        chosen = {key: name if isinstance(name, str) else half_of(*name) for key, name in connectivity.items()}
        config = FarskipConfig(**options, connectivity=chosen or "none")
        if device == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
            model = model.to(device)
            inputs = {name: v.to(device) if isinstance(v, torch.Tensor) else v for name, v in inputs.items()}
        if ep > 1:
            from ..expert_parallel import expert_parallel
            expert_parallel(model, own_group(ep), exchange=exchange)
        runs = Runs(model, (), inputs, config, gradients=gradients, tolerance=None if slower else tolerance)
        wrong, text = _again_slower(runs, stage, chosen, tolerance) if slower else _again(runs, stage, chosen, layers)
        if not dist.is_initialized() or dist.get_rank() == 0:
            print(f"{'reproduced' if wrong else 'not reproduced'}: {text}")
    return int(wrong)


def _again(runs: Runs, stage: str, connectivity: Mapping[str, str], layers: int | None) -> tuple[bool, str]:
    if stage == "trace":
        trial = runs.traced()
        return trial.wrong, str(trial)
    names = _names(runs, connectivity, layers)
    if stage == "cache":
        for _ in range(2):
            trial = runs.trial(names, stages_of(runs.config)[-1], caches=True, label="with caches")
            if trial.wrong:
                break
    else:
        trial = runs.trial(names, _stage(runs.config, stage), layers=layers)
    return trial.wrong, str(trial)


def _again_slower(runs: Runs, stage: str, connectivity: Mapping[str, str], margin: float) -> tuple[bool, str]:
    stock = next(s for s in stages_of(runs.config) if s.name == "inductor")
    names = _names(runs, connectivity, None)
    other = stock if stage == "rewire" else stages_of(runs.config)[-1]
    one, other = runs.times([(None, stock, "stock"), (names, other, stage)], rounds=_ROUNDS)
    return other.step_s > one.step_s * (1 + margin), f"{one}; {other}"


def _names(runs: Runs, connectivity: Mapping[str, str], layers: int | None) -> tuple[str, ...] | None:
    if not connectivity:
        return None
    if layers is None:
        runs.traced()
        layers = runs.count
    return runs.config.of_layers(layers)


def _stage(config: FarskipConfig, name: str) -> Stage:
    return next(stage for stage in stages_of(config) if stage.name == name)


# --- making it ---------------------------------------------------------------------------------------------------

def script_of(found: Bisection, runs: Runs, model: nn.Module, args: tuple, inputs: dict, *,
              source: str | Path | None) -> Bisection:
    """``found`` with its script and the files of that."""
    named = _named(model, args, inputs)
    building = _Building(model, runs, source)
    rank = dist.get_rank() if dist.is_initialized() else 0
    fixed = {"stage": found.stage, "connectivity": {k: _spelled(v) for k, v in found.conversion.items()},
             "tolerance": found.tolerance, "layers": found.layers, "gradients": runs.gradients, "slower": found.slower,
             "options": _options(runs.config), "device": next(model.parameters()).device.type, **building.ranks}
    for weights, drawn in ((False, True), (False, False), (True, False)):
        maker = building.code(weights)
        if maker is None:
            continue
        code, files = maker
        given, saved = _inputs(named, model, drawn)
        if saved:
            files = {**files, f"{_INPUTS}{rank}.pt": saved}
        # With the weights of the model, it is the run that was found. A cache and a time are of this machine alone.
        if weights or not building.rebuilds or found.slower or found.stage == "cache" \
                or building.is_wrong(found, {**{name: value for name, (_, value) in given.items()}, **saved}):
            break
    text = _SCRIPT.format(
        about=_comment(f"{found.verdict}\n{building.notes(weights, bool(saved), found)}"), build=code,
        inputs="".join(f"\n        {name!r}: {text}," for name, (text, _) in given.items()),
        saved=f"\n    inputs.update(torch.load(HERE / f\"{_INPUTS}{{RANK}}.pt\", weights_only=False))" if saved else "",
        found=",\n".join(f"    {key}={pprint.pformat(value, width=110, sort_dicts=False)}" for key, value in fixed.items()))
    return dataclasses.replace(found, script=text, files=files)


class _Building:
    """How a script can make the model again."""

    def __init__(self, model: nn.Module, runs: Runs, source: str | Path | None) -> None:
        self.model, self.runs, self.source = model, runs, source
        shard = next((m.__dict__["_farskip_experts"] for m in model.modules() if "_farskip_experts" in m.__dict__), None)
        self.ranks = {} if shard is None else {"ep": shard.group.size, "exchange": shard.exchange}
        config = getattr(model, "config", None)
        self.library = type(model).__module__.startswith("transformers.models.") and hasattr(config, "to_json_string")
        self.rebuilds = self.library or source is not None

    def code(self, weights: bool) -> tuple[str, dict[str, object]] | None:
        """(statements that set ``model``, files that they read); None where this is no way to make it."""
        mode = f"model.train({self.model.training})"
        rank = dist.get_rank() if dist.is_initialized() else 0
        if self.source is not None and not self.library:
            return None if weights else (_FROM_SOURCE.format(path=str(Path(self.source).resolve()), mode=mode), {})
        if not self.library:
            return (_FROM_FILE.format(file=_MODEL, mode=mode), {f"{_MODEL}{rank}.pt": self._original()}) if weights else None
        config, kind = self._config(), type(self.model)
        plain = {"config_module": type(config).__module__, "config_class": type(config).__name__, "module": kind.__module__,
                 "model_class": kind.__name__, "mode": mode, "seed": SEED, "dtype": next(self.model.parameters()).dtype,
                 "fields": textwrap.indent(pprint.pformat(json.loads(config.to_json_string()), width=110), "    ").strip()}
        if not weights:
            return _FROM_CONFIG.format(**plain, load=""), {}
        checkpoint = getattr(config, "name_or_path", "")
        if checkpoint and Path(checkpoint).is_dir():
            return _FROM_CHECKPOINT.format(**plain, path=str(Path(checkpoint).resolve())), {}
        if self.ranks:      # a part of the weights is no whole model
            return _FROM_CONFIG.format(**plain, load=""), {}
        load = f"\n    model.load_state_dict(torch.load(HERE / \"{_WEIGHTS}0.pt\"))"
        return _FROM_CONFIG.format(**plain, load=load), {f"{_WEIGHTS}0.pt": self.model.state_dict()}

    def is_wrong(self, found: Bisection, inputs: Mapping[str, object]) -> bool:
        """Whether weights drawn from the seed, and these inputs, show it too. On several ranks: on all together."""
        try:
            model = self._rebuilt()
            device = next(self.model.parameters()).device
            inputs = {name: v.to(device) if isinstance(v, torch.Tensor) else v for name, v in inputs.items()}
            config = dataclasses.replace(self.runs.config, connectivity=dict(found.conversion) or "none", layers="all")
            runs = Runs(model.to(device), (), inputs, config, gradients=self.runs.gradients, tolerance=found.tolerance,
                        told=lambda done: self.runs._tell(dataclasses.replace(done, stage=f"{done.stage}, new weights")))
            return _again(runs, found.stage, found.conversion, found.layers)[0]
        except (FarskipError, RuntimeError, ValueError, TypeError, LookupError, AttributeError, OSError):
            return False

    def _rebuilt(self) -> nn.Module:
        if self.library:
            default = torch.get_default_dtype()
            with torch.random.fork_rng(devices=[]), torch.device("cpu"):
                torch.manual_seed(SEED)
                torch.set_default_dtype(next(self.model.parameters()).dtype)
                try:
                    model = type(self.model)(self._config()).train(self.model.training)
                finally:
                    torch.set_default_dtype(default)
        else:
            made = runpy.run_path(str(self.source))["build"]()
            model = (made[0] if isinstance(made, tuple) else made).train(self.model.training)
        if self.ranks:
            from ..expert_parallel import expert_parallel
            expert_parallel(model, own_group(self.ranks["ep"]), exchange=self.ranks["exchange"])
        return model

    def _config(self):
        config = copy.deepcopy(self.model.config)
        forget(config)
        return config

    def _original(self) -> nn.Module:
        """A copy that was never converted."""
        owner = converted_of(self.model)
        if owner is None:
            return copy.deepcopy(self.model)
        converted = owner.__dict__.pop("forward")
        try:
            twin = copy.deepcopy(self.model)
        finally:
            owner.forward = converted
        for module in twin.modules():
            forget(getattr(module, "config", None))
        return twin

    def notes(self, weights: bool, saved: bool, found: Bisection) -> str:
        said = []
        if weights and self.library:
            said.append("It does not show with weights drawn at random: it reads those of the model.")
        if weights and self.ranks:
            said.append("The weights of a model that is split over ranks were not saved: give it a checkpoint in build().")
        if saved:
            said.append(f"Some inputs could not be drawn by their shapes: they are in {_INPUTS}RANK.pt.")
        if found.stage == "cache":
            said.append("A cache is of one machine: it shows where TORCHINDUCTOR_CACHE_DIR is that of the run that found it.")
        if "Your own passes" in found.detail:
            said.append("Your own passes of Inductor are not in here: set them in build().")
        if own := sorted(set(found.conversion.values()) - set(BUILT_IN)):
            said.append(f"Register {', '.join(own)} in build(), where it is your own connectivity.")
        if self.ranks:
            said.append(f"Run it on {self.ranks['ep']} ranks: torchrun --nproc-per-node {self.ranks['ep']} reproduce.py")
        return " ".join(said)


def draw(most: int, *shape: int) -> torch.Tensor:
    """Integers below ``most``, the same in each process."""
    return torch.randint(most, shape, generator=torch.Generator().manual_seed(SEED))


def _named(model: nn.Module, args: tuple, inputs: dict) -> dict:
    names = [name for name in inspect.signature(type(model).forward).parameters][1:]
    return {**dict(zip(names, args)), **inputs}


def _inputs(named: dict, model: nn.Module, drawn: bool) -> tuple[dict[str, tuple[str, object]], dict[str, object]]:
    """(expressions of the script and their values, values that it has to read)."""
    given: dict[str, tuple[str, object]] = {}
    saved: dict[str, object] = {}
    for name, value in named.items():
        if value is None or isinstance(value, (bool, int, float, str)):
            given[name] = repr(value), value
        elif isinstance(value, torch.Tensor) and value.numel() and bool((value == value.flatten()[0]).all()):
            given[name] = f"torch.full({tuple(value.shape)}, {value.flatten()[0].item()!r}, dtype={value.dtype})", value
        elif drawn and isinstance(value, torch.Tensor) and value.dtype == torch.int64 and name.endswith("ids"):
            most = _vocabulary(model, value)
            given[name] = f"draw({most}, {', '.join(map(str, value.shape))})", draw(most, *value.shape)
        else:
            saved[name] = value.detach().cpu() if isinstance(value, torch.Tensor) else value
    return given, saved


def _vocabulary(model: nn.Module, ids: torch.Tensor) -> int:
    config = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return getattr(text, "vocab_size", None) or int(ids.max()) + 1


def _spelled(name: str):
    """A half that ``bisect`` registered: the script has to do that too."""
    whole, _, half = name.removesuffix("_half").rpartition("_")
    return (whole, half) if name.endswith("_half") and half in ("attention", "mlp") else name


def _options(config: FarskipConfig) -> dict:
    kept = config.to_dict()
    return {key: kept[key] for key in ("overlap", "inner", "strict", "attention_parts", "causal_attention", "rates")}


def _comment(text: str) -> str:
    lines = text.strip().splitlines()
    return "\n".join(textwrap.fill(line, 120, initial_indent="# ", subsequent_indent="# ") for line in lines)


_SCRIPT = '''\
{about}
#
# The smallest reproducer that farskip bisect found. Exit status 1: it is wrong here too; 0: it is not.
import os
import sys
from pathlib import Path

import torch

from farskip_fx.diagnose.script import draw, reproduce

HERE, RANK = Path(__file__).resolve().parent, os.environ.get("RANK", "0")


def build():
{build}
    inputs = {{{inputs}
    }}{saved}
    return model, inputs


FOUND = dict(
{found},
)

if __name__ == "__main__":
    sys.exit(reproduce(build, **FOUND))
'''

_FROM_CONFIG = '''\
    from {config_module} import {config_class}
    from {module} import {model_class}
    fields = {fields}
    torch.manual_seed({seed})
    torch.set_default_dtype({dtype})
    model = {model_class}({config_class}.from_dict(fields))
    torch.set_default_dtype(torch.float32){load}
    {mode}'''

_FROM_CHECKPOINT = '''\
    from {module} import {model_class}
    model = {model_class}.from_pretrained({path!r}, dtype={dtype})
    {mode}'''

_FROM_SOURCE = '''\
    import runpy
    made = runpy.run_path({path!r})["build"]()
    model = made[0] if isinstance(made, tuple) else made
    {mode}'''

_FROM_FILE = '''\
    model = torch.load(HERE / f"{file}{{RANK}}.pt", weights_only=False)
    {mode}'''
