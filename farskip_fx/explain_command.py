"""``farskip explain`` and ``farskip diff``: reports of models that nobody runs, and what two reports differ in."""
from __future__ import annotations

import json
from pathlib import Path

import torch.distributed as dist
from rich.console import Console
from rich.text import Text

from .agreement import check_agreement
from .calibrate_command import rates_of
from .config import FarskipConfig
from .errors import ConfigError
from .explain import explain
from .planned import planned, ranks_for
from .report import VERSION, Report
from .view import compare, terminal


def explain_source(source: Path, *, ep: int, tokens: int, batch: int, training: bool, rates: str | None, options: dict,
                   fold: bool, predict: bool) -> Report:
    """The report of what ``planned`` builds. Under torchrun every rank makes its own, and they are compared.

    Raises:
        CollectiveError: a rank differs; names it, and the first difference.
    """
    config = FarskipConfig.from_dict({**options, **({"rates": rates_of(rates)} if rates else {})})
    with ranks_for(ep):
        model, inputs = planned(source, tokens=tokens, batch=batch, training=training, ep=ep)
        report = explain(model, config=config, gradients=training, fold=fold, predict=predict, **inputs)
        if dist.is_initialized() and dist.get_backend() != "fake":
            check_agreement(report)
    return report


def show(report: Report, console: Console, *, layer: int | None, sides: tuple[str, ...], as_json: bool,
         html: Path | None, trace: Path | None) -> None:
    if report.rank:
        return
    if as_json:
        print(report.to_json())
    else:
        terminal.show(report.to_dict(), console, layer=layer, sides=sides)
    for path, write in ((html, report.to_html), (trace, report.to_trace)):
        if path is not None:
            write(path)
            if not as_json:
                console.print(f"written: {path}", highlight=False)


def diff(first: Path, second: Path, console: Console, *, as_json: bool) -> int:
    """Exit status: 0 where the reports say the same, else 1."""
    differences = compare.compare(read(first), read(second))
    if as_json:
        print(json.dumps(differences, indent=1))
    else:
        for line in compare.lines(differences):
            console.print(Text(line))
    return 1 if differences else 0


def read(path: Path) -> dict:
    """A report that ``to_json`` wrote.

    Raises:
        ConfigError: it is not one, or of another version.
    """
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as a report: {error}. farskip explain ... --json > {path} writes one") from error
    if not isinstance(report, dict) or "layers" not in report or "options" not in report:
        raise ConfigError(f"{path} is no report of farskip_fx. farskip explain ... --json > {path} writes one")
    if report.get("version") != VERSION:
        raise ConfigError(f"{path} is a report of version {report.get('version')!r}; this release of farskip_fx reads version "
                          f"{VERSION}: make it again")
    return report
