"""``farskip diff``: what two reports differ in."""
from __future__ import annotations

import argparse
import json
from pathlib import Path

from rich.console import Console
from rich.text import Text

from ..errors import ConfigError
from ..report import VERSION
from ..view import compare
from .common import screen


def add(verbs: argparse._SubParsersAction) -> None:
    verb = verbs.add_parser("diff", help="what two reports differ in",
                            description="What two reports of farskip explain --json differ in. Status 0 if nothing, else 1.")
    verb.add_argument("first", type=Path, metavar="A.json")
    verb.add_argument("second", type=Path, metavar="B.json")
    verb.add_argument("--json", action="store_true", help="as JSON")
    verb.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    return diff(args.first, args.second, screen(), as_json=args.json)


def diff(first: Path, second: Path, console: Console, *, as_json: bool) -> int:
    """Exit status: 0 where the reports say the same, else 1."""
    one, other = read(first), read(second)
    try:
        differences = compare.compare(one, other)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ConfigError(f"{first} or {second} is damaged ({type(error).__name__}: {error}): make it again") from error
    if as_json:
        print(json.dumps(differences, indent=1))
    else:
        for line in compare.lines(differences):
            console.print(Text(line), soft_wrap=True)       # a line is a difference
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
