"""``farskip calibrate``: rates of this device and link into a file; and where a command takes them from."""
from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console

from ..calibrate import calibrate
from ..config import FarskipConfig
from ..diagnose.planned import ranks_for
from ..errors import ConfigError
from ..passes.costs import PRESETS, Rates
from .common import screen


def measure(console: Console, *, hidden: int, tokens: int, dtype: str, path: Path | None) -> None:
    with ranks_for(1, real=True):
        rates = calibrate(dtype=getattr(torch, dtype), hidden=hidden, tokens=tokens, cache=None)
        if dist.is_initialized() and dist.get_rank():
            return
        alone = "" if dist.is_initialized() else "   (not measured: run under torchrun)"
        for name, value in rates.to_dict().items():
            console.print(f"{name:20} {value:.4g}{alone if name in ('link_bytes', 'link_latency', 'link_queued') else ''}"
                          if not isinstance(value, bool) else f"{name:20} {value}", highlight=False)
        if path is not None:
            path.write_text(json.dumps(rates.to_dict(), indent=1), encoding="utf-8")
            console.print(f"written: {path}", highlight=False)


def rates_of(name: str) -> Rates:
    """A preset, or a file that ``run`` wrote.

    Raises:
        ConfigError: it is neither.
    """
    if name in PRESETS:
        return PRESETS[name]
    try:
        data = json.loads(Path(name).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"rates {name!r}: neither one of {', '.join(PRESETS)} nor a file of farskip calibrate: {error}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"rates {name!r} is no file of farskip calibrate: it holds a {type(data).__name__}")
    return FarskipConfig(rates=data).rates


TEXT = """\
Measure this device, and the link between ranks under torchrun; the median over ranks is for all of them.

  torchrun --nproc-per-node 8 -m farskip_fx.cli calibrate --dtype bfloat16 --json rates.json

In Python: farskip_fx.apply(model, rates=farskip_fx.calibrate(group))."""


def add(verbs: argparse._SubParsersAction) -> None:
    verb = verbs.add_parser("calibrate", help="measure what this device and link can do: rates for the schedule",
                            description=TEXT, formatter_class=argparse.RawTextHelpFormatter)
    verb.add_argument("--hidden", type=int, default=1024, metavar="N", help="width of the model (1024)")
    verb.add_argument("--tokens", type=int, default=2048, metavar="N", help="of a sequence (2048)")
    verb.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of the model (float32)")
    verb.add_argument("--json", type=Path, metavar="PATH", help="write them there, for farskip explain --rates PATH")
    verb.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    measure(screen(), hidden=args.hidden, tokens=args.tokens, dtype=args.dtype, path=args.json)
    return 0
