"""docs/performance.md is written from results: every table and plot from figures of the same shape as a real run's."""
import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from farskip_fx.bench import performance
from farskip_fx.bench.performance import RUNS, TABLES, main, result_of
from farskip_fx.cli import parser
from farskip_fx.commands.bench import spec_of
from farskip_fx.view.plot import bars, lines

DOCUMENT = "# Title\n" + "".join(f"\n<!-- measured: {name} -->\nold\n<!-- end -->\n" for name in TABLES) + "\nlast line\n"


def point(ratio: float, **slow: float) -> dict:
    fast = {name: 100.0 for name in slow}
    return {"ratio": ratio, "comm_only_ms": 100.0 * ratio, "rate_bits": 5e8, "ends_ms": 20.0,
            "variants": [{"name": name, "fast_ms": fast[name], "slow_ms": ms, "speedup_slow": slow["stock"] / ms}
                         for name, ms in slow.items()]}


def bench(mode: str) -> dict:
    curve = [point(0.5, stock=150, two_batches=130, farskip=120), point(1.0, stock=200, two_batches=140, farskip=130)]
    exposed = [{"place": f"{kind} of layer {layer}", "predicted_ms": 3.0, "measured_ms": 4.0}
               for layer in (0, 1) for kind in ("dispatch", "combine")]
    return {mode: {**curve[0], "curve": curve, "rounds": 3, "chunks": 2, "exposed": {"collectives": exposed},
                   "schedules": [{"collectives": [{"ms": 25.0}] * 4}]}}


def found(name: str) -> dict:
    if name == "growth":
        row = dict(layers=4, nodes=10, trace=2.0, rewiring=0.1, schedule=0.1, peak_mb=1.0, **{"aten nodes": 20})
        once = dict(layers=2, first=10.0, rewire=0.1, schedule=0.1, fence=0.1, recompiles=0, hits=2)
        return {"traced": [row, {**row, "layers": 64}], "compiled": {"first": once, "second": once}}
    return bench("train" if name.startswith("train") else "step" if name.startswith("step") else "forward")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Results of three runs, and a document."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "performance.md").write_text(DOCUMENT)
    for run in RUNS:
        if run.name in ("forward", "train", "growth"):
            (tmp_path / f"{run.name}.json").write_text(json.dumps({
                "command": run.command, "date": "2026-01-02", "found": found(run.name),
                "machine": {"cores": 2, "cpu": "a cpu", "system": "a system"}, "versions": {"torch": "1", "transformers": "2"}}))
    return tmp_path


def written(folder: Path, *given: str) -> str:
    main([*given, "--folder", str(folder), "--write", str(folder / "docs" / "performance.md")])
    return (folder / "docs" / "performance.md").read_text()


def test_tables(folder):
    text = written(folder, "--only")
    assert "old" not in text and text.startswith("# Title\n") and text.endswith("\nlast line\n")
    row = next(line for line in text.splitlines() if line.startswith("| 4 layers, 2048 tokens | 1 |"))
    assert row == "| 4 layers, 2048 tokens | 1 | 200 | 140 | **130** | 1.54x | 1.08x | 1.30x | 70% | 88% |"      # 70 of 80 ms
    assert "| skewed | not measured |" in text and "2026-01-02 | 3 | 0.5: 500, 1: 500 |" in text
    assert "| 64 | 10 | 20 | 2.0 | 0.10 | 0.10 | 10.0% | 1 |" in text
    assert "](img/speed-up.svg)" in text and "](img/speed-up-training.svg)" not in text     # of what was measured
    assert written(folder, "--only") == text        # again: the same


def test_plots(folder):
    written(folder, "--only")
    for name, marks in (("speed-up.svg", "circle"), ("exposed.svg", "rect"), ("growth.svg", "circle")):
        drawn = ElementTree.parse(folder / "docs" / "img" / name).getroot()
        assert drawn.tag.endswith("svg") and drawn.findall(f".//{{*}}{marks}")


def test_a_document_without_a_place_is_an_error(folder):
    (folder / "docs" / "performance.md").write_text(DOCUMENT.replace("<!-- measured: growth -->", ""))
    with pytest.raises(SystemExit, match="0 places for growth"):
        written(folder, "--only")


def test_only_what_has_no_result_of_its_command_is_measured(folder, monkeypatch):
    measured = []

    def fake(run, where):
        measured.append(run.name)
        template = json.loads((where / "growth.json").read_text())
        (where / f"{run.name}.json").write_text(json.dumps({**template, "command": run.command, "found": found(run.name)}))

    monkeypatch.setattr(performance, "measure", fake)
    stale = folder / "train.json"
    stale.write_text(stale.read_text().replace("--layers 3", "--layers 2"))
    assert result_of(next(run for run in RUNS if run.name == "train"), folder) is None
    written(folder)
    assert measured == [run.name for run in RUNS if run.name not in ("forward", "growth")]
    assert "not measured" not in written(folder, "--only", "growth") and measured[-1] == "growth"


def test_every_command_is_understood():
    for run in performance.SPEED:
        spec = spec_of(parser().parse_args(run.command.split()[1:]))
        spec.check()
        assert set(spec.variants) & set(performance.OURS), run.name
    assert len({run.name for run in RUNS}) == len(RUNS) == len({run.command for run in RUNS})


def test_names_are_text():
    for drawn in (lines("a <b>", "x", "y", {"<script>": {1: 1.0, 2: 0.0}}), bars("t", "y", ["<g>"], {"&": [0.0]})):
        assert "<script>" not in drawn and "<b>" not in drawn and "<g>" not in drawn
        ElementTree.fromstring(drawn)
