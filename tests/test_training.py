"""docs/training.md says what composes with what; each row of its table is run here, on two ranks."""
import re
from pathlib import Path

import pytest

from ranks import run_ranks
from training_rows import ROWS, run_rows

GUIDE = Path(__file__).parent.parent / "docs" / "training.md"


def table():
    """{row: what the guide says}."""
    lines = GUIDE.read_text().split("## What composes with what")[1].split("\n## ")[0].splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines if line.startswith("| ")]
    return {row[0]: row[1] for row in cells[1:] if not set(row[0]) <= {"-"}}


def test_the_table_has_every_row():
    assert list(table()) == list(ROWS)


@pytest.mark.parametrize("part", [0, *(pytest.param(part, marks=pytest.mark.slow) for part in (1, 2, 3))])
def test_each_row(part):
    names = list(ROWS)[part::4]
    for found in run_ranks(run_rows, 2, timeout=500, names=names):
        for name in names:
            said, got = table()[name], found[name]
            if said.startswith("refused"):
                words = re.search(r'"(.+)"', said).group(1)
                assert "Error" in got.split(":")[0] and words in got, (name, said, got)
            else:
                assert got == said, (name, said, got)
