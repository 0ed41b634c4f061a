"""The growth bench: what a process of its own finds, and the tables. Nothing asserts a time."""
from __future__ import annotations

import pytest
from rich.console import Console

from farskip_fx.bench import growth

TRACED = {"layers": 4, "nodes": 900, "aten nodes": 2000, "trace": 10.0, "rewiring": 0.2, "schedule": 0.3, "process_mb": 500.0}
COMPILED = {"layers": 2, "first": 20.0, "rewire": 0.1, "schedule": 0.2, "fence": 0.1, "later": 0.01, "recompiles": 0, "hits": 0,
            "misses": 2}


def shown(table):
    console = Console(record=True, width=160, file=open("/dev/null", "w"))
    console.print(table)
    return console.export_text()


def test_tables():
    text = shown(growth.growth_table([{**TRACED, "peak_mb": 3.0}, TRACED]))
    assert "5.0%" in text and "125.0" in text
    assert "2.0%" in shown(growth.compile_table({"first": COMPILED}))


@pytest.mark.slow
def test_a_depth_in_a_process_of_its_own():
    found = growth.child("trace", "2")
    assert found["layers"] == 2 and found["aten nodes"] > found["nodes"] > 100
    assert found["trace"] > found["rewiring"] + found["schedule"] > 0
    assert growth.child("memory", "2")["peak_mb"] > 0


@pytest.mark.slow
def test_a_second_process_finds_the_first_ones_graphs(tmp_path):
    first, second = (growth.child("compile", "1", cache=str(tmp_path)) for _ in range(2))
    assert first["misses"] and not first["hits"] and second["hits"] and not second["misses"]
    assert first["recompiles"] == second["recompiles"] == 0
    assert first["schedule"] > 0
