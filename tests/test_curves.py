"""The command that compares loss curves: equal where they must be, different where the model is another one."""
import json

import pytest

from farskip_fx.bench import curves


@pytest.mark.slow
def test_curves_of_two_settings(tmp_path, monkeypatch):
    monkeypatch.setattr(curves, "HELD_OUT_ROWS", 4)
    path = tmp_path / "curves.json"
    rows = curves.main(["--settings", "stock", "none", "farskip", "--steps", "5", "--rows", "2", "--length", "16", "--layers",
                        "2", "--hidden", "16", "--inner", "eager", "--json", str(path)])
    stock, none, farskip = rows
    assert [row["setting"] for row in rows] == ["stock", "none", "farskip"]
    assert stock["relative"] == 0 and none["largest_difference"] == 0 and farskip["largest_difference"] > 1e-5
    written = json.loads(path.read_text())
    assert written["rows"] == rows and written["arguments"]["steps"] == 5
    assert [len(one["losses"]) for one in written["curves"]] == [5, 5, 5]
    assert all(abs(loss - 5.545) < 0.2 for row in rows for loss in row["held_out"])      # ln 256, nearly untrained


def test_held_out_text_is_other_text():
    training, held_out = curves.text()
    assert len(training) > 10 * len(held_out) > 1e5
    assert not bytes(training.numpy()).count(bytes(held_out[:2000].numpy()))
