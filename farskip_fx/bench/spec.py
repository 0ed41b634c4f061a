"""What one bench run is asked to do: a frozen dataclass that travels to the ranks as JSON."""
from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from ..connectivity import BUILT_IN

MODES = ("forward", "train", "step")
BOTH = MODES[:2]                            # without data parallelism
VARIANTS = ("stock", "inductor_overlap", "rewired_stock", "farskip")
PEERS = ("transformers_ep", "two_batches", "overlapped_eager")       # bench/peers/, a file each
OTHERS = ("exact_chunks", "farskip_chunks", "farskip_int8")            # ours, with other exchanges
ORDER = ("stock", "inductor_overlap", *PEERS, "exact_chunks", "rewired_stock", "farskip", *OTHERS[1:])
FAMILIES = ("qwen3_moe", "deepseek", "llama4")                       # bench/families.py
ROUTINGS = ("balanced", "skewed")
REWIRED = tuple(name for name in BUILT_IN if name != "none")
EP = 2                                      # ranks that share the experts


class SpecError(ValueError):
    """What was asked for cannot be measured."""


@dataclass(frozen=True)
class Shape:
    """The model that is measured. ``tokens`` are per rank, in one sequence."""

    layers: int = 4
    hidden: int = 512
    tokens: int = 2048
    experts: int = 8
    top_k: int = 2
    moe_intermediate: int = 256
    heads: int = 8
    kv_heads: int = 4
    head_dim: int = 64
    vocab: int = 512
    family: str = "qwen3_moe"
    routing: str = "balanced"

    def check(self) -> None:
        """Raise SpecError for a model that two ranks cannot share."""
        for name in ("layers", "hidden", "tokens", "experts", "top_k", "moe_intermediate"):
            if getattr(self, name) < 1:
                raise SpecError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(self, name)}")
        if self.experts % EP:
            raise SpecError(f"--experts {self.experts} cannot be split over {EP} ranks; take a multiple of {EP}")
        if self.top_k > self.experts:
            raise SpecError(f"--top-k {self.top_k} is more than --experts {self.experts}")
        for what, given, known in (("family", self.family, FAMILIES), ("routing", self.routing, ROUTINGS)):
            if given not in known:
                raise SpecError(f"--{what} {given} is unknown; known: {', '.join(known)}")
        if self.family == "llama4" and (self.top_k != 1 or self.layers % 2):
            raise SpecError(f"--family llama4 is top-1 with an MoE in every second layer: take --top-k 1 (not {self.top_k}) "
                            f"and an even number of --layers (not {self.layers})")
        if self.family == "deepseek" and self.layers < 2:
            raise SpecError("--family deepseek has a dense first layer: take at least 2 --layers")


@dataclass(frozen=True)
class Spec:
    forward: Shape = Shape()
    train: Shape = Shape(layers=3, tokens=1024)
    modes: tuple[str, ...] = BOTH
    variants: tuple[str, ...] = VARIANTS
    ratios: tuple[float, ...] = (0.5,)       # comm-only over compute-only
    connectivity: str = "farskip"
    exchange: str = "all_to_all"
    chunks: int = 2                          # of the variants that are named after them
    dp: int = 1                              # replicas of the experts; dp * EP ranks
    bucket_mb: float = 2.0                   # of gradients that travel together (mode step)
    inner: str = "inductor"                  # what our backend hands its graph to; tests use "aot_eager"
    rounds: int = 8
    budget_s: float = 90.0                   # time for the rounds of one mode; fewer rounds when they do not fit
    seed: int = 0
    silence_s: float = 900.0                 # no word from any rank for this long ends the run

    def shape(self, mode: str) -> Shape:
        return self.forward if mode == "forward" else self.train

    @property
    def world(self) -> int:
        return self.dp * EP

    @property
    def main_ratio(self) -> float:
        """The ratio that a mode's own figures are for; the others are in its curve."""
        return 0.5 if 0.5 in self.ratios else self.ratios[0]

    def check(self) -> None:
        for mode in self.modes:
            self.shape(mode).check()
        for what, given, known in (("mode", self.modes, MODES), ("variant", self.variants, ORDER)):
            unknown = [name for name in given if name not in known]
            if unknown or not given:
                raise SpecError(f"unknown {what} {', '.join(unknown) or '(none given)'}; known: {', '.join(known)}")
        if self.connectivity not in REWIRED:
            raise SpecError(f"--connectivity {self.connectivity} is not measured; known: {', '.join(REWIRED)}")
        if (peers := sorted(set(self.variants) & set(PEERS))) and "step" in self.modes:
            raise SpecError(f"--peers ({', '.join(peers)}) do not average gradients: take --mode forward, train or both")
        if "overlapped_eager" in peers and self.connectivity != "farskip":
            raise SpecError(f"overlapped_eager is written for --connectivity farskip, not {self.connectivity}")
        if self.exchange == "all_reduce":
            raise SpecError("--exchange all_reduce wants the same tokens on both ranks, and the bench gives each its own")
        if self.chunks < 2:
            raise SpecError(f"--chunks must be at least 2, not {self.chunks}: the other variants have one")
        if self.dp < 1:
            raise SpecError(f"--dp must be at least 1, not {self.dp}")
        if self.dp > 1 and self.modes != ("step",):
            raise SpecError("--dp needs --mode step: without means of gradients replicas have nothing to say to each other")
        if not self.bucket_mb > 0:
            raise SpecError(f"--bucket-mb must be above 0, not {self.bucket_mb:g}")
        if "stock" not in self.variants:
            raise SpecError("--variants must have stock: every speed-up is over it")
        if not self.ratios or min(self.ratios) <= 0:
            raise SpecError("--comm-ratio must be above 0: it is the exchanges' time over the compute's")
        if self.rounds < 1:
            raise SpecError("--rounds must be at least 1")

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)))

    @staticmethod
    def read(path: Path) -> "Spec":
        data = json.loads(path.read_text())
        tuples = {name: tuple(data[name]) for name in ("modes", "variants", "ratios")}
        return replace(Spec(**data), forward=Shape(**data["forward"]), train=Shape(**data["train"]), **tuples)
