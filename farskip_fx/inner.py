"""What compiles the graph after rewiring: Inductor with our schedule and fence, AOTAutograd alone, or nothing."""
from __future__ import annotations

from collections.abc import Callable

from torch.fx import GraphModule

from .agreement import collectives_of
from .artifacts import Shown
from .config import FarskipConfig
from .errors import ConfigError
from .passes._torch import aot_eager, compile_fx, mode_options
from .report import Report


def compile(gm: GraphModule, example_inputs: list, *, config: FarskipConfig, mode: str | None,
            report: Report, shown: Shown | None = None) -> Callable:
    """Hand ``gm`` to the inner compiler that ``config.inner`` names. ``shown`` gets to see what that makes of it."""
    if mode is not None and config.inner != "inductor":
        raise ConfigError(f"mode={mode!r} is Inductor's; inner={config.inner!r} takes none")
    report.collectives = collectives_of(gm)
    if config.inner == "eager":
        return gm.forward
    if config.inner == "aot_eager":
        return aot_eager(gm, example_inputs)
    from .overlap import inductor_patches
    patches = {**_options(mode), **inductor_patches(config, report, shown)}
    compiled = compile_fx(gm, example_inputs, config_patches=patches)
    # AOTAutograd swallows what fails while it compiles a backward during the forward, and tries again later.
    if config.strict and report.errors:
        raise report.errors[0]
    return compiled


def _options(mode: str | None) -> dict:
    try:
        return mode_options(mode)
    except RuntimeError as error:       # Inductor's way to say that it does not know the mode
        raise ConfigError(f"mode={mode!r} is not one of torch.compile's: {error}") from error
