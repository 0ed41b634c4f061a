"""DistillConfig: what a distillation run does besides what ``TrainingArguments`` say, with a YAML and JSON round trip."""
from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..config import FarskipConfig, refuse_unknown
from ..errors import ConfigError
from .exposed import CHOICES, Deployment, require_choices
from .teacher import MODES

VERSION = 1
OPTIMIZERS = ("", "muon")


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """Options of a distillation run. Learning rate, batch, schedule, precision, logging and saving are TrainingArguments'.

    Args:
        connectivity, layers, inner: of the student, as in ``FarskipConfig``. Besides, layers="auto:SHARE" ("auto" is "auto:0.9")
            chooses a connectivity for each layer that keeps so much of the hidden time, see docs/distill.md; the run's
            distill.yaml then says which.
        choices: with layers="auto", the connectivities to choose from.
        deployment: with layers="auto", where the model will run: an ``exposed.Deployment`` or a mapping of its fields (ep,
            tokens, context, rates). None: its defaults.
        scan_batches: with layers="auto", batches of the dataset (per_device_train_batch_size rows each) that layers are
            measured on; over all ranks, and at least one on each.
        refit_batches: batches of the dataset (per_device_train_batch_size rows each, over all ranks) on which the weights are
            refitted in closed form before training (``refit``); 0: none. Not for teacher="shared".
        teacher: "copy", "int8", "shared" or "cached", see docs/distill.md.
        temperature: of both distributions.
        kl, cross_entropy: weights of the two terms; the paper's recipe is KL alone.
        router_aux_loss: weight of the router's load-balancing loss, on top of the model's own coefficient; 0: not computed.
        hidden: weight of what the states between layers miss of the teacher's (``states.states_loss``), at the first step; it
            falls to zero over the run. Off in the paper's recipe; for short runs (docs/distill.md). Not for teacher="cached".
        optimizer: "muon": Muon for matrices, AdamW for the rest (``muon.Muon``), at TrainingArguments' learning rate, betas and
            weight decay; "": what TrainingArguments say.
        chunk_mb: MiB of one chunk of logits, see ``loss.distillation_loss``.
        cache: folder of the cached teacher; needed for teacher="cached". Made if it is not there.
        top_k: log-probabilities that a cache keeps of each token.
        stop_metric: a metric of evaluation ("humaneval": one of ``tasks``) that ends the run when it does not get better.
            Not the loss: KL goes on to fall after the tasks have become worse (the paper). None: no early stopping.
        stop_patience: evaluations without an improvement.
        stop_delta: what counts as one, relative to the best so far.

    Raises:
        ConfigError: an unknown option, or a value that it cannot have.
    """
    connectivity: str | Mapping = "farskip"
    layers: str | tuple[int, ...] = "all"
    choices: tuple[str, ...] = CHOICES
    deployment: Deployment | Mapping | None = None
    scan_batches: int = 4
    inner: str = "inductor"
    refit_batches: int = 0
    teacher: str = "copy"
    temperature: float = 1.0
    kl: float = 1.0
    cross_entropy: float = 0.0
    router_aux_loss: float = 0.0
    hidden: float = 0.0
    optimizer: str = ""
    chunk_mb: float = 64.0
    cache: str | None = None
    top_k: int = 64
    stop_metric: str | None = None
    stop_patience: int = 20
    stop_delta: float = 0.02
    version: int = VERSION

    def __post_init__(self) -> None:
        if self.version != VERSION:
            raise ConfigError(f"version {self.version!r} of the distillation config; this release reads version {VERSION}")
        self._automatic()
        settled = FarskipConfig(connectivity=self.connectivity, layers="all" if self.share is not None else self.layers,
                                inner=self.inner)       # refuses what is not known
        object.__setattr__(self, "layers", settled.layers if self.share is None else self.layers)
        if isinstance(self.connectivity, Mapping):
            object.__setattr__(self, "connectivity", dict(self.connectivity))
        if not settled.names:
            raise ConfigError("connectivity='none' converts nothing, so there is nothing to distill")
        if not isinstance(self.teacher, str) or self.teacher not in MODES:
            raise ConfigError(f"teacher={self.teacher!r} is not known; choose one of {', '.join(MODES)}")
        if self.teacher == "shared" and self.refit_batches:
            raise ConfigError('a refit changes the weights that teacher="shared" uses; use teacher="copy", "int8" or "cached", '
                              "or refit_batches=0")
        if self.optimizer not in OPTIMIZERS:
            raise ConfigError(f"optimizer={self.optimizer!r} is not known; choose one of {', '.join(map(repr, OPTIMIZERS))}, or set "
                              "TrainingArguments(optim=...)")
        if self.teacher == "cached" and self.hidden:
            raise ConfigError('teacher="cached" keeps log-probabilities and no states: leave hidden at 0')
        if self.teacher == "cached" and not self.cache:
            raise ConfigError('teacher="cached" needs cache=FOLDER')
        for name, low in (("temperature", None), ("chunk_mb", None), ("kl", 0), ("cross_entropy", 0), ("router_aux_loss", 0),
                          ("hidden", 0), ("top_k", None), ("stop_patience", None), ("stop_delta", 0), ("scan_batches", None),
                          ("refit_batches", 0)):
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number or not (value > 0 if low is None else value >= low):
                raise ConfigError(f"{name} must be a number {'above' if low is None else 'of at least'} 0, got {value!r}")
        if not (self.kl or self.cross_entropy):
            raise ConfigError("kl and cross_entropy are both 0: there is no loss")

    def _automatic(self) -> None:
        require_choices(self.choices)
        object.__setattr__(self, "choices", tuple(self.choices))
        if self.deployment is not None:
            object.__setattr__(self, "deployment", Deployment.of(self.deployment))
        if self.share is None:
            return
        if not 0 < self.share <= 1:
            raise ConfigError(f'layers must be "auto:SHARE" with 0 < SHARE <= 1, got {self.layers!r}')
        if self.connectivity != "farskip":
            raise ConfigError(f"layers={self.layers!r} chooses the connectivity of each layer among choices={self.choices}; "
                              f"leave connectivity={self.connectivity!r} out, or give layers that are not chosen")

    @property
    def share(self) -> float | None:
        """Of the hidden time, where layers are still to be chosen; nan where it is no number."""
        if not isinstance(self.layers, str) or not re.fullmatch(r"auto(:.*)?", self.layers):
            return None
        try:
            return float(self.layers.removeprefix("auto").removeprefix(":") or 0.9)
        except ValueError:
            return math.nan

    def farskip(self) -> FarskipConfig:
        """The student's conversion.

        Raises:
            ConfigError: layers="auto": ``distill`` chooses them.
        """
        if self.share is not None:
            raise ConfigError(f"layers={self.layers!r} is chosen by distill (or `farskip sensitivity`); there is no conversion "
                              "yet")
        return FarskipConfig(connectivity=self.connectivity, layers=self.layers, inner=self.inner)

    @classmethod
    def from_dict(cls, options: Mapping) -> DistillConfig:
        refuse_unknown(options, [f.name for f in dataclasses.fields(cls)], "unknown option ", " of distillation; known: ")
        return cls(**options)

    @classmethod
    def load(cls, path: str | Path) -> DistillConfig:
        """From a YAML or JSON file: the options themselves, or a saved run (then its part "distill")."""
        data = read(path)
        return cls.from_dict(data["distill"] if isinstance(data.get("distill"), Mapping) else data)

    def to_dict(self) -> dict:
        data = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {**data, "layers": self.layers if isinstance(self.layers, str) else list(self.layers),
                "choices": list(self.choices), "deployment": None if self.deployment is None else self.deployment.to_dict()}

    def save(self, path: str | Path) -> None:
        write(path, self.to_dict())


def read(path: str | Path) -> dict:
    """A YAML or JSON file that holds a mapping."""
    import yaml     # comes with transformers
    try:
        data = yaml.safe_load(Path(path).read_text())       # JSON is YAML
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path} holds {type(data).__name__}; a configuration is a mapping of options")
    return data


def write(path: str | Path, data: dict) -> None:
    import yaml
    text = json.dumps(data, indent=1) if str(path).endswith(".json") else yaml.safe_dump(data, sort_keys=False)
    Path(path).write_text(text)
