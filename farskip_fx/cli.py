"""The command line. Each verb is a file in ``commands/``; VERBS lists them in the order of the help."""
from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from .bench.launch import RankFailed
from .bench.link import LinkRefused
from .bench.spec import SpecError
from .commands import bench, bisect, calibrate, demo, diff, distill, explain, plan, profile, sensitivity, sweep
from .errors import FarskipError

VERBS = (demo, explain, plan, diff, profile, bisect, calibrate, bench, distill, sweep, sensitivity)


def parser() -> argparse.ArgumentParser:
    all_verbs = argparse.ArgumentParser(prog="farskip", description="FarSkip connectivity for MoE models.")
    verbs = all_verbs.add_subparsers(dest="verb", required=True, metavar="VERB")
    for verb in VERBS:
        verb.add(verbs)
    return all_verbs


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    try:
        return args.run(args)
    except (SpecError, LinkRefused, RankFailed, FarskipError) as error:
        print(f"farskip {args.verb}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        done = "; ranks and link are gone" if args.verb in ("bench", "demo") else ""
        print(f"farskip {args.verb}: interrupted{done}", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
